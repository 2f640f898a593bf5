"""Tells in words when a run goes wrong, what is best so far, when to stop early, and how the run ended."""

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from ml_collections import ConfigDict

from dpo_jax.cli import flatten
from dpo_jax.training.figures import score_figure

Row = Mapping[str, float]
"""Figures of one step, as in metrics.jsonl."""

FIGURES = {
    "pair_accuracy": ("validation/pair_accuracy", 1),
    "winner_error": ("validation/error_winner", -1),
    "vote_accuracy": ("validation/vote_accuracy", 1),
}
"""Figures of held-out pairs that runs and checkpoints are compared by: name in metrics.jsonl, and 1 if higher is
better, otherwise -1."""
JUDGE = "judge"
"""In place of one of `FIGURES`: the mean score of the image grids by `sample.judge`."""
REPEAT = 1000
"""Steps after which a warning of one kind may be repeated."""
MANY_VALIDATIONS = 5
"""Validations after the warm-up, all without a preference, after which a warning says so."""
FLAT, EXTREME = 4.0, 0.95
"""An image is blank if no channel's standard deviation is above FLAT (of 255), and saturated if more than this share
of its values are within 2 of black or white. Images are alike if their standard deviation is below FLAT."""


def figure_of(metric: str, judge: str) -> tuple[str, int]:
    """Return the name in metrics.jsonl of one of `FIGURES` or of `JUDGE`, and 1 if higher is better, otherwise -1.

    Args:
        metric: value of `early_stop.metric` or `checkpoint.best`.
        judge: value of `sample.judge`.
    """
    return (score_figure(judge), 1) if metric == JUDGE else FIGURES[metric]


