"""Draws images of a list of prompts.

  python -m dpo_jax.sample --model=FOLDER_OR_ID_OR_FILE --prompts=prompts.txt --output=DIR [--lora=FILE] [--steps=...]
  python -m dpo_jax.sample --workdir=runs/sdxl --prompts=prompts.txt --output=DIR

DIR receives an image for each prompt and seed, such as 00003_a-red-square_7.png; prompts.jsonl, which lists them;
sampling.json, what they were drawn by; and grid.png, a look at some. The same command again goes on where it stopped.
An image depends on its prompt and seed alone: neither on the batch nor on the number of devices. With --init_image
images are not drawn from noise, but from a given image that is made noisy: the less --strength, the more of it stays.
"""

import dataclasses
import hashlib
import time
from typing import Any

from absl import flags

from dpo_jax import cli, locks
from dpo_jax.errors import UserError
from dpo_jax.sampling.prompts import BUNDLED

MODEL = flags.DEFINE_string("model", None, "A model folder, a hub id, or a single .safetensors file.")
WORKDIR = flags.DEFINE_string("workdir", None, "Instead of it: work directory of a training run, of which the newest.")
STEP = flags.DEFINE_string(
    "step",
    "",
    "With --workdir: the step whose checkpoint to sample from, or best: the one with the highest accuracy on held-out "
    "pairs (for SFT, the lowest error). Default: the newest checkpoint.",
)
PROMPTS = flags.DEFINE_string(
    "prompts",
    None,
    f"Prompts, one a line; also .jsonl, .tsv, .csv, .json, .parquet, or one of our lists: {', '.join(BUNDLED)}.",
    required=True,
)
OUTPUT = flags.DEFINE_string("output", None, "Folder for the images.", required=True)
SEEDS = flags.DEFINE_integer("seeds", 1, "Images of each prompt, from seeds that follow each other.", 1, 2**16)
SEED = flags.DEFINE_integer("seed", 0, "The first seed.", 0, 2**32 - 1)
SAMPLER = flags.DEFINE_enum(
    "sampler",
    None,
    ["ddim", "euler", "euler_ancestral", "dpmsolver++", "lcm"],
    "By default what the model's scheduler means, ddim where that is none of these; of a run its config.sample.",
)
STEPS = flags.DEFINE_integer(
    "steps", None, "Denoising steps. By default the family's: 30, or 4 for sdxl_turbo.", lower_bound=1
)
GUIDANCE = flags.DEFINE_float(
    "guidance",
    None,
    "Classifier-free guidance scale; 1 or less for none. By default the family's: 7.5, 5 or 0.",
    lower_bound=0,
)
GUIDANCE_RESCALE = flags.DEFINE_float(
    "guidance_rescale", 0.0, "How far guided predictions are brought back to the spread of plain ones.", 0.0, 1.0
)
NEGATIVE_PROMPT = flags.DEFINE_string("negative_prompt", "", "What guidance leads away from.")
ETA = flags.DEFINE_float("eta", 0.0, "ddim: share of noise that is drawn anew in each step.", 0.0, 1.0)
RESOLUTION = flags.DEFINE_integer(
    "resolution", None, "Pixels, height and width. By default what the model is made for.", 1, 2**14
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Images drawn at a time, by all devices together.", 1, 2**16)
INIT_IMAGE = flags.DEFINE_string(
    "init_image",
    None,
    "An image to begin from, or a folder of images named by their prompt's line from 0 (00012.png).",
)
STRENGTH = flags.DEFINE_float(
    "strength", None, "With --init_image: share of the steps that are taken. [0.8]", lower_bound=0, upper_bound=1
)
LORA = flags.DEFINE_string("lora", "", "A LoRA to add to the UNet: a file, or a hub id with the file's name.")
LORA_SCALE = flags.DEFINE_float("lora_scale", 1.0, "What the LoRA is multiplied by.")
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "With --model: of computing. By default bfloat16, on CPUs float32."
)
VAE_DTYPE = flags.DEFINE_enum("vae_dtype", None, ["float32", "bfloat16"], "The same for the VAE, if another.")
ATTENTION = flags.DEFINE_enum(
    "attention", None, ["xla", "cudnn"], "With --model: cudnn is one kernel of GPUs, in bfloat16. [xla]"
)
FSDP = flags.DEFINE_integer("fsdp", 1, "With --model: devices that one copy of it is split over.", 1)
UNET = flags.DEFINE_string("unet", "", "With --model: another UNet; a folder, a file, or a hub id.")
VAE = flags.DEFINE_string("vae", "", "With --model: another VAE, likewise.")
FAMILY = flags.DEFINE_string("family", None, "With --model: its family where the files can't tell (sdxl_turbo).")
MODEL_CONFIG = flags.DEFINE_string(
    "model_config", "", "With a single file: folder or hub id of its configs and tokenizers, if not the published one."
)
REVISION = flags.DEFINE_string("revision", "", "Branch, tag or commit of a hub id.")
VARIANT = flags.DEFINE_string("variant", "", "Which set of weights to fetch from the hub, such as fp16.")
ALLOW_NONFINITE = flags.DEFINE_bool(
    "allow_nonfinite", False, "Draw also with weights that hold NaN or infinity, and keep black images."
)
OF_MODEL = (UNET, VAE, FAMILY, MODEL_CONFIG, REVISION, VARIANT, DTYPE, VAE_DTYPE, ATTENTION)


