"""Batches of buckets: one shape in a batch, every record once an epoch, whatever reads and wherever it stops."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dpo_jax.data.buckets import nearest
from dpo_jax.data.images import Shape, View, cover, decode
from dpo_jax.data.load.bucket_order import BucketOrder, in_buckets
from dpo_jax.data.load.inputs import RawInputs
from dpo_jax.data.load.masks import cell_weights
from dpo_jax.data.load.pipeline import make_iterator, validation_batches
from dpo_jax.data.load.records import PreparedRecords, open_records

from ..array_checks import agrees
from .conftest import encode, write_prepared
from .test_pipeline import assert_same, rows_of, spell

SHAPES: list[Shape] = [(16, 24), (16, 16), (24, 16)]
SIZES = [(32, 48), (40, 50), (30, 30), (48, 33), (20, 21), (64, 40)]
"""(height, width) of the images of records, in turn; the partner of every fourth is a square."""
NUMBER = 26

buckets = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(np.asarray)


@given(buckets, st.integers(1, 9), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_an_epoch_has_every_record_once_and_no_batch_has_two_shapes(bucket_N, batch_size: int, seed: int) -> None:
    order = BucketOrder(bucket_N, seed, batch_size)
    places = order.batches * batch_size
    epochs = [[order[epoch * places + place] for place in range(places)] for epoch in (0, 1, 2)]
    for epoch in epochs:
        assert sorted(number for number, counts in epoch if counts) == list(range(len(bucket_N)))
        filled: dict[int, list[int]] = {}
        for start in range(0, places, batch_size):
            batch = epoch[start : start + batch_size]
            (bucket,) = {int(bucket_N[number]) for number, _ in batch}
            filled.setdefault(bucket, []).append(sum(counts for _, counts in batch))
        for bucket, counts in filled.items():
            assert sum(counts) == (bucket_N == bucket).sum()
            assert max(counts) - min(counts) <= 1  # spread evenly
            assert len(counts) == -(-sum(counts) // batch_size)  # over as few batches as hold them
    assert [order[place] for place in range(places)] == epochs[0]  # whatever was looked up before
    if len(bucket_N) > 20:
        assert epochs[0] != epochs[1]
        assert [BucketOrder(bucket_N, seed ^ 1, batch_size)[place] for place in range(places)] != epochs[0]


@given(buckets, st.integers(1, 9))
@settings(deadline=None, max_examples=30)
def test_validation_has_every_record_once(bucket_N, batch_size: int) -> None:
    places = in_buckets(bucket_N, batch_size)
    assert sorted(number for number, counts in places if counts) == list(range(len(bucket_N)))
    for start in range(0, len(places), batch_size):
        assert len({int(bucket_N[number]) for number, _ in places[start : start + batch_size]}) == 1
    assert len(places) % batch_size == 0


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of plain images, except for some noise: red gives the pair, green the candidate."""
    rng, records = np.random.default_rng(0), []
    for number in range(NUMBER):
        sizes = [SIZES[number % len(SIZES)], (30, 30) if number % 4 == 0 else SIZES[number % len(SIZES)]]
        pixels = [np.full((*size, 3), (number, 100 * k, 0), np.uint8) for k, size in enumerate(sizes)]
        for each_HWC in pixels:
            each_HWC[..., 2] = rng.integers(0, 256, each_HWC.shape[:2])
        split = "validation" if number % 5 == 4 else "train"
        records.append(
            {"caption": f"prompt {number}", "images": [encode(each, "PNG") for each in pixels], "split": split}
        )
    return write_prepared(tmp_path_factory.mktemp("data") / "out", records)


def opened(prepared: Path, split: str = "train") -> tuple[Any, dict[str, Any]]:
    """The records, and the arguments of `make_iterator` and `validation_batches` about buckets."""
    records = open_records(prepared, split)
    return records, {"bucket_N": nearest(SHAPES, *records.sizes())}


def inputs(**options: Any) -> RawInputs:
    return RawInputs(16, spell, buckets=SHAPES, **options)


