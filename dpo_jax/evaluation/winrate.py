"""How often a judge prefers one model's image to another's, with an interval that does not flatter.

Axes: P prompts, S seeds of each.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class WinRate(NamedTuple):
    """Share of comparisons won, ties counting half, with its 95% interval."""

    rate: float
    low: float
    high: float
    ties: int
    """Number of comparisons that neither side won."""
    comparisons: int


def win_rate(scores_PS: np.ndarray, base_scores_PS: np.ndarray, confidence: float = 0.95) -> WinRate:
    """Win rate of `scores` over `base_scores`, compared prompt by prompt and seed by seed, as `rate_over_prompts`."""
    return rate_over_prompts((1 + np.sign(scores_PS - base_scores_PS)) / 2, confidence)


def rate_over_prompts(wins: Sequence[np.ndarray], confidence: float = 0.95) -> WinRate:
    """Win rate over prompts that count alike, however many comparisons each has.

    Images of one prompt are not independent: what a model draws well for one seed it draws well for the next. So the
    interval is Student's t over the prompts' own win rates (a cluster-robust interval, Cameron & Miller 2015), clipped
    to [0, 1]. It needs at least two prompts.

    Args:
        wins: for each prompt, of each comparison: 1 if it was won, 0 if it was lost, 0.5 for a tie.
    """
    P = len(wins)
    if P < 2:
        raise ValueError(f"an interval over prompts needs at least 2 prompts, not {P}")
    rate_P = np.array([of_prompt.mean() for of_prompt in wins])
    rate, error = rate_P.mean(), rate_P.std(ddof=1) / np.sqrt(P)
    half = error * stats.t.ppf((1 + confidence) / 2, df=P - 1)
    outcomes = np.concatenate(wins)
    ties = int((outcomes == 0.5).sum())
    return WinRate(float(rate), float(max(rate - half, 0)), float(min(rate + half, 1)), ties, outcomes.size)
