import contextlib
import io
import itertools
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from dpo_jax.data import images
from dpo_jax.data.images import DamagedImage, View, decode, fit, read

from .conftest import encode


def ramp(height: int, width: int) -> Image.Image:
    """Red counts columns and green counts rows, so a pixel's colour gives its position."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, bits: int, colour: int, rows: bytes, *chunks: bytes) -> bytes:
    """Return a handmade PNG that Pillow does not write, or that contradicts its header."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")])


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
    np.testing.assert_array_equal(pixels_HWC[0, ::-1, 0], 63 - np.arange(8, 40))  # the encoder mirrors the square


def test_resize_against_numpy() -> None:
    """Halving with an antialiased triangle filter weighs four neighbours 1/8, 3/8, 3/8, 1/8."""
    image_HWC = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    got_HWC, _ = fit(Image.fromarray(image_HWC), 32, View())

    def halve(x: np.ndarray) -> np.ndarray:
        inner = (x[1:-4:2] + 3 * x[2:-3:2] + 3 * x[3:-2:2] + x[4:-1:2]) / 8
        return inner  # without the outermost pixels, where the filter is cut off

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
    assert b"Adobe" in file.getvalue()  # it marks values that are stored inverted
    np.testing.assert_allclose(decode(file.getvalue()).getpixel((4, 4)), (255, 0, 0), atol=3)


def test_exif_orientation() -> None:
    pixels_HWC = np.zeros((8, 16, 3), np.uint8)
    pixels_HWC[:, :8] = 255  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # displayed after a quarter turn clockwise, so the left half is at the top
    image = decode(encode(pixels_HWC, "PNG", exif=exif))
    assert image.size == (8, 16)
    assert image.getpixel((4, 2)) == (255, 255, 255)
    assert image.getpixel((4, 13)) == (0, 0, 0)


def test_16_bits_are_scaled() -> None:
    """Rounded v / 65535 * 255; Pillow's own conversion makes everything above 255 white."""
    values_HW = np.random.default_rng(0).integers(0, 65536, (40, 50)).astype(np.uint16)
    expected_HW = np.round(values_HW / 65535 * 255).astype(np.uint8)
    pgm = b"P5 50 40 65535 " + values_HW.astype(">u2").tobytes()  # Pillow's mode I
    big_endian = Image.frombytes("I;16B", (50, 40), values_HW.astype(">u2").tobytes())
    for data in (saved(Image.fromarray(values_HW)), saved(Image.fromarray(values_HW), "TIFF"), pgm):
        image = decode(data)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(image, np.stack([expected_HW] * 3, -1))
    np.testing.assert_array_equal(np.asarray(decode(saved(big_endian, "TIFF")))[..., 0], expected_HW)


def test_16_bit_grey_with_a_transparent_value() -> None:
    rows = b"".join(b"\0" + struct.pack(">3H", *row) for row in ([0, 1000, 65535], [1000, 257, 1001]))
    image = decode(png(3, 2, 16, 0, rows, chunk(b"tRNS", struct.pack(">H", 1000))))
    np.testing.assert_array_equal(np.asarray(image)[..., 0], [[0, 255, 255], [255, 1, 4]])


def test_16_bit_colours() -> None:
    """Pillow keeps the upper byte, which is within 1 of the rounded value."""
    values_HWC = np.random.default_rng(0).integers(0, 65536, (5, 7, 3)).astype(">u2")
    got_HWC = np.asarray(decode(png(7, 5, 16, 2, b"".join(b"\0" + row.tobytes() for row in values_HWC))))
    np.testing.assert_allclose(got_HWC, values_HWC / 257, atol=1)
    values_HWC = np.concatenate([values_HWC, np.full((5, 7, 1), 0x8000)], -1).astype(">u2")  # half transparent
    got_HWC = np.asarray(decode(png(7, 5, 16, 6, b"".join(b"\0" + row.tobytes() for row in values_HWC))))
    np.testing.assert_allclose(got_HWC, values_HWC[..., :3] / 257 / 2 + 127.5, atol=2)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_values_without_a_range_are_refused(mode: str) -> None:
    with pytest.raises(DamagedImage, match="32-bit values without a known range"):
        decode(saved(Image.new(mode, (4, 4), 1), "TIFF"))