def take(prepared: Path, number: int, *, batch_size: int = 4, position: int = 0, **options: Any) -> list[Any]:
    augmentation = {name: options.pop(name) for name in ("random_crop", "random_flip") if name in options}
    records, of_buckets = opened(prepared)
    with make_iterator(
        records, inputs(**augmentation), batch_size=batch_size, **{"seed": 3} | of_buckets | options
    ) as batches:
        batches.set_state({"position": position})
        return list(itertools.islice(batches, number))


def shape_of(batch: Any) -> Shape:
    return batch.inputs.images_BKHWC.shape[2:4]


def test_batches_have_the_shapes_of_their_buckets(prepared: Path) -> None:
    """Crops and size conditioning, with random crops, are those of `cover` and of the images' own sizes."""
    options = {"random_crop": True, "random_flip": True, "mask_floor": None}
    real = take(prepared, 8, size_conditioning="real", **options)
    constant = take(prepared, 8, **options)
    records = open_records(prepared, "train")
    assert isinstance(records, PreparedRecords)
    shapes = nearest(SHAPES, *records.sizes())
    numbers = {records[i]["captions"][0]: i for i in range(len(records))}
    offsets = set()
    for batch, plain in zip(real, constant, strict=True):
        assert agrees(batch)
        height, width = shape_of(batch)
        np.testing.assert_array_equal(
            plain.size_cond_BK6, np.broadcast_to([height, width, 0, 0, height, width], (4, 2, 6))
        )
        for row in rows_of([batch]):
            i = numbers[bytes(row.inputs.token_ids_BML[0].tolist()).decode().strip()]
            assert SHAPES[shapes[i]] == (height, width)
            files = records.read_images(records[i])
            for k, (data, told) in enumerate(zip(files, row.size_cond_BK6, strict=True)):
                image = decode(data)
                top, left = told[2:4]
                assert tuple(told[:2]) == image.size[::-1]
                assert tuple(told[4:]) == (height, width)
                flip = bool(row.inputs.mirrored_BK[k])
                resized = [
                    side - own
                    for side, own in zip(_covered(image.size[::-1], (height, width)), (height, width), strict=True)
                ]
                at = [(offset + 0.5) / (room + 1) for offset, room in zip((top, left), resized, strict=True)]
                expected_HWC, _ = cover(image, (height, width), View(*at, flip=flip))
                np.testing.assert_array_equal(row.inputs.images_BKHWC[k], expected_HWC)
                offsets.add((top, left))
    assert {shape_of(batch) for batch in real} == set(SHAPES)
    assert len(offsets) > 4


def _covered(size: Shape, shape: Shape) -> Shape:
    scale = max(shape[0] / size[0], shape[1] / size[1])
    return int(size[0] * scale + 1e-9), int(size[1] * scale + 1e-9)


def test_both_images_of_a_pair_are_in_the_bucket_that_crops_them_least(prepared: Path) -> None:
    records, of_buckets = opened(prepared)
    for i, bucket in enumerate(of_buckets["bucket_N"]):
        sizes = records[i]["sizes"]
        losses = [sum(1 - min(h * b / (w * a), w * a / (h * b)) for h, w in sizes) for a, b in SHAPES]
        assert losses[bucket] == pytest.approx(min(losses))


