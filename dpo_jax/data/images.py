"""Encoded images to pixels: what Pillow reads becomes upright RGB, then one square of the training resolution."""

import io
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")  # none that starts another program, as EPS does
MAX_PIXELS = 2**26  # 8192 x 8192
MAX_RATIO = 32  # `fit` resizes before it crops, so that a longer strip would take gigabytes

# Damage comes as an exception. Process-wide, because a filter set for the time of a call isn't safe among threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class View(NamedTuple):
    """Where candidates of a prompt are cropped and whether they are mirrored; shared, so that no candidate is favoured.

    `top` and `left` are fractions in [0, 1) of the room that the resized image leaves; None takes the centre.
    """

    top: float | None = None
    left: float | None = None
    flip: bool = False


class DamagedImage(ValueError):
    """The message is a short reason without sizes or names, so that the same damage counts as the same."""


def decode(data: bytes) -> Image.Image:
    """The image as its EXIF orientation shows it, in RGB, transparent parts on white, of an animation the first frame.

    16-bit grey is scaled to 8 bits. Colour profiles are ignored, as the trainers of diffusers do.

    Raises:
        DamagedImage: it is no image, damaged or truncated, too large or too narrow, or its values have no known range.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)  # reads no further than the header
        _check(image)
        image.load()
        image = _upright(image)
        if image.mode.startswith("I"):
            image = _grey(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except DamagedImage:
        raise
    except UnidentifiedImageError:
        raise DamagedImage("not an image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DamagedImage(_TOO_LARGE) from None
    except Exception as error:  # Pillow's parsers raise whatever a damaged file leads them to
        reason = str(error).partition(" (")[0].splitlines()
        raise DamagedImage(reason[0][:80] if reason else type(error).__name__) from error


_TOO_LARGE = f"more than {MAX_PIXELS} pixels"


def _check(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise DamagedImage(_TOO_LARGE)
    if max(image.size) > MAX_RATIO * min(image.size):
        raise DamagedImage(f"one side more than {MAX_RATIO} times the other")
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise DamagedImage("32-bit values without a known range")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF that can't be read turns nothing, as in browsers
        return image


def _grey(image: Image.Image) -> Image.Image:
    """8-bit grey of Pillow's modes for more bits, which its own conversion would clip at 255."""
    values_HW = np.asarray(image).astype(np.int32)
    grey_HW = ((values_HW + 128) // 257).astype(np.uint8)  # value / 257, rounded
    if "transparency" in image.info:
        grey_HW[values_HW == image.info["transparency"]] = 255
    return Image.fromarray(grey_HW)


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
