"""Compare models: which one's images do judges prefer, how often, and how certain is that?

  python -m dpo_jax.evaluate --models=base=stabilityai/stable-diffusion-xl-base-1.0,tuned=exported/sdxl \\
      --prompts=bundled --judges=pickscore,aesthetic=models/sac+logos+ava1-l14-linearMSE.safetensors --output=evaluation
  python -m dpo_jax.evaluate --images=base=DIR_A,midjourney=DIR_B --prompts=PartiPrompts.tsv --judges=pickscore \\
      --output=evaluation

The first command draws the same prompts with the same seeds by each model (a folder, hub id, single file, or the work
directory of a training run). The second compares existing images, made by `dpo_jax.sample` or by other programs. Each
model is compared with every model named before it, as "tuned over base". --output receives report.html, result.json,
the images (images/MODEL/) and all scores (scores/). The same command continues where it stopped.
"""

import time
from typing import Any

from absl import flags
from etils import epath

from dpo_jax import cli, locks
from dpo_jax.api.evaluation import Request, check, compare_models
from dpo_jax.command_help import section
from dpo_jax.rewards import JUDGES as JUDGE_KINDS
from dpo_jax.sampling.prompts import BUNDLED, FORMS

section("Models or images to compare")
MODELS = flags.DEFINE_list("models", [], "Models to compare, the base first: FOLDER_OR_ID_OR_FILE or NAME=...")
STEP = flags.DEFINE_string(
    "step",
    "",
    "Checkpoint of the training runs in --models: a step, or best, which is the one with the highest accuracy on "
    "held-out pairs (for SFT, the lowest error). Default: the latest. To compare checkpoints of one run, draw with "
    "dpo_jax.sample --step=N and compare the folders with --images.",
)
IMAGES = flags.DEFINE_list(
    "images", [], "Folders of existing images, FOLDER or NAME=FOLDER; an alternative to --models."
)
PROMPTS = flags.DEFINE_multi_string(
    "prompts",
    [],
    f"A prompt, {FORMS}, or a list that comes with dpo_jax: {', '.join(BUNDLED)}. May be repeated. A text file has one "
    "prompt per line. A value with a slash or a file's ending is always a path. Required with --models.",
)

section("Judges and output")
JUDGES = flags.DEFINE_list(
    "judges",
    None,
    "Judges, NAME or NAME=SOURCE.\n" + "\n".join(f"{name}: {kind.help}" for name, kind in JUDGE_KINDS.items()),
    required=True,
)
OUTPUT = flags.DEFINE_string("output", None, "Folder for the report, the images and the scores.", required=True)

section("Drawing, with --models")
SEEDS = flags.DEFINE_integer("seeds", 4, "Images per prompt, with consecutive seeds.", 1, 2**16)
SEED = flags.DEFINE_integer(
    "seed", 10**6, "First seed; the default is far from the seeds that training images are drawn with.", 0, 2**32 - 1
)
STEPS = flags.DEFINE_integer("steps", None, "Denoising steps. Default: those of the first model.", 1)
GUIDANCE = flags.DEFINE_float("guidance", None, "Classifier-free guidance scale. Default: that of the first model.", 0)
SAMPLER = flags.DEFINE_enum(
    "sampler",
    None,
    ["ddim", "euler", "euler_ancestral", "dpmsolver++", "lcm", "flow_euler", "flow_sde", "flow_cps"],
    "Sampler. Default: that of the first model.",
)
RESOLUTION = flags.DEFINE_integer(
    "resolution", None, "Height and width in pixels. Default: those of the first model.", 1, 2**14
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Images drawn or judged at a time.", 1, 2**16)
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16"],
    "Compute dtype of models and judges. Default: bfloat16; float32 on CPUs.",
)
ALLOW_NONFINITE = flags.DEFINE_bool(
    "allow_nonfinite", False, "Draw even if weights contain NaN or infinity; the images may be black."
)

section("Report")
FEATURES = flags.DEFINE_string(
    "features", "thumbnails", "Features that diversity and drift are measured in: thumbnails, or clip=FOLDER_OR_ID."
)
CURVES = flags.DEFINE_list(
    "curves",
    [],
    "Training runs whose curves the report shows, WORKDIR or NAME=WORKDIR; the name of a model uses its "
    "colour. Runs among --models are shown without this.",
)
SINCE = flags.DEFINE_float("since", None, "Unix time from which `seconds` is counted. Default: the command's start.")


def main() -> None:
    request = Request(
        output=OUTPUT.value,
        judges=JUDGES.value,
        models=MODELS.value,
        images=IMAGES.value,
        prompts=PROMPTS.value,
        step=STEP.value,
        seeds=SEEDS.value,
        seed=SEED.value,
        sampler=SAMPLER.value,
        steps=STEPS.value,
        guidance=GUIDANCE.value,
        resolution=RESOLUTION.value,
        batch_size=BATCH_SIZE.value,
        dtype=DTYPE.value,
        features=FEATURES.value,
        allow_nonfinite=ALLOW_NONFINITE.value,
        curves=CURVES.value,
        since=SINCE.value or time.time(),
    )
    check(request)
    with locks.locked_early(OUTPUT.value, "python -m dpo_jax.evaluate"):
        from dpo_jax import cluster  # after the flags are checked: importing JAX takes seconds

        cluster.join()
        with cluster.leaving_at_once(), cluster.locked(OUTPUT.value, "python -m dpo_jax.evaluate"):
            result = compare_models(request)
            if cluster.is_first():
                tell(result, epath.Path(OUTPUT.value))


def tell(result: dict[str, Any], output: epath.Path) -> None:
    from dpo_jax.evaluation.winrate import describe_win_rate, win_rate_in

    images, prompts = result["images"], result["prompts"]
    print(f"{images} images per model ({prompts} prompts); ties count 1/2; 95% confidence intervals")
    for judge, judged in result["judges"].items():
        print(f"\n{judge}")
        for row in judged["win_rates"]:
            print(f"  {describe_win_rate(row['of'], row['over'], win_rate_in(row))}, {row['ties']} ties")
        for name, model in judged["models"].items():
            print(f"  {name}: mean score {model['mean']:.4g} [{model['low']:.4g}, {model['high']:.4g}]")
            if model["categories"]:
                by_category = ", ".join(
                    f"{c} {of_category['mean']:.4g}" for c, of_category in model["categories"].items()
                )
                print(f"    {by_category}; mean of the categories {model['mean_of_categories']:.4g}")
    print()
    for name, of_run in result["pair_accuracies"].items():
        print(f"{name}: implicit accuracy on held-out pairs {of_run['accuracy']:.1%} (step {of_run['step']:.0f})")
    print(f"seconds: {result['seconds']:.0f}\nfigures: {output / 'result.json'}\nreport:  {output / 'report.html'}")


if __name__ == "__main__":
    cli.run(main)
