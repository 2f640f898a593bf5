"""Writing a model in the formats that other tools open.

Every weight goes out as PyTorch safetensors under today's names, whatever it came from: `text_model.` before the text
encoders' names, without which transformers 4 would silently find nothing, and none of the old VAE names.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.typing import DTypeLike

from dpo_jax.files import new_folder, write_whole
from dpo_jax.models.pipeline import Pipeline, read_model_index
from dpo_jax.weights import original
from dpo_jax.weights.io import LEGACY_FLAX, MAX_SHARD_BYTES, PICKLES, save_component

Weights = Mapping[str, jax.Array | np.ndarray]


def save_pipeline(
    pipeline: Pipeline,
    output: epath.PathLike,
    unet: Weights,
    *,
    dtype: DTypeLike | None,
    card: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a complete PyTorch diffusers folder with `unet` as its UNet. All of it is written, or nothing.

    The other networks, scheduler, tokenizers and a PyTorch safety checker are the model's own.

    Args:
        pipeline: the model.
        output: the folder; ValueError if it exists and is not empty.
        unet: the UNet's weights in our layout.
        dtype: of all weights; None keeps each tensor's own.
        card: the text of README.md.
        max_shard_bytes: weights beyond this size are split over several files.
    """
    model_index = _without_flax(read_model_index(pipeline.folder))
    networks = pipeline.components
    options: dict[str, Any] = {"max_shard_bytes": max_shard_bytes, "allow_nonfinite": pipeline.allow_nonfinite}
    with new_folder(output) as target:
        for name in [name for name, value in model_index.items() if isinstance(value, list)]:
            source = pipeline.folder / name
            if name in networks:
                weights = unet if name == "unet" else pipeline.read(name)
                config, specs = _config(pipeline, name, dtype), networks[name].specs
                save_component(target / name, config, weights, specs, dtype=dtype, **options)
            elif not source.is_dir() or _lacks_weights(source):  # a safety checker that nobody downloaded, or can open
                model_index[name] = [None, None]
            else:
                _copy(source, target / name)
        write_whole(target / "model_index.json", json.dumps(model_index, indent=2) + "\n")
        write_whole(target / "README.md", card)


def save_unet(
    pipeline: Pipeline,
    output: epath.PathLike,
    unet: Weights,
    *,
    dtype: DTypeLike | None,
    card: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes the UNet alone, a folder for `UNet2DConditionModel.from_pretrained`; arguments as in `save_pipeline`."""
    config, specs = _config(pipeline, "unet", dtype), pipeline.unet.specs
    options: dict[str, Any] = {"max_shard_bytes": max_shard_bytes, "allow_nonfinite": pipeline.allow_nonfinite}
    save_component(output, config, unet, specs, dtype=dtype, card=card, **options)


def save_single_file(
    pipeline: Pipeline, output: epath.PathLike, unet: Weights, *, dtype: DTypeLike | None, card: str
) -> epath.Path:
    """Writes `output`/NAME.safetensors, the whole model in the original layout, which web UIs read; returns its path.

    NAME is that of the folder; the other arguments are those of `save_pipeline`.
    """
    prefixes = pipeline.original_prefixes
    with new_folder(output) as target:
        components = {
            prefixes[name]: (unet if name == "unet" else pipeline.read(name), network.specs)
            for name, network in pipeline.components.items()
        }
        file = f"{epath.Path(output).name}.safetensors"
        original.write(target / file, components, dtype=dtype, allow_nonfinite=pipeline.allow_nonfinite)
        write_whole(target / "README.md", card)
    return epath.Path(output) / file


def _lacks_weights(folder: epath.Path) -> bool:
    """Whether this is a network's folder without safetensors: with none, pickles or legacy Flax."""
    names = [path.name for path in folder.iterdir()]
    return "config.json" in names and not any(name.endswith(".safetensors") for name in names)


def _copy(source: epath.Path, target: epath.Path) -> None:
    """Copies what PyTorch needs of a component that we don't compute; an fp16 variant loses its mark if alone."""
    names = {path.name for path in source.iterdir()}
    target.mkdir()
    for name in names:
        plain = name.replace(".fp16.", ".")
        if not name.endswith((*PICKLES, *LEGACY_FLAX)) and (name == plain or plain not in names):
            (source / name).copy(target / plain)


def _config(pipeline: Pipeline, component: str, dtype: DTypeLike | None) -> dict[str, Any]:
    """The config.json to write beside weights of `dtype`."""
    config = _without_flax(pipeline.config(component))
    # transformers opens a text encoder in the dtype named here, in its version 4 as torch_dtype.
    return config | {key: np.dtype(dtype).name for key in ("torch_dtype", "dtype") if dtype and key in config}


def _without_flax(config: dict[str, Any]) -> dict[str, Any]:
    """Class names of the PyTorch twin: legacy Flax ones differ by their prefix."""

    def rename(value: Any) -> Any:
        if isinstance(value, list):
            return [rename(item) for item in value]
        return value.removeprefix("Flax") if isinstance(value, str) else value

    return {name: rename(value) for name, value in config.items()}
