"""Reads one component (`unet/`, `vae/`, `text_encoder/`) into parameters, and writes it.

It reads a folder of safetensors (also sharded, or of the `fp16` variant), a folder of legacy Flax msgpack, or one file
that holds the whole model in the original layout; fp8 weights are multiplied by their scales. It writes safetensors in
PyTorch's layout with diffusers' file names. Pickles (.bin, .ckpt) are refused because opening one runs code.
"""

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import pydantic
from etils import epath
from jax.typing import DTypeLike

from dpo_jax.errors import MissingFileError, UserError
from dpo_jax.files import check_regular, look_at, new_folder, read_json, write_whole
from dpo_jax.weights import flax_msgpack, original, safetensors_file
from dpo_jax.weights.file_kinds import kind_of
from dpo_jax.weights.finite import is_finite, refuse_nonfinite
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
from dpo_jax.weights.mapped_file import fetch
from dpo_jax.weights.original_slots import Slot
from dpo_jax.weights.quantised import Held
from dpo_jax.weights.scaled import multiplied

Sharding = Callable[[str, ParamSpec], jax.sharding.Sharding]

VARIANTS = ("fp16", "bf16")
SAFETENSORS = (  # in order of preference; the index of a sharded checkpoint names its files
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "model.safetensors.index.json",
    *(
        f"{stem}.{ending}"
        for variant in VARIANTS
        for ending in (f"{variant}.safetensors", f"safetensors.index.{variant}.json")
        for stem in ("diffusion_pytorch_model", "model")
    ),
)
LEGACY_FLAX = ("diffusion_flax_model.msgpack", "flax_model.msgpack")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")

CONVERT_PICKLE = (
    'opening a pickle can run code; if you trust it, convert it once in PyTorch: python -c "import diffusers; '
    "diffusers.DiffusionPipeline.from_pretrained('FOLDER').save_pretrained('NEW_FOLDER')\" (one .ckpt file: "
    "diffusers.StableDiffusionPipeline.from_single_file('FILE'))"
)

CONVERT_STATE_DICT = (
    "opening a pickle can run code; convert it once in PyTorch, which reads tensors alone by weights_only: "
    "python -c \"import torch, safetensors.torch as s; x = torch.load('{file}', 'cpu', weights_only=True); "
    "s.save_file({{k: v.clone() for k, v in x.get('state_dict', x).items()}}, '{stem}.safetensors')\""
)
"""Advice for converting a pickle that holds the tensors of one network."""

MAX_SHARD_BYTES = 10 * 10**9  # diffusers' default
MAX_INDEX_BYTES = 100 * 10**6


class Index(pydantic.BaseModel):
    """The index of a sharded checkpoint."""

    weight_map: Annotated[dict[str, str], pydantic.Field(min_length=1)]
    """The file of each tensor."""


class _Stored(NamedTuple):
    arrays: dict[str, np.ndarray]
    """Views of the stored arrays, by the names that the file gives them."""
    aliases: Callable[[str], list[str]]
    """Maps a parameter's name to the names it may have in `arrays`."""
    convert: Callable[[np.ndarray, ParamSpec], np.ndarray]
    """Converts a stored array to dpo_jax's layout; raises a UserError if the shape differs."""
    slots: Mapping[str, Slot] = MappingProxyType({})
    """Where arrays hold the parameters with these names, for those that other parameters share."""


def load_params(
    path: epath.PathLike,
    specs: Specs,
    *,
    dtype: DTypeLike,
    sharding: Sharding | None = None,
    prefix: str = "",
    variant: str = "",
    allow_nonfinite: bool = False,
    only: Collection[str] | None = None,
    store: Callable[[str, jax.Array], Held] | None = None,
) -> Params:
    """Read the parameters that `specs` names from `path`, cast them to `dtype` and place them tensor by tensor.

    `only` are the names of those that are wanted; by default all. `store` (name, array -> what is held of it) may
    quantise each tensor before the next one is read.

    With `sharding` (name, spec -> placement), each process reads from disk only the slices that its devices hold;
    without it, everything goes to the default device. `path`, `prefix`, `variant` and errors are as in `read_params`.
    Raises a UserError for NaN and infinity in the parts that this process reads, unless `allow_nonfinite`.
    """
    stored = read_params(path, specs, prefix=prefix, variant=variant)
    nonfinite: dict[str, None] = {}

    def cast(name: str, view: np.ndarray) -> np.ndarray:
        array = np.array(fetch(view), dtype, order="C")
        if not allow_nonfinite and not is_finite(array):
            nonfinite[name] = None
        return array

    params: Params = {}
    for name, array in stored.items():
        if only is None or name in only:
            placed = _place(array, functools.partial(cast, name), sharding and sharding(name, specs[name]))
            params[name] = store(name, placed) if store else placed
    if nonfinite:
        files = weight_files(epath.Path(path), variant) if epath.Path(path).is_dir() else [path]
        refuse_nonfinite(map(torch_name, nonfinite), files[0] if len(files) == 1 else path, np.dtype(dtype).name)
    return params


