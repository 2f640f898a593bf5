"""Image files to pixels: what Pillow reads becomes upright RGB, then a square or rectangle of the training resolution.

All commands read images here, so that a file looks the same to training, judges and raters, and is refused for the same
reasons.
"""

import io
import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import simplejpeg
from etils import epath
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from dpo_jax.errors import UserError
from dpo_jax.files import read_bytes, what_it_is

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")  # not EPS, which starts another program
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff")  # image files
MAX_PIXELS = 2**26  # 8192 x 8192
MAX_BYTES = 2**29  # of a file: MAX_PIXELS with 16 bits and four channels, uncompressed
MAX_RATIO = 32  # `fit` resizes before it crops, so a longer strip would take gigabytes

# Damage has to raise an exception. The filter is process-wide because one set per call is not safe among threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


Shape = tuple[int, int]
"""(height, width) in pixels."""


class View(NamedTuple):
    """Crop and mirroring of the candidates of a prompt; they share it, so that no candidate is favoured.

    `top` and `left` are fractions in [0, 1) of the margin around the crop in the resized image; None takes the
    centre. Images are mirrored before they are cropped, as in diffusers' SDXL trainers. The official Diffusion-DPO
    trainer crops first, so its central crop is one column further where the margin is odd; random crops are the same.
    Here the crop is only cut from the other side, and the encoder mirrors it: see `encode.images.mirror`.
    """

    top: float | None = None
    left: float | None = None
    flip: bool = False


ImageBytes = bytes | memoryview
"""The contents of an image file, such as JPEG bytes."""


class DamagedImage(UserError):
    """The message is a short reason without sizes or names, so that the same damage counts as the same."""


def read_image(path: epath.PathLike) -> np.ndarray:
    """Return the pixels of an image file as `decode` makes them, uint8 [H, W, 3].

    Raise FileNotFoundError or ValueError, with the file and the reason, where it cannot be read.
    """
    return np.asarray(decode_file(path, read_bytes(path, MAX_BYTES)))


def decode_file(path: epath.PathLike, data: ImageBytes) -> Image.Image:
    """Decode the contents of a file; raise ValueError with the file and the reason."""
    try:
        return decode(data)
    except DamagedImage as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error


