"""Writes a model in the formats that other tools read.

Every weight is written as PyTorch safetensors under its current name, whatever the source's layout: the names of text
encoders begin with `text_model.`, without which transformers 4 would silently find nothing, and the VAE has none of
its old names.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NotRequired

import jax
import numpy as np
from etils import epath
from jax.typing import DTypeLike
from typing_extensions import TypedDict

from dpo_jax.errors import UserError
from dpo_jax.files import new_folder, read_json, write_whole
from dpo_jax.models.families import PUBLISHED
from dpo_jax.models.model_folder import files_of, read_model_index
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.models.single_file import V_PRED, ZERO_TERMINAL_SNR
from dpo_jax.weights import original
from dpo_jax.weights.hub import HUB_ID
from dpo_jax.weights.io import LEGACY_FLAX, MAX_SHARD_BYTES, PICKLES, save_component
from dpo_jax.weights.safetensors_file import NotFinite

Weights = Mapping[str, jax.Array | np.ndarray]


def save_pipeline(
    pipeline: Pipeline,
    output: epath.PathLike,
    denoiser: Weights,
    *,
    dtype: DTypeLike | None,
    card: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    others: Mapping[str, Weights] = MappingProxyType({}),
) -> None:
    """Write a complete PyTorch diffusers folder with this `denoiser`; it is written completely or not at all.

    The other networks, scheduler, tokenizers and a PyTorch safety checker are the model's own. Paths that configs were
    read from are removed from them.

    Args:
        pipeline: the model.
        output: the folder; a UserError if it exists and is not empty.
        denoiser: the denoiser's weights in dpo_jax's layout.
        dtype: dtype of all weights; None keeps each tensor's own.
        card: the text of README.md.
        max_shard_bytes: weights beyond this size are split over several files.
        others: weights that replace those of other networks, by the names of their folders.
    """
    model_index = _portable(read_model_index(pipeline.folder))
    networks = pipeline.components
    options: dict[str, Any] = {"max_shard_bytes": max_shard_bytes, "allow_nonfinite": pipeline.allow_nonfinite}
    with new_folder(output) as target:
        for name in [name for name, value in model_index.items() if isinstance(value, list)]:
            source = pipeline.folder / name
            if name in networks:
                weights = denoiser if name == pipeline.denoiser_name else others.get(name) or pipeline.read(name)
                config, specs = _config(pipeline, name, dtype), networks[name].specs
                with _naming(pipeline, {name: ""}):
                    save_component(target / name, config, weights, specs, dtype=dtype, **options)
            elif not source.is_dir() or _lacks_weights(source):  # a safety checker without weights that can be opened
                model_index[name] = [None, None]
            else:
                _copy(source, target / name)
        scheduler = target / "scheduler" / "scheduler_config.json"
        write_whole(scheduler, json.dumps(_portable(dict(pipeline.scheduler_config)), indent=2) + "\n")
        for tokenizer in pipeline.tokenizers:
            if tokenizer.kind != "t5":  # which has no byte pairs
                _complete_tokenizer(target / tokenizer.name)
        write_whole(target / "model_index.json", json.dumps(model_index, indent=2) + "\n")
        write_whole(target / "README.md", card)


def save_denoiser(
    pipeline: Pipeline,
    output: epath.PathLike,
    denoiser: Weights,
    *,
    dtype: DTypeLike | None,
    card: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the denoiser alone, a folder for `from_pretrained` of its class; arguments as in `save_pipeline`."""
    config, specs = _config(pipeline, pipeline.denoiser_name, dtype), pipeline.denoiser.specs
    options: dict[str, Any] = {"max_shard_bytes": max_shard_bytes, "allow_nonfinite": pipeline.allow_nonfinite}
    with _naming(pipeline, {pipeline.denoiser_name: ""}):
        save_component(output, config, denoiser, specs, dtype=dtype, card=card, **options)