@pytest.mark.parametrize("case", range(4))
def test_every_pair_once_an_epoch_whatever_reads_and_wherever_it_stops(prepared: Path, case: int) -> None:
    """Stretches by 1, 2, 4 or 8 processes, all with 8 places in a batch of all."""
    rng = np.random.default_rng(case)
    _, of_buckets = opened(prepared)
    position, seen = 0, []
    while len(seen) < 2 * BucketOrder(of_buckets["bucket_N"], case, 8).batches * 8:
        processes, steps = int(rng.choice([1, 2, 4, 8])), int(rng.integers(1, 5))
        options = {"num_workers": int(rng.integers(1, 5)), "shard_count": processes, "seed": case, "position": position}
        shards = [
            take(prepared, steps, batch_size=8 // processes, shard_index=process, **options)
            for process in range(processes)
        ]
        for same_step in zip(*shards, strict=True):
            assert len({shape_of(batch) for batch in same_step}) == 1  # of all processes
        seen += [row for batches in shards for row in rows_of(batches)]
        position += 8 * steps
    seen.sort(key=lambda row: int(row.index_B))
    assert [int(row.index_B) for row in seen] == list(range(position))
    epoch = BucketOrder(of_buckets["bucket_N"], case, 8).batches * 8
    for start in range(0, len(seen) // epoch * epoch, epoch):
        reds = [int(row.inputs.images_BKHWC[0, 0, 0, 0]) for row in seen[start : start + epoch] if row.weight_B]
        assert sorted(reds) == [number for number in range(NUMBER) if number % 5 != 4]
    assert all(row.weight_B in (0, 1) for row in seen)


def test_shards_interleave_to_the_stream_of_one_process(prepared: Path) -> None:
    """All random draws are included."""
    options = {"caption_dropout": 0.3, "random_crop": True, "random_flip": True, "size_conditioning": "real"}
    whole = rows_of(take(prepared, 12, batch_size=4, **options))
    shards = [rows_of(take(prepared, 12, batch_size=2, shard_index=i, shard_count=2, **options)) for i in range(2)]
    assert_same([row for pair in zip(*shards, strict=True) for row in pair], whole)


def test_a_batch_describes_its_records(prepared: Path) -> None:
    records, of_buckets = opened(prepared)
    with make_iterator(records, inputs(), batch_size=4, seed=1, **of_buckets) as batches:
        for batch in itertools.islice(batches, 5):
            reds = batch.inputs.images_BKHWC[:, 0, 0, 0, 0]
            told = batches.describe(batch)
            assert all(f"prompt {red}'" in line for red, line in zip(reds, told, strict=True))


@pytest.mark.parametrize("view", [View(), View(0.2, 0.9, flip=True)])
def test_a_mask_is_cut_as_its_image(view: View) -> None:
    """Each cell weighs what the mean of its pixels does, in the image as the model sees it."""
    mask = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40), np.uint8)).convert("RGB")
    file = encode(np.asarray(mask), "PNG")
    weight_hw = cell_weights(file, view, (16, 24), 4, floor=0.25)
    assert weight_hw is not None
    crop_HWC, _ = cover(mask, (16, 24), view)
    seen_HW = crop_HWC[:, ::-1, 0] if view.flip else crop_HWC[..., 0]
    expected_hw = np.zeros((4, 6))
    for h, w in itertools.product(range(4), range(6)):
        expected_hw[h, w] = 0.25 + 0.75 * seen_HW[4 * h : 4 * h + 4, 4 * w : 4 * w + 4].mean() / 255
    np.testing.assert_allclose(weight_hw, expected_hw / expected_hw.mean())


@pytest.mark.parametrize("most", [None, 3, 100])
def test_validation(prepared: Path, most: int | None) -> None:
    """The position of a pair, which its noise follows from, does not depend on the batches."""
    records, of_buckets = opened(prepared, "validation")
    count = len(records) if most is None else min(most, len(records))
    reds = [4, 9, 14, 19, 24]
    for batch_size, processes in ((1, 1), (2, 1), (2, 2)):
        options = {"batch_size": batch_size, "shard_count": processes, "most": most} | of_buckets
        shards = [list(validation_batches(records, inputs(), shard_index=i, **options)) for i in range(processes)]
        assert len({len(batches) for batches in shards}) == 1
        for same_step in zip(*shards, strict=True):
            assert len({shape_of(batch) for batch in same_step}) == 1
        rows = [row for batches in shards for row in rows_of(batches) if row.weight_B]
        found = sorted((int(row.index_B), int(row.inputs.images_BKHWC[0, 0, 0, 0])) for row in rows)
        assert found == list(enumerate(reds))[:count]
        assert {tuple(row.inputs.images_BKHWC.shape[1:3]) for row in rows} <= set(SHAPES)


def test_at_most_so_many_squares_are_validated_on(prepared: Path) -> None:
    records = open_records(prepared, "validation")
    found = [list(validation_batches(records, RawInputs(16, spell), batch_size=2, most=most)) for most in (None, 3)]
    assert [len(batches) for batches in found] == [3, 2]
    assert_same(
        [batch._replace(weight_B=()) for batch in found[1]], [batch._replace(weight_B=()) for batch in found[0][:2]]
    )
    assert [batch.weight_B.tolist() for batch in found[1]] == [[1, 1], [1, 0]]
