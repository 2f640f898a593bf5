"""Buckets: the lists of shapes, the shape of each record, and what is cropped to it."""

import ast
import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dpo_jax.data import buckets
from dpo_jax.data.buckets import list_shapes, nearest, share_cropped, used_shapes
from dpo_jax.data.images import Shape, View, cover, crop_offsets, decode, read
from dpo_jax.data.load.records import open_records
from dpo_jax.data.store.latents import images_of
from dpo_jax.data.store.prepared import open_prepared
from dpo_jax.errors import UserError

from .conftest import encode, write_prepared

sizes = st.tuples(st.integers(20, 3000), st.integers(20, 3000))
"""(height, width)"""
records = st.lists(st.lists(sizes, min_size=1, max_size=4), min_size=1, max_size=12)


def flat(lists: list[list[Shape]]) -> tuple[np.ndarray, np.ndarray]:
    """sizes_M2 and record_M of the images of each record."""
    return np.asarray([size for each in lists for size in each]), np.repeat(
        np.arange(len(lists)), list(map(len, lists))
    )


@pytest.mark.parametrize("name", buckets.NAMES)
@pytest.mark.parametrize("multiple", [8, 16])
@pytest.mark.parametrize("resolution", [256, 512, 640, 768, 1000, 1024, 1536])
def test_shapes_of_a_list(name: str, multiple: int, resolution: int) -> None:
    shapes = list_shapes(name, resolution, multiple)
    assert len(set(shapes)) == len(shapes) > 3
    assert all(side % multiple == 0 and side > 0 for shape in shapes for side in shape)
    areas = [math.prod(shape) / resolution**2 for shape in shapes]
    assert max(areas) <= (1.0132 if name == "flux" else 1)
    assert min(areas) > 0.8
    ratios = [height / width for height, width in shapes]
    assert ratios == sorted(ratios)
    assert any(abs(math.log(ratio)) < 0.01 for ratio in ratios)
    if name != "sdxl":  # the published list has one shape without a counterpart
        assert {shape[::-1] for shape in shapes} == set(shapes)
    if name == "data":
        assert max(ratios) <= 2
        assert all(side % 32 == 0 for shape in shapes for side in shape if shape[0] != shape[1])


def test_published_lists_are_unchanged_at_their_own_resolution() -> None:
    assert set(list_shapes("sdxl", 1024, 16)) == set(buckets.SDXL)
    assert set(list_shapes("flux", 1024, 16)) == set(buckets.FLUX)
    assert (len(buckets.SDXL), len(buckets.FLUX)) == (40, 17)


def test_published_flux_shapes_are_those_of_diffusers() -> None:
    """Read from its source, since importing it takes ten seconds."""
    (folder,) = importlib.util.find_spec("diffusers").submodule_search_locations
    source = (Path(folder) / "pipelines" / "flux" / "pipeline_flux_kontext.py").read_text()
    assert set(buckets.FLUX) == set(
        ast.literal_eval(source.split("PREFERRED_KONTEXT_RESOLUTIONS = ")[1].split("]")[0] + "]")
    )


def test_a_resolution_below_a_patch_is_refused() -> None:
    with pytest.raises(UserError, match=r"data.resolution=8 is too small for buckets: .* multiples of 16 pixels"):
        list_shapes("data", 8, 16)


@given(st.integers(8, 4096), st.sampled_from([1, 2, 4, 8, 16, 32]), st.sampled_from(buckets.NAMES))
@settings(deadline=None, max_examples=60)
def test_every_list_has_shapes_of_multiples_and_no_larger_area(resolution: int, multiple: int, name: str) -> None:
    if resolution < multiple:
        return
    shapes = list_shapes(name, resolution, multiple)
    assert shapes
    assert all(side % multiple == 0 and side > 0 for shape in shapes for side in shape)
    assert max(map(math.prod, shapes)) <= 1.0132 * resolution**2


@given(records, st.sampled_from(buckets.NAMES), st.randoms())
@settings(deadline=None, max_examples=40)
def test_a_record_has_the_shape_that_crops_the_least(lists: list[list[Shape]], name: str, random) -> None:
    shapes = list_shapes(name, 512, 8)

    def cropped(shape: Shape, height: int, width: int) -> float:
        """What is left out of the image's pixels, with the rectangle of the shape's ratio that fits into it."""
        scale = min(height / shape[0], width / shape[1])
        return 1 - scale**2 * math.prod(shape) / (height * width)

    bucket_N = nearest(shapes, *flat(lists))
    for each, number in zip(lists, bucket_N, strict=True):
        losses = [sum(cropped(shape, *size) for size in each) for shape in shapes]
        assert losses[number] == pytest.approx(min(losses), abs=1e-8)
        np.testing.assert_allclose(
            share_cropped(shapes[number], np.asarray(each)),
            [cropped(shapes[number], *size) for size in each],
            atol=1e-9,
        )
    shuffled = [random.sample(each, len(each)) for each in lists]  # neither the order of candidates ...
    np.testing.assert_array_equal(nearest(shapes, *flat(shuffled)), bucket_N)
    some = lists[::2]  # ... nor the other records decide
    np.testing.assert_array_equal(nearest(shapes, *flat(some)), bucket_N[::2])


