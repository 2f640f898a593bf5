import itertools
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tree

from dpo_jax.batch import PreferenceBatch
from dpo_jax.data.load.curriculum import CurriculumOrder
from dpo_jax.data.load.inputs import RawInputs
from dpo_jax.data.load.pipeline import EXAMPLES_PER_TASK, NUM_WORKERS, _draws, make_iterator, validation_batches
from dpo_jax.data.load.records import RandomRecords, TrainingRecords, open_records
from dpo_jax.data.store.latents import distinct_captions
from dpo_jax.data.store.prepared import open_prepared

from ..array_checks import agrees
from .conftest import encode, write_prepared

LENGTH = 11


def spell(captions: Sequence[str]) -> np.ndarray:
    """A stand-in for one tokenizer: the caption's bytes."""
    return np.asarray([list(caption.encode().ljust(32)) for caption in captions], np.int32)


def caption_of(row: PreferenceBatch, candidate: int = 0) -> str:
    return bytes(row.inputs.token_ids_BML[candidate].tolist()).decode().strip()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of 40 x 32 ramps: green and blue give rows and columns, red gives the pair and candidate."""
    rows, columns = np.mgrid[:32, :40]
    ramps = [np.stack([0 * rows + red, rows, columns], -1).astype(np.uint8) for red in range(2 * LENGTH + 4)]
    pngs = [encode(ramp, "PNG") for ramp in ramps]
    records = [
        {
            "caption": f"prompt {i}",
            "images": pngs[2 * i : 2 * i + 2],
            "split": "validation" if i in (3, 8) else "train",
        }
        for i in range(LENGTH + 2)
    ]
    return write_prepared(tmp_path_factory.mktemp("data") / "out", records)


def captions_of(pairs: TrainingRecords) -> list[str]:
    return [caption for i in range(len(pairs)) for caption in pairs[i]["captions"]]


def take(data: Path | str | TrainingRecords, number: int, batch_size: int = 4, **options: Any) -> list[PreferenceBatch]:
    pairs = open_records(data, "train") if isinstance(data, str | Path) else data
    augmentation = {name: options.pop(name) for name in ("random_crop", "random_flip") if name in options}
    inputs = RawInputs(16, spell, **augmentation)
    with make_iterator(pairs, inputs, batch_size=batch_size, **{"seed": 3} | options) as batches:
        return list(itertools.islice(batches, number))


def rows_of(batches: Iterable[PreferenceBatch]) -> list[PreferenceBatch]:
    return [
        tree.map_structure(lambda x, i=i: None if x is None else x[i], batch)
        for batch in batches
        for i in range(len(batch.index_B))
    ]


def assert_same(a: Sequence[PreferenceBatch], b: Sequence[PreferenceBatch]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        for (path, left), right in zip(tree.flatten_with_path(x), tree.flatten(y), strict=True):
            np.testing.assert_array_equal(left, right, err_msg=str(path))


def test_a_batch(prepared: Path) -> None:
    (batch,) = take(prepared, 1)
    assert agrees(batch)
    fields = batch.inputs._asdict() | batch._asdict()
    shapes = {
        name: (value.shape, value.dtype.name)
        for name, value in fields.items()
        if name not in ("inputs", "cell_weight_BKhw")
    }
    assert batch.cell_weight_BKhw is None
    assert shapes == {
        "images_BKHWC": ((4, 2, 16, 16, 3), "uint8"),
        "mirrored_BK": ((4, 2), "bool"),
        "token_ids_BML": ((4, 1, 32), "int32"),
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
        number = int(caption_of(row).removeprefix("prompt "))
        np.testing.assert_array_equal(row.inputs.images_BKHWC[:, 0, 0, 0], [2 * number, 2 * number + 1])


def test_each_epoch_has_every_record_in_another_order(prepared: Path) -> None:
    rows = rows_of(take(prepared, 3, batch_size=LENGTH))
    epochs = [[caption_of(row) for row in rows[i : i + LENGTH]] for i in (0, LENGTH, 2 * LENGTH)]
    records = captions_of(open_records(prepared, "train"))
    assert [sorted(epoch) for epoch in epochs] == [sorted(records)] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [row.index_B for row in rows] == list(range(3 * LENGTH))


def test_shards_interleave_to_the_stream_of_one_process(prepared: Path) -> None:
    """All random draws are included, over an epoch whose length is not divisible by the shards."""
    options = {"caption_dropout": 0.3, "random_crop": True, "random_flip": True, "size_conditioning": "real"}
    whole = rows_of(take(prepared, 6, batch_size=4, **options))
    shards = [rows_of(take(prepared, 6, batch_size=2, shard_index=i, shard_count=2, **options)) for i in range(2)]
    assert_same([row for pair in zip(*shards, strict=True) for row in pair], whole)
    assert sorted(int(row.index_B) for shard in shards for row in shard) == list(range(24))


def test_crop_and_flip_are_joint_and_told(prepared: Path) -> None:
    """Resized to 16 x 20: red tells candidates apart; blue (columns) and green (rows) must agree."""
    rows = rows_of(take(prepared, 30, random_crop=True, random_flip=True, size_conditioning="real"))
    flips, lefts = [], []
    for row in rows:
        np.testing.assert_array_equal(row.inputs.images_BKHWC[0, ..., 1:], row.inputs.images_BKHWC[1, ..., 1:])
        np.testing.assert_array_equal(row.size_cond_BK6[0], row.size_cond_BK6[1])
        height, width, top, left, *target = row.size_cond_BK6[0]
        assert (height, width, top, *target) == (32, 40, 0, 16, 16)
        blue_W = row.inputs.images_BKHWC[0, 0, :, 2].astype(int)
        assert blue_W[0] < blue_W[-1]  # the step mirrors it
        flips.append(row.inputs.mirrored_BK[0])
        assert row.inputs.mirrored_BK[1] == flips[-1]
        blue_W = blue_W[::-1] if flips[-1] else blue_W
        lefts.append(int(left))
        first = blue_W[-1] if flips[-1] else blue_W[0]
        # column j of the resized ramp is 2 j + 1/2; mirrored, the crop began `left` columns from the right
        assert abs(first - (2 * (4 - left if flips[-1] else left) + 0.5)) <= 1
    assert 0.3 < np.mean(flips) < 0.7
    assert set(lefts) == {0, 1, 2, 3, 4}


def test_options_leave_each_others_draws_alone(prepared: Path) -> None:
    def dropped(**options: object) -> list[bool]:
        return [caption_of(row) == "" for row in rows_of(take(prepared, 50, caption_dropout=0.25, **options))]

    plain = dropped()
    assert dropped(random_crop=True, random_flip=True) == plain
    assert 0.15 < np.mean(plain) < 0.35
    assert not any(caption_of(row) == "" for row in rows_of(take(prepared, 10)))
    assert all(caption_of(row) == "" for row in rows_of(take(prepared, 3, caption_dropout=1.0)))


def test_draws_depend_on_seed_and_position_alone() -> None:
    all_N4 = _draws(7, range(0, 60, 1))
    assert all_N4.shape == (60, 4)
    assert len(set(all_N4.ravel())) == 240
    assert ((all_N4 >= 0) & (all_N4 < 1)).all()
    for positions in (range(13, 14), range(20, 50, 1), range(3, 60, 7), range(59, 60, 5)):
        np.testing.assert_array_equal(_draws(7, positions), all_N4[list(positions)])
    assert not (_draws(8, range(0, 60, 1)) == all_N4).any()
    later_N4 = _draws(7, range(2**40, 2**40 + 1000))
    assert abs(later_N4.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(later_N4, rowvar=False) - np.eye(4)).max() < 0.15


def test_seed_decides() -> None:
    same, again, other = (take("random:20", 3, seed=seed) for seed in (1, 1, 2))
    assert_same(same, again)
    assert any((a.inputs.token_ids_BML != b.inputs.token_ids_BML).any() for a, b in zip(same, other, strict=True))


def test_resumes_exactly_with_another_number_of_workers(prepared: Path) -> None:
    inputs, options = RawInputs(16, spell, random_crop=True, random_flip=True), {"batch_size": 4, "seed": 3}
    pairs = open_records(prepared, "train")
    expected = take(pairs, 9, random_crop=True, random_flip=True)
    found, state = [], {"position": 0}
    for workers in (1, 5, 2):
        with make_iterator(pairs, inputs, num_workers=workers, **options) as batches:
            batches.set_state(state)
            found += [next(batches) for _ in range(3)]
            state = json.loads(json.dumps(batches.get_state()))
            next(batches)  # batches after the state was taken are returned again
    assert_same(found, expected)


def test_what_goes_wrong_in_a_worker_is_raised(prepared: Path) -> None:
    def damaged(captions: Sequence[str]) -> np.ndarray:
        if captions != [""]:
            raise ValueError(f"no words for {captions[0]}")
        return spell(captions)

    with (
        pytest.raises(ValueError, match="no words for prompt"),
        make_iterator(open_records(prepared, "train"), RawInputs(16, damaged), batch_size=4, seed=0) as batches,
    ):
        next(batches)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 pairs: Grain shuffles few slowly, walking through 2^16 indices to find the next."""
    pngs = [encode(np.full((8, 8, 3), red, np.uint8), "PNG") for red in range(240)]
    records = [{"caption": f"prompt {i}", "images": pngs[2 * i : 2 * i + 2]} for i in range(120)]
    return write_prepared(tmp_path_factory.mktemp("many") / "out", records)


