"""Write a trained model, or any other model, in the format of other tools, and upload it if you like.

  python -m dpo_jax.export --workdir=runs/sdxl --output=exported/sdxl --dtype=float16
  python -m dpo_jax.export --model=FOLDER_OR_ID_OR_FILE [--lora=FILE] --output=FOLDER --format=...
  python -m dpo_jax.export --workdir=runs/sdxl --output=exported/sdxl --push_to_hub=USER/NAME

What --output holds, by format:
  diffusers  a complete folder for DiffusionPipeline.from_pretrained; a LoRA is merged into its UNet
  unet       the UNet alone, for UNet2DConditionModel.from_pretrained; a LoRA is merged into it
  transformer  the same for models whose denoiser is a transformer
  single     NAME.safetensors: the whole model in one file of the original layout, for web UIs; a LoRA is merged.
             Of FLUX.1 and Z-Image, the transformer alone, as their published files
  lora       pytorch_lora_weights.safetensors, for pipe.load_lora_weights, PEFT and OneTrainer; not for web UIs
  kohya      NAME.safetensors: the LoRA under kohya's names, for web UIs; diffusers and OneTrainer open it too
Beside these lies a model card, README.md, with the licence and the base model. NAME is the name of the folder.

With --model, no training is needed: legacy Flax folders become PyTorch folders, single files become folders, folders
become single files, and a LoRA is rewritten or merged, also into the text encoders.
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
MODEL = flags.DEFINE_string(
    "model", None, "Model to convert: a folder, a hub id, or a single .safetensors file; an alternative to --workdir."
)
LORA = flags.DEFINE_string("lora", None, "LoRA to add (with --model): a file, its folder, or a hub id.")

section("Output")
OUTPUT = flags.DEFINE_string("output", None, "Folder to write. It must not exist.", required=True)
FORMAT = flags.DEFINE_enum(
    "format",
    "diffusers",
    ["diffusers", "unet", "transformer", "single", "lora", "kohya"],
    "Format to write; see above.",
)
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "float16", "bfloat16"],
    "Dtype of all weights. Default: float32 for trained models and with --lora; otherwise as the files hold them.",
)
SHARD_GB = flags.DEFINE_float("max_shard_gb", 10.0, "Largest size of one file of weights, in GB (10^9 bytes).", 0.001)

section("Hugging Face hub")
PUSH_TO_HUB = flags.DEFINE_string(
    "push_to_hub",
    "",
    "USER/NAME of a new model repository, to which --output is uploaded. Needs `hf auth login` or HF_TOKEN.",
)
HUB_PRIVATE = flags.DEFINE_bool(
    "hub_private", True, "Keep the new repository private; --nohub_private makes it public."
)

section("Model card")
LICENSE = flags.DEFINE_string(
    "license", "", "Licence for the card, by the hub's id. Default: the licence of the base model."
)
BASE_MODEL = flags.DEFINE_string(
    "base_model", "", "Hub id of the base model, for the card, if it was opened from a disk."
)

section("More about the model")
FAMILY = flags.DEFINE_string("family", None, "Family of the model, if its files do not tell (sdxl_turbo).")
MODEL_CONFIG = flags.DEFINE_string(
    "model_config",
    "",
    "Folder or hub id with the configs and tokenizers of a single file, and with the text encoders and the VAE that a "
    "file of SD3, FLUX.1 or Z-Image lacks. Default: the published model.",
)
REVISION = flags.DEFINE_string("revision", "", "Branch, tag or commit of the hub id.")
VARIANT = flags.DEFINE_string("variant", "", "Set of weights to fetch from the hub, for example fp16.")
UNET = flags.DEFINE_string("unet", "", "Another UNet (with --model): a folder, a file, or a hub id.")
TRANSFORMER = flags.DEFINE_string("transformer", "", "The same for models whose denoiser is a transformer.")
VAE = flags.DEFINE_string("vae", "", "Another VAE (with --model): a folder, a file, or a hub id.")
ALLOW_NONFINITE = flags.DEFINE_bool("allow_nonfinite", False, "Export weights that hold NaN or infinity, too.")


def main() -> None:
    if (WORKDIR.value is None) == (MODEL.value is None):
        raise UserError("give either --workdir (a training run) or --model (a model to convert), and not both")
    of_model = (LORA, FAMILY, MODEL_CONFIG, REVISION, VARIANT, UNET, TRANSFORMER, VAE)
    given = [flag.name for flag in of_model if flag.value]
    if WORKDIR.value is not None and given:
        raise UserError(f"--{given[0]} goes with --model; a training run has its own. Leave it out")
    if MODEL.value is not None and STEP.value:
        raise UserError("--step goes with --workdir; a model has no steps. Leave it out")
    exported = write_exported(
        read_exportable,
        OUTPUT.value,
        format=FORMAT.value,
        dtype=DTYPE.value,
        license=LICENSE.value,
        base_model=BASE_MODEL.value,
        max_shard_gb=SHARD_GB.value,
        push_to_hub=PUSH_TO_HUB.value,
        hub_private=HUB_PRIVATE.value,
    )
    for remark in exported.remarks:
        print(f"note: {remark}", file=sys.stderr)
    print(f"exported {exported.title} to {exported.path}")
    if exported.url:
        print(f"uploaded it to {exported.url}")


def read_exportable() -> "Exportable":
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
        transformer=TRANSFORMER.value,
        vae=VAE.value,
        allow_nonfinite=ALLOW_NONFINITE.value,
    )


if __name__ == "__main__":
    cli.run(main)
