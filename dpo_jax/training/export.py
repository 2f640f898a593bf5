"""From a training run, or a model that nobody trained here, to files of other tools."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from jax.typing import DTypeLike

from dpo_jax.files import new_folder, write_whole
from dpo_jax.models.pipeline import Pipeline, load_pipeline
from dpo_jax.models.save import Weights, save_pipeline, save_single_file, save_unet
from dpo_jax.training.checkpoint import read_config
from dpo_jax.training.metrics import last_validation
from dpo_jax.training.model import load_tokenizers_of
from dpo_jax.training.model_card import model_card, read_result
from dpo_jax.training.run import open_run
from dpo_jax.weights.hub import find_lora
from dpo_jax.weights.lora_files import Adapter, Merged, read_lora, write_kohya, write_peft

LORA_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers calls a LoRA's file and looks for first."""


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What there is to export: a model, the weights of its UNet, and what its card says of them."""

    title: str
    pipeline: Pipeline
    unet: Weights
    """Of the whole UNet, with the LoRA merged where there is one."""
    adapter: Adapter | None
    card: Mapping[str, Any]
    """What `model_card` is to say."""
    dtype: str | None
    """Of all weights unless the user says otherwise; None keeps what each is held in. One for all, or PyTorch could not
    run a float32 UNet after a float16 text encoder."""


def open_tuned(workdir: epath.PathLike, *, allow_nonfinite: bool = False) -> Tuned:
    """The newest checkpoint of a training run."""
    run = open_run(workdir, allow_nonfinite=allow_nonfinite)
    card = {"config": read_config(workdir), "step": run.step, "validation": last_validation(workdir)}
    card |= {"result": read_result(workdir)}
    return Tuned(f"the model after step {run.step}", run.pipeline, run.merged, run.adapter, card, "float32")


def open_untrained(model: str, *, lora: str | None, **options: Any) -> Tuned:
    """A model as it is, or with a LoRA; `options` are those of `load_pipeline`."""
    pipeline = load_pipeline(model, dtype="float32", **options)
    load_tokenizers_of(pipeline)  # which are copied: damaged ones are told here, not by who opens the copy
    unet = pipeline.read("unet")
    if lora is None:
        return Tuned(model, pipeline, unet, None, {"model": model}, dtype=None)
    adapter = read_lora(find_lora(lora), pipeline.unet.specs)
    card = {"model": model, "lora": lora}
    return Tuned(f"{model} with {lora}", pipeline, Merged(unet, adapter), adapter, card, "float32")


def export(
    tuned: Tuned, output: epath.PathLike, *, format: str, dtype: DTypeLike | None, max_shard_bytes: int
) -> epath.Path:
    """Writes `tuned` to the new folder `output` in one of the formats of `dpo_jax.export`; returns what to open."""
    output = epath.Path(output)
    pipeline, unet, adapter = tuned.pipeline, tuned.unet, tuned.adapter
    dtype = dtype or tuned.dtype
    held = np.dtype(dtype or next(iter(unet.values())).dtype).name
    card = model_card(tuned.card, pipeline, format, output.name, held)
    if format == "diffusers":
        save_pipeline(pipeline, output, unet, dtype=dtype, card=card, max_shard_bytes=max_shard_bytes)
        return output
    if format == "unet":
        save_unet(pipeline, output, unet, dtype=dtype, card=card, max_shard_bytes=max_shard_bytes)
        return output
    if format == "single":
        return save_single_file(pipeline, output, unet, dtype=dtype, card=card)
    if adapter is None:
        raise ValueError(
            f"--format={format} writes a LoRA, but {tuned.title} has none: the whole UNet was trained; "
            "choose --format=diffusers, unet or single"
        )
    assert dtype is not None  # a model with a LoRA has a default
    specs = pipeline.unet.specs
    file = LORA_FILE if format == "lora" else f"{output.name}.safetensors"
    with new_folder(output) as target:
        if format == "lora":
            write_peft(target / file, adapter, specs, dtype=dtype)
        else:
            kohya = pipeline.family.kohya
            write_kohya(
                target / file,
                adapter,
                specs,
                dtype=dtype,
                original_names=kohya.original_names,
                base_model_version=kohya.base_model_version,
            )
        write_whole(target / "README.md", card)
    return output / file
