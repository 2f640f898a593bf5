"""Draw images for prompts, with a model or with a training run.

  python -m dpo_jax.sample --model=FOLDER_OR_ID_OR_FILE --prompts="a cat" --output=DIR
  python -m dpo_jax.sample --model=FOLDER_OR_ID_OR_FILE --lora=FILE --prompts=prompts.txt --output=DIR
  python -m dpo_jax.sample --workdir=runs/sdxl --prompts=prompts.txt --output=DIR

DIR receives one image per prompt and seed (00003_a-red-square_7.png), prompts.jsonl (the list of the images),
sampling.json (the settings they were drawn with) and grid.png (some of them side by side). The same command continues
where it stopped. An image depends only on its prompt and seed, not on the batch size or the number of devices. With
--init_image drawing starts from a given image with noise added to it; the lower --strength, the more of it remains.
"""

import dataclasses
import hashlib
import time
from typing import TYPE_CHECKING

from absl import flags

from dpo_jax import cli, locks
from dpo_jax.api.models import load_model
from dpo_jax.command_help import section
from dpo_jax.errors import UserError
from dpo_jax.sampling.prompts import BUNDLED, FORMS

if TYPE_CHECKING:
    from dpo_jax.sampling.loaded_model import LoadedModel

section("Model or training run")
MODEL = flags.DEFINE_string("model", None, "Model to sample from: a folder, a hub id, or a .safetensors file.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Training run to sample from (its latest checkpoint, or --step); an alternative to --model."
)
STEP = flags.DEFINE_string(
    "step",
    "",
    "Checkpoint to sample from (with --workdir): a step, or best, which is the one with the highest accuracy on "
    "held-out pairs (for SFT, the lowest error). Default: the latest.",
)

section("Prompts and output")
PROMPTS = flags.DEFINE_multi_string(
    "prompts",
    None,
    f"A prompt, {FORMS}, or a list that comes with dpo_jax: {', '.join(BUNDLED)}. May be repeated. A text file has one "
    "prompt per line. A value with a slash or a file's ending is always a path.",
    required=True,
)
OUTPUT = flags.DEFINE_string("output", None, "Folder for the images.", required=True)
SEEDS = flags.DEFINE_integer("seeds", 1, "Images per prompt, with consecutive seeds.", 1, 2**16)
SEED = flags.DEFINE_integer("seed", 0, "First seed.", 0, 2**32 - 1)