def decode(data: ImageBytes) -> Image.Image:
    """Return the image upright (by EXIF), in RGB, on white where it is transparent; of an animation the first frame.

    16-bit grey is scaled to 8 bits. Colour profiles are ignored, as in the trainers of diffusers.

    Raises:
        DamagedImage: not an image, damaged or truncated, too large or too narrow, or values without a known range.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)  # reads no further than the header
        _check(image)
        image.load()
        if image.format == "PNG":  # loading ignores a PNG's checksums, so flipped bits would change the pixels
            Image.open(io.BytesIO(data), formats=["PNG"]).verify()
        image = _upright(image)
        if image.mode.startswith("I"):
            image = _grey(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except DamagedImage:
        raise
    except UnidentifiedImageError:
        raise DamagedImage(_not_an_image(bytes(data[:64]))) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DamagedImage(_TOO_LARGE) from None
    except Exception as error:  # Pillow's parsers raise any class of error for damaged files
        reason = str(error).partition(" (")[0].splitlines()
        raise DamagedImage(reason[0][:80] if reason else type(error).__name__) from error


_UNREAD = {
    b"%!PS": "PostScript",
    b"%PDF": "PDF",
    b"<svg": "SVG",
    b"8BPS": "Photoshop",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
}
"""First bytes of formats that are not supported."""
_HEIF = {b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"}


def _not_an_image(head: bytes) -> str:
    known = what_it_is(head)
    format = next((name for sign, name in _UNREAD.items() if head.startswith(sign)), "")
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF:
        format = "HEIC"
    if format:
        return f"the format {format} is not supported; convert it to PNG or JPEG"
    return "not an image" if known is None or known.endswith("image") else f"not an image: it is {known}"


_TOO_LARGE = f"more than {MAX_PIXELS} pixels"


def _check(image: Image.Image) -> None:
    _check_size(image.size)
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise DamagedImage("32-bit values without a known range")


def _check_size(size: tuple[int, int]) -> None:
    if math.prod(size) > MAX_PIXELS:
        raise DamagedImage(_TOO_LARGE)
    if max(size) > MAX_RATIO * min(size):
        raise DamagedImage(f"one side is more than {MAX_RATIO} times the other")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image) if _is_turned(image) else image
    except Exception:  # unreadable EXIF rotates nothing, as in browsers
        return image


def _is_turned(image: Image.Image) -> bool:
    return image.getexif().get(ExifTags.Base.Orientation, 1) != 1


def _grey(image: Image.Image) -> Image.Image:
    """Return 8-bit grey of a deeper image, which Pillow's own conversion would clip at 255."""
    values_HW = np.asarray(image).astype(np.int32)
    grey_HW = ((values_HW + 128) // 257).astype(np.uint8)  # value / 257, rounded
    if "transparency" in image.info:
        grey_HW[values_HW == image.info["transparency"]] = 255
    return Image.fromarray(grey_HW)


def fit(image: Image.Image, resolution: int, view: View) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the square that `cover` cuts."""
    return cover(image, (resolution, resolution), view)


def cover(image: Image.Image, shape: Shape, view: View) -> tuple[np.ndarray, tuple[int, int]]:
    """Resize an image until it just covers `shape`, and cut that: (pixels_HWC uint8, (crop top, crop left)).

    The filter is bilinear (Pillow widens it when it shrinks an image), and the side that is cropped is rounded down, as
    in the official Diffusion-DPO trainer and diffusers' SDXL trainers. The offsets count resized pixels of the image
    that the view shows, mirrored or not; the result itself is not mirrored.
    """
    height, width = _covering(image.height, image.width, shape)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    top, left = _offsets(height, width, shape, view)
    if (height, width) != shape:
        column = _column(left, width, shape, view)
        image = image.crop((column, top, column + shape[1], top + shape[0]))
    return np.asarray(image), (top, left)


def _covering(height: int, width: int, shape: Shape) -> Shape:
    """Return the size to which `cover` resizes an image of this size: one of its sides is that of the shape."""
    if shape[0] * width >= shape[1] * height:
        return shape[0], int(shape[0] * width / height)
    return int(shape[1] * height / width), shape[1]


Placement = tuple[tuple[int, int], tuple[int, int]]
"""(height, width) of an image, and the (top, left) of its crop that `cover` returns."""


def read(data: ImageBytes, view: View, crop_HWC: np.ndarray) -> Placement:
    """Write `cover(decode(data), shape, view)` into `crop_HWC`, which has that shape.

    The pixels are the same, but a JPEG takes two thirds of the time: Pillow keeps four bytes per pixel and copies them
    three times; simplejpeg writes RGB, and in place if there is nothing to resize or crop.

    Raises:
        DamagedImage: as `decode`.
    """
    return _read(data, view, crop_HWC, _size_if_plain(data))


def read_all(images: Sequence[tuple[ImageBytes, View, np.ndarray]]) -> list[Placement]:
    """Read several images, faster than one by one.

    Decoding empties a core's caches, so Python code after it takes several times as long. So headers are read first,
    and there is almost no code between the images.
    """
    sizes = [_size_if_plain(data) for data, _, _ in images]
    return [_read(*image, size) for image, size in zip(images, sizes, strict=True)]


def _read(data: ImageBytes, view: View, crop_HWC: np.ndarray, size: Shape | None) -> Placement:
    """Read one image, given the size that `_size_if_plain` returned."""
    if size is not None:
        try:
            return _read_plain(data, view, crop_HWC, size)
        except Exception:  # `decode` determines what is wrong with it
            pass
    image = decode(data)
    crop_HWC[:], offsets = cover(image, crop_HWC.shape[:2], view)
    return (image.height, image.width), offsets


def _read_plain(data: ImageBytes, view: View, crop_HWC: np.ndarray, size: Shape) -> Placement:
    shape = crop_HWC.shape[:2]
    if size == shape:
        simplejpeg.decode_jpeg(data, buffer=crop_HWC)
        return size, (0, 0)
    if size == _covering(*size, shape):
        top, left = _offsets(*size, shape, view)
        column = _column(left, size[1], shape, view)
        crop_HWC[:] = simplejpeg.decode_jpeg(data)[top : top + shape[0], column : column + shape[1]]
        return size, (top, left)
    crop_HWC[:], offsets = cover(Image.fromarray(simplejpeg.decode_jpeg(data)), shape, view)
    return size, offsets


def _size_if_plain(data: ImageBytes) -> tuple[int, int] | None:
    """Return (height, width) of an upright colour JPEG; None for everything else, and for damaged files."""
    try:
        return _size_of_plain_jpeg(data)
    except Exception:  # Pillow's parsers raise any class of error for damaged files
        return None


def _size_of_plain_jpeg(data: ImageBytes) -> tuple[int, int]:
    """Return (height, width) of an upright colour JPEG; raise an exception for everything else."""
    size = _size_in_plain_header(data)
    if size is None:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        header = Image.open(io.BytesIO(data), formats=["JPEG"])
        # The two may read a damaged header differently.
        if header.size != (width, height) or header.format != "JPEG" or _is_turned(header):
            raise UserError("not a plain JPEG")
        if colours not in ("YCbCr", "RGB"):
            raise UserError(f"a JPEG in {colours}")
        size = height, width
    _check_size(size)
    return size


_JFIF = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00"
_FRAMES = frozenset(b"\xc0\xc2")
"""Frame markers of sequential and progressive JPEGs."""
_TABLES = frozenset(b"\xc4\xdb\xdd\xfe")
"""Markers of code and quantization tables, restarts and comments."""
_PIXELS = 0xDA
_HEAD = 2**10
"""Bytes that are searched: tables and frame take some 620, a comment little. Later frames are read by Pillow."""


def _size_in_plain_header(data: ImageBytes) -> tuple[int, int] | None:
    """Return (height, width) if the header of a JPEG has nothing, such as EXIF, that could rotate the image.

    Pillow takes 15 times as long to find out. In a JFIF file three colours are YCbCr.
    """
    head = bytes(data[:_HEAD])  # a memoryview gives its bytes more slowly
    if not head.startswith(_JFIF):
        return None
    size, at = None, 2 + 2 + 16
    while at + 10 <= len(head) and head[at] == 0xFF and head[at + 1] != _PIXELS:
        kind = head[at + 1]
        if kind in _FRAMES and head[at + 9] == 3:
            size = head[at + 5] << 8 | head[at + 6], head[at + 7] << 8 | head[at + 8]
        elif kind not in _TABLES:
            return None
        at += 2 + (head[at + 2] << 8 | head[at + 3])
    return size if head[at : at + 2] == bytes([0xFF, _PIXELS]) else None


def _offsets(height: int, width: int, shape: Shape, view: View) -> tuple[int, int]:
    return _offset(height - shape[0], view.top), _offset(width - shape[1], view.left)


def _column(left: int, width: int, shape: Shape, view: View) -> int:
    """Return the first column, in the image before mirroring, of the crop that the view sees at `left`."""
    return width - shape[1] - left if view.flip else left


def _offset(room: int, fraction: float | None) -> int:
    return round(room / 2) if fraction is None else int((room + 1) * fraction)


def crop_offsets(height: int, width: int, shape: Shape, view: View) -> tuple[int, int]:
    """Return the offsets that `cover` gives for an upright image of this size."""
    return _offsets(*_covering(height, width, shape), shape, view)
