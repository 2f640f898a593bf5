"""Writes a tuned model, or any model converted, in the format of other tools.

  python -m dpo_jax.export --workdir=runs/sdxl --output=exported/sdxl [--format=...] [--dtype=float16]
  python -m dpo_jax.export --model=FOLDER_OR_ID_OR_FILE [--lora=FILE] --output=DIR [--format=...] [--dtype=...]

What DIR holds, by format:
  diffusers  a complete folder for DiffusionPipeline.from_pretrained; a LoRA is merged into its UNet
  unet       the UNet alone, for UNet2DConditionModel.from_pretrained; likewise
  single     NAME.safetensors: the whole model in one file of the original layout, as web UIs read it; likewise
  lora       pytorch_lora_weights.safetensors, for pipe.load_lora_weights, PEFT and OneTrainer; not for web UIs
  kohya      NAME.safetensors: the LoRA under kohya's names, for web UIs; diffusers and OneTrainer open it too
and a model card, README.md, with the licence and the base model. NAME is that of DIR. With --model nothing need have
been trained: legacy Flax folders become PyTorch ones, single files become folders, folders single files, and a LoRA is
rewritten or merged, also into the text encoders.
"""

import sys
from typing import TYPE_CHECKING

from absl import flags

from dpo_jax import cli
from dpo_jax.api.models import write_exported
from dpo_jax.command_help import section
from dpo_jax.errors import UserError

if TYPE_CHECKING:
    from dpo_jax.training.export import Exportable

section("Training run or model")
WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of a training run.")
STEP = flags.DEFINE_string(
    "step",
    "",
    "With --workdir: the step whose checkpoint to export, or best: the one with the highest accuracy on held-out pairs "
    "(for SFT, the lowest error). Default: the newest checkpoint.",
)
MODEL = flags.DEFINE_string("model", None, "Instead of it: a model folder, a hub id, or a single .safetensors file.")
LORA = flags.DEFINE_string("lora", None, "With --model: a LoRA for it; a file, or a hub id with the file's name.")

section("Output")
OUTPUT = flags.DEFINE_string("output", None, "New folder for what is exported.", required=True)
FORMAT = flags.DEFINE_enum("format", "diffusers", ["diffusers", "unet", "single", "lora", "kohya"], "See above.")
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "float16", "bfloat16"],
    "Of all weights. By default tuned models are float32, converted ones as held.",
)
SHARD_GB = flags.DEFINE_float("max_shard_gb", 10.0, "Weights beyond this size are split over several files.", 0.001)

section("Model card")
LICENSE = flags.DEFINE_string(
    "license", "", "Licence for the card, by the hub's id. By default that of the base model."
)
BASE_MODEL = flags.DEFINE_string("base_model", "", "Hub id of the base, for the card, where it was opened from a disk.")

section("More about the model")
FAMILY = flags.DEFINE_string("family", None, "With --model: its family where the files can't tell (sdxl_turbo).")
MODEL_CONFIG = flags.DEFINE_string(
    "model_config", "", "With a single file: folder or hub id of its configs and tokenizers, if not the published one."
)
REVISION = flags.DEFINE_string("revision", "", "Branch, tag or commit of a hub id.")
VARIANT = flags.DEFINE_string("variant", "", "Which set of weights to fetch from the hub, such as fp16.")
UNET = flags.DEFINE_string("unet", "", "With --model: another UNet; a folder, a file, or a hub id.")
VAE = flags.DEFINE_string("vae", "", "With --model: another VAE, likewise.")
ALLOW_NONFINITE = flags.DEFINE_bool("allow_nonfinite", False, "Export weights also where they hold NaN or infinity.")


def main() -> None:
    if (WORKDIR.value is None) == (MODEL.value is None):
        raise UserError("give either --workdir (a training run) or --model (a model to convert), one of the two")
    of_model = (LORA, FAMILY, MODEL_CONFIG, REVISION, VARIANT, UNET, VAE)
    given = [flag.name for flag in of_model if flag.value]
    if WORKDIR.value is not None and given:
        raise UserError(f"--{given[0]} goes with --model; a training run has its own")
    if MODEL.value is not None and STEP.value:
        raise UserError("--step goes with --workdir; a model has no steps")
    exported = write_exported(
        read,
        OUTPUT.value,
        format=FORMAT.value,
        dtype=DTYPE.value,
        license=LICENSE.value,
        base_model=BASE_MODEL.value,
        max_shard_gb=SHARD_GB.value,
    )
    for remark in exported.remarks:
        print(f"note: {remark}", file=sys.stderr)
    print(f"exported {exported.title} to {exported.path}")


def read() -> "Exportable":
    from dpo_jax.training.export import exportable_model, exportable_run

    if WORKDIR.value is not None:
        return exportable_run(WORKDIR.value, STEP.value, allow_nonfinite=ALLOW_NONFINITE.value)
    return exportable_model(
        MODEL.value or "",
        lora=LORA.value,
        family=FAMILY.value,
        model_config=MODEL_CONFIG.value,
        revision=REVISION.value,
        variant=VARIANT.value,
        unet=UNET.value,
        vae=VAE.value,
        allow_nonfinite=ALLOW_NONFINITE.value,
    )


if __name__ == "__main__":
    cli.run(main)
