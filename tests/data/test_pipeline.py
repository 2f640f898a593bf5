import itertools
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_jax.batch import PreferenceBatch
from dpo_jax.data.builder import open_prepared, prepare
from dpo_jax.data.pipeline import RandomPairs, make_iterator, validation_batches
from dpo_jax.data.sources import pickapic

from .conftest import encode

LENGTH = 11
DEFAULTS = {"resolution": 16, "seed": 3}


def spell(captions: Sequence[str]) -> np.ndarray:
    """One "encoder": the caption's bytes."""
    return np.asarray([[list(caption.encode().ljust(32))] for caption in captions], np.int32)


def read(ids_EL: np.ndarray) -> str:
    return bytes(ids_EL[0].tolist()).decode().strip()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of 40 x 32 ramps whose green and blue channels tell rows and columns; red tells the pair and candidate."""
    folder = tmp_path_factory.mktemp("data")
    rows, columns = np.mgrid[:32, :40]
    ramps = [np.stack([0 * rows + red, rows, columns], -1).astype(np.uint8) for red in range(2 * LENGTH + 4)]
    pngs = [encode(ramp, "PNG") for ramp in ramps]
    captions = [f"prompt {i}" for i in range(LENGTH + 2)]
    labels = [1.0] * len(captions)
    table = {"jpg_0": pngs[::2], "jpg_1": pngs[1::2], "caption": captions, "label_0": labels}
    pq.write_table(pa.table(table), folder / "pairs.parquet")
    summary = prepare(pickapic, [folder / "pairs.parquet"], folder / "out", validation_fraction=0.16)
    assert summary.pairs == {"train": LENGTH, "validation": 2}
    return folder / "out"


def take(path: Path | str, number: int, batch_size: int = 4, **options: object) -> list[PreferenceBatch]:
    with make_iterator(path, batch_size=batch_size, tokenizers=spell, **DEFAULTS | options) as batches:
        return list(itertools.islice(batches, number))


def rows_of(batches: Iterable[PreferenceBatch]) -> list[PreferenceBatch]:
    return [PreferenceBatch(*row) for batch in batches for row in zip(*batch, strict=True)]


def assert_same(a: Sequence[PreferenceBatch], b: Sequence[PreferenceBatch]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        for name, left, right in zip(x._fields, x, y, strict=True):
            np.testing.assert_array_equal(left, right, err_msg=name)


def test_a_batch(prepared: Path) -> None:
    (batch,) = take(prepared, 1)
    shapes = {name: (value.shape, value.dtype.name) for name, value in batch._asdict().items()}
    assert shapes == {
        "images_BKHWC": ((4, 2, 16, 16, 3), "uint8"),
        "token_ids_BEL": ((4, 1, 32), "int32"),
        "size_cond_BK6": ((4, 2, 6), "float32"),
        "preference_BK": ((4, 2), "float32"),
        "valid_BK": ((4, 2), "bool"),
        "weight_B": ((4,), "float32"),
        "index_B": ((4,), "int32"),
    }
    np.testing.assert_array_equal(batch.index_B, range(4))
    np.testing.assert_array_equal(batch.size_cond_BK6, np.broadcast_to([16, 16, 0, 0, 16, 16], (4, 2, 6)))
    np.testing.assert_array_equal(batch.preference_BK, [[1, 0]] * 4)
    for row in rows_of([batch]):
        number = int(read(row.token_ids_BEL).removeprefix("prompt "))
        np.testing.assert_array_equal(row.images_BKHWC[:, 0, 0, 0], [2 * number, 2 * number + 1])


def test_each_epoch_has_every_record_in_another_order(prepared: Path) -> None:
    rows = rows_of(take(prepared, 3, batch_size=LENGTH))
    epochs = [[read(row.token_ids_BEL) for row in rows[i : i + LENGTH]] for i in (0, LENGTH, 2 * LENGTH)]
    records = {record["caption"].decode() for record in open_prepared(prepared, "train")}
    assert [set(epoch) for epoch in epochs] == [records] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [row.index_B for row in rows] == list(range(3 * LENGTH))


def test_shards_interleave_to_the_stream_of_one_process(prepared: Path) -> None:
    """All draws included, over an epoch whose length doesn't divide by the shards."""
    options = {"caption_dropout": 0.3, "random_crop": True, "random_flip": True, "size_conditioning": "real"}
    whole = rows_of(take(prepared, 6, batch_size=4, **options))
    shards = [rows_of(take(prepared, 6, batch_size=2, shard_index=i, shard_count=2, **options)) for i in range(2)]
    assert_same([row for pair in zip(*shards, strict=True) for row in pair], whole)
    assert sorted(int(row.index_B) for shard in shards for row in shard) == list(range(24))


