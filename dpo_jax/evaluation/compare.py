"""Two models, the same prompts and seeds, one judge.

Axes: P prompts, S seeds of each, H x W pixels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from dpo_jax.evaluation.winrate import win_rate
from dpo_jax.rewards import Scorer
from dpo_jax.weights.layout import Params

FIRST_SEED = 10**6
"""Far from the seeds that anyone samples training images with, so that held-out prompts get held-out noise."""

Generate = Callable[[Params, Sequence[str], Sequence[int]], np.ndarray]


def judged_samples(
    generate: Generate, params: Params, prompts: Sequence[str], *, seeds: int, judge: Scorer
) -> tuple[np.ndarray, np.ndarray]:
    """Images [P, S, H, W, 3] of one model and the judge's scores_PS.

    Every prompt and seed has a starting noise of its own, the same for every model.
    """
    P, S = len(prompts), seeds
    captions = [prompt for prompt in prompts for _ in range(S)]
    images = generate(params, captions, range(FIRST_SEED, FIRST_SEED + P * S))
    scores_PS = judge.score(images, captions).reshape(P, S)
    return images.reshape(P, S, *images.shape[1:]), scores_PS


def compare(scores_PS: np.ndarray, base_scores_PS: np.ndarray) -> dict[str, Any]:
    """The figures of `result.json`: win rate of tuned over base with its interval, and both mean scores."""
    rate = win_rate(scores_PS, base_scores_PS)
    return {
        "win_rate": rate.rate,
        "win_rate_low": rate.low,
        "win_rate_high": rate.high,
        "ties": rate.ties,
        "comparisons": rate.comparisons,
        "base_score": float(base_scores_PS.mean()),
        "tuned_score": float(scores_PS.mean()),
    }


def read_prompts(path: epath.PathLike) -> list[str]:
    """One prompt a line; empty lines are skipped. Raises ValueError when there is none."""
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no file of prompts at {path}; write one prompt a line")
    prompts = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{path} has no prompt; write one prompt a line")
    return prompts