class Watch:
    """Looks at the figures and samples of a run.

    Args:
        config: of the run.
        validations: figures of held-out pairs by step, which the run adds to. Only process 0 has those of before a
            resume, so all decisions are process 0's.
        say: prints a line.
        samples: scores of the image grids by step, as `validations`.
    """

    def __init__(
        self,
        config: ConfigDict,
        validations: Mapping[int, Row],
        say: Callable[[str], None],
        samples: Mapping[int, Row] | None = None,
    ):
        self.config, self.validations, self.say = config, validations, say
        self.samples = {} if samples is None else samples
        self._told: dict[str, int] = {}
        """The step at which a warning of each kind was given last."""

    def trained(self, step: int, figures: Row) -> None:
        """Warn if the winner's error has risen in training."""
        self._tell_rise(step, figures.get("error/winner_rise", 0.0), "the reference's", "training data")

    def since_start(self, figures: Row) -> dict[str, float]:
        """Return by what share the errors of held-out pairs have risen since step 0."""
        first = self.validations.get(0, {})
        names = [f"validation/error_{who}" for who in ("winner", "loser")]
        return {
            f"{name}_since_start": figures[name] / first[name] - 1
            for name in names
            if name in figures and first.get(name, 0.0) > 0
        }

    def validated(self, step: int) -> None:
        """Warn if the winner's error has risen on held-out pairs, or if nothing is learned."""
        row = self.validations.get(step, {})
        for name, than in (("rise", "the reference's"), ("since_start", "before training")):
            self._tell_rise(step, row.get(f"validation/error_winner_{name}", 0.0), than, "held-out data")
        later = [row for at, row in self.validations.items() if self.config.optimizer.warmup_steps < at <= step]
        number_of_images = self.config.data.get("candidates", 2)
        is_fixed = not self.config.moving_reference.every  # one that follows closely is no better than chance either
        is_chance = len(later) >= MANY_VALIDATIONS and all(_is_chance(row, number_of_images) for row in later)
        if is_fixed and is_chance:
            self._warn(
                "chance",
                step,
                f"accuracy on {' held-out '.join(_number(row))} is still "
                f"{row['validation/pair_accuracy']:.3g}, which chance alone would give. "
                f"Look at some {_number(row)[1]} to see that the labels are right; otherwise raise "
                f"optimizer.learning_rate or steps, or prepare more {_number(row)[1]}",
            )

    def sampled(self, step: int, blank: int, count: int, file: object) -> None:
        """Warn if samples are blank or saturated that were not so before training."""
        if blank:
            self._warn(
                "blank",
                step,
                f"{blank} of {count} samples are of one colour, saturated or all alike, unlike those that they are "
                f"compared with: see {file}. The model is damaged. In a new --workdir, {remedy(self.config)}",
            )

    def best(self, metric: str, steps: Iterable[int]) -> int:
        """Return the step of the best figure among these steps, the earliest of equals; -1 if there is none."""
        values = {step: value for step, value in self._values(metric).items() if step in set(steps) and step}
        return max(values, key=lambda step: (values[step], -step), default=-1)

    def stop_reason(self, step: int) -> str:
        """Return why a run should stop early after this step; empty if it should not."""
        metric, patience = self.config.early_stop.metric, self.config.early_stop.patience
        values = {at: value for at, value in self._values(metric).items() if at <= step} if metric else {}
        if not values:
            return ""
        best = max(values, key=lambda at: (values[at], -at))
        since = sum(at > best for at in values)
        if since < patience:
            return ""
        name, _ = figure_of(metric, self.config.sample.judge)
        value = self._rows(metric)[best][name]
        what, looks = f"{metric} on held-out data", "validations"
        if metric == JUDGE:
            what, looks = f"the mean score of the samples by {self.config.sample.judge}", "grids"
        return (
            f"{what} was best {_when(best)} ({value:.4g}) and not better in the {since} {looks} since. To continue, "
            "run the same command with a larger early_stop.patience"
        )

    def verdict(self, trained: Row) -> str:
        """Return how the run ended, as the end of a sentence; empty if no figure tells.

        Args:
            trained: the last figures of training, used if there are none of held-out pairs.
        """
        row = self.validations[max(self.validations)] if self.validations else {}
        found = []
        rises = {
            "the reference's": row.get("validation/error_winner_rise", trained.get("error/winner_rise")),
            "before training": row.get("validation/error_winner_since_start"),
        }
        told = next(((than, rise) for than, rise in rises.items() if rise is not None), None)
        if told:
            found.append(f"the winner's error is {_compared(told[1], told[0])}")
        if "validation/pair_accuracy" in row:
            of = f" ({' '.join(_number(row))})" if _number(row)[1] else ""
            found.append(f"held-out accuracy {row['validation/pair_accuracy']:.3g}{of}")
        if "validation/vote_accuracy" in row:
            votes = row["validation/votes"]
            found.append(f"held-out accuracy {row['validation/vote_accuracy']:.3g} ({votes:.0f} votes)")
        if scores := self.scores(max(self.samples, default=0)):
            found.append(f"mean score of the samples by {self.config.sample.judge}: {scores}")
        text = "; ".join(found)
        if told and self._is_too_high(told[1]):
            text += (
                f". The model denoises preferred images worse than before. In a new --workdir, {remedy(self.config)}"
            )
        return text

    def scores(self, step: int) -> str:
        """Return the judge's scores of a step's image grid in words; empty if there are none."""
        row, judge = self.samples.get(step, {}), self.config.sample.judge
        if not judge or score_figure(judge) not in row:
            return ""
        compared = [
            f"{whose} {row[score_figure(judge, whose)]:.4g}"
            for whose in ("reference", "base")
            if score_figure(judge, whose) in row
        ]
        return f"{row[score_figure(judge)]:.4g} ({', '.join(compared)})"

    def _rows(self, metric: str) -> Mapping[int, Row]:
        return self.samples if metric == JUDGE else self.validations

    def _values(self, metric: str) -> dict[int, float]:
        """Return the figures by step, so that higher is better; one that is not finite is worse than all others."""
        figure, sign = figure_of(metric, self.config.sample.judge)
        found = {step: sign * row[figure] for step, row in self._rows(metric).items() if figure in row}
        return {step: value if math.isfinite(value) else -math.inf for step, value in found.items()}

    def _is_too_high(self, rise: float) -> bool:
        bound = self.config.monitor.winner_rise
        return bool(bound) and rise > bound

    def _tell_rise(self, step: int, rise: float, than: str, where: str) -> None:
        if self._is_too_high(rise):
            self._warn(
                "winner",
                step,
                f"the winner's error is {_compared(rise, than)} on {where}, so the model gets worse at the images that "
                f"it should prefer. In a new --workdir, {remedy(self.config)}",
            )

    def _warn(self, kind: str, step: int, message: str) -> None:
        if kind not in self._told or step >= self._told[kind] + REPEAT:
            self._told[kind] = step
            self.say(f"warning: step {step}: {message}")


