"""Reading one component's folder (`unet/`, `vae/`, `text_encoder/`) into parameters, and writing it back.

Reads what people hold: safetensors, sharded or of the `fp16` variant, and legacy Flax msgpack. Writes what everybody
reads: PyTorch-layout safetensors with diffusers' file names. Pickles (.bin, .ckpt) are refused: opening one runs code.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from flax import serialization
from jax.typing import DTypeLike

from dpo_jax.weights import safetensors_file
from dpo_jax.weights.layout import (
    Params,
    ParamSpec,
    Specs,
    flax_aliases,
    from_flax,
    from_torch,
    to_torch,
    torch_aliases,
    torch_name,
)

Sharding = Callable[[str, ParamSpec], jax.sharding.Sharding]

SAFETENSORS = (  # in order of preference; the index of a sharded checkpoint names its files
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "model.fp16.safetensors",
    "diffusion_pytorch_model.safetensors.index.fp16.json",
    "model.safetensors.index.fp16.json",
)
LEGACY_FLAX = ("diffusion_flax_model.msgpack", "flax_model.msgpack")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")

# Stored beside the parameters by some versions of transformers, and no part of the computation here.
HARMLESS = ("text_model.embeddings.position_ids", "embeddings.position_ids", "logit_scale")

MAX_SHARD_BYTES = 10 * 10**9  # diffusers' own default


class _Checkpoint(NamedTuple):
    arrays: dict[str, np.ndarray]
    aliases: Callable[[str], list[str]]
    """Our name to the names it may have in `arrays`."""
    convert: Callable[[np.ndarray, ParamSpec], np.ndarray]
    """A stored array to our layout; raises ValueError where the shape differs."""


def load_params(folder: epath.PathLike, specs: Specs, *, dtype: DTypeLike, sharding: Sharding | None = None) -> Params:
    """The parameters that `specs` names, read from `folder`, cast to `dtype` and placed tensor by tensor.

    With `sharding` (name, spec -> placement) each process reads from disk only the slices its devices hold; without,
    everything goes to the default device. Raises one ValueError that lists all missing, unexpected and misshapen names.
    """
    folder = epath.Path(folder)
    checkpoint = _open(folder)
    found, missing, misshapen = {}, [], []
    unused = set(checkpoint.arrays) - set(HARMLESS)
    for name, spec in specs.items():
        stored = next((alias for alias in checkpoint.aliases(name) if alias in unused), None)
        if stored is None:
            missing.append(checkpoint.aliases(name)[0])
            continue
        unused.remove(stored)
        try:
            found[name] = checkpoint.convert(checkpoint.arrays[stored], spec)
        except ValueError as error:
            misshapen.append(f"{stored} ({error})")
    problems = [
        _first_several(names, kind)
        for kind, names in (("missing", missing), ("unexpected", sorted(unused)), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise ValueError(f"{folder} does not hold the model that its config.json describes: {'; '.join(problems)}")
    return {name: _place(array, dtype, sharding and sharding(name, specs[name])) for name, array in found.items()}


def save_component(
    folder: epath.PathLike,
    config: Mapping[str, Any],
    params: Mapping[str, jax.Array | np.ndarray],
    specs: Specs,
    *,
    dtype: DTypeLike,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes `config.json` and the parameters as diffusers (or transformers) would, all of it or nothing.

    Parameters are brought to the host one at a time. Raises ValueError if `folder` exists and is not empty.
    """
    dtype = np.dtype(dtype)
    stem = "diffusion_pytorch_model" if "_class_name" in config else "model"
    shards = _shards(specs, dtype.itemsize, max_shard_bytes)
    files = (
        [f"{stem}.safetensors"]
        if len(shards) == 1
        else [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    with new_folder(folder) as target:
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for file, names in zip(files, shards, strict=True):
            header = {torch_name(name): (specs[name].torch_shape, dtype) for name in names}
            tensors = (
                (torch_name(name), to_torch(np.asarray(params[name]), specs[name]).astype(dtype)) for name in names
            )
            safetensors_file.write(target / file, tensors, header)
        if len(shards) > 1:
            total = sum(math.prod(spec.shape) for spec in specs.values()) * dtype.itemsize
            weight_map = {torch_name(name): file for file, names in zip(files, shards, strict=True) for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (target / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def fingerprint(folder: epath.PathLike, *, places: int = 64, chunk: int = 2**14) -> str:
    """A digest of a component's weight files that another model's would not have: names, sizes, and `places` evenly
    spaced chunks of each, so that 10 GB take no longer than 10 MB."""
    digest = hashlib.sha256()
    for path in sorted(epath.Path(folder).iterdir()):
        if path.suffix not in (".safetensors", ".msgpack"):
            continue
        size = path.stat().length
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for place in range(places):
                file.seek(place * max(size - chunk, 0) // max(places - 1, 1))
                digest.update(file.read(chunk))
    return digest.hexdigest()


@contextlib.contextmanager
def new_folder(folder: epath.PathLike) -> Iterator[epath.Path]:
    """A temporary sibling that becomes `folder` when the block succeeds, and disappears when it fails.

    Raises ValueError if `folder` exists and is not empty: nothing is ever overwritten.
    """
    folder = epath.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} already exists and is not an empty folder; choose another output or remove it")
    unfinished = folder.parent / f".{folder.name}.unfinished"
    if unfinished.exists():
        unfinished.rmtree()
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    except BaseException:
        unfinished.rmtree(missing_ok=True)
        raise


def _open(folder: epath.Path) -> _Checkpoint:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; a diffusers model folder keeps each component in one of its own")
    names = {path.name for path in folder.iterdir()}
    for name in SAFETENSORS:
        if name in names:
            return _Checkpoint(_read_safetensors(folder, name), torch_aliases, from_torch)
    for name in LEGACY_FLAX:
        if name in names:
            return _Checkpoint(_read_legacy_flax(folder / name), flax_aliases, from_flax)
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles:
        raise ValueError(
            f"{folder} holds only pickled weights ({', '.join(pickles)}), and opening a pickle can run code; if you "
            "trust them, convert them once in PyTorch with from_pretrained(...).save_pretrained(...)"
        )
    raise FileNotFoundError(f"no weights in {folder}; looked for {', '.join(SAFETENSORS + LEGACY_FLAX)}")


def _read_safetensors(folder: epath.Path, name: str) -> dict[str, np.ndarray]:
    if name.endswith(".safetensors"):
        return safetensors_file.read(folder / name)
    files = sorted(set(json.loads((folder / name).read_text())["weight_map"].values()))
    absent = [file for file in files if not (folder / file).exists()]
    if absent:
        raise FileNotFoundError(f"{folder / name} names files that are absent: {', '.join(absent)}")
    return {key: array for file in files for key, array in safetensors_file.read(folder / file).items()}


def _read_legacy_flax(path: epath.Path) -> dict[str, np.ndarray]:
    """The arrays of a Flax msgpack by dotted path; big arrays stored in chunks come back whole."""
    try:
        tree = serialization.msgpack_restore(path.read_bytes())
    except Exception as error:  # msgpack raises many kinds for damaged input
        raise ValueError(f"{path} is truncated or no Flax msgpack; copy it again") from error
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {".".join(key.key for key in path): np.asarray(array) for path, array in leaves}


def _first_several(names: list[str], kind: str, several: int = 5) -> str:
    more = f" and {len(names) - several} more" if len(names) > several else ""
    return f"{len(names)} {kind}: {', '.join(names[:several])}{more}"


def _place(array: np.ndarray, dtype: DTypeLike, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(np.array(array, dtype, order="C"))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: np.array(array[index], dtype, order="C"))


def _shards(specs: Specs, itemsize: int, max_shard_bytes: int) -> list[list[str]]:
    """Names in order, cut where the next parameter would make a file larger than `max_shard_bytes`."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        bytes_here = math.prod(spec.shape) * itemsize
        if shards[-1] and size + bytes_here > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_here
    return shards