def test_crop_and_flip_are_joint_and_told(prepared: Path) -> None:
    """Resized to 16 x 20: red tells candidates apart, blue (columns) and green (rows) must agree."""
    rows = rows_of(take(prepared, 30, random_crop=True, random_flip=True, size_conditioning="real"))
    flips, lefts = [], []
    for row in rows:
        np.testing.assert_array_equal(row.images_BKHWC[0, ..., 1:], row.images_BKHWC[1, ..., 1:])
        np.testing.assert_array_equal(row.size_cond_BK6[0], row.size_cond_BK6[1])
        height, width, top, left, *target = row.size_cond_BK6[0]
        assert (height, width, top, *target) == (32, 40, 0, 16, 16)
        blue_W = row.images_BKHWC[0, 0, :, 2].astype(int)
        flips.append(blue_W[0] > blue_W[-1])
        lefts.append(int(left))
        first = blue_W[-1] if flips[-1] else blue_W[0]
        # column j of the resized ramp is 2 j + 1/2; mirrored, the crop began `left` columns from the right
        assert abs(first - (2 * (4 - left if flips[-1] else left) + 0.5)) <= 1
    assert 0.3 < np.mean(flips) < 0.7
    assert set(lefts) == {0, 1, 2, 3, 4}


def test_options_leave_each_others_draws_alone(prepared: Path) -> None:
    def dropped(**options: object) -> list[bool]:
        return [read(row.token_ids_BEL) == "" for row in rows_of(take(prepared, 50, caption_dropout=0.25, **options))]

    plain = dropped()
    assert dropped(random_crop=True, random_flip=True) == plain
    assert 0.15 < np.mean(plain) < 0.35
    assert not any(read(row.token_ids_BEL) == "" for row in rows_of(take(prepared, 10)))
    assert all(read(row.token_ids_BEL) == "" for row in rows_of(take(prepared, 3, caption_dropout=1.0)))


def test_seed_decides() -> None:
    same, again, other = (take("random:20", 3, seed=seed) for seed in (1, 1, 2))
    assert_same(same, again)
    assert any((a.token_ids_BEL != b.token_ids_BEL).any() for a, b in zip(same, other, strict=True))


class TokenizeInWorker:
    """Reports from where it runs: (a JAX backend has started, running in a child process)."""

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        import multiprocessing

        from jax._src import xla_bridge

        started = xla_bridge.backends_are_initialized()
        return np.asarray([[[started, multiprocessing.parent_process() is not None]]] * len(captions), np.int32)


def test_resumes_exactly_with_other_workers_which_never_start_jax(prepared: Path) -> None:
    options = {"random_crop": True, "random_flip": True, "batch_size": 4, **DEFAULTS}
    expected = take(prepared, 9, random_crop=True, random_flip=True)
    with make_iterator(prepared, tokenizers=TokenizeInWorker(), **options) as batches:
        here = [next(batches) for _ in range(3)]
        state = json.loads(json.dumps(batches.get_state()))
        next(batches)  # what was handed out after the state was taken comes again
    with make_iterator(prepared, tokenizers=TokenizeInWorker(), num_workers=2, **options) as batches:
        batches.set_state(state)
        there = [next(batches) for _ in range(3)]
        state = json.loads(json.dumps(batches.get_state()))
    np.testing.assert_array_equal([batch.token_ids_BEL[..., 1] for batch in here], 0)
    np.testing.assert_array_equal([batch.token_ids_BEL[..., 0] for batch in there], 0)
    np.testing.assert_array_equal([batch.token_ids_BEL[..., 1] for batch in there], 1)
    with make_iterator(prepared, tokenizers=TokenizeInWorker(), **options) as batches:
        batches.set_state(state)
        back = [next(batches) for _ in range(3)]
    ours = [batch._replace(token_ids_BEL=0) for batch in here + there + back]
    assert_same(ours, [batch._replace(token_ids_BEL=0) for batch in expected])