class Reading(NamedTuple):
    """The processes, workers and batch size that read a stretch of the stream."""

    processes: int
    workers: int
    batch_size: int
    steps: int


def read_stretch(
    pairs: TrainingRecords, seed: int, reading: Reading, state: dict[str, int], **options: Any
) -> tuple[list, dict[str, int]]:
    """Return (position, caption) of every sample that the processes read from `state` on, and the state after them."""
    seen, states = [], []
    for process in range(reading.processes):
        with make_iterator(
            pairs,
            RawInputs(8, spell),
            batch_size=reading.batch_size,
            seed=seed,
            shard_index=process,
            shard_count=reading.processes,
            num_workers=reading.workers,
            **options,
        ) as batches:
            batches.set_state(json.loads(json.dumps(state)))
            rows = rows_of(itertools.islice(batches, reading.steps))
            states.append(batches.get_state())
        seen += [(int(row.index_B), caption_of(row)) for row in rows]
    assert states == [states[0]] * len(states)
    return seen, states[0]


def draw_stretches(rng: np.random.Generator) -> list[Reading]:
    """Return two to four stretches, each by another number of processes and workers with another batch size."""
    return [
        Reading(
            processes=int(rng.integers(1, 6)),
            workers=int(rng.integers(1, 9)),
            batch_size=int(rng.choice([1, 2, 3, 5, 7, 16, 20])),
            steps=int(rng.integers(0, 4)),
        )
        for _ in range(rng.integers(2, 5))
    ]


