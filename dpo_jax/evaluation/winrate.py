"""How often one side is preferred to another, with an interval that does not flatter.

Images of one prompt are not independent: what a model draws well for one seed it draws well for the next. So intervals
are bootstrapped over whole prompts (Efron and Tibshirani 1993, percentile method; clusters: Cameron and Miller 2015).

Axes: P prompts, S seeds of each.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax.errors import UserError

RESAMPLES = 10_000
CONFIDENCE = 0.95


class WinRate(NamedTuple):
    """Share of comparisons won, ties counting half, with its 95% interval."""

    rate: float
    low: float
    high: float
    ties: int
    """Number of comparisons that neither side won."""
    comparisons: int


def rate_over_prompts(wins: Sequence[np.ndarray]) -> WinRate:
    """Win rate over prompts that count alike, however many comparisons each has.

    Args:
        wins: for each prompt, of each comparison: 1 if it was won, 0 if it was lost, 0.5 for a tie.

    Raises ValueError for fewer than two prompts, which have no interval.
    """
    mean, low, high = mean_over_prompts(wins)
    outcomes = np.concatenate(wins)
    return WinRate(mean, low, high, int((outcomes == 0.5).sum()), outcomes.size)


def mean_over_prompts(values: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """The mean over prompts of what each prompt's values are on average, and its 95% interval; see above.

    The same values have the same interval: the resamples are drawn from a fixed seed.
    """
    P = len(values)
    if P < 2:
        raise UserError(f"an interval over prompts needs at least 2 prompts, not {P}")
    mean_P = np.array([of_prompt.mean() for of_prompt in values])
    drawn_RP = np.random.default_rng(0).multinomial(P, np.full(P, 1 / P), size=RESAMPLES)
    low, high = np.quantile(drawn_RP @ mean_P / P, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(mean_P.mean()), float(low), float(high)
