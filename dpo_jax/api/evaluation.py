"""Comparison of models, as a function."""

import dataclasses
import datetime
import functools
import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from dpo_jax import __version__
from dpo_jax.api.models import is_run, load_model
from dpo_jax.errors import MissingFileError, UserError
from dpo_jax.rewards import find_judge

if TYPE_CHECKING:
    from dpo_jax.rewards import Settings
    from dpo_jax.sampling.loaded_model import LoadedModel
    from dpo_jax.sampling.prompts import Prompt

Named = Mapping[str, str] | Sequence[str]
"""Sources by name, or sources that are named by the last part of their path; also texts NAME=SOURCE."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """The models to compare, and how; the fields are the arguments of `evaluate`, or the flags of the command."""

    output: str
    judges: Sequence[str]
    models: Sequence[str] = ()
    images: Sequence[str] = ()
    prompts: Sequence[str] = ()
    step: str = ""
    seeds: int = 4
    seed: int = 10**6
    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    resolution: int | None = None
    batch_size: int = 8
    dtype: str | None = None
    features: str = "thumbnails"
    allow_nonfinite: bool = False
    curves: Sequence[str] = ()
    since: float | None = None


def evaluate(
    models: Named = (),
    *,
    judges: str | Sequence[str],
    output: epath.PathLike,
    prompts: str | Sequence[str] = (),
    images: Named = (),
    curves: Named = (),
    step: int | str = "",
    **options: Any,
) -> dict[str, Any]:
    """Compare models, or images that exist: which one draws what judges prefer, how often, and how certain that is.

    The same call continues after an interruption.

        result = dpo_jax.evaluate(
            {"base": "stabilityai/stable-diffusion-xl-base-1.0", "mine": "runs/mine"},
            prompts="bundled", judges=["pickscore"], output="evaluation", step="best",
        )
        print(result["win_rate"], result["win_rate_low"], result["win_rate_high"])

    Args:
        models: models to draw with, the base first: folders, hub ids, single files or training runs, by name.
        judges: judges, NAME or NAME=SOURCE, as `dpo_jax evaluate --help` lists them.
        output: folder for the report, the images and the scores.
        prompts: one or several prompts, files of prompts, or lists that come with dpo_jax.
        images: in place of models, folders of images by name.
        curves: further training runs whose curves the report shows, by name.
        step: for training runs: the step whose checkpoint to draw with, "best", or "" for the newest.
        options: `seeds`, `seed`, `sampler`, `steps`, `guidance`, `resolution`, `batch_size`, `dtype`, `features` and
            `allow_nonfinite`, as the flags of `dpo_jax.evaluate`.

    Returns:
        What OUTPUT/result.json holds: the win rate of the second model over the first with its 95% interval
        ("win_rate", "win_rate_low", "win_rate_high"), and all figures of all judges ("judges").

    Raises:
        UserError: something that will be needed is missing or cannot be used; this is checked before anything is drawn.
    """
    request = Request(
        models=_specs(models),
        judges=[judges] if isinstance(judges, str) else list(judges),
        output=str(output),
        prompts=[prompts] if isinstance(prompts, str) else list(prompts),
        images=_specs(images),
        curves=_specs(curves),
        step=str(step),
        **options,
    )
    check(request)
    from dpo_jax import cluster

    with cluster.locked(request.output, "python -m dpo_jax.evaluate"):
        return compare_models(request)


def _specs(named: Named) -> list[str]:
    return [f"{name}={source}" for name, source in named.items()] if isinstance(named, Mapping) else list(named)


def check(request: Request) -> None:
    """Raise a UserError for a request that cannot be met, as far as can be told without JAX."""
    if bool(request.models) == bool(request.images):
        raise UserError("give either --models or --images, and not both")
    named = name_all(request.models or request.images)
    if len(named) < 2:
        raise UserError(f"--{'models' if request.models else 'images'} names only one; give two or more to compare")
    if request.models and not request.prompts:
        raise UserError("--prompts is missing; name a file of prompts, or a list as in --prompts=bundled")
    if request.seed + request.seeds > 2**32:
        raise UserError(f"--seed={request.seed} with --seeds={request.seeds} goes past the largest seed, {2**32 - 1}")
    if not request.judges:
        raise UserError("--judges is missing; name one or more, for example --judges=pickscore")
    for spec in request.judges:
        find_judge(spec)
    if request.features != "thumbnails" and not request.features.startswith("clip="):
        raise UserError(f"--features={request.features} must be thumbnails or clip=FOLDER_OR_ID")
    name_all(request.curves)


def compare_models(request: Request) -> dict[str, Any]:
    """Compare the models or the folders of images of a request that `check` has accepted, and write the report."""
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

    output = epath.Path(request.output)
    since = request.since or time.time()
    named, runs = name_all(request.models or request.images), name_all(request.curves)
    keep_compiled_programs(output)  # models of one structure share them
    dtype = request.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    how = Settings(dtype, request.batch_size)
    prompts = given_prompts(list(request.prompts), repeated=True)
    for run in runs.values():
        if not read_metrics(run):
            raise MissingFileError(f"--curves={run} is not a training run: it has no metrics.jsonl with figures")
    with ProgressBar("images", quiet=not cluster.is_first()) as bar:
        settings: dict[str, Any] = {}
        folders = named
        trained = [source for source in named.values() if request.models and is_run(source)]
        steps = {run: select_step(run, request.step) for run in trained}
        if request.step and not trained:
            raise UserError(
                "--step goes with training runs, but --models names none; leave it out, or name a work directory"
            )
        if request.models:
            folders = {name: str(output / "images" / name) for name in named}
            prompts = distinct(prompts)
            check_prompts(prompts)
            settings = draw_all(request, named, folders, prompts, steps, how, bar)
            contest = match(folders, prompts)
        else:
            contest = match(folders, prompts)
            first = read_image(next(iter(contest.images.values()))[0])
            check_judges(request.judges, request.features, how, first, contest.captions[0])
        scores = judge_contest(request.judges, how, contest, output / "scores", bar.show)
        features = features_of(request.features, how, contest, bar.show)
    runs |= {name: source for name, source in named.items() if is_run(source)}
    metrics = {name: read_metrics(run) for name, run in runs.items()}
    result = compare(contest, scores, features)
    result |= {"features": request.features, "sources": named, "settings": settings}
    result |= {"version": __version__, "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"}
    result |= summary(result) | accuracies(runs, steps)
    result["seconds"] = time.time() - since
    if cluster.is_first():
        write_report(output / "report.html", result, contest, scores, settings, metrics)
        write_whole(output / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def name_all(specs: Sequence[str]) -> dict[str, str]:
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


def check_prompts(prompts: "list[Prompt]") -> None:
    """Refuse fewer prompts than an interval over prompts needs, before anything is drawn."""
    if len(prompts) < 2:
        only = repr(prompts[0].text)
        raise UserError(f"--prompts gives only one prompt ({only}), too few for confidence intervals; give two or more")


def draw_all(
    request: Request,
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

    entries = list_entries(prompts, request.seed, request.seeds)
    settings: dict[str, Any] = {}
    loaded: dict[str, LoadedModel] = {}

    def load(source: str) -> "LoadedModel":
        allow = request.allow_nonfinite
        if is_run(source):  # runs have their own dtype
            step = steps.get(source)
            return load_model(source, step="" if step is None else step, allow_nonfinite=allow)
        return load_model(source, dtype=how.dtype, allow_nonfinite=allow)

    for name, source in named.items():
        model = load(source)
        if not settings:
            sampling = model.sampling_with(sampler=request.sampler, steps=request.steps, guidance=request.guidance)
            resolution = request.resolution or model.resolution
            settings = {**dataclasses.asdict(sampling), "resolution": resolution, "dtype": how.dtype}
        model.generator(sampling, resolution=resolution, batch_size=request.batch_size)
        check_folder(folders[name], {"model": model.fingerprint, "seed": request.seed, **settings})
        if not is_run(source):  # the weights of a run are read when it is opened and would fill the memory
            loaded[name] = model
    del model
    grey = np.full((resolution, resolution, 3), 128, np.uint8)
    check_judges(request.judges, request.features, how, grey, prompts[0].text)
    fingerprints: dict[str, str] = {}
    for name, source in named.items():
        model = loaded.pop(name) if name in loaded else load(source)
        fingerprints[name] = model.fingerprint  # for a run it contains the step
        begin_folder(folders[name], {"model": model.fingerprint, "seed": request.seed, **settings})
        generator = model.generator(sampling, resolution=resolution, batch_size=request.batch_size)
        show = functools.partial(bar.show, f"drawing by {name}")
        draw(generator, model.denoiser, entries, folders[name], on_progress=show)
    return settings | {"models": fingerprints}


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