@pytest.mark.parametrize("case", range(57))
def test_every_pair_once_an_epoch_whatever_reads_and_wherever_it_stops(many: Path, case: int) -> None:
    rng = np.random.default_rng(case)
    number = int(rng.integers(20, 121))
    stretches = draw_stretches(rng)
    pairs = open_records(many, "train", limit=number)
    seen, state = [], {"position": 0}
    for reading in stretches:
        more, state = read_stretch(pairs, case, reading, state)
        seen += more
    assert state == {"position": sum(r.processes * r.batch_size * r.steps for r in stretches)}
    seen.sort()
    assert [position for position, _ in seen] == list(range(state["position"]))
    everything = sorted(captions_of(pairs))
    for start in range(0, len(seen), number):
        epoch = sorted(caption for _, caption in seen[start : start + number])
        assert len(set(epoch)) == len(epoch)
        assert epoch == everything or (start + number > len(seen) and set(epoch) < set(everything))


@pytest.mark.parametrize("case", range(6))
def test_a_curriculum_is_the_same_whatever_reads_and_wherever_it_stops(many: Path, case: int) -> None:
    rng = np.random.default_rng(case)
    number, blocks, positions = int(rng.integers(20, 121)), int(rng.integers(1, 7)), int(rng.integers(1, 200))
    pairs = open_records(many, "train", limit=number)
    order = CurriculumOrder(rng.normal(size=number), case, blocks=blocks, positions=positions)
    seen, state = [], {"position": 0}
    for reading in draw_stretches(rng):
        more, state = read_stretch(pairs, case, reading, state, curriculum=order)
        seen += more
    captions = captions_of(pairs)
    assert sorted(seen) == [(position, captions[order[position]]) for position in range(state["position"])]


