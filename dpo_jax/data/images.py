"""Encoded images to pixels: what Pillow reads becomes upright RGB, then one square of the training resolution."""

import io
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps


class View(NamedTuple):
    """Where candidates of a prompt are cropped and whether they are mirrored; shared, so that no candidate is favoured.

    `top` and `left` are fractions in [0, 1) of the room that the resized image leaves; None takes the centre.
    """

    top: float | None = None
    left: float | None = None
    flip: bool = False


def decode(data: bytes) -> Image.Image:
    """The image as its EXIF orientation shows it, in RGB, transparent parts on white.

    Raises whatever Pillow's parsers raise for a damaged or truncated file.
    """
    image: Image.Image = Image.open(io.BytesIO(data))
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit(image: Image.Image, resolution: int, view: View) -> tuple[np.ndarray, tuple[int, int]]:
    """Resizes the shorter side to `resolution` and cuts a square: (pixels_HWC uint8, (crop top, crop left)).

    Bilinear (Pillow widens the filter when it shrinks an image), then flip, then crop, and the longer side rounded
    down: so do the official Diffusion-DPO trainer and diffusers' SDXL trainers. The offsets count resized pixels.
    """
    shorter = min(image.size)
    width, height = (int(resolution * side / shorter) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    if view.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    top, left = _offset(height - resolution, view.top), _offset(width - resolution, view.left)
    return np.asarray(image.crop((left, top, left + resolution, top + resolution))), (top, left)


def _offset(room: int, fraction: float | None) -> int:
    return round(room / 2) if fraction is None else int((room + 1) * fraction)
