"""Diversity and drift, which win rates do not show: does a model draw nearly the same image for every seed, and how far
has it moved from the base?

Both are distances between features of images. The features of `thumbnails` need no network, and contain only colours
and layout. Those of a CLIP contain what an image shows.

Axes: N images, D features.
"""

import numpy as np
from PIL import Image

from dpo_jax.rewards import Images

SIDE = 8
"""Height and width of a thumbnail, in pixels."""


def thumbnails(images: Images) -> np.ndarray:
    """Return features_ND of uint8 images [H, W, 3]: the pixels of their thumbnails, D = 3 SIDE^2, from 0 to 1."""
    small = [Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX) for image in images]
    return np.stack([np.asarray(image, np.float64).ravel() / 255 for image in small])


def diversity(features_ND: np.ndarray, prompt_N: np.ndarray) -> float | None:
    """Return the mean distance between two images of one prompt, over prompts with several images; None without any."""
    distances = []
    for prompt in np.unique(prompt_N):
        of_prompt = features_ND[prompt_N == prompt]
        first, second = np.triu_indices(len(of_prompt), k=1)
        if len(first):
            distances.append(np.linalg.norm(of_prompt[first] - of_prompt[second], axis=1).mean())
    return float(np.mean(distances)) if distances else None


def frechet_distance(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    """Return the squared Fréchet distance between two sets of features, both taken as normal distributions.

    FID (Heusel et al., arXiv 1706.08500, equation 6) is this distance between features of an Inception network. It is
    biased upwards, the more so the fewer images there are: compare models only on equal numbers of images.
    """
    mean = float(np.square(a_ND.mean(0) - b_ND.mean(0)).sum())
    a_ND, b_ND = ((x - x.mean(0)) / np.sqrt(max(len(x) - 1, 1)) for x in (a_ND, b_ND))
    # The trace of (A B)^(1/2), for covariances A = a' a and B = b' b, is the sum of the singular values of a b'. This
    # holds for any such a and b, so also for triangular ones, which have at most D rows.
    a, b = (np.asarray(np.linalg.qr(x_ND, mode="r")) for x_ND in (a_ND, b_ND))
    shared = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return max(0.0, mean + float(np.square(a_ND).sum() + np.square(b_ND).sum() - 2 * shared))
