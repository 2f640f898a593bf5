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

import dataclasses
import datetime
import functools
import json
import time
from typing import TYPE_CHECKING, Any

from absl import flags
from etils import epath

from dpo_jax import __version__, cli, locks
from dpo_jax.errors import MissingFileError, UserError
from dpo_jax.rewards import JUDGES as JUDGE_KINDS
from dpo_jax.rewards import find_judge
from dpo_jax.sampling.prompts import BUNDLED, FORMS

if TYPE_CHECKING:
    from dpo_jax.rewards import Settings
    from dpo_jax.sampling.generate import Sampling
    from dpo_jax.sampling.loaded_model import LoadedModel
    from dpo_jax.sampling.prompts import Prompt

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
JUDGES = flags.DEFINE_list(
    "judges",
    None,
    "Judges, NAME or NAME=SOURCE.\n" + "\n".join(f"{name}: {kind.help}" for name, kind in JUDGE_KINDS.items()),
    required=True,
)
OUTPUT = flags.DEFINE_string("output", None, "Folder for the report, the images and the scores.", required=True)
SEEDS = flags.DEFINE_integer("seeds", 4, "Images per prompt, with consecutive seeds.", 1, 2**16)
SEED = flags.DEFINE_integer(
    "seed", 10**6, "First seed; the default is far from the seeds that training images are drawn with.", 0, 2**32 - 1
)
STEPS = flags.DEFINE_integer("steps", None, "Denoising steps. Default: those of the first model.", 1)
GUIDANCE = flags.DEFINE_float("guidance", None, "Classifier-free guidance scale. Default: that of the first model.", 0)
SAMPLER = flags.DEFINE_enum(
    "sampler",
    None,
    ["ddim", "euler", "euler_ancestral", "dpmsolver++", "lcm"],
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
FEATURES = flags.DEFINE_string(
    "features", "thumbnails", "Features that diversity and drift are measured in: thumbnails, or clip=FOLDER_OR_ID."
)
ALLOW_NONFINITE = flags.DEFINE_bool(
    "allow_nonfinite", False, "Draw even if weights contain NaN or infinity; the images may be black."
)
CURVES = flags.DEFINE_list(
    "curves",
    [],
    "Training runs whose curves the report shows, WORKDIR or NAME=WORKDIR; the name of a model uses its "
    "colour. Runs among --models are shown without this.",
)
SINCE = flags.DEFINE_float("since", None, "Unix time from which `seconds` is counted. Default: the command's start.")


def main() -> None:
    since = SINCE.value or time.time()
    if bool(MODELS.value) == bool(IMAGES.value):
        raise UserError("give either --models or --images, and not both")
    named = name_all(MODELS.value or IMAGES.value)
    if len(named) < 2:
        raise UserError(f"--{'models' if MODELS.value else 'images'} names only one; give two or more to compare")
    if MODELS.value and not PROMPTS.value:
        raise UserError("--prompts is missing; name a file of prompts, or a list as in --prompts=bundled")
    if SEED.value + SEEDS.value > 2**32:
        raise UserError(f"--seed={SEED.value} with --seeds={SEEDS.value} goes past the largest seed, {2**32 - 1}")
    for spec in JUDGES.value:
        find_judge(spec)
    if FEATURES.value != "thumbnails" and not FEATURES.value.startswith("clip="):
        raise UserError(f"--features={FEATURES.value} must be thumbnails or clip=FOLDER_OR_ID")
    runs = name_all(CURVES.value)
    with locks.locked_early(OUTPUT.value, "python -m dpo_jax.evaluate"):
        from dpo_jax import cluster  # after the flags are checked: importing JAX takes seconds

        cluster.join()
        with cluster.leaving_at_once(), cluster.locked(OUTPUT.value, "python -m dpo_jax.evaluate"):
            evaluate(named, runs, since)


def evaluate(named: dict[str, str], runs: dict[str, str], since: float) -> None:
    """Compare the named models or folders of images, and write the report.

    Args:
        named: what --models or --images names.
        runs: further training runs whose curves are shown, by name.
        since: Unix time from which seconds are counted.
    """
    import jax

    from dpo_jax import cluster
    from dpo_jax.data.images import read_image
    from dpo_jax.evaluation.compare import compare, match
    from dpo_jax.evaluation.html_report import write_report
    from dpo_jax.evaluation.judge_contest import check_judges, features_of, judge_contest
    from dpo_jax.files import write_whole
    from dpo_jax.progress import ProgressBar
    from dpo_jax.rewards import Settings
    from dpo_jax.sampling.prompts import distinct, given_prompts
    from dpo_jax.training.metrics import read_metrics
    from dpo_jax.training.select_step import select_step
    from dpo_jax.training.startup import keep_compiled_programs

    output = epath.Path(OUTPUT.value)
    keep_compiled_programs(output)  # models of one structure share them
    dtype = DTYPE.value or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    how = Settings(dtype, BATCH_SIZE.value)
    prompts = given_prompts(PROMPTS.value, repeated=True)
    for run in runs.values():
        if not read_metrics(run):
            raise MissingFileError(f"--curves={run} is not a training run: it has no metrics.jsonl with figures")
    with ProgressBar("images", quiet=not cluster.is_first()) as bar:
        settings: dict[str, Any] = {}
        folders = named
        trained = [source for source in named.values() if MODELS.value and is_run(source)]
        steps = {run: select_step(run, STEP.value) for run in trained}
        if STEP.value and not trained:
            raise UserError(
                "--step goes with training runs, but --models names none; leave it out, or name a work directory"
            )
        if MODELS.value:
            folders = {name: str(output / "images" / name) for name in named}
            prompts = distinct(prompts)
            check_prompts(prompts)
            settings = draw_all(named, folders, prompts, steps, how, bar)
            contest = match(folders, prompts)
        else:
            contest = match(folders, prompts)
            first = read_image(next(iter(contest.images.values()))[0])
            check_judges(JUDGES.value, FEATURES.value, how, first, contest.captions[0])
        scores = judge_contest(JUDGES.value, how, contest, output / "scores", bar.show)
        features = features_of(FEATURES.value, how, contest, bar.show)
    runs |= {name: source for name, source in named.items() if is_run(source)}
    metrics = {name: read_metrics(run) for name, run in runs.items()}
    result = compare(contest, scores, features)
    result |= {"features": FEATURES.value, "sources": named, "settings": settings}
    result |= {"version": __version__, "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"}
    result |= summary(result) | accuracies(runs, steps)
    result["seconds"] = time.time() - since
    if not cluster.is_first():
        return
    write_report(output / "report.html", result, contest, scores, settings, metrics)
    write_whole(output / "result.json", json.dumps(result, indent=2) + "\n")
    tell(result, output)


def name_all(specs: list[str]) -> dict[str, str]:
    """Return the sources by name, of NAME=SOURCE or SOURCE, whose name is its last part; names must differ."""
    named: dict[str, str] = {}
    for spec in specs:
        name, equals, source = spec.partition("=")
        if not equals or "/" in name:  # the equals sign is part of a path
            name, source = spec.rstrip("/").rpartition("/")[2], spec
        if not source or not name or name in named:
            raise UserError(f"the name {name!r} of {spec} is empty or already taken; give one as in NAME={source}")
        named[name] = source
    return named


def is_run(source: str) -> bool:
    """Whether it is the work directory of a training run."""
    return (epath.Path(source) / "checkpoints").exists()


def check_prompts(prompts: "list[Prompt]") -> None:
    """Refuse fewer prompts than an interval over prompts needs, before anything is drawn."""
    if len(prompts) < 2:
        only = repr(prompts[0].text)
        raise UserError(f"--prompts gives only one prompt ({only}), too few for confidence intervals; give two or more")


def draw_all(
    named: dict[str, str],
    folders: dict[str, str],
    prompts: "list[Prompt]",
    steps: dict[str, int | None],
    how: "Settings",
    bar: Any,
) -> dict[str, Any]:
    """Draw the prompts with each model into its folder; return the settings, which are the same for all models.

    Everything that could fail later is checked before: models, samplers, folders, judges and features. Training runs
    are drawn with at these steps, by work directory; None is the latest.
    """
    import numpy as np

    from dpo_jax.evaluation.judge_contest import check_judges
    from dpo_jax.sampling.draw import begin_folder, check_folder, draw, list_entries

    entries = list_entries(prompts, SEED.value, SEEDS.value)
    settings: dict[str, Any] = {}
    loaded: dict[str, LoadedModel] = {}
    for name, source in named.items():
        model = load_model(source, how.dtype, steps.get(source))
        if not settings:
            sampling, resolution = sampling_for(model)
            settings = {**dataclasses.asdict(sampling), "resolution": resolution, "dtype": how.dtype}
        model.generator(sampling, resolution=resolution, batch_size=BATCH_SIZE.value)
        check_folder(folders[name], {"model": model.fingerprint, "seed": SEED.value, **settings})
        if not is_run(source):  # a run's weights are read when it is opened, and would fill the memory
            loaded[name] = model
    del model
    grey = np.full((resolution, resolution, 3), 128, np.uint8)
    check_judges(JUDGES.value, FEATURES.value, how, grey, prompts[0].text)
    fingerprints: dict[str, str] = {}
    for name, source in named.items():
        model = loaded.pop(name) if name in loaded else load_model(source, how.dtype, steps.get(source))
        fingerprints[name] = model.fingerprint  # for a run it contains the step
        begin_folder(folders[name], {"model": model.fingerprint, "seed": SEED.value, **settings})
        generator = model.generator(sampling, resolution=resolution, batch_size=BATCH_SIZE.value)
        show = functools.partial(bar.show, f"drawing by {name}")
        draw(generator, model.unet, entries, folders[name], on_progress=show)
    return settings | {"models": fingerprints}


def sampling_for(model: "LoadedModel") -> "tuple[Sampling, int]":
    """Return how all models are sampled and the resolution: what the flags say, otherwise as this model is."""
    from dpo_jax.diffusion.samplers import own_sampler

    given = {"sampler": SAMPLER.value, "steps": STEPS.value, "guidance": GUIDANCE.value}
    changed: dict[str, Any] = {field: value for field, value in given.items() if value is not None}
    sampling = dataclasses.replace(model.sampling, **changed)
    sampling = dataclasses.replace(sampling, sampler=sampling.sampler or own_sampler(model.pipeline.sampling_schedule))
    return sampling, RESOLUTION.value or model.resolution


def load_model(source: str, dtype: str, step: int | None = None) -> "LoadedModel":
    """Return the loaded model of a folder, hub id or file, or of a training run at a step (by default the latest)."""
    from dpo_jax.sampling.loaded_model import open_model
    from dpo_jax.training.run import open_run

    allow = ALLOW_NONFINITE.value
    if is_run(source):
        return open_run(source, "" if step is None else str(step), allow_nonfinite=allow).load_model()
    return open_model(source, dtype=dtype, allow_nonfinite=allow)


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Return the first judge's figures of the second model over the first, for the top level of result.json."""
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


def accuracies(runs: dict[str, str], steps: dict[str, int | None]) -> dict[str, Any]:
    """Return the implicit accuracy of each run on its held-out pairs, at its step or the latest; and the last run's."""
    from dpo_jax.training.metrics import last_validation

    found: dict[str, Any] = {}
    for name, run in runs.items():
        validation = last_validation(run, steps.get(run))
        if "validation/pair_accuracy" in validation:
            found[name] = {"accuracy": validation["validation/pair_accuracy"], "step": validation["step"]}
    last = list(found.values())[-1] if found else {"accuracy": None, "step": None}
    return {"pair_accuracies": found, "pair_accuracy": last["accuracy"], "pair_accuracy_step": last["step"]}


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
    for name, of_run in result["pair_accuracies"].items():
        print(f"{name}: implicit accuracy on held-out pairs {of_run['accuracy']:.1%} (step {of_run['step']:.0f})")
    print(f"seconds: {result['seconds']:.0f}\nfigures: {output / 'result.json'}\nreport:  {output / 'report.html'}")


if __name__ == "__main__":
    cli.run(main)