def test_relabel(prepared: Path) -> None:
    def order(relabel: str) -> dict[str, set[bool]]:
        """By caption: whether the better candidate came second, over three epochs."""
        found: dict[str, set[bool]] = {}
        for row in rows_of(take(prepared, 3, batch_size=LENGTH, relabel=relabel)):
            swapped = row.images_BKHWC[0, 0, 0, 0] > row.images_BKHWC[1, 0, 0, 0]
            found.setdefault(read(row.token_ids_BEL), set()).add(bool(swapped))
            np.testing.assert_array_equal(row.preference_BK, [1, 0])
        return found

    assert set(map(frozenset, order("none").values())) == {frozenset({False})}
    assert set(map(frozenset, order("swapped").values())) == {frozenset({True})}
    shuffled = order("shuffled").values()
    assert all(len(seen) == 1 for seen in shuffled)
    assert {next(iter(seen)) for seen in shuffled} == {False, True}


@pytest.mark.parametrize("shard_count", [1, 2])
def test_validation_counts_every_record_once(prepared: Path, shard_count: int) -> None:
    shards = [
        list(
            validation_batches(
                prepared,
                split="train",
                batch_size=3,
                resolution=16,
                tokenizers=spell,
                shard_index=i,
                shard_count=shard_count,
            )
        )
        for i in range(shard_count)
    ]
    assert {len(batches) for batches in shards} == {4 // shard_count}
    rows = [row for batches in shards for row in rows_of(batches)]
    kept = sorted((int(row.index_B), read(row.token_ids_BEL)) for row in rows if row.weight_B == 1)
    records = open_prepared(prepared, "train")
    assert kept == [(i, records[i]["caption"].decode()) for i in range(LENGTH)]
    assert sum(row.weight_B == 0 for row in rows) == 12 - LENGTH


def test_short_records_are_filled_up(prepared: Path) -> None:
    (batch,) = take(prepared, 1, num_candidates=3)
    np.testing.assert_array_equal(batch.valid_BK, [[True, True, False]] * 4)
    np.testing.assert_array_equal(batch.preference_BK, [[1, 0, 0]] * 4)
    assert not batch.images_BKHWC[:, 2].any()
    with pytest.raises(ValueError, match="a record has 2 candidates, more than num_candidates=1"):
        take(prepared, 1, num_candidates=1)


def test_random_pairs() -> None:
    pairs = RandomPairs(64, seed=0)
    assert len({pairs[i]["caption"] for i in range(64)}) == len({pairs[i]["images"][0] for i in range(64)}) == 64
    assert pairs[5]["images"] == RandomPairs(64, seed=0)[5]["images"] != RandomPairs(64, seed=1)[5]["images"]
    batches = list(validation_batches("random:6", batch_size=4, resolution=16, tokenizers=spell))
    assert [batch.weight_B.sum() for batch in batches] == [4, 2]


def test_nothing_prepared(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no prepared data set at .*: run python -m dpo_jax.prepare"):
        make_iterator(tmp_path, batch_size=2, tokenizers=spell, **DEFAULTS)
    with pytest.raises(FileNotFoundError, match="no prepared data set at"):
        validation_batches(tmp_path, batch_size=2, resolution=16, tokenizers=spell)


def test_needs_no_tensorflow(prepared: Path) -> None:
    code = (
        "import sys, numpy as np; from dpo_jax.data import pipeline; "
        f"it = pipeline.make_iterator({str(prepared)!r}, batch_size=2, resolution=8, seed=0, "
        "tokenizers=lambda captions: np.zeros((1, 1, 4), np.int32)); next(it); it.close(); "
        "from jax._src import xla_bridge; "
        "print({'tensorflow', 'torch'} & set(sys.modules), xla_bridge.backends_are_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set() False", done.stderr