def read_params(path: epath.PathLike, specs: Specs, *, prefix: str = "", variant: str = "") -> dict[str, np.ndarray]:
    """Return the parameters that `specs` names in dpo_jax's layout and the stored dtype, as views of files not yet
    read.

    `path` is a component's folder, or a single file in which the component's names begin with `prefix`. If a folder has
    several sets of weights, that of `variant` ("fp16") is preferred. Raises one UserError that lists all missing,
    unexpected and misshapen names.
    """
    path = epath.Path(path)
    stored = _open_folder(path, variant) if path.is_dir() else _open_file(path, specs, prefix)
    found, missing, misshapen = {}, [], []
    unused = set(stored.arrays)
    for name, spec in specs.items():
        key = next((alias for alias in stored.aliases(name) if alias in unused), None)
        if key is None:
            missing.append(stored.aliases(name)[0])
            continue
        unused.remove(key)
        array = stored.arrays[key]
        if not jax.dtypes.issubdtype(array.dtype, np.floating):
            misshapen.append(f"{key} (stored as {array.dtype}, which is not floating point)")
            continue
        try:
            found[name] = stored.convert(stored.slots[key].take(array) if key in stored.slots else array, spec)
        except ValueError as error:
            misshapen.append(f"{key} ({error})")
    problems = [
        first_several(names, kind)
        for kind, names in (
            ("missing", missing),
            ("unexpected", sorted(name for name in unused if not original.is_no_part(name, specs))),
            ("misshapen", misshapen),
        )
        if names
    ]
    if problems:
        kind, wanted = kind_of(stored.arrays), kind_of([torch_name(name) for name in specs])
        if kind and wanted and kind != wanted:
            raise UserError(f"{path} holds {kind}; a file or folder of {wanted} is needed here")
        raise UserError(f"{path} does not hold the model that its config describes: {'; '.join(problems)}")
    return found


def tensor_names(file: epath.Path) -> set[str]:
    """Return the names of the tensors of a single file. Raises a UserError for a pickle or a damaged file."""
    _refuse_pickle(file)
    return set(safetensors_file.read(file))


