import io

import numpy as np
import pytest
from PIL import Image

from dpo_jax.data.images import View, decode, fit

from .conftest import encode


def ramp(height: int, width: int) -> Image.Image:
    """Red counts columns and green rows, so that a pixel tells where it came from."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))


def test_centre_crop_of_an_image_of_the_right_height() -> None:
    pixels_HWC, offsets = fit(ramp(32, 101), 32, View())
    assert offsets == (0, 34)  # round(69 / 2) = round(34.5), to the even neighbour as in torchvision
    np.testing.assert_array_equal(pixels_HWC[0, :, 0], np.arange(34, 66))
    np.testing.assert_array_equal(pixels_HWC[:, 0, 1], np.arange(32))


def test_offsets_span_all_the_room() -> None:
    tall = ramp(42, 32)
    assert [fit(tall, 32, View(top, 0))[1][0] for top in (0, 0.5, 0.999)] == [0, 5, 10]
    assert fit(tall, 32, View(0.5, 0.9))[1] == (5, 0)


def test_flip_comes_before_the_crop() -> None:
    pixels_HWC, offsets = fit(ramp(32, 64), 32, View(0, 0.25, flip=True))
    assert offsets == (0, 8)
    np.testing.assert_array_equal(pixels_HWC[0, :, 0], 63 - np.arange(8, 40))


def test_resize_against_numpy() -> None:
    """Halving with an antialiased triangle filter weighs four neighbours 1/8, 3/8, 3/8, 1/8."""
    image_HWC = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    got_HWC, _ = fit(Image.fromarray(image_HWC), 32, View())

    def halve(x: np.ndarray) -> np.ndarray:
        inner = (x[1:-4:2] + 3 * x[2:-3:2] + 3 * x[3:-2:2] + x[4:-1:2]) / 8
        return inner  # the outermost pixels, where the filter is cut off, are not compared

    expected_HWC = halve(halve(image_HWC.astype(float)).swapaxes(0, 1)).swapaxes(0, 1)
    np.testing.assert_allclose(got_HWC[1:-1, 1:-1], expected_HWC, atol=1.01)


def test_the_longer_side_is_rounded_down() -> None:
    # 100 x 67 -> 32 high, int(32 * 100 / 67) = 47 wide: 15 pixels of room
    assert fit(ramp(67, 100), 32, View(0, 0.999))[1] == (0, 15)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 128), (255, 127, 127)),
        ("LA", (0, 0), (255, 255, 255)),
        ("L", 7, (7, 7, 7)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_modes_become_rgb_on_white(mode: str, colour: int | tuple[int, ...], expected: tuple[int, ...]) -> None:
    file = io.BytesIO()
    Image.new(mode, (4, 4), colour).save(file, "PNG")
    assert decode(file.getvalue()).getpixel((0, 0)) == expected


def test_palette_with_transparency_and_cmyk() -> None:
    file = io.BytesIO()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.putpixel((1, 0), 1)
    palette.save(file, "PNG", transparency=0)
    image = decode(file.getvalue())
    assert [image.getpixel((0, 0)), image.getpixel((1, 0))] == [(255, 255, 255), (200, 0, 0)]
    file = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(file, "JPEG", quality=100)
    np.testing.assert_allclose(decode(file.getvalue()).getpixel((4, 4)), (255, 0, 0), atol=3)


def test_exif_orientation() -> None:
    pixels_HWC = np.zeros((8, 16, 3), np.uint8)
    pixels_HWC[:, :8] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise: the left half comes to the top
    image = decode(encode(pixels_HWC, "PNG", exif=exif))
    assert image.size == (8, 16)
    assert image.getpixel((4, 2)) == (255, 255, 255)
    assert image.getpixel((4, 13)) == (0, 0, 0)
