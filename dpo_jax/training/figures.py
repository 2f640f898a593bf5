"""The figures that a run logs, from the means that its steps return: rises over the reference, and noise levels."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo_jax.methods.metrics import BY_NOISE, LOG_SNR_EDGES, WEIGHT_BY_NOISE

NOISE = "/noise_"
"""Begins the end of the names of figures of one noise level: `error/winner_rise/noise_1` is that of the least noise."""

SAMPLES = "samples/"
"""Begins the names of a judge's mean scores of the image grids."""


def score_figure(judge: str, whose: str = "policy") -> str:
    """Return the name of the mean score that a judge, given by its spec, gives to the images in a grid.

    Args:
        judge: for example `pickscore` or `python=module:function`.
        whose: whose images: "policy", or what it is compared with, "reference" or "base".
    """
    return f"{SAMPLES}{judge.partition('=')[0]}/{whose}"


def mean_of(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean of each number, or array of numbers, over the steps that have it."""
    names = dict.fromkeys(name for step in steps for name in step)
    return {name: np.mean([step[name] for step in steps if name in step], axis=0) for name in names}


def figures_of(means: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures to log from the mean numbers of steps, also by noise level.

    `error/winner_rise` and `error/loser_rise` are the policy's errors minus the reference's, as a share of the latter;
    `error/drift` is the mean squared difference of their predictions, as a share of the reference's error. All three
    are without a unit. Noise levels that were not drawn are left out.
    """
    found = _with_shares({name: float(value) for name, value in means.items() if not name.endswith(BY_NOISE)})
    for level in range(len(LOG_SNR_EDGES) + 1):
        weight = float(means[WEIGHT_BY_NOISE][level]) if WEIGHT_BY_NOISE in means else 0.0
        if weight > 0:
            of_level = {
                name.removesuffix(BY_NOISE): float(sums[level]) / weight
                for name, sums in means.items()
                if name.endswith(BY_NOISE) and name != WEIGHT_BY_NOISE
            }
            found |= {f"{name}{NOISE}{level + 1}": value for name, value in _with_shares(of_level).items()}
    return found


def validation_figures(means: Mapping[str, Any]) -> dict[str, float]:
    """Return the same figures of held-out pairs, under names that begin with `validation/`."""
    return {f"validation/{name.replace('/', '_')}": value for name, value in figures_of(means).items()}


def is_by_noise(name: str) -> bool:
    """Return whether a figure is of one noise level only."""
    return NOISE in name or NOISE.replace("/", "_") in name


def _with_shares(means: dict[str, float]) -> dict[str, float]:
    drift = means.pop("error/drift", None)
    references = [means[f"error/reference_{who}"] for who in ("winner", "loser") if f"error/reference_{who}" in means]
    for who in ("winner", "loser"):
        error, reference = means.get(f"error/{who}"), means.get(f"error/reference_{who}", 0.0)
        if error is not None and reference > 0:
            means[f"error/{who}_rise"] = error / reference - 1
    if drift is not None and min(references, default=0.0) > 0:
        means["error/drift"] = drift / float(np.mean(references))
    return means
