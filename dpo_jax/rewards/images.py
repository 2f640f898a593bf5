"""Images as the judges' originals show them to their networks, to the pixel.

Sizes and places are rounded as the originals round them, and pixels are resampled by Pillow, as theirs are.

Axes: H x W pixels, C channels.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image

Fit = Callable[[np.ndarray, int], np.ndarray]
"""(uint8 image [H, W, 3], size) -> [size, size, 3] on the scale of 0 to 255, uint8 or float32."""


def crop_like_transformers(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """The shorter side scaled to `size` (bicubic), then the middle: CLIPImageProcessor of transformers. uint8."""
    return _crop(image_HWC, size, lambda room: room // 2)


def crop_like_torchvision(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """The same by torchvision's Resize and CenterCrop, whose middle may lie a pixel further. uint8."""
    return _crop(image_HWC, size, lambda room: round(room / 2))


def letterbox(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """The longer side scaled to `size` (bicubic), black added to the shorter one on both sides: HPSv2's.

    float32, and not cut off at 0 and 255: the original scales a tensor. It does so by the `ResizeMaxSize` in
    github.com/tgxs002/HPSv2, hpsv2/src/open_clip/transform.py, under torchvision 0.17 or later, which smooths as it
    makes smaller; under earlier ones it doesn't, and scores differ.
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
