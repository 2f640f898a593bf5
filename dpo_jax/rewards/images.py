"""Resizes and crops images exactly as the original implementations of the judges do.

Sizes and offsets are rounded as in the originals, and Pillow resamples the pixels, as there.

Axes: H x W pixels, C channels.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image

Fit = Callable[[np.ndarray, int], np.ndarray]
"""(uint8 image [H, W, 3], size) -> [size, size, 3] on the scale of 0 to 255, uint8 or float32."""


def crop_like_transformers(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """Scale the shorter side to `size` (bicubic) and crop the centre, as CLIPImageProcessor of transformers; uint8."""
    return _crop(image_HWC, size, lambda room: room // 2)


def crop_like_torchvision(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """Do the same as torchvision's Resize and CenterCrop, whose centre may lie one pixel further; uint8."""
    return _crop(image_HWC, size, lambda room: round(room / 2))


def letterbox(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """Scale the longer side to `size` (bicubic) and pad the shorter one with black on both sides, as HPSv2 does.

    The result is float32 and not clipped to 0..255, because the original scales a tensor: `ResizeMaxSize` of
    github.com/tgxs002/HPSv2, hpsv2/src/open_clip/transform.py, with torchvision 0.17 or later. Earlier versions of
    torchvision do not smooth when they shrink an image, and give other scores.
    """
    height, width = image_HWC.shape[:2]
    scale = size / max(height, width)
    new_height, new_width = max(round(height * scale), 1), max(round(width * scale), 1)
    resized_HWC = np.stack(
        [
            np.asarray(Image.fromarray(channel_HW).resize((new_width, new_height), Image.Resampling.BICUBIC))
            for channel_HW in np.moveaxis(image_HWC, 2, 0).astype(np.float32)
        ],
        axis=-1,
    )
    result_HWC = np.zeros((size, size, 3), np.float32)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    result_HWC[top : top + new_height, left : left + new_width] = resized_HWC
    return result_HWC


def _crop(image_HWC: np.ndarray, size: int, middle: Callable[[int], int]) -> np.ndarray:
    height, width = image_HWC.shape[:2]
    new_height, new_width = (int(size * side / min(height, width)) for side in (height, width))
    resized = Image.fromarray(image_HWC).resize((new_width, new_height), Image.Resampling.BICUBIC)
    top, left = middle(new_height - size), middle(new_width - size)
    return np.asarray(resized.crop((left, top, left + size, top + size)))
