"""How small a picture becomes as a JPEG: the rewards with a known answer of DDPO (arXiv 2305.13301) and D3PO."""

import io

import numpy as np
from PIL import Image

from dpo_jax.rewards import Score, Settings


def open_compressibility(source: str, settings: Settings) -> Score:
    """Higher is smoother."""
    return lambda pictures, captions: -np.asarray([kilobytes(picture) for picture in pictures], np.float32)


def open_incompressibility(source: str, settings: Settings) -> Score:
    """Higher is busier."""
    return lambda pictures, captions: np.asarray([kilobytes(picture) for picture in pictures], np.float32)


def kilobytes(picture_HWC: np.ndarray) -> float:
    """Thousands of bytes that Pillow needs at quality 95."""
    buffer = io.BytesIO()
    Image.fromarray(picture_HWC).save(buffer, format="JPEG", quality=95)
    return buffer.tell() / 1000