@pytest.mark.filterwarnings("ignore")  # pytest undoes the module's own filter
def test_broken_exif_turns_nothing() -> None:
    data = saved(Image.new("RGB", (16, 8), "red"), "WEBP", exif=b"Exif\0\0II*\0 no tags here")
    assert decode(data).size == (16, 8)
    assert decode(data.replace(b"II*", b"???")).size == (16, 8)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = saved(
        frames[0], format, save_all=True, append_images=frames[1:], **{"lossless": True} if format == "WEBP" else {}
    )
    assert Image.open(io.BytesIO(data)).n_frames == 3
    np.testing.assert_array_equal(decode(data), np.full((8, 8, 3), (255, 0, 0), np.uint8))


def test_colour_profiles_are_ignored() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    image = ramp(8, 8)
    np.testing.assert_array_equal(decode(saved(image, icc_profile=profile)), image)


def test_bombs_are_refused_by_their_header() -> None:
    """No pixel is decoded and nothing is printed; an image just below the limit fails only because it is truncated."""
    too_large = png(8192, 8193, 8, 2, b"")
    code = (
        "import re, sys; from pathlib import Path; from dpo_jax.data.images import decode\n"
        "for data in sys.stdin.buffer.read().split(b'NEXT'):\n"
        "    try: decode(data)\n"
        "    except ValueError as error: print(type(error).__name__, error)\n"
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())\n"
        "assert int(peak[1]) < 150_000, peak"
    )
    gif = saved(Image.new("L", (8, 8)), "GIF")
    gif = gif[:6] + struct.pack("<HH", 40000, 40000) + gif[10:]  # beyond Pillow's own limit
    webp = saved(Image.new("RGB", (8, 8)), "WEBP", lossless=True)
    webp = webp[:21] + struct.pack("<I", (16383 - 1) | (16383 - 1) << 14) + webp[25:]
    huge = png(2**31 - 1, 2**31 - 1, 8, 2, b"")
    warned = png(10_000, 10_000, 8, 2, b"")  # Pillow would only warn
    done = subprocess.run(
        [sys.executable, "-c", code], input=b"NEXT".join([too_large, gif, webp, huge, warned]), capture_output=True
    )
    assert done.stdout.decode() == "DamagedImage more than 67108864 pixels\n" * 5, done.stderr.decode()
    assert not done.stderr


UNREAD = "the format {} is not supported; convert it to PNG or JPEG"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image: it is empty"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid",
            "not an image: it is a Git LFS pointer, not the file itself: fetch it with git lfs pull",
        ),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", UNREAD.format("PostScript")),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", UNREAD.format("HEIC")),
        (saved(ramp(64, 64), "JPEG")[:-40], "image file is truncated"),
        (saved(Image.effect_noise((64, 64), 50))[:-99], "image file is truncated"),
        (png(0, 4, 8, 2, b""), "not an image"),
        (b"GIF89a" + bytes(40), "not an image"),
        (saved(Image.new("RGB", (1, 33))), "one side is more than 32 times the other"),
    ],
)
def test_damage_has_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(DamagedImage) as error:
        decode(data)
    assert str(error.value) == reason


