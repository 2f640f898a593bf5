"""Asks judges in a run of several processes."""

from collections.abc import Sequence

import numpy as np

from dpo_jax import cluster
from dpo_jax.rewards import Images, Judge


def ask_together(judges: Sequence[Judge], images: Images, captions: Sequence[str]) -> np.ndarray:
    """Return the scores [R, N] of R judges for N images, the same on all processes, which all have the images.

    External judges may be random and cost money, so only process 0 calls them.
    """
    scores_RN = np.zeros((len(judges), len(captions)), np.float32)

    def ask(*, is_outside: bool) -> None:
        for r, judge in enumerate(judges):
            if judge.is_outside == is_outside:
                scores_RN[r] = judge.score(images, captions)

    with cluster.together("asking its judges"):
        if cluster.is_first():
            ask(is_outside=True)
    ask(is_outside=False)  # networks may lie on the devices of all processes
    return cluster.says_first(scores_RN)
