"""Compares models: who draws what judges prefer, how often, and how sure that is.

  python -m dpo_jax.evaluate --models=base=stabilityai/stable-diffusion-xl-base-1.0,tuned=exported/sdxl \\
      --prompts=bundled --judges=pickscore,aesthetic=models/sac+logos+ava1-l14-linearMSE.safetensors --output=evaluation
  python -m dpo_jax.evaluate --images=base=DIR_A,midjourney=DIR_B --prompts=PartiPrompts.tsv --judges=pickscore \\
      --output=evaluation

The first draws the same prompts from the same seeds by each model (a folder, hub id, single file, or the work directory
of a training run); the second compares images that are there, such as those of `dpo_jax.sample` or of other programs.
Each model is compared with those named before it. The folder --output receives report.html, result.json, the images
(images/MODEL/) and all scores (scores/); the same command again goes on where it stopped.
"""

import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from etils import epath

from dpo_jax import cli, locks
from dpo_jax.errors import UserError
from dpo_jax.rewards import find_judge
from dpo_jax.sampling.prompts import BUNDLED

if TYPE_CHECKING:
    from dpo_jax.sampling.loaded_model import LoadedModel
    from dpo_jax.sampling.prompts import Prompt

MODELS = flags.DEFINE_list("models", [], "Models to draw with, the base first: FOLDER_OR_ID_OR_FILE or NAME=...")
STEP = flags.DEFINE_string(
    "step",
    "",
    "For work directories in --models: the step whose checkpoint to draw with, or best: the one with the highest "
    "accuracy on held-out pairs (for SFT, the lowest error). Default: the newest. To compare checkpoints of one run, "
    "draw with dpo_jax.sample --step=N and compare the folders with --images.",
)
IMAGES = flags.DEFINE_list("images", [], "Instead of them: folders of images, FOLDER or NAME=FOLDER.")
PROMPTS = flags.DEFINE_string(
    "prompts",
    None,
    "Prompts, one a line; also .jsonl, .tsv, .csv, .json, .parquet, a folder of them, or one of our lists: "
    f"{', '.join(BUNDLED)}.",
)
JUDGES = flags.DEFINE_list("judges", None, "Judges, NAME or NAME=what it is opened from.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Folder for the report.", required=True)
SEEDS = flags.DEFINE_integer("seeds", 4, "Images of each prompt, from seeds that follow each other.", 1, 2**16)
SEED = flags.DEFINE_integer(
    "seed", 10**6, "The first; far from those that training images are drawn from.", 0, 2**32 - 1
)
STEPS = flags.DEFINE_integer("steps", None, "Denoising steps. By default what the first model is drawn with.", 1)
GUIDANCE = flags.DEFINE_float("guidance", None, "Classifier-free guidance scale, likewise.", 0)
SAMPLER = flags.DEFINE_enum(
    "sampler", None, ["ddim", "euler", "euler_ancestral", "dpmsolver++", "lcm"], "Sampler, likewise."
)
RESOLUTION = flags.DEFINE_integer("resolution", None, "Pixels, height and width, likewise.", 1, 2**14)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Images drawn or judged at a time.", 1, 2**16)
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Of models and judges. By default bfloat16, on CPUs float32."
)
FEATURES = flags.DEFINE_string(
    "features", "thumbnails", "What diversity and drift are distances of: thumbnails, or clip=FOLDER_OR_ID."
)
ALLOW_NONFINITE = flags.DEFINE_bool(
    "allow_nonfinite", False, "Draw also with weights that hold NaN or infinity, and judge black images."
)
CURVES = flags.DEFINE_list("curves", [], "Work directories of training runs whose curves the report shows.")
SINCE = flags.DEFINE_float("since", None, "Unix time that `seconds` counts from; by default this command's start.")