def remedy(config: ConfigDict) -> str:
    """Return what to change so that the policy moves less, as the end of a sentence."""
    fields = flatten(config)
    changes = [f"lower optimizer.learning_rate (now {fields['optimizer.learning_rate']:g})"]
    if "loss.beta" in fields:
        changes.append(f"raise loss.beta (now {fields['loss.beta']:g})")
    if fields.get("loss.safeguard") == "none":
        changes.append("set loss.safeguard=pair")
    elif "loss.safeguard" in fields:
        changes.append(f"raise loss.safeguard_margin (now {fields['loss.safeguard_margin']:g})")
    return " or ".join(changes)


def is_blank(images_NHWC: np.ndarray) -> np.ndarray:
    """Return bool [N]: which uint8 images are of one colour, or saturated."""
    is_flat = images_NHWC.std(axis=(1, 2), dtype=np.float32).max(axis=-1) < FLAT
    is_extreme = (images_NHWC <= 2) | (images_NHWC >= 253)
    return np.asarray(is_flat | (is_extreme.mean(axis=(1, 2, 3)) > EXTREME))


def count_blank(images_NHWC: np.ndarray, compared_NHWC: np.ndarray) -> int:
    """Return how many uint8 images are blank, or the same as all others, unlike those that they are compared with."""
    if _are_alike(images_NHWC) and not _are_alike(compared_NHWC):
        return len(images_NHWC)
    return int((is_blank(images_NHWC) & ~is_blank(compared_NHWC)).sum())


def _are_alike(images_NHWC: np.ndarray) -> bool:
    return len(images_NHWC) > 1 and bool(images_NHWC.std(axis=0, dtype=np.float32).mean() < FLAT)


def _number(row: Row) -> tuple[str, str]:
    """Return the number of held-out examples with an order, and what they are; empty if the row does not say."""
    units = [unit for unit in ("pairs", "prompts") if f"validation/{unit}" in row]
    return (f"{row[f'validation/{units[0]}']:.0f}", units[0]) if units else ("", "")


def _is_chance(row: Row, number_of_images: int) -> bool:
    """Return whether the accuracy is within the 95% interval of guessing, for lists of this many images or for pairs.

    The variance of a list is that of Kendall's tau of a random order, over 4; for pairs it is 1/4.
    """
    K, accuracy = number_of_images, row.get("validation/pair_accuracy", math.nan)
    examples = float(_number(row)[0] or 0)
    deviation = 0.5 * math.sqrt(2 * (2 * K + 5) / (9 * K * (K - 1)))
    return examples > 0 and abs(accuracy - 0.5) <= 1.96 * deviation / math.sqrt(examples)


def _compared(rise: float, than: str) -> str:
    """Return, for example, "12.0% above the reference's"; `than` is "the reference's" or a time."""
    what = than if than.startswith("the ") else f"its value {than}"
    if rise >= 1:
        return f"{1 + rise:,.3g} times {what}"
    if abs(rise) < 0.0005:
        return f"equal to {what}"
    return f"{abs(rise):.1%} {'above' if rise > 0 else 'below'} {what}"


def _when(step: int) -> str:
    return f"at step {step}" if step else "before training"
