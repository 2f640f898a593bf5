"""The size of an image as a JPEG, as a reward: used by DDPO (arXiv 2305.13301) and D3PO."""

import io

import numpy as np
from PIL import Image

from dpo_jax.rewards import Reward, Settings


def open_compressibility(source: str, settings: Settings) -> Reward:
    """Return the reward for smooth images: minus the size in kB."""
    return lambda images, captions: -np.asarray([kilobytes(image) for image in images], np.float32)


def open_incompressibility(source: str, settings: Settings) -> Reward:
    """Return the reward for detailed images: the size in kB."""
    return lambda images, captions: np.asarray([kilobytes(image) for image in images], np.float32)


def kilobytes(image_HWC: np.ndarray) -> float:
    """Return the size in kB (1000 bytes) of the image as Pillow's JPEG of quality 95."""
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, format="JPEG", quality=95)
    return buffer.tell() / 1000