def save_component(
    folder: epath.PathLike,
    config: Mapping[str, Any],
    params: Mapping[str, jax.Array | np.ndarray],
    specs: Specs,
    *,
    dtype: DTypeLike | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    card: str | None = None,
    allow_nonfinite: bool = False,
) -> None:
    """Write `config.json` and the parameters as diffusers (or transformers) would, completely or not at all.

    Parameters are brought to the host one at a time. A `dtype` of None keeps each one's own; `card` becomes README.md.
    Raises a UserError if `folder` exists and is not empty, and for NaN and infinity unless `allow_nonfinite`.
    """
    stem = "diffusion_pytorch_model" if "_class_name" in config else "model"
    # A language model of transformers holds the network that encodes text as its `model`.
    is_within = any(name.endswith("ForCausalLM") for name in config.get("architectures") or ())
    keys = {name: f"model.{torch_name(name)}" if is_within else torch_name(name) for name in specs}
    dtypes = {name: np.dtype(dtype or params[name].dtype) for name in specs}
    shards = _shards(specs, dtypes, max_shard_bytes)
    files = (
        [f"{stem}.safetensors"]
        if len(shards) == 1
        else [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    with new_folder(folder) as target:
        write_whole(target / "config.json", json.dumps(config, indent=2) + "\n")
        if card is not None:
            write_whole(target / "README.md", card)
        for file, names in zip(files, shards, strict=True):
            ours = {keys[name]: name for name in names}
            header = safetensors_file.in_order(
                {key: (specs[name].torch_shape, dtypes[name]) for key, name in ours.items()}
            )
            tensors = (
                (key, to_torch(fetch(params[ours[key]]), specs[ours[key]]).astype(dtype))
                for key, (_, dtype) in header.items()
            )
            safetensors_file.write(target / file, tensors, header, allow_nonfinite=allow_nonfinite)
        if len(shards) > 1:
            total = sum(math.prod(spec.shape) * dtypes[name].itemsize for name, spec in specs.items())
            weight_map = {keys[name]: file for file, names in zip(files, shards, strict=True) for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_whole(target / f"{stem}.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")


def fingerprint(files: Iterable[epath.Path], *, places: int = 64, chunk: int = 2**14) -> str:
    """Return a digest of names, sizes, and `places` evenly spaced chunks of files: 10 GB take no longer than 10 MB."""
    digest = hashlib.sha256()
    for path in map(check_regular, files):
        size = path.stat().length
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for place in range(places):
                file.seek(place * max(size - chunk, 0) // max(places - 1, 1))
                digest.update(file.read(chunk))
    return digest.hexdigest()[:16]


def first_several(names: list[str], kind: str, several: int = 5) -> str:
    """Return text for an error such as "12 missing: a, b, c, d, e and 7 more"; duplicate names count once."""
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - several} more" if len(names) > several else ""
    return f"{len(names)} {kind}: {', '.join(names[:several])}{more}"


def _open_file(path: epath.Path, specs: Specs, prefix: str) -> _Stored:
    if not path.exists():
        raise MissingFileError(f"no folder {path}; a diffusers model folder keeps each component in one of its own")
    _refuse_pickle(path)
    arrays, slots = original.read(path, specs, prefix)
    return _Stored(arrays, torch_aliases, from_torch, slots)


def _refuse_pickle(file: epath.Path) -> None:
    if file.suffix != ".safetensors":
        known = look_at(check_regular(file)) or "not a .safetensors file"
        pickled = file.suffix in PICKLES or "pickle" in known
        raise UserError(f"{file} is not a .safetensors file; {CONVERT_PICKLE}" if pickled else f"{file} is {known}")


def _open_folder(folder: epath.Path, variant: str) -> _Stored:
    files = weight_files(folder, variant)
    if files[0].name in LEGACY_FLAX:
        return _Stored(flax_msgpack.read(files[0]), flax_aliases, from_flax)
    arrays: dict[str, np.ndarray] = {}
    for file in files:
        of_file = safetensors_file.read(file)
        twice = sorted(of_file.keys() & arrays.keys())
        if twice:
            raise UserError(first_several(twice, f"tensors of {file} are in another file of its folder too"))
        arrays |= of_file
    return _Stored(multiplied(arrays, folder), torch_aliases, from_torch)


def weight_files(folder: epath.Path, variant: str = "") -> list[epath.Path]:
    """Return the files of the set of weights in a component's folder that is read; that of `variant` if there is one.

    Raises a UserError if there are only pickles, and a MissingFileError if there is nothing or a file is missing.
    """
    names = {path.name for path in folder.iterdir()}
    name = preferred_weights(names, variant)
    if name is None:
        pickles = sorted(name for name in names if name.endswith(PICKLES))
        if pickles:
            raise UserError(f"{folder} holds only pickled weights ({', '.join(pickles)}); {CONVERT_PICKLE}")
        raise MissingFileError(f"no weights in {folder}; looked for {', '.join(SAFETENSORS + LEGACY_FLAX)}")
    if not name.endswith(".json"):
        return [folder / name]
    index: Index = read_json(folder / name, Index, MAX_INDEX_BYTES)
    shards = sorted(set(index.weight_map.values()))
    outside = [shard for shard in shards if "/" in shard or "\\" in shard or not shard.endswith(".safetensors")]
    if outside:
        raise UserError(f"{folder / name} names {outside[0]!r}, which is not a .safetensors file of its folder")
    absent = [shard for shard in shards if shard not in names]
    if absent:
        raise MissingFileError(f"{folder / name} names files that are absent: {', '.join(absent)}")
    return [folder / shard for shard in shards]


def preferred_weights(names: Collection[str], variant: str = "") -> str | None:
    """Return the file, or the index of shards, that is read from a folder with these `names`; None if there is none."""
    of_variant_first = sorted(SAFETENSORS, key=lambda name: f".{variant}." not in name) if variant else SAFETENSORS
    return next((name for name in (*of_variant_first, *LEGACY_FLAX) if name in names), None)


def _place(
    array: np.ndarray, cast: Callable[[np.ndarray], np.ndarray], sharding: jax.sharding.Sharding | None
) -> jax.Array:
    """Place a stored array on its devices. Each part is read once, even if several devices here hold copies of it."""

    @functools.cache
    def part(*bounds: tuple[int | None, int | None]) -> np.ndarray:
        return cast(array[tuple(itertools.starmap(slice, bounds))])

    if sharding is None:
        return jax.device_put(part())
    return jax.make_array_from_callback(
        array.shape, sharding, lambda index: part(*((axis.start, axis.stop) for axis in index or ()))
    )


def _shards(specs: Specs, dtypes: Mapping[str, np.dtype], max_shard_bytes: int) -> list[list[str]]:
    """Return the names in order, in one list per file; a new file begins where one would exceed `max_shard_bytes`."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        bytes_here = math.prod(spec.shape) * dtypes[name].itemsize
        if shards[-1] and size + bytes_here > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_here
    return shards