@pytest.mark.parametrize("batch_size", [1, 8, 24, 64])
def test_the_next_batch_is_made_ahead_but_not_the_whole_epoch(many: Path, batch_size: int) -> None:
    made = []

    def counted(captions: Sequence[str]) -> np.ndarray:
        made.extend(caption for caption in captions if caption)
        return spell(captions)

    with make_iterator(open_records(many, "train"), RawInputs(8, counted), batch_size=batch_size, seed=0) as batches:
        next(batches)
        deadline = time.monotonic() + 10
        while len(made) < 2 * batch_size and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(made) >= 2 * batch_size
        time.sleep(0.2)
        assert len(made) <= 2 * (batch_size + NUM_WORKERS * EXAMPLES_PER_TASK)


def test_relabel(prepared: Path) -> None:
    def order(relabel: str) -> dict[str, set[bool]]:
        """Return, by caption, whether the better candidate came second, over three epochs."""
        found: dict[str, set[bool]] = {}
        for row in rows_of(take(prepared, 3, batch_size=LENGTH, relabel=relabel)):
            swapped = row.inputs.images_BKHWC[0, 0, 0, 0] > row.inputs.images_BKHWC[1, 0, 0, 0]
            found.setdefault(caption_of(row), set()).add(bool(swapped))
            np.testing.assert_array_equal(row.preference_BK, [1, 0])
        return found

    assert set(map(frozenset, order("none").values())) == {frozenset({False})}
    assert set(map(frozenset, order("swapped").values())) == {frozenset({True})}
    shuffled = order("shuffled").values()
    assert all(len(seen) == 1 for seen in shuffled)
    assert {next(iter(seen)) for seen in shuffled} == {False, True}