def main() -> None:
    since = SINCE.value or time.time()
    if bool(MODELS.value) == bool(IMAGES.value):
        raise UserError("give either --models or --images, one of the two")
    named = name_all(MODELS.value or IMAGES.value)
    if len(named) < 2:
        raise UserError(f"--{'models' if MODELS.value else 'images'} names one; give two or more to compare")
    if MODELS.value and not PROMPTS.value:
        raise UserError("--prompts is missing; name a file of prompts, or a list as in --prompts=bundled")
    if SEED.value + SEEDS.value > 2**32:
        raise UserError(f"--seed={SEED.value} with --seeds={SEEDS.value} goes past the last seed, {2**32 - 1}")
    for spec in JUDGES.value:
        find_judge(spec)
    if FEATURES.value != "thumbnails" and not FEATURES.value.startswith("clip="):
        raise UserError(f"--features={FEATURES.value}: take thumbnails, or clip=FOLDER_OR_ID")
    with locks.locked_early(OUTPUT.value, "python -m dpo_jax.evaluate"):
        from dpo_jax import cluster  # after the flags are checked: importing JAX takes seconds

        cluster.join()
        with cluster.leaving_at_once(), cluster.locked(OUTPUT.value, "python -m dpo_jax.evaluate"):
            evaluate(named, since)


def evaluate(named: dict[str, str], since: float) -> None:
    import jax

    from dpo_jax import cluster
    from dpo_jax.evaluation.compare import compare, match
    from dpo_jax.evaluation.html_report import write_report
    from dpo_jax.evaluation.judge import features_of, judge_all
    from dpo_jax.files import write_whole
    from dpo_jax.progress import ProgressBar
    from dpo_jax.rewards import Settings, open_judge
    from dpo_jax.sampling.prompts import distinct, read_prompts
    from dpo_jax.training.metrics import last_validation, read_metrics
    from dpo_jax.training.select_step import select_step
    from dpo_jax.training.startup import keep_compiled_programs

    output = epath.Path(OUTPUT.value)
    keep_compiled_programs(output)  # models of one structure share them
    dtype = DTYPE.value or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    prompts = read_prompts(PROMPTS.value, repeated=True) if PROMPTS.value else []
    with ProgressBar("images", quiet=not cluster.is_first()) as bar:
        settings: dict[str, Any] = {}
        folders = named
        trained = [source for source in named.values() if MODELS.value and is_run(source)]
        steps = {workdir: select_step(workdir, STEP.value) for workdir in trained}
        if STEP.value and not trained:
            raise UserError("--step goes with a work directory of a training run, and --models names none")
        if MODELS.value:
            for spec in JUDGES.value:  # what is missing is told before hours of drawing; opened again by `judge_all`
                open_judge(spec, dtype=dtype, batch_size=BATCH_SIZE.value)
            folders = {name: str(output / "images" / name) for name in named}
            settings = draw_all(named, folders, distinct(prompts), steps, dtype, bar)
        contest = match(folders, prompts)
        how = Settings(dtype, BATCH_SIZE.value)
        scores = judge_all(JUDGES.value, how, contest, output / "scores", bar.show)
        features = features_of(FEATURES.value, how, contest, bar.show)
    result = compare(contest, scores, features) | {"features": FEATURES.value, "settings": settings}
    runs = [*CURVES.value, *(source for source in named.values() if is_run(source))]
    result |= summary(result) | {"pair_accuracy": None, "pair_accuracy_step": None}
    for run in runs:
        validation = last_validation(run, steps.get(run))
        result["pair_accuracy"] = validation.get("validation/pair_accuracy")
        result["pair_accuracy_step"] = validation.get("step")
    result["seconds"] = time.time() - since
    if not cluster.is_first():
        return
    curves = {Path(run).name: read_metrics(run) for run in runs}
    write_report(output / "report.html", result, contest, scores, settings, curves)
    write_whole(output / "result.json", json.dumps(result, indent=2) + "\n")
    tell(result, output)


