"""Selects the checkpoint of a training run that a command reads: the newest, that of a step, or the best."""

import math
import sys
from typing import NotRequired

import numpy as np
from etils import epath
from typing_extensions import TypedDict

from dpo_jax import cluster
from dpo_jax.errors import UserError
from dpo_jax.files import read_json
from dpo_jax.streams import warn
from dpo_jax.training.checkpoint import finished_steps, read_config
from dpo_jax.training.figures import score_figure
from dpo_jax.training.metrics import is_of_samples, is_validation, read_metrics
from dpo_jax.training.watch import FIGURES, JUDGE, figure_of

BEST = "best"


def select_step(workdir: epath.PathLike, step: str) -> int | None:
    """Return the step that `--step` means: None for "" (the newest whole checkpoint), N, or `best_step` for "best".

    Raises:
        UserError: it is none of these, or the run has no such checkpoint; the message names those that there are.
    """
    if not step:
        return None
    if step == BEST:
        return int(cluster.says_first(np.array(best_step(workdir))))
    if not (step.isascii() and step.isdigit()):
        raise UserError(f"--step={step} is not a step; give its number, or --step=best")
    if int(step) not in finished_steps(workdir):
        raise UserError(f"--step={step}: {workdir} has no checkpoint of that step; {_steps_told(workdir)}")
    return int(step)


def best_step(workdir: epath.PathLike) -> int:
    """Return the kept checkpoint that is best by `checkpoint.best`, or by pair accuracy, the earliest of equals.

    Runs without pairs to order (SFT) are compared by the error of the held-out images, the lowest first; runs without
    held-out data by the judge's score of their samples. The result of a run of `dpo_jax.online` names its best round.
    Prints the step, and warns if another step, whose checkpoint was not kept, was better.

    Raises:
        UserError: the run has no such figures, or none of a step with a checkpoint.
    """
    kept, config = finished_steps(workdir), read_config(workdir) or {}
    if (step := _best_of_rounds(workdir)) is not None:
        return step
    rows = [
        {name: value for name, value in row.items() if math.isfinite(value)}  # NaN cannot be compared
        for row in read_metrics(workdir)
        if is_validation(row) or is_of_samples(row)
    ]
    first = config.get("checkpoint.best") or "pair_accuracy"
    judge = config.get("sample.judge", "")
    metrics = sorted([*FIGURES, *([JUDGE] if judge else [])], key=lambda metric: metric != first)
    wanted = [figure_of(metric, judge) for metric in metrics]
    figure, sign = next((found for found in wanted if any(found[0] in row for row in rows)), ("", 0))
    if not figure:
        raise UserError(
            f"--step=best: {workdir} has no figures of held-out data in metrics.jsonl; {_steps_told(workdir)}"
        )
    name = figure.removeprefix("validation/")
    what, figures = f"held-out {name}", "held-out figures"
    if figure == score_figure(judge):
        what = name = f"mean score of the samples by {judge}"
        figures = "scores of samples"
    values = {int(row["step"]): row[figure] for row in rows if figure in row}
    candidates = [step for step in kept if step in values]
    if not candidates:
        raise UserError(
            f"--step=best: {workdir} has {figures} of steps {_listed(values)}, but no checkpoint of these; "
            f"{_steps_told(workdir)}"
        )

    def quality(step: int) -> tuple[float, int]:
        return sign * values[step], -step

    best, overall = max(candidates, key=quality), max(values, key=quality)
    if cluster.is_first():
        print(f"step {best} has the best {what} of the checkpoints: {values[best]:.4g}", file=sys.stderr)
        if sign * values[overall] > sign * values[best]:
            when = f"step {overall}" if overall else "step 0, before training"
            warn(f"{name} was better at {when} ({values[overall]:.4g}), but there is no checkpoint of that step")
    return best


class _Best(TypedDict):
    round: int
    step: int


class _BestOfRounds(TypedDict):
    """The part of the result of `dpo_jax.online` that names the best round."""

    best: NotRequired[_Best]


def _best_of_rounds(workdir: epath.PathLike) -> int | None:
    """Return the step of the checkpoint that drew the best round's images; None if the run's result names none."""
    file = epath.Path(workdir) / "result.json"
    found: _BestOfRounds = read_json(file, _BestOfRounds) if file.exists() else {}
    if "best" not in found:
        return None
    number, step = found["best"]["round"] + 1, found["best"]["step"]
    if step not in finished_steps(workdir):
        why = "the model drew them before training" if not step else f"there is no checkpoint of step {step}"
        raise UserError(
            f"--step=best: the best images of {workdir} are those of round {number}, but {why}; {_steps_told(workdir)}"
        )
    if cluster.is_first():
        print(f"step {step} drew the best images, those of round {number}", file=sys.stderr)
    return step


def _steps_told(workdir: epath.PathLike) -> str:
    kept = finished_steps(workdir)
    return f"its checkpoints are of steps {_listed(kept)}" if kept else "it has no checkpoint yet"


def _listed(steps: "list[int] | dict[int, float]") -> str:
    return ", ".join(map(str, sorted(steps)))
