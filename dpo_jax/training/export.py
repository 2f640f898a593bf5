"""Writes a training run's model, or any other model, in the formats of other tools."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from jax.typing import DTypeLike

from dpo_jax.cli import flatten
from dpo_jax.errors import UserError
from dpo_jax.files import new_folder, write_whole
from dpo_jax.models.denoiser import OTHER_PROGRAMS
from dpo_jax.models.families import DENOISERS
from dpo_jax.models.pipeline import Pipeline, load_pipeline
from dpo_jax.models.save import Weights, save_denoiser, save_pipeline, save_single_file
from dpo_jax.sampling.loaded_model import read_lora_for
from dpo_jax.training.metrics import last_scores, last_validation
from dpo_jax.training.model import load_tokenizers_of
from dpo_jax.training.model_card import model_card, read_result
from dpo_jax.training.model_origin import Origin, model_spec, origin_of
from dpo_jax.training.run import open_run
from dpo_jax.weights.lora_files import Adapter, Merged, check_low_rank
from dpo_jax.weights.lora_write import write_kohya, write_peft

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name that diffusers gives a LoRA's file and looks for first."""


@dataclasses.dataclass(frozen=True)
class Exportable:
    """A model to export: its weights, and what its card says about them."""

    title: str
    pipeline: Pipeline
    denoiser: Weights
    """The whole denoiser, with the LoRA merged if there is one."""
    adapter: Adapter | None
    card: Mapping[str, Any]
    """The facts that `model_card` reads."""
    dtype: str | None
    """Default dtype of all weights; None keeps the dtype that each is stored in. There is one dtype for all because
    PyTorch cannot run a float32 denoiser after a float16 text encoder."""
    text_encoders: Mapping[str, Weights] = dataclasses.field(default_factory=dict)
    """Text encoders that the LoRA changes, with it merged, by the names of their folders."""


def exportable_run(workdir: epath.PathLike, step: str = "", *, allow_nonfinite: bool = False) -> Exportable:
    """Return the model of a training run at its newest checkpoint, or at `step`: a number or "best"."""
    run = open_run(workdir, step, allow_nonfinite=allow_nonfinite)
    card = {"config": flatten(run.config), "step": run.step, "validation": last_validation(workdir, run.step)}
    card |= {"scores": last_scores(workdir, run.step), "result": read_result(workdir)}
    return Exportable(f"the model after step {run.step}", run.pipeline, run.merged, run.adapter, card, "float32")


def exportable_model(model: str, *, lora: str | None, **options: Any) -> Exportable:
    """Return a model as it is, or with a LoRA; `options` are those of `load_pipeline`."""
    pipeline = load_pipeline(model, dtype="float32", **options)
    load_tokenizers_of(pipeline)  # they are copied: damaged ones are reported now, not when the copy is opened
    name = pipeline.denoiser_name
    denoiser = pipeline.read(name)
    if lora is None:
        return Exportable(model, pipeline, denoiser, None, {"model": model}, dtype=None)
    adapters = read_lora_for(pipeline, lora)
    text_encoders = {
        encoder: Merged(pipeline.read(encoder), adapter)
        for encoder, adapter in adapters.items()
        if encoder != name and not adapter.is_empty
    }
    adapter = adapters[name]
    card = {"model": model, "lora": lora}
    merged = Merged(denoiser, adapter)
    return Exportable(f"{model} with {lora}", pipeline, merged, adapter, card, "float32", text_encoders)


def origin(exportable: Exportable, license: str = "", base_model: str = "") -> Origin:
    """Return the base model and licence of `exportable`; the user may state both."""
    config = exportable.card.get("config")
    return origin_of(config["model"] if config else exportable.card["model"], exportable.pipeline, license, base_model)


def remarks(exportable: Exportable, format: str, source: Origin) -> list[str]:
    """Return what users of the export should know, a sentence or two each."""
    found = [source.remark] if source.remark else []
    whole = ["diffusers"] if exportable.pipeline.family.denoiser.is_alone_in_files else ["diffusers", "single"]
    if exportable.text_encoders and format not in whole:
        others = " and ".join(f"--format={name}" for name in whole)
        found.append(
            f"The LoRA also changes the text encoders, but --format={format} leaves that out; {others} "
            f"{'merge' if len(whole) > 1 else 'merges'} it."
        )
    if format == "single" and format not in whole:
        found.append("This file holds the transformer alone, as the published one does.")
    if format in ("lora", "kohya"):
        found.append(OTHER_PROGRAMS[exportable.pipeline.denoiser_name][format])
    return found


def export(
    exportable: Exportable,
    output: epath.PathLike,
    *,
    format: str,
    dtype: DTypeLike | None,
    max_shard_bytes: int,
    license: str = "",
    base_model: str = "",
    repo: str = "",
) -> epath.Path:
    """Write `exportable` to the new folder `output` in a format of `dpo_jax.export`; return the path to open.

    The model card opens the model from the repository `repo` of the hub if that is given, otherwise from the folder.
    Nothing is written if it fails.

    Raises:
        UserError: `output` exists, or the format cannot hold the model.
    """
    output = epath.Path(output)
    pipeline, denoiser, adapter = exportable.pipeline, exportable.denoiser, exportable.adapter
    dtype = dtype or exportable.dtype
    held = np.dtype(dtype or next(iter(denoiser.values())).dtype).name
    source = origin(exportable, license, base_model)
    said = remarks(exportable, format, source)
    card = model_card(exportable.card, pipeline, format, output.name, held, source, said, repo)
    if format == "diffusers":
        options: dict[str, Any] = {"max_shard_bytes": max_shard_bytes, "others": exportable.text_encoders}
        save_pipeline(pipeline, output, denoiser, dtype=dtype, card=card, **options)
        return output
    if format in DENOISERS:
        if format != pipeline.denoiser_name:
            raise UserError(f"--format={format}: this model has no {format}; choose --format={pipeline.denoiser_name}")
        save_denoiser(pipeline, output, denoiser, dtype=dtype, card=card, max_shard_bytes=max_shard_bytes)
        return output
    metadata = model_spec(exportable.card, pipeline, format, output.name, source)
    if format == "single":
        options = {"others": exportable.text_encoders, "metadata": metadata}
        return save_single_file(pipeline, output, denoiser, dtype=dtype, card=card, **options)
    if adapter is None:
        raise UserError(
            f"--format={format} writes a LoRA, but {exportable.title} has none: the whole {pipeline.denoiser_name} was "
            f"trained; choose --format=diffusers, {pipeline.denoiser_name} or single"
        )
    check_low_rank(adapter, str(exportable.card.get("lora", exportable.title)))
    assert dtype is not None  # models with a LoRA have a default
    specs = pipeline.denoiser.specs
    file = LORA_FILE if format == "lora" else f"{output.name}.safetensors"
    with new_folder(output) as target:
        if format == "lora":
            write_peft(target / file, adapter, specs, dtype=dtype, component=pipeline.denoiser_name, metadata=metadata)
        else:
            write_kohya(
                target / file,
                adapter,
                specs,
                dtype=dtype,
                original_names=pipeline.family.original_layer_names,
                component=pipeline.denoiser_name,
                base_model_version=pipeline.marks.base_model_version,
                metadata=metadata,
            )
        write_whole(target / "README.md", card)
    return output / file