def name_all(specs: list[str]) -> dict[str, str]:
    """NAME=SOURCE, or the last part of the source for a name; names that come twice are refused."""
    named: dict[str, str] = {}
    for spec in specs:
        name, equals, source = spec.partition("=")
        source = source if equals else spec
        name = name if equals else spec.rstrip("/").rpartition("/")[2]
        if not source or not name or "/" in name or name in named:
            raise UserError(f"{spec}: the name {name!r} is empty, taken or has a slash; give one as in NAME={source}")
        named[name] = source
    return named


def is_run(source: str) -> bool:
    """Whether it is the work directory of a training run."""
    return (epath.Path(source) / "checkpoints").exists()


def draw_all(
    named: dict[str, str],
    folders: dict[str, str],
    prompts: "list[Prompt]",
    steps: dict[str, int | None],
    dtype: str,
    bar: Any,
) -> dict[str, Any]:
    """Draws the prompts by each model into its folder, all in the way of the first but for what flags say.

    Of work directories the checkpoints of `steps` are drawn with; None is the newest.
    """
    from dpo_jax.diffusion.samplers import own_sampler
    from dpo_jax.sampling.draw import begin_folder, draw, list_entries

    entries = list_entries(prompts, SEED.value, SEEDS.value)
    given = {"sampler": SAMPLER.value, "steps": STEPS.value, "guidance": GUIDANCE.value}
    changed: dict[str, Any] = {field: value for field, value in given.items() if value is not None}
    settings: dict[str, Any] = {}
    models: dict[str, str] = {}
    sampling, resolution = None, RESOLUTION.value
    # A model that can't be opened is told before the first one draws; of runs, opening reads the weights at once.
    ready = {name: open_any(source, dtype) for name, source in named.items() if not is_run(source)}
    for name, source in named.items():
        opened = ready.pop(name, None) or open_any(source, dtype, steps.get(source))
        sampling = sampling or dataclasses.replace(opened.sampling, **changed)
        resolution = resolution or opened.resolution
        own = own_sampler(opened.pipeline.sampling_schedule)
        sampling = dataclasses.replace(sampling, sampler=sampling.sampler or own)
        generator = opened.generator(sampling, resolution=resolution, batch_size=BATCH_SIZE.value)
        settings = {**dataclasses.asdict(sampling), "resolution": resolution, "dtype": dtype}
        models[name] = opened.fingerprint  # of a run it tells the step
        begin_folder(folders[name], {"model": models[name], "seed": SEED.value, **settings})
        show = functools.partial(bar.show, f"drawing by {name}")
        draw(generator, opened.unet, entries, folders[name], on_progress=show)
    return settings | {"models": models}


def open_any(source: str, dtype: str, step: int | None = None) -> "LoadedModel":
    """A model, or that of a training run at a step, by default the newest."""
    from dpo_jax.sampling.loaded_model import open_model
    from dpo_jax.training.run import open_run

    allow = ALLOW_NONFINITE.value
    if is_run(source):
        return open_run(source, str(step or ""), allow_nonfinite=allow).load_model()
    return open_model(source, dtype=dtype, allow_nonfinite=allow)


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """The first judge's figures of the second model over the first, at the top level."""
    judged = next(iter(result["judges"].values()))
    first = judged["win_rates"][0]
    return {
        "win_rate": first["rate"],
        "win_rate_low": first["low"],
        "win_rate_high": first["high"],
        "ties": first["ties"],
        "comparisons": first["comparisons"],
        "base_score": judged["models"][first["over"]]["mean"],
        "tuned_score": judged["models"][first["of"]]["mean"],
    }


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
    print()
    if result["pair_accuracy"] is not None:
        print(
            f"implicit accuracy on held-out pairs: {result['pair_accuracy']:.1%} "
            f"(after step {result['pair_accuracy_step']:.0f})"
        )
    print(f"seconds: {result['seconds']:.0f}\nfigures: {output / 'result.json'}\nreport:  {output / 'report.html'}")


if __name__ == "__main__":
    cli.run(main)