section("Sampling")
SAMPLER = flags.DEFINE_enum(
    "sampler",
    None,
    ["ddim", "euler", "euler_ancestral", "dpmsolver++", "lcm", "flow_euler", "flow_sde", "flow_cps"],
    "Sampler. Default: the model's own scheduler, or ddim if it is none of these; with --workdir the config's.",
)
STEPS = flags.DEFINE_integer(
    "steps",
    None,
    "Denoising steps. Default: 30, or 4 for sdxl_turbo; with --workdir the config's.",
    lower_bound=1,
)
GUIDANCE = flags.DEFINE_float(
    "guidance",
    None,
    "Classifier-free guidance scale; 1 or less turns guidance off. Default: 7.5, 5 for SDXL, 0 for sdxl_turbo; with "
    "--workdir the config's.",
    lower_bound=0,
)
GUIDANCE_RESCALE = flags.DEFINE_float(
    "guidance_rescale",
    0.0,
    "How far guided predictions are rescaled to the standard deviation of unguided ones, which avoids overexposure.",
    0.0,
    1.0,
)
NEGATIVE_PROMPT = flags.DEFINE_string("negative_prompt", "", "What the images should not show.")
ETA = flags.DEFINE_float(
    "eta", 0.0, "Share of fresh noise in each step of ddim; 0 is deterministic, 1 is DDPM.", 0.0, 1.0
)
RESOLUTION = flags.DEFINE_integer(
    "resolution", None, "Height and width in pixels. Default: the model's own resolution.", 1, 2**14
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Images drawn at a time, on all devices together.", 1, 2**16)

section("Starting from an image")
INIT_IMAGE = flags.DEFINE_string(
    "init_image",
    None,
    "Image to start from, or a folder with one image per prompt; their names begin with the number of the prompt's "
    "line, counted from 0 (00012.png).",
)
STRENGTH = flags.DEFINE_float(
    "strength",
    None,
    "Share of the steps that are run on --init_image; lower values keep more of it. Default: 0.8.",
    lower_bound=0,
    upper_bound=1,
)

section("More about the model")
LORA = flags.DEFINE_string("lora", "", "LoRA to add to the model: a file, its folder, or a hub id with the file name.")
LORA_SCALE = flags.DEFINE_float("lora_scale", 1.0, "Factor that the LoRA is multiplied by.")
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16"],
    "Compute dtype (with --model). Default: bfloat16; float32 on CPUs.",
)
VAE_DTYPE = flags.DEFINE_enum(
    "vae_dtype", None, ["float32", "bfloat16"], "Compute dtype of the VAE (with --model). Default: --dtype."
)
ATTENTION = flags.DEFINE_enum(
    "attention",
    None,
    ["auto", "xla", "cudnn", "splash"],
    "Attention kernel (with --model). Default: auto, which takes cudnn on NVIDIA GPUs in bfloat16, splash on TPUs.",
)
FSDP = flags.DEFINE_integer("fsdp", 1, "Devices that share one copy of the model's weights (with --model).", 1)
UNET = flags.DEFINE_string(
    "unet", "", "UNet to use instead of the model's own (with --model): a folder, file or hub id."
)
TRANSFORMER = flags.DEFINE_string("transformer", "", "The same for models whose denoiser is a transformer.")
VAE = flags.DEFINE_string("vae", "", "VAE to use instead of the model's own (with --model): a folder, file or hub id.")
FAMILY = flags.DEFINE_string(
    "family", None, "Model family (with --model), where the files do not tell it; for example sdxl_turbo."
)
MODEL_CONFIG = flags.DEFINE_string(
    "model_config",
    "",
    "Folder or hub id of the configs and tokenizers for a model that is a single file, and of the text encoders and "
    "the VAE that a file of SD3, FLUX.1 or Z-Image lacks. Default: the published model.",
)
REVISION = flags.DEFINE_string("revision", "", "Branch, tag or commit of a hub id (with --model).")
VARIANT = flags.DEFINE_string(
    "variant", "", "Variant of the weights to fetch from the hub (with --model), such as fp16."
)
ALLOW_NONFINITE = flags.DEFINE_bool(
    "allow_nonfinite", False, "Draw even if weights contain NaN or infinity; the images may be black."
)
OF_MODEL = (UNET, TRANSFORMER, VAE, FAMILY, MODEL_CONFIG, REVISION, VARIANT, DTYPE, VAE_DTYPE, ATTENTION)


def main() -> None:
    if (WORKDIR.value is None) == (MODEL.value is None):
        raise UserError("give either --model or --workdir (a training run), and not both")
    given = [flag.name for flag in OF_MODEL if flag.value] + (["fsdp"] if FSDP.value != 1 else [])
    if WORKDIR.value is not None and given:
        raise UserError(f"--{given[0]} goes with --model; with --workdir the run's config decides, so leave it out")
    if MODEL.value is not None and STEP.value:
        raise UserError("--step goes with --workdir; a model has no steps")
    if STRENGTH.value is not None and INIT_IMAGE.value is None:
        raise UserError("--strength needs an image to start from, but --init_image is missing")
    with locks.locked_early(OUTPUT.value, "python -m dpo_jax.sample"):
        from dpo_jax import cluster  # after the flags are checked: importing JAX takes seconds

        cluster.join()
        with cluster.leaving_at_once(), cluster.locked(OUTPUT.value, "python -m dpo_jax.sample"):
            draw_all()


