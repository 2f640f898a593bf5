"""What win rates don't show: whether a model draws ever the same, or has wandered far from where it began.

Both are distances between features of images. Those of `thumbnails` need no network and see colours and layout alone;
a CLIP's see what is in an image.

Axes: N images, D features.
"""

import numpy as np
from PIL import Image

from dpo_jax.rewards import Images

SIDE = 8
"""Of a thumbnail, in pixels."""


def thumbnails(images: Images) -> np.ndarray:
    """features_ND, D = 3 SIDE^2: the colours of parts of uint8 images [H, W, 3], from 0 to 1."""
    small = [Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX) for image in images]
    return np.stack([np.asarray(image, np.float64).ravel() / 255 for image in small])


def diversity(features_ND: np.ndarray, prompt_N: np.ndarray) -> float | None:
    """Mean distance between two images of one prompt, over the prompts with several; None where none has."""
    distances = []
    for prompt in np.unique(prompt_N):
        of_prompt = features_ND[prompt_N == prompt]
        first, second = np.triu_indices(len(of_prompt), k=1)
        if len(first):
            distances.append(np.linalg.norm(of_prompt[first] - of_prompt[second], axis=1).mean())
    return float(np.mean(distances)) if distances else None


def frechet_distance(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    """The squared Frechet distance between normal distributions with the means and covariances of two sets of features.

    FID (Heusel et al., arXiv 1706.08500, equation 6) is this of an Inception network's features. With few images it is
    too large, the more so the fewer: compare models only on equally many.
    """
    mean = float(np.square(a_ND.mean(0) - b_ND.mean(0)).sum())
    a_ND, b_ND = ((x - x.mean(0)) / np.sqrt(max(len(x) - 1, 1)) for x in (a_ND, b_ND))
    # The trace of (A B)^(1/2) for covariances A = a' a and B = b' b is the sum of the singular values of a b', for any
    # such a and b: so for the triangular ones too, which have no more than D rows.
    a, b = (np.asarray(np.linalg.qr(x_ND, mode="r")) for x_ND in (a_ND, b_ND))
    shared = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return max(0.0, mean + float(np.square(a_ND).sum() + np.square(b_ND).sum() - 2 * shared))