@pytest.mark.parametrize("size", [(1, 32), (96, 3)])
def test_narrow_images_can_be_cut(size: tuple[int, int]) -> None:
    assert fit(decode(saved(Image.new("RGB", size, "red"))), 64, View())[0].shape == (64, 64, 3)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), struct.error("bad\nthing"), RecursionError("deep"), OverflowError("x" * 200), SyntaxError("no")],
)
def test_whatever_a_parser_raises_is_damage(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(images.Image, "open", fail)
    with pytest.raises(DamagedImage) as raised:
        decode(b"")
    expected = {"MemoryError": "MemoryError", "error": "bad", "RecursionError": "deep", "OverflowError": "x" * 80}
    assert str(raised.value) == expected.get(type(error).__name__, "no")


VIEWS = (View(), View(flip=True), View(0.3, 0.9), View(0.99, 0.01, flip=True))


def step_by_step(data: bytes, resolution: int, view: View) -> tuple[np.ndarray, tuple[int, int]]:
    """Apply `decode` and `fit` to an opaque 8-bit image, skipping no step that would change nothing."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    width, height = (int(resolution * side / min(image.size)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    if view.flip:
        image = ImageOps.mirror(image)
    rooms = height - resolution, width - resolution
    top, left = (
        round(room / 2) if place is None else int((room + 1) * place)
        for room, place in zip(rooms, (view.top, view.left), strict=True)
    )
    return np.asarray(image)[top : top + resolution, left : left + resolution], (top, left)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quality": 100},
        {"subsampling": "4:4:4"},
        {"subsampling": "4:2:2"},
        {"subsampling": "4:1:1"},
        {"progressive": True},
        {"keep_rgb": True},
        {"restart_marker_rows": 1},
        {"exif": 3},
        {"exif": 6},
        {"mode": "L"},
        {"format": "PNG"},
        {"format": "PNG", "mode": "P"},
        {"format": "WEBP"},
    ],
    ids=str,
)
def test_reading_leaves_out_only_what_changes_nothing(options: dict[str, Any]) -> None:
    options = {"format": "JPEG", "mode": "RGB"} | options
    if "exif" in options:
        exif = Image.Exif()
        exif[0x0112] = options["exif"]
        options["exif"] = exif
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 31, 3), np.uint8))
    for size in ((31, 20), (40, 64), (40, 40), (101, 97)):
        image = noise.resize(size, Image.Resampling.BICUBIC).convert(options["mode"])
        data = saved(image, **{name: value for name, value in options.items() if name != "mode"})
        for resolution in (20, min(size), 50, 64):  # some need no resize
            for view in VIEWS:
                expected_HWC, offsets = step_by_step(data, resolution, view)
                if view.flip:  # `read` leaves this to the encoder
                    expected_HWC = expected_HWC[:, ::-1]
                image = decode(data)
                fitted_HWC, fitted_offsets = fit(image, resolution, view)
                np.testing.assert_array_equal(fitted_HWC, expected_HWC)
                square_HWC = np.zeros_like(expected_HWC)
                assert read(data, view, square_HWC) == ((image.height, image.width), offsets)
                assert fitted_offsets == offsets
                np.testing.assert_array_equal(square_HWC, expected_HWC)


def test_only_a_plain_jpeg_needs_no_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(images, "decode", lambda data: called.append(data) or Image.new("RGB", (16, 8)))
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, turned, grey = saved(ramp(8, 8), "JPEG"), saved(ramp(8, 8), "JPEG", exif=exif), ramp(8, 8).convert("L")
    with monkeypatch.context() as without_pillow:
        without_pillow.delattr(images.Image, "open")
        for options in ({}, {"progressive": True}, {"comment": b"made"}, {"restart_marker_rows": 1}):
            read(saved(ramp(8, 8), "JPEG", **options), View(), np.empty((8, 8, 3), np.uint8))
    assert not called
    others = [turned, saved(grey, "JPEG"), saved(ramp(8, 8)), plain[:-1], plain[:300], b""]
    for data, view, resolution in itertools.product((plain, *others), (View(), View(flip=True)), (8, 12)):
        called.clear()
        read(data, view, np.empty((resolution, resolution, 3), np.uint8))
        assert called == ([] if data is plain else [data])
    decoded = []
    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", decoded.append)
    frame = plain.index(b"\xff\xc0")
    huge = plain[: frame + 5] + struct.pack(">HH", 50_000, 50_000) + plain[frame + 9 :]
    read(huge, View(), np.empty((8, 8, 3), np.uint8))
    assert (called[-1:], decoded) == ([huge], [])


def originals() -> dict[str, bytes]:
    """Small images of every format and of modes with their own code in the decoders."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 4), np.uint8)
    rgb, rgba = Image.fromarray(pixels[..., :3]), Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [rgb.rotate(180)]}
    return {
        "jpeg": saved(rgb, "JPEG", exif=exif),
        "progressive": saved(rgb, "JPEG", progressive=True),
        "cmyk": saved(rgb.convert("CMYK"), "JPEG"),
        "png": saved(rgba, exif=exif),
        "palette": saved(rgb.quantize(16), transparency=3),
        "apng": saved(rgb, **frames),
        "grey16": saved(Image.fromarray(np.uint16(pixels[..., 0]) * 200)),
        "webp": saved(rgb, "WEBP", exif=exif),
        "lossless": saved(rgba, "WEBP", lossless=True),
        "awebp": saved(rgb, "WEBP", **frames),
        "gif": saved(rgb, "GIF"),
        "agif": saved(rgb, "GIF", **frames),
    }


