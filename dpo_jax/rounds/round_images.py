"""What the images of a round show, from their files: diversity, drift, and the best and worst of some prompts.

Axes: P prompts, K images of a prompt, N = P * K images, D features.
"""

from collections.abc import Sequence

import numpy as np
from etils import epath
from PIL import Image

from dpo_jax.data.image_grid import image_grid
from dpo_jax.data.images import read_image
from dpo_jax.evaluation.drift import diversity, thumbnails

SHOWN = 6
"""Most prompts whose best and worst images are shown."""


def features_of(files: Sequence[epath.Path]) -> np.ndarray | None:
    """Return features_ND of image files, as `thumbnails` makes them; None if a file is no longer there."""
    if not all(file.exists() for file in files):
        return None
    return np.concatenate([thumbnails([read_image(file)]) for file in files])


def diversity_of_prompts(features_ND: np.ndarray, prompts: Sequence[str]) -> list[float | None]:
    """Return the mean distance between two images of each prompt [P]; None for a prompt with one image.

    A prompt that the round has several times has the images of all of them.
    """
    prompt_N = np.repeat(np.array(prompts), len(features_ND) // len(prompts))
    found = {}
    for prompt in dict.fromkeys(prompts):
        of_prompt = features_ND[prompt_N == prompt]
        found[prompt] = diversity(of_prompt, np.zeros(len(of_prompt), int))
    return [found[prompt] for prompt in prompts]


def best_and_worst_images(
    files: Sequence[epath.Path], prompts: Sequence[str], scores_PK: np.ndarray
) -> Image.Image | None:
    """Return a grid of some prompts' best and worst images with their scores; None if no prompt has different scores.

    The prompts are those of the first positions in the round whose images differ in score; NaN is no score.
    """
    K, rows = scores_PK.shape[1], []
    for p, (prompt, scores_K) in enumerate(zip(prompts, scores_PK, strict=True)):
        if np.isnan(scores_K).all() or np.nanmax(scores_K) == np.nanmin(scores_K):
            continue
        ends = int(np.nanargmax(scores_K)), int(np.nanargmin(scores_K))
        caption = f"{prompt}: {scores_K[ends[0]]:.4g} and {scores_K[ends[1]]:.4g}"
        rows.append((caption, [read_image(files[p * K + k]) for k in ends]))
        if len(rows) == SHOWN:
            break
    return image_grid(rows, ["best", "worst"]) if rows else None