@pytest.mark.parametrize("shard_count", [1, 2])
def test_validation_counts_every_record_once(prepared: Path, shard_count: int) -> None:
    pairs = open_records(prepared, "train")
    shards = [
        list(
            validation_batches(
                pairs,
                RawInputs(16, spell),
                batch_size=3,
                shard_index=i,
                shard_count=shard_count,
            )
        )
        for i in range(shard_count)
    ]
    assert {len(batches) for batches in shards} == {4 // shard_count}
    rows = [row for batches in shards for row in rows_of(batches)]
    kept = sorted((int(row.index_B), caption_of(row)) for row in rows if row.weight_B == 1)
    assert kept == list(enumerate(captions_of(pairs)))
    assert sum(row.weight_B == 0 for row in rows) == 12 - LENGTH


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tie, soft labels, seven candidates and two single images; an image's red is 100 * record + rank."""

    def images(*reds: int) -> list[bytes]:
        return [encode(np.full((8, 8, 3), red, np.uint8), "PNG") for red in reds]

    votes = [0.3, 0.2, 0.15, 0.1, 0.1, 0.1, 0.05]
    records: list[dict[str, Any]] = [
        {"caption": "tie", "images": images(0, 1), "preference": [0.5, 0.5]},
        {"caption": "soft", "images": images(10, 11), "preference": [0.75, 0.25]},
        {"caption": "seven", "images": images(*range(20, 27)), "preference": votes},
        {"caption": "liked", "images": images(30), "preference": [1.0]},
        {"caption": "disliked", "images": images(40), "preference": [0.0]},
    ]
    return write_prepared(tmp_path_factory.mktemp("mixed") / "out", records)


def rows_by_caption(folder: Path, **choice: Any) -> dict[str, PreferenceBatch]:
    pairs = open_records(folder, "train", **choice)
    rows = rows_of(take(pairs, 1, batch_size=len(pairs)))
    return {caption_of(row): row for row in rows}


def test_labels_and_ties(mixed: Path) -> None:
    """Compares preference and weight by caption."""

    def labels(**choice: Any) -> dict[str, tuple[list[float], float]]:
        rows = rows_by_caption(mixed, **choice)
        return {
            name: (row.preference_BK.astype(float).round(4).tolist(), float(row.weight_B)) for name, row in rows.items()
        }

    winner, half = [1.0, 0.0], [0.5, 0.5]
    assert labels() == {"soft": (winner, 1.0), "seven": (winner, 1.0)}
    assert labels(labels="soft") == {"soft": ([0.75, 0.25], 1.0), "seven": ([0.8571, 0.1429], 1.0)}
    assert labels(ties="soft") == {"tie": (half, 1.0), "soft": (winner, 1.0), "seven": (winner, 1.0)}
    assert labels(ties="zero_weight") == {"tie": (half, 0.0), "soft": (winner, 1.0), "seven": (winner, 1.0)}
    single = labels(num_candidates=1)
    assert single == {name: ([float(name != "disliked")], 1.0) for name in ("soft", "seven", "liked", "disliked")}


def test_one_of_the_lines_of_a_caption_is_drawn_every_time(tmp_path: Path) -> None:
    """Nothing else changes; validation uses the first line."""
    image = encode(np.zeros((8, 8, 3), np.uint8), "PNG")
    records: list[dict[str, Any]] = [
        {"caption": "a\nbb\n\n ccc ", "images": [image, image]},
        {"caption": "own", "captions": ["1", "2\n22"], "images": [image, image]},
        {"caption": "first\nsecond", "images": [image, image], "split": "validation"},
    ]
    folder = write_prepared(tmp_path / "out", records)
    assert distinct_captions(open_prepared(folder)).to_pylist() == sorted(
        ["", "1", "2\n22", "own", "a\nbb\n\n ccc ", "first\nsecond"]
    )
    lines = distinct_captions(open_prepared(folder), caption_lines=True).to_pylist()
    assert lines == ["", "1", "2", "22", "a", "bb", "ccc", "first", "own", "second"]

    options = {"caption_dropout": 0.25, "random_flip": True}
    drawn, whole = (take(folder, 40, caption_lines=drawn, **options) for drawn in (True, False))
    found = Counter((caption_of(row, 0), caption_of(row, 1)) for row in rows_of(drawn))
    shared = {pair: count for pair, count in found.items() if pair[0] in ("a", "bb", "ccc")}
    assert shared.keys() == {(line, line) for line in ("a", "bb", "ccc")}
    assert found.keys() - shared.keys() == {("", ""), ("1", "2"), ("1", "22")}
    assert all(count == pytest.approx(20, abs=14) for count in shared.values())  # 80 of 160; a quarter has no caption
    assert all(found[pair] == pytest.approx(30, abs=18) for pair in (("1", "2"), ("1", "22")))
    for one, other in zip(drawn, whole, strict=True):
        np.testing.assert_array_equal(one.inputs.mirrored_BK, other.inputs.mirrored_BK)
        dropped = [caption_of(row) == "" for row in rows_of([one])]
        assert dropped == [caption_of(row) == "" for row in rows_of([other])]
    held_out = open_records(folder, "validation")
    with validation_batches(held_out, RawInputs(16, spell), batch_size=1, caption_lines=True) as batches:
        assert [caption_of(row) for row in rows_of(batches)] == ["first"]


def test_single_images_that_were_liked(mixed: Path) -> None:
    """They are examples with a candidate that is only padding."""
    rows = rows_by_caption(mixed, liked_images=True)
    assert rows.keys() == {"soft", "seven", "liked"}
    assert {name: row.valid_BK.tolist() for name, row in rows.items()} == {
        "soft": [True, True],
        "seven": [True, True],
        "liked": [True, False],
    }
    assert rows["liked"].inputs.images_BKHWC[:, 0, 0, 0].tolist() == [30, 0]
    assert rows["liked"].preference_BK.tolist() == [1, 0]
    assert rows["liked"].weight_B == 1


def test_best_and_worst_are_kept_of_more_candidates(mixed: Path) -> None:
    for number, reds in ((1, [20]), (2, [20, 26]), (3, [20, 21, 26]), (7, list(range(20, 27)))):
        row = rows_by_caption(mixed, num_candidates=number)["seven"]
        assert row.inputs.images_BKHWC[:, 0, 0, 0].tolist() == reds
        assert row.valid_BK.all()
    soft = rows_by_caption(mixed, num_candidates=3, labels="soft")["seven"]
    np.testing.assert_allclose(soft.preference_BK, np.asarray([0.3, 0.2, 0.05]) / 0.55, rtol=1e-6)


def test_validation_keeps_the_weight_of_ties(mixed: Path) -> None:
    pairs = open_records(mixed, "train", ties="zero_weight")
    (batch,) = validation_batches(pairs, RawInputs(8, spell), batch_size=5)
    assert batch.weight_B.tolist() == [0, 1, 1, 0, 0]
    assert [caption_of(row) for row in rows_of([batch])][:3] == ["tie", "soft", "seven"]


def test_each_image_may_have_a_caption_of_its_own(tmp_path: Path) -> None:
    """It stays with its image. A single caption is given to each image; dropout drops all captions or none."""
    images = [encode(np.full((8, 8, 3), red, np.uint8), "PNG") for red in range(6)]
    records: list[dict[str, Any]] = [{"caption": "both", "images": images[:2]}]
    records += [{"caption": "", "images": images[i : i + 2], "captions": [f"red {i}", f"red {i + 1}"]} for i in (2, 4)]
    folder = write_prepared(tmp_path / "out", records)
    assert open_records(folder, "train", limit=1).num_captions == 1
    for relabel, order in (("none", [0, 1]), ("swapped", [1, 0])):
        rows = rows_of(take(folder, 1, batch_size=3, relabel=relabel))
        found = sorted([caption_of(row, k) for k in order] for row in rows)
        assert found == [["both", "both"], ["red 2", "red 3"], ["red 4", "red 5"]]
        for row in rows:
            reds = row.inputs.images_BKHWC[:, 0, 0, 0]
            assert [caption_of(row, k) in ("both", f"red {reds[k]}") for k in range(2)] == [True, True]
    dropped = [[caption_of(row, k) == "" for k in range(2)] for row in rows_of(take(folder, 30, caption_dropout=0.5))]
    assert {tuple(pair) for pair in dropped} == {(True, True), (False, False)}


def test_short_records_are_filled_up(prepared: Path) -> None:
    (batch,) = take(open_records(prepared, "train", num_candidates=3), 1)
    np.testing.assert_array_equal(batch.valid_BK, [[True, True, False]] * 4)
    np.testing.assert_array_equal(batch.preference_BK, [[1, 0, 0]] * 4)
    assert not batch.inputs.images_BKHWC[:, 2].any()


def test_random_pairs() -> None:
    pairs = RandomRecords(64, seed=0)
    images = [pairs.read_images(pairs[i]) for i in range(64)]
    assert len({pairs[i]["captions"][0] for i in range(64)}) == len({both[0] for both in images}) == 64
    same, other = RandomRecords(64, seed=0), RandomRecords(64, seed=1)
    assert images[5] == same.read_images(same[5]) != other.read_images(other[5])
    batches = list(validation_batches(open_records("random:6", "validation"), RawInputs(16, spell), batch_size=4))
    assert [batch.weight_B.sum() for batch in batches] == [4, 2]
    for path in ("random:0", "random:many"):
        with pytest.raises(ValueError, match=f"data path {path}: .* is not a number above 0"):
            open_records(path, "train")


def test_needs_no_tensorflow(prepared: Path) -> None:
    code = (
        "import sys, numpy as np; from dpo_jax.data.load import inputs, pipeline, records; "
        f"pairs = records.open_records({str(prepared)!r}, 'train'); "
        "decoded = inputs.RawInputs(8, lambda captions: np.zeros((len(captions), 4), np.int32)); "
        "it = pipeline.make_iterator(pairs, decoded, batch_size=2, seed=0); next(it); it.close(); "
        "from jax._src import xla_bridge; "
        "print({'tensorflow', 'torch'} & set(sys.modules), xla_bridge.backends_are_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set() False", done.stderr