def main() -> None:
    if (WORKDIR.value is None) == (MODEL.value is None):
        raise UserError("give either --model or --workdir (a training run), one of the two")
    given = [flag.name for flag in OF_MODEL if flag.value] + (["fsdp"] if FSDP.value != 1 else [])
    if WORKDIR.value is not None and given:
        raise UserError(f"--{given[0]} goes with --model; a training run has its own")
    if MODEL.value is not None and STEP.value:
        raise UserError("--step goes with --workdir; a model has no steps")
    if STRENGTH.value is not None and INIT_IMAGE.value is None:
        raise UserError("--strength says how much of --init_image is drawn anew, and --init_image is missing")
    with locks.locked_early(OUTPUT.value, "python -m dpo_jax.sample"):
        from dpo_jax import cluster  # after the flags are checked: importing JAX takes seconds

        cluster.join()
        with cluster.leaving_at_once(), cluster.locked(OUTPUT.value, "python -m dpo_jax.sample"):
            draw_all()


def draw_all() -> None:
    from etils import epath

    from dpo_jax import cluster
    from dpo_jax.diffusion.samplers import SAMPLER_OF_CLASS, other_fields, own_sampler
    from dpo_jax.progress import ProgressBar
    from dpo_jax.sampling.draw import begin_folder, draw, find_images, list_entries
    from dpo_jax.sampling.generate import MAX_SEED
    from dpo_jax.sampling.prompts import read_prompts
    from dpo_jax.weights.io import fingerprint

    own_images = bool(INIT_IMAGE.value) and epath.Path(INIT_IMAGE.value).is_dir()
    prompts = read_prompts(PROMPTS.value, repeated=own_images)
    if SEED.value + SEEDS.value - 1 > MAX_SEED:
        raise UserError(f"--seed={SEED.value} with --seeds={SEEDS.value} goes past the last seed, {MAX_SEED}")
    entries = list_entries(prompts, SEED.value, SEEDS.value)
    begin_from = find_images(INIT_IMAGE.value, [prompt.number for prompt in prompts]) if INIT_IMAGE.value else []
    opened = open_named()
    given = {"sampler": SAMPLER.value, "steps": STEPS.value, "guidance": GUIDANCE.value}
    sampling = dataclasses.replace(
        opened.sampling,
        **{name: value for name, value in given.items() if value is not None},
        eta=ETA.value,
        guidance_rescale=GUIDANCE_RESCALE.value,
        negative_prompt=NEGATIVE_PROMPT.value,
        strength=(0.8 if STRENGTH.value is None else STRENGTH.value) if begin_from else 1.0,
    )
    schedule = opened.pipeline.sampling_schedule
    sampling = dataclasses.replace(sampling, sampler=sampling.sampler or own_sampler(schedule))
    resolution = RESOLUTION.value or opened.resolution
    generator = opened.generator(sampling, resolution=resolution, batch_size=BATCH_SIZE.value)
    settings = {
        "model": opened.fingerprint,
        "prompts": hashlib.sha256("\n".join(prompt.text for prompt in prompts).encode()).hexdigest()[:16],
        "seed": SEED.value,
        "init_image": fingerprint(dict.fromkeys(begin_from)) if begin_from else "",
        **dataclasses.asdict(sampling),
        "resolution": resolution,
        "dtype": opened.pipeline.dtype.name,
        "vae_dtype": VAE_DTYPE.value,
    }
    begin_folder(OUTPUT.value, settings)

    other = other_fields(SAMPLER_OF_CLASS.get(schedule.class_name, ""), schedule)
    unlike = "".join(f", {field}={schedule.sampler_fields[field]!r}" for field in other)
    started = time.monotonic()
    with ProgressBar("images", quiet=not cluster.is_first()) as bar:
        bar.say(
            f"{len(entries)} images of {len(prompts)} prompts, {resolution} pixels, {generator.batch_size} at a time: "
            f"{sampling.sampler} (the model has {schedule.class_name}{unlike}), {sampling.steps} steps, "
            f"guidance {sampling.guidance:g}"
        )
        cut = opened.tokenizers.count_cut([prompt.text for prompt in prompts])
        if cut:
            bar.say(f"{cut} of {len(prompts)} prompts are longer than the model reads, and are cut off at their end")
        drawn = draw(
            generator,
            opened.unet,
            entries,
            OUTPUT.value,
            begin_from=[file for file in begin_from for _ in range(SEEDS.value)] or None,
            on_progress=lambda done, total: bar.show("drawing", done, total),
        )
    if cluster.is_first():
        before = f", {len(entries) - drawn} of them before" if drawn < len(entries) else ""
        print(f"{len(entries)} images in {OUTPUT.value}{before}; {drawn} in {time.monotonic() - started:.0f} s")


def open_named() -> Any:
    """The model or the run that the flags name."""
    if WORKDIR.value is not None:
        from dpo_jax.training.run import open_run

        run = open_run(WORKDIR.value, STEP.value, allow_nonfinite=ALLOW_NONFINITE.value)
        return run.load_model(lora=LORA.value, lora_scale=LORA_SCALE.value)
    import jax

    from dpo_jax.models.execution import Execution
    from dpo_jax.sampling.loaded_model import open_model

    return open_model(
        MODEL.value or "",
        lora=LORA.value,
        lora_scale=LORA_SCALE.value,
        dtype=DTYPE.value or ("float32" if jax.default_backend() == "cpu" else "bfloat16"),
        vae_dtype=VAE_DTYPE.value,
        execution=Execution(attention=ATTENTION.value or "xla"),
        fsdp=FSDP.value,
        unet=UNET.value,
        vae=VAE.value,
        family=FAMILY.value,
        model_config=MODEL_CONFIG.value,
        revision=REVISION.value,
        variant=VARIANT.value,
        allow_nonfinite=ALLOW_NONFINITE.value,
    )


if __name__ == "__main__":
    cli.run(main)
