"""Guards a run against exploiting its judges: its scores rise while what nobody trains on gets worse.

The functions here read the history of the rounds and nothing else, so a resumed run comes to the same conclusions. Each
figure of a round (a judge's scores, the diversity) is compared with that of the first round, whose images the model
drew before any training.

Axes: P prompts of a round.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dpo_jax.training.watch import remedy

WARNED, ENDED = 3.0, 4.0
"""Standard errors that a fall must exceed for a warning, and for ending the run: rounds have few prompts, and runs
hundreds of rounds."""
DIVERSITY = "diversity"


class RoundFigures(NamedTuple):
    """Figures of one round, each with one value per prompt: the mean over its images. NaN where it is unknown."""

    prompts: Sequence[str]
    trained: Mapping[str, np.ndarray]
    """Scores [P] of each judge that the run trains on."""
    watched: Mapping[str, np.ndarray]
    """Scores [P] of each judge that is only watched."""
    diversity_P: np.ndarray | None = None
    """Mean distance between two images of a prompt; None if every prompt has one image."""


class Change(NamedTuple):
    """How far a figure is from its value in the first round."""

    name: str
    first: float
    now: float
    share: float
    """The difference as a share of the mean in the first round, or of its standard deviation over prompts if that is
    larger, as with judges whose scores are about 0."""
    error: float
    """The standard error of the difference, in the same unit."""
    is_in_deviations: bool = False
    """Whether that unit is the standard deviation."""

    def has_fallen(self, bound: float, errors: float) -> bool:
        """Whether it has fallen by more than `bound` and this many standard errors; never if the bound is 0."""
        return bool(bound) and -self.share > max(bound, errors * self.error)

    def __str__(self) -> str:
        size = f"{abs(self.share):.3g} standard deviations" if self.is_in_deviations else f"{abs(self.share):.1%}"
        who = "the diversity" if self.name == DIVERSITY else self.name
        return f"{who} {'fell' if self.share < 0 else 'rose'} by {size} ({self.first:.4g} to {self.now:.4g})"


class Bounds(NamedTuple):
    """How much may be lost."""

    watched: float
    """Share of the value in the first round that watched judges may lose; 0 for no bound."""
    diversity: float
    """The same of the diversity."""
    errors: float
    """Standard errors that a smaller loss may be of whatever the shares are."""


class Alarm(NamedTuple):
    """The figures of one round that mean that the judges are being exploited."""

    risen: list[Change]
    """The judges that the run trains on and whose scores are higher than in the first round."""
    fallen: list[Change]
    """The watched judges and the diversity that have fallen past their bounds; never empty."""

    def __str__(self) -> str:
        risen, fallen = (" and ".join(map(str, found)) for found in self)
        return f"since round 1, {fallen}, while {risen}"


class Verdict(NamedTuple):
    """The conclusions from the rounds so far."""

    best: int
    """The round with the best images."""
    warning: str = ""
    """What goes wrong since this round, in words; empty if nothing does."""
    stop: str = ""
    """Why the run should end, in words; empty if it should not."""


def verdict(config: ConfigDict, history: Sequence[RoundFigures]) -> Verdict:
    """Return the conclusions from the rounds so far, the last of which is not trained on yet.

    A warning is of what was not past its bound in the round before.
    """
    online, best, last = config.online, best_round(history), len(history) - 1
    falls = Bounds(online.watched_fall, online.diversity_fall, WARNED)
    stops = Bounds(online.watched_stop, online.diversity_stop, ENDED)
    if ended := alarm(history, last, stops):
        fields = " or ".join(f"--config.online.{field}" for field in _stops(ended))
        return Verdict(
            best,
            stop=f"{ended}. {_exploits(ended)}. To continue, run the same command with a larger {fields}; to do "
            f"better, {_remedy(config, ended)}",
        )
    known = alarm(history, last - 1, falls) if last else None
    told = {each.name for each in known.fallen} if known else set()
    new = alarm(history, last, falls)
    new = new and new._replace(fallen=[each for each in new.fallen if each.name not in told])
    if not new or not new.fallen:
        return Verdict(best)
    ends = [f"{field}={online[field]:g}" for field in _stops(new) if online[field]]
    past = f". The run ends past online.{' or online.'.join(ends)}" if ends else ""
    return Verdict(best, f"round {last + 1}: {new}. {_exploits(new)}. To do better, {_remedy(config, new)}{past}")


def _exploits(found: Alarm) -> str:
    return f"The model may exploit {' and '.join(each.name for each in found.risen)}, and its images get worse"


def _stops(found: Alarm) -> list[str]:
    """Return the fields of `config.online` with the bounds past which the run ends."""
    return list(dict.fromkeys("diversity_stop" if each.name == DIVERSITY else "watched_stop" for each in found.fallen))


def _remedy(config: ConfigDict, found: Alarm) -> str:
    """Return what to change, as the end of a sentence."""
    judges = [each.name for each in found.fallen if each.name != DIVERSITY]
    also = f", or add {' and '.join(judges)} to online.judges" if judges else ""
    return f"in a new --workdir {remedy(config)}{also}"


def change(name: str, first: tuple[Sequence[str], np.ndarray], now: tuple[Sequence[str], np.ndarray]) -> Change | None:
    """Compare the values of two rounds, given as prompts and values [P]; None if one round has none.

    The standard error is over prompts. Where at least half of the prompts are in both rounds, these alone are compared,
    each with itself: prompts differ more from one another than from round to round.
    """
    before, after = _by_prompt(*first), _by_prompt(*now)
    shared = [prompt for prompt in before if prompt in after]
    if not before or not after:
        return None
    is_paired = 2 * len(shared) >= max(len(before), len(after))
    if is_paired:
        x_P, y_P = (np.array([found[prompt] for prompt in shared]) for found in (before, after))
        error = _standard_error(y_P - x_P)
    else:
        x_P, y_P = (np.array(list(found.values())) for found in (before, after))
        error = float(np.hypot(_standard_error(x_P), _standard_error(y_P)))
    old, new = float(x_P.mean()), float(y_P.mean())
    spread = float(x_P.std())
    unit = max(abs(old), spread) or 1.0
    return Change(name, old, new, (new - old) / unit, error / unit, spread > abs(old))


def changes(history: Sequence[RoundFigures], number: int) -> tuple[list[Change], list[Change]]:
    """Return how the judges that are trained on, and how the watched judges and the diversity of a round have changed.

    Args:
        history: the figures of the rounds.
        number: the round that is compared with the first one.
    """
    first, now = history[0], history[number]

    def compared(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> list[Change]:
        both = [name for name in before if name in after]
        found = [change(name, (first.prompts, before[name]), (now.prompts, after[name])) for name in both]
        return [each for each in found if each is not None]

    diversity = []
    if first.diversity_P is not None and now.diversity_P is not None:
        diversity = compared({DIVERSITY: first.diversity_P}, {DIVERSITY: now.diversity_P})
    return compared(first.trained, now.trained), [*compared(first.watched, now.watched), *diversity]


def alarm(history: Sequence[RoundFigures], number: int, bounds: Bounds) -> Alarm | None:
    """Return what has fallen past its bound in a round, while a judge has risen that the run trains on; else None."""
    trained, watched = changes(history, number)
    risen = [each for each in trained if each.share > 0]
    bound = {each.name: bounds.diversity if each.name == DIVERSITY else bounds.watched for each in watched}
    fallen = [each for each in watched if each.has_fallen(bound[each.name], bounds.errors)]
    return Alarm(risen, fallen) if risen and fallen else None


def best_round(history: Sequence[RoundFigures]) -> int:
    """Return the round with the best images by the watched judges, or by those trained on if none is watched.

    Several judges count by the mean of their changes. Of equal rounds the earliest is returned.
    """
    has_watched = bool(history[0].watched)

    def quality(number: int) -> float:
        trained, watched = changes(history, number)
        shares = [each.share for each in (watched if has_watched else trained) if each.name != DIVERSITY]
        return float(np.mean(shares)) if shares else 0.0

    return max(range(len(history)), key=lambda number: (quality(number), -number))


def _by_prompt(prompts: Sequence[str], values_P: np.ndarray) -> dict[str, float]:
    """Return the mean of each prompt that has a value; a round may have a prompt more than once."""
    found: dict[str, list[float]] = {}
    for prompt, value in zip(prompts, values_P, strict=True):
        if not np.isnan(value):
            found.setdefault(prompt, []).append(float(value))
    return {prompt: float(np.mean(values)) for prompt, values in found.items()}


def _standard_error(values_P: np.ndarray) -> float:
    """Return the standard error of the mean; infinite for a single value, which tells nothing about its noise."""
    return float(values_P.std(ddof=1) / np.sqrt(len(values_P))) if len(values_P) > 1 else np.inf
