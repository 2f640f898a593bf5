"""Weights of pairs in the loss, made of the scores that a judge gave to their images. Their mean is 1.

Axes: N pairs; 2: their better and their worse image.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np

PairWeights = Literal["none", "gap", "rarity"]

BINS = 50
"""Bins of equal width in the histogram of scores."""
MAX_RATIO = 10.0
"""Largest ratio of two weights by rarity; without it, a few pairs with unique scores would be most of the loss."""


def by_gap(scores_N2: np.ndarray) -> np.ndarray:
    """Return twice the share of the pairs whose gap is smaller; a pair with the same gap counts half.

    The gap is the score of the better image minus that of the worse one, so it is negative where the judge contradicts
    the label. Weights are between 0 and 2, and depend neither on the judge's unit nor on how far outliers lie.
    """
    gap_N = gaps(scores_N2)
    _, place_N, count = np.unique(gap_N, return_inverse=True, return_counts=True)
    smaller = np.cumsum(count) - count
    return ((2 * smaller + count) / len(gap_N))[place_N]


def by_rarity(scores_N2: np.ndarray) -> np.ndarray:
    """Return weights in inverse proportion to how often such scores occur, as VideoDPO does (arXiv 2412.14167).

    A pair occurs as often as the geometric mean of the shares of all scores that lie in the bins of its two scores.
    VideoDPO's code multiplies both shares, takes the histogram from a file that is not published, and has a constant in
    place of the mean; its exponent, `dupbeta`, is 1/2 here. The smallest weight is at least 1 / `MAX_RATIO` of the
    largest.
    """
    edges = np.linspace(scores_N2.min(), scores_N2.max(), BINS + 1)
    bin_N2 = np.clip(np.searchsorted(edges, scores_N2, side="right") - 1, 0, BINS - 1)
    often_N = np.sqrt(np.bincount(bin_N2.ravel(), minlength=BINS)[bin_N2].prod(axis=1))
    rare_N = 1 / np.maximum(often_N, often_N.max() / MAX_RATIO)
    return rare_N / rare_N.mean()


def gaps(scores_N2: np.ndarray) -> np.ndarray:
    """Return the score of the better image minus that of the worse one, in float64."""
    return scores_N2[:, 0].astype(np.float64) - scores_N2[:, 1]


WEIGHTS: dict[PairWeights, Callable[[np.ndarray], np.ndarray]] = {"gap": by_gap, "rarity": by_rarity}