def save_single_file(
    pipeline: Pipeline,
    output: epath.PathLike,
    denoiser: Weights,
    *,
    dtype: DTypeLike | None,
    card: str,
    others: Mapping[str, Weights] = MappingProxyType({}),
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> epath.Path:
    """Write `output`/NAME.safetensors, the whole model in the original layout, which web UIs read; return its path.

    For FLUX.1 and Z-Image, whose published files hold the transformer alone, it holds that alone. NAME is that of the
    folder; `metadata` goes into the file's header, and the other arguments are those of `save_pipeline`. If the model
    predicts v or its schedule ends in pure noise, and the published model of the family does not, the file holds the
    empty tensors by which web UIs recognise this.
    """
    is_alone = pipeline.family.denoiser.is_alone_in_files
    prefixes = {pipeline.denoiser_name: ""} if is_alone else pipeline.original_prefixes
    with new_folder(output) as target:
        components = {
            prefixes[name]: (
                denoiser if name == pipeline.denoiser_name else others.get(name) or pipeline.read(name),
                network.specs,
            )
            for name, network in pipeline.components.items()
            if name in prefixes
        }
        file = f"{epath.Path(output).name}.safetensors"
        marks = [mark for mark, is_so in unlike_published(pipeline).items() if is_so]
        options: dict[str, Any] = {"marks": marks, "metadata": metadata, "allow_nonfinite": pipeline.allow_nonfinite}
        with _naming(pipeline, prefixes):
            original.write(target / file, components, dtype=dtype, **options)
        write_whole(target / "README.md", card)
    return epath.Path(output) / file


@contextlib.contextmanager
def _naming(pipeline: Pipeline, prefixes: Mapping[str, str]) -> Iterator[None]:
    """If a tensor is not finite, name the file of the component that the prefix of the tensor's name stands for."""
    try:
        yield
    except NotFinite as error:
        component = next(name for name, prefix in prefixes.items() if error.name.startswith(prefix))
        files = files_of(pipeline.weights[component], pipeline.variant)
        changed = ", or what was trained or merged into it" if component == pipeline.denoiser_name else ""
        raise UserError(f"{files[0]}{changed}: {error}") from None


def unlike_published(pipeline: Pipeline) -> dict[str, bool]:
    """Return which marks for web UIs hold for the model but not for the published model of its family.

    None does for a flow model: there is no other target and no other end of the schedule.
    """
    if pipeline.schedule.is_flow:
        return {V_PRED: False, ZERO_TERMINAL_SNR: False}
    path = epath.Path(PUBLISHED / pipeline.family.name / "scheduler" / "scheduler_config.json")
    published = json.loads(path.read_text())
    return {
        V_PRED: pipeline.predicts_velocity and published["prediction_type"] != "v_prediction",
        ZERO_TERMINAL_SNR: pipeline.ends_in_noise and not published.get("rescale_betas_zero_snr"),
    }


def _lacks_weights(folder: epath.Path) -> bool:
    """Return whether this is a network's folder without safetensors: with no weights, pickles or legacy Flax."""
    names = [path.name for path in folder.iterdir()]
    return "config.json" in names and not any(name.endswith(".safetensors") for name in names)


def _copy(source: epath.Path, target: epath.Path) -> None:
    """Copy what PyTorch needs of a component that dpo_jax does not compute. An fp16 variant that is alone loses its
    suffix.

    Programs are not copied: a model's Python files are neither run nor passed on.
    """
    names = {path.name for path in source.iterdir() if not path.is_dir()}
    target.mkdir()
    for name in names:
        plain = name.replace(".fp16.", ".")
        if name.endswith((*PICKLES, *LEGACY_FLAX, ".py")) or (name != plain and plain in names):
            continue
        if name.endswith("config.json"):
            config: dict[str, Any] = read_json(source / name, dict[str, Any])
            if _portable(config) != config:
                write_whole(target / plain, json.dumps(_portable(config), indent=2) + "\n")
                continue
        (source / name).copy(target / plain)


def _complete_tokenizer(folder: epath.Path) -> None:
    """Write vocab.json and merges.txt, which older tools read, if transformers 5 wrote only tokenizer.json."""
    path, vocabulary, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if not path.exists() or (vocabulary.exists() and merges.exists()):
        return
    stored: _Tokenizer = read_json(path, _Tokenizer)
    ids = stored["model"]["vocab"] | {token["content"]: token["id"] for token in stored.get("added_tokens", [])}
    ordered = dict(sorted(ids.items(), key=lambda item: item[1]))
    write_whole(vocabulary, json.dumps(ordered, ensure_ascii=False))
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in stored["model"]["merges"])
    write_whole(merges, "\n".join(["#version: 0.2", *pairs]) + "\n")


class _AddedToken(TypedDict):
    content: str
    id: int


class _BytePairs(TypedDict):
    vocab: dict[str, int]
    merges: list[str | tuple[str, str] | list[str]]


class _Tokenizer(TypedDict):
    """The byte-pair vocabulary of CLIP and Qwen in tokenizer.json."""

    model: _BytePairs
    added_tokens: NotRequired[list[_AddedToken]]


def _config(pipeline: Pipeline, component: str, dtype: DTypeLike | None) -> dict[str, Any]:
    """Return the config.json to write next to weights of `dtype`."""
    config = _portable(pipeline.config(component))
    # transformers loads a text encoder in the dtype named here; version 4 reads it as torch_dtype.
    return config | {key: np.dtype(dtype).name for key in ("torch_dtype", "dtype") if dtype and key in config}


def _portable(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config for other tools: without the prefix "Flax" of legacy class names and the path it was read
    from."""

    def rename(value: Any) -> Any:
        if isinstance(value, list):
            return [rename(item) for item in value]
        return value.removeprefix("Flax") if isinstance(value, str) else value

    return {
        name: rename(value)
        for name, value in config.items()
        if name not in ("_name_or_path", "name_or_path") or (isinstance(value, str) and HUB_ID.fullmatch(value))
    }
