"""Weights of latent cells, from the mask beside an image: what is white in it counts.

Axes: H x W pixels, h x w latent cells.
"""

import numpy as np
from jaxtyping import Float

from dpo_jax.data import images


def cell_weights(
    mask: images.ImageBytes, view: images.View, shape: images.Shape, pixels: int, floor: float
) -> Float[np.ndarray, "h w"] | None:
    """Return the weight of each cell with a mean of 1; None if all of them are 0.

    A cell counts as much as its pixels are white on average, grey ones partly.

    Args:
        mask: the image file of the mask, with the size of its image.
        view: the view of its image, which the mask shares.
        shape: height and width of what the view cuts.
        pixels: pixels along the side of a latent cell.
        floor: weight of black, where white has 1.

    Raises:
        DamagedImage: the mask cannot be read.
    """
    crop_HWC = np.empty((*shape, 3), np.uint8)
    images.read(mask, view, crop_HWC)
    white_hw = crop_HWC.reshape(shape[0] // pixels, pixels, shape[1] // pixels, pixels, 3).mean(axis=(1, 3, 4)) / 255
    weight_hw = floor + (1 - floor) * (white_hw[:, ::-1] if view.flip else white_hw)
    return weight_hw / weight_hw.mean() if weight_hw.any() else None