def draw_all() -> None:
    from etils import epath

    from dpo_jax import cluster
    from dpo_jax.diffusion.samplers import SAMPLER_OF_CLASS, other_fields
    from dpo_jax.progress import ProgressBar
    from dpo_jax.sampling.draw import begin_folder, draw, find_images, list_entries
    from dpo_jax.sampling.generate import MAX_SEED
    from dpo_jax.sampling.prompts import given_prompts
    from dpo_jax.weights.io import fingerprint

    own_images = bool(INIT_IMAGE.value) and epath.Path(INIT_IMAGE.value).is_dir()
    prompts = given_prompts(PROMPTS.value, repeated=own_images)
    if SEED.value + SEEDS.value - 1 > MAX_SEED:
        raise UserError(f"--seed={SEED.value} with --seeds={SEEDS.value} goes past the largest seed, {MAX_SEED}")
    entries = list_entries(prompts, SEED.value, SEEDS.value)
    begin_from = find_images(INIT_IMAGE.value, [prompt.number for prompt in prompts]) if INIT_IMAGE.value else []
    model = load_named_model()
    sampling = model.sampling_with(
        sampler=SAMPLER.value,
        steps=STEPS.value,
        guidance=GUIDANCE.value,
        eta=ETA.value,
        guidance_rescale=GUIDANCE_RESCALE.value,
        negative_prompt=NEGATIVE_PROMPT.value,
        strength=(0.8 if STRENGTH.value is None else STRENGTH.value) if begin_from else 1.0,
    )
    schedule = model.pipeline.sampling_schedule
    resolution = RESOLUTION.value or model.resolution
    generator = model.generator(sampling, resolution=resolution, batch_size=BATCH_SIZE.value)
    settings = {
        "model": model.fingerprint,
        "prompts": hashlib.sha256("\n".join(prompt.text for prompt in prompts).encode()).hexdigest()[:16],
        "seed": SEED.value,
        "init_image": fingerprint(dict.fromkeys(begin_from)) if begin_from else "",
        **dataclasses.asdict(sampling),
        "resolution": resolution,
        "dtype": model.pipeline.dtype.name,
        "vae_dtype": VAE_DTYPE.value,
    }
    begin_folder(OUTPUT.value, settings)

    other = other_fields(SAMPLER_OF_CLASS.get(schedule.class_name, ""), schedule)
    unlike = "".join(f", {field}={schedule.sampler_fields[field]!r}" for field in other)
    started = time.monotonic()
    with ProgressBar("images", quiet=not cluster.is_first()) as bar:
        bar.say(
            f"{len(entries)} images ({len(prompts)} prompts) of {resolution} x {resolution} pixels in batches of "
            f"{generator.batch_size}: sampler {sampling.sampler} (the model's scheduler is {schedule.class_name}"
            f"{unlike}), {sampling.steps} steps, guidance {sampling.guidance:g}"
        )
        cut = model.tokenizers.count_cut([prompt.text for prompt in prompts])
        if cut:
            bar.say(f"{cut} of {len(prompts)} prompts are longer than the model can read; their ends are cut off")
        drawn = draw(
            generator,
            model.denoiser,
            entries,
            OUTPUT.value,
            begin_from=[file for file in begin_from for _ in range(SEEDS.value)] or None,
            on_progress=lambda done, total: bar.show("drawing", done, total),
        )
    if cluster.is_first():
        existing = f", {len(entries) - drawn} existed already" if drawn < len(entries) else ""
        print(f"{len(entries)} images in {OUTPUT.value}: {drawn} drawn in {time.monotonic() - started:.0f} s{existing}")


def load_named_model() -> "LoadedModel":
    """Return the loaded model that the flags name, or that of the training run."""
    if WORKDIR.value is not None:
        from dpo_jax.training.run import open_run

        run = open_run(WORKDIR.value, STEP.value, allow_nonfinite=ALLOW_NONFINITE.value)
        return run.load_model(lora=LORA.value, lora_scale=LORA_SCALE.value)
    return load_model(
        MODEL.value or "",
        lora=LORA.value,
        lora_scale=LORA_SCALE.value,
        dtype=DTYPE.value,
        vae_dtype=VAE_DTYPE.value,
        attention=ATTENTION.value or "auto",
        fsdp=FSDP.value,
        unet=UNET.value,
        transformer=TRANSFORMER.value,
        vae=VAE.value,
        family=FAMILY.value,
        model_config=MODEL_CONFIG.value,
        revision=REVISION.value,
        variant=VARIANT.value,
        allow_nonfinite=ALLOW_NONFINITE.value,
    )


if __name__ == "__main__":
    cli.run(main)