@given(records, st.sampled_from([0.5, 1, 2, 3.5, 100]))
@settings(deadline=None, max_examples=40)
def test_shapes_that_are_used_have_enough_records(lists: list[list[Shape]], least: float) -> None:
    shapes = list_shapes("data", 512, 8)
    used = used_shapes(shapes, *flat(lists), least)
    assert [shape for shape in shapes if shape in used] == used
    counts = np.bincount(nearest(used, *flat(lists)), minlength=len(used))
    assert len(used) == 1 or counts.min() >= least
    assert counts.sum() == len(lists)
    if least < 1:  # all that occur
        assert used == [shapes[number] for number in np.unique(nearest(shapes, *flat(lists)))]


def test_names_of_shapes() -> None:
    assert buckets.shown((1216, 832)) == "832x1216"
    assert buckets.parse("832x1216 1024x1024") == [(1216, 832), (1024, 1024)]


VIEWS = [View(), View(flip=True), View(0.0, 0.0), View(0.3, 0.7, flip=True), View(0.999, 0.999)]


@given(st.integers(20, 90), st.integers(20, 90), st.integers(8, 60), st.integers(8, 60), st.sampled_from(VIEWS))
@settings(deadline=None, max_examples=60)
def test_crops_against_pillow(height: int, width: int, rows: int, columns: int, view: View) -> None:
    """Resize until the image covers the shape, mirror it, cut: with Pillow's own parts and exact fractions."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
    scaled = (
        (rows, rows * width // height) if rows * width >= columns * height else (columns * height // width, columns)
    )
    room = (scaled[0] - rows, scaled[1] - columns)
    assert min(room) == 0
    fractions = (view.top, view.left)
    top, left = (
        round(free / 2) if at is None else int((free + 1) * at) for free, at in zip(room, fractions, strict=True)
    )
    resized = noise.resize(scaled[::-1], Image.Resampling.BILINEAR)
    shown = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else resized
    expected_HWC = np.asarray(shown.crop((left, top, left + columns, top + rows)))
    if view.flip:  # the encoder mirrors it
        expected_HWC = expected_HWC[:, ::-1]
    crop_HWC, offsets = cover(noise, (rows, columns), view)
    np.testing.assert_array_equal(crop_HWC, expected_HWC)
    assert offsets == (top, left) == crop_offsets(height, width, (rows, columns), view)


def test_reading_a_jpeg_in_place_gives_the_same_crop() -> None:
    for size in ((24, 40), (24, 50), (32, 40), (48, 80), (60, 31)):  # the first three need no resize
        data = encode(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
        for view in VIEWS:
            crop_HWC = np.zeros((24, 40, 3), np.uint8)
            found, offsets = read(data, view, crop_HWC)
            expected_HWC, expected_offsets = cover(decode(data), (24, 40), view)
            assert (found, offsets) == (size, expected_offsets)
            np.testing.assert_array_equal(crop_HWC, expected_HWC)


def test_images_of_each_shape(tmp_path: Path) -> None:
    """An image of two records with other partners may have two shapes."""
    wide, tall, square = (
        [encode(np.full((*s, 3), i, np.uint8), "PNG") for i in range(2)] for s in ((20, 40), (40, 20), (30, 30))
    )
    pairs = [wide, [tall[0], square[0]], [square[0], square[1]], tall, [wide[0]]]
    data = write_prepared(tmp_path / "data", [{"caption": "c", "images": pair} for pair in pairs])
    shapes = [(20, 40), (30, 30), (40, 20)]
    of_wide, of_square, of_tall = images_of(open_prepared(data), shapes)
    # The order of images: wide 0 and 1, tall 2, square 3 and 4, tall 5
    assert (of_wide.tolist(), of_square.tolist(), of_tall.tolist()) == ([0, 1], [2, 3, 4], [2, 5])
    sizes_M2, record_M = open_records(data, "train", limit=3).sizes()
    assert sizes_M2.tolist() == [[20, 40], [20, 40], [40, 20], [30, 30], [30, 30], [30, 30]]
    assert record_M.tolist() == [0, 0, 1, 1, 2, 2]