def damage(random: np.random.Generator, data: bytes, other: bytes) -> Iterator[bytes]:
    """Yield one example of each kind of damage."""

    def at(low: int, high: int) -> int:
        return int(random.integers(low, high))

    def flipped(number: int, end: int) -> bytes:
        changed = bytearray(data)
        for _ in range(number):
            changed[at(0, end)] ^= 1 << at(0, 8)
        return bytes(changed)

    yield flipped(1, len(data))
    yield flipped(8, len(data))
    yield flipped(2, min(64, len(data)))  # a wrong header
    yield data[: at(0, len(data))]
    yield data[: at(0, len(data))] + other[at(0, len(other)) :]
    yield data[at(0, 64) :]
    start, length = at(0, len(data)), at(1, 32)
    yield data[:start] + random.bytes(length) + data[start + length :]  # overwritten
    yield data[:start] + data[start + length :]  # lost
    yield data[:start] + data[max(0, start - length) :]  # repeated
    place = at(8, 40)
    yield data[:place] + b"\xff\xff\xff\xff" + data[place + 4 :]  # large sizes and lengths


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_give_an_image_or_one_error() -> None:
    files = originals()
    random = np.random.default_rng(1)
    outcomes: dict[str, list[str]] = {name: [] for name in files}
    slowest = 0.0
    for name, data in files.items():
        assert decode(data).mode == "RGB"
        for _ in range(6):
            for damaged in damage(random, data, files[random.choice(list(files))]):
                started = time.perf_counter()
                try:
                    image = decode(damaged)
                    assert image.mode == "RGB"
                    assert np.asarray(image).size
                    outcomes[name].append("")
                except DamagedImage as error:
                    outcomes[name].append(str(error))
                slowest = max(slowest, time.perf_counter() - started)
                square_HWC = np.empty((24, 24, 3), np.uint8)
                if outcomes[name][-1]:
                    with pytest.raises(DamagedImage):
                        read(damaged, View(), square_HWC)
                else:
                    read(damaged, View(), square_HWC)
                    np.testing.assert_array_equal(square_HWC, fit(image, 24, View())[0])
    assert sum(len(reasons) for reasons in outcomes.values()) == 720
    assert not any(len(reason) > 80 or " at 0x" in reason for reasons in outcomes.values() for reason in reasons)
    assert 200 < sum(reasons.count("") for reasons in outcomes.values()) < 400  # neither always fatal nor never
    assert slowest < 5


@pytest.mark.filterwarnings("ignore")
def test_what_the_walk_over_a_header_accepts_pillow_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    """For JPEGs with damaged headers, pixels, refusals and reasons are the same as when Pillow reads every header."""
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (24, 24, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    options = ({}, {"progressive": True}, {"comment": b"made"}, {"restart_marker_rows": 1}, {"exif": exif})
    files = [saved(image, "JPEG", **each) for each in options]
    files += [saved(image.convert(mode), "JPEG") for mode in ("L", "CMYK")]

    def outcome(data: bytes) -> Any:
        square_HWC = np.zeros((24, 24, 3), np.uint8)
        try:
            return read(data, View(), square_HWC), square_HWC.tobytes()
        except DamagedImage as error:
            return str(error)

    walked, walk = 0, images._size_in_plain_header
    for data in files:
        header = data.index(b"\xff\xda")
        for _ in range(30):
            other = files[random.integers(len(files))]
            for damaged in damage(random, data[:header], other[: other.index(b"\xff\xda")]):
                damaged += data[header:]
                walked += walk(damaged) is not None
                found = outcome(damaged)
                with monkeypatch.context() as asking_pillow:
                    asking_pillow.setattr(images, "_size_in_plain_header", lambda data: None)
                    assert found == outcome(damaged)
    assert walked > 200


def test_no_flipped_bit_of_a_png_changes_pixels() -> None:
    """Its checksums are compared: loading alone, as in Pillow, accepts four in ten."""
    random = np.random.default_rng(0)
    image = ramp(64, 64)
    data = saved(image)
    for _ in range(100):
        flipped = bytearray(data)
        flipped[random.integers(len(data))] ^= 1 << int(random.integers(8))
        with contextlib.suppress(DamagedImage):
            np.testing.assert_array_equal(decode(bytes(flipped)), image)
