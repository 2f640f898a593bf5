"""How small an image becomes as a JPEG: the rewards with a known answer of DDPO (arXiv 2305.13301) and D3PO."""

import io

import numpy as np
from PIL import Image

from dpo_jax.rewards import Reward, Settings


def open_compressibility(source: str, settings: Settings) -> Reward:
    """Higher is smoother."""
    return lambda images, captions: -np.asarray([kilobytes(image) for image in images], np.float32)


def open_incompressibility(source: str, settings: Settings) -> Reward:
    """Higher is busier."""
    return lambda images, captions: np.asarray([kilobytes(image) for image in images], np.float32)


def kilobytes(image_HWC: np.ndarray) -> float:
    """Thousands of bytes that Pillow needs at quality 95."""
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, format="JPEG", quality=95)
    return buffer.tell() / 1000
