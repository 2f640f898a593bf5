"""Two models, the same prompts and seeds, one judge.

Axes: P prompts, S seeds of each, H x W pixels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from dpo_jax.evaluation.winrate import win_rate
from dpo_jax.rewards import REWARDS
from dpo_jax.weights.layout import Params

Generate = Callable[[Params, Sequence[str], Sequence[int]], np.ndarray]


def compare(
    generate: Generate, base: Params, tuned: Params, prompts: Sequence[str], *, seeds: int, reward: str
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Figures of the comparison, and the images [P, S, H, W, 3] of base and tuned.

    Every prompt and seed has a starting noise of its own, which both models share.
    """
    if reward not in REWARDS:
        raise ValueError(f"reward {reward!r}; the judges are {', '.join(REWARDS)}")
    P, S = len(prompts), seeds
    captions = [prompt for prompt in prompts for _ in range(S)]
    images, scores = {}, {}
    for name, params in {"base": base, "tuned": tuned}.items():
        flat = generate(params, captions, range(P * S))
        images[name] = flat.reshape(P, S, *flat.shape[1:])
        scores[name] = np.asarray(REWARDS[reward](flat, captions)).reshape(P, S)
    rate = win_rate(scores["tuned"], scores["base"])
    figures = {
        "win_rate": rate.rate,
        "win_rate_low": rate.low,
        "win_rate_high": rate.high,
        "ties": rate.ties,
        "comparisons": rate.comparisons,
        "base_score": float(scores["base"].mean()),
        "tuned_score": float(scores["tuned"].mean()),
    }
    return figures, images["base"], images["tuned"]


def read_prompts(path: epath.PathLike) -> list[str]:
    """One prompt a line; empty lines are skipped. Raises ValueError when there is none."""
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no file of prompts at {path}; write one prompt a line")
    prompts = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{path} has no prompt; write one prompt a line")
    return prompts
