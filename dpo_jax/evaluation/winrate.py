"""Win rates with confidence intervals, and the one way they are written.

Images of one prompt are not independent: a model that draws one seed of a prompt well often draws the others well too.
The intervals are therefore bootstrapped over whole prompts (Efron and Tibshirani 1993, percentile method; clusters:
Cameron and Miller 2015).

A win rate is always that of the model named later over the model named earlier, "tuned over base", so that more than
50% means that the later one is better.

Axes: P prompts, R resamples.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.errors import UserError

RESAMPLES = 10_000
CONFIDENCE = 0.95


class WinRate(NamedTuple):
    """The share of comparisons that one model wins over another (ties count 1/2), with its 95% confidence interval."""

    rate: float
    low: float
    high: float
    ties: int
    """The number of comparisons that neither model won."""
    comparisons: int

    def reverse(self) -> "WinRate":
        """Return the win rate of the other model over this one."""
        return self._replace(rate=1 - self.rate, low=1 - self.high, high=1 - self.low)

    def __str__(self) -> str:
        """For example "61.8% [57.2%, 66.3%]"."""
        return f"{self.rate:.1%} [{self.low:.1%}, {self.high:.1%}]"


def win_rate_in(fields: Mapping[str, Any]) -> WinRate:
    """Return the win rate of a row of result.json, which has its fields among others."""
    return WinRate(**{name: fields[name] for name in WinRate._fields})


def describe_win_rate(of: str, over: str, win_rate: WinRate) -> str:
    """Return for example "tuned over base: win rate 61.8% [57.2%, 66.3%]"."""
    return f"{of} over {over}: win rate {win_rate}"


def verdict(of: str, over: str, win_rate: WinRate, by: str) -> str:
    """Return a sentence that says which model is preferred, and whether the difference is clear.

    A difference is clear if the confidence interval does not contain 50%. The rate in the sentence is that of the model
    that it names first.

    Args:
        of: the model whose win rate it is.
        over: the model that it was compared with.
        win_rate: of the first over the second.
        by: who compared them: a judge, or "raters".
    """
    if win_rate.low <= 0.5 <= win_rate.high:
        return f"There is no clear difference by {by}: {describe_win_rate(of, over, win_rate)}."
    if win_rate.rate < 0.5:
        of, over, win_rate = over, of, win_rate.reverse()
    return f"{of} is clearly preferred over {over} by {by}: win rate {win_rate}."


def rate_over_prompts(wins: Sequence[np.ndarray]) -> WinRate:
    """Return the win rate, averaged within each prompt first, so that every prompt has the same weight.

    Args:
        wins: one array per prompt with one value per comparison: 1 for a win, 0 for a loss, 0.5 for a tie.

    Raises UserError for fewer than two prompts, for which there is no interval.
    """
    mean, low, high = mean_over_prompts(wins)
    outcomes = np.concatenate(wins)
    return WinRate(mean, low, high, int((outcomes == 0.5).sum()), outcomes.size)


def mean_over_prompts(values: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Return the mean over prompts of each prompt's mean value, and the ends of its 95% confidence interval.

    The resamples are drawn from a fixed seed, so equal values give equal intervals. Raises UserError for fewer than two
    prompts.
    """
    P = len(values)
    if P < 2:
        raise UserError(f"a confidence interval over prompts needs at least 2 prompts, not {P}")
    mean_P = np.array([of_prompt.mean() for of_prompt in values])
    drawn_RP = np.random.default_rng(0).multinomial(P, np.full(P, 1 / P), size=RESAMPLES)
    low, high = np.quantile(drawn_RP @ mean_P / P, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(mean_P.mean()), float(low), float(high)
