"""Lists of ranked images and shares of votes, from the file that states them to the batch that a loss reads."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.batch import LossInputs, PreferenceBatch
from dpo_jax.data.load.inputs import RawInputs
from dpo_jax.data.load.pipeline import validation_batches
from dpo_jax.data.load.records import RandomRecords, open_records
from dpo_jax.data.prepare import builder
from dpo_jax.data.sources import SOURCES
from dpo_jax.data.store.prepared import open_prepared
from dpo_jax.data.store.scores import candidates, write_scores
from dpo_jax.errors import UserError
from dpo_jax.methods.dpo import dpo

from .conftest import encode

ROWS: list[dict[str, Any]] = [
    {"prompt": "votes", "votes": [3, 7]},
    {"prompt": "pair", "ranks": [2, 1]},
    {"prompt": "ties", "ranks": [3, 1, 1, 2]},
    {"prompt": "six", "scores": [0.1, 5, 4, 3, 2, 1]},
    {"prompt": "best", "preferred": 2, "captions": ["c0", "c1", "c2"]},
    {"prompt": "all", "ranks": [1, 1, 1]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ROWS`; the grey of an image is 10 * row + its place in the row."""
    source = tmp_path_factory.mktemp("lists")
    lines = []
    for i, row in enumerate(ROWS):
        count = len(next(row[name] for name in ("votes", "ranks", "scores", "captions") if name in row))
        names = [f"{10 * i + k}.png" for k in range(count)]
        for k, name in enumerate(names):
            (source / name).write_bytes(encode(np.full((8, 8, 3), 10 * i + k, np.uint8), "PNG"))
        lines.append(json.dumps(row | {"images": names}))
    (source / "rows.jsonl").write_text("\n".join(lines) + "\n")
    builder.prepare(SOURCES["jsonl"], [source / "rows.jsonl"], source / "out", workers=0, validation_fraction=0)
    return source / "out"


def spell(captions: Sequence[str]) -> np.ndarray:
    """Return the bytes of captions as token ids."""
    return np.array([list(caption.encode()[:8].ljust(8, b"\0")) for caption in captions], np.int32)


def batch_of(folder: Path, **choice: Any) -> PreferenceBatch:
    records = open_records(folder, "train", **choice)
    with validation_batches(records, RawInputs(8, spell), batch_size=len(records)) as batches:
        return next(batches)


def lists_of(batch: PreferenceBatch) -> list[tuple[list[int], list[float]]]:
    """Return the greys of the images and their shares, of each example."""
    assert not batch.inputs.images_BKHWC[~batch.valid_BK].any()
    assert not batch.preference_BK[~batch.valid_BK].any()
    return [
        (images_KHWC[valid_K, 0, 0, 0].tolist(), preference_K[valid_K].astype(float).round(4).tolist())
        for images_KHWC, preference_K, valid_K in zip(
            batch.inputs.images_BKHWC, batch.preference_BK, batch.valid_BK, strict=True
        )
    ]


def test_the_whole_order_reaches_the_batch_best_first_with_ties(folder: Path) -> None:
    batch = batch_of(folder, labels="order", num_candidates=4)
    assert lists_of(batch) == [
        ([1, 0], [0.7, 0.3]),
        ([11, 10], [1, 0]),
        ([21, 22, 23, 20], [0.4167, 0.4167, 0.1667, 0]),
        ([31, 32, 33, 30], [0.4167, 0.3333, 0.25, 0]),  # of six, the best three and the worst
        ([42, 40, 41], [1, 0, 0]),
    ]
    assert batch.weight_B.tolist() == [1] * 5
    own = batch.inputs.token_ids_BML[4]
    assert [bytes(ids.astype(np.uint8)).rstrip(b"\0") for ids in own] == [b"c2", b"c0", b"c1", b""]
    tied = batch_of(folder, labels="order", num_candidates=4, ties="soft")
    assert lists_of(tied)[5] == ([50, 51, 52], [0.3333] * 3)


def test_labels_of_pairs_are_of_the_best_and_the_worst(folder: Path) -> None:
    hard = [pair for _, pair in lists_of(batch_of(folder))]
    assert hard == [[1, 0]] * 5
    shares = [pair for _, pair in lists_of(batch_of(folder, labels="soft"))]
    assert shares == [[0.7, 0.3], *[[1, 0]] * 4]


def test_seven_votes_of_ten_are_a_soft_label_of_dpo(folder: Path) -> None:
    batch = batch_of(folder, labels="soft")
    z = 0.3
    log_ratio_BK = jnp.asarray(np.tile(np.float32([z / 100, 0]), (len(batch.preference_BK), 1)))
    loss_B = dpo(LossInputs(log_ratio_BK, jnp.asarray(batch.preference_BK)), beta=100.0)
    better, worse = np.log1p(np.exp(-z)), np.log1p(np.exp(z))
    np.testing.assert_allclose(loss_B, [0.7 * better + 0.3 * worse, *[better] * 4], rtol=1e-6)


def test_scores_of_a_judge_order_whole_lists(folder: Path) -> None:
    """They say the opposite of the labels, but for two images of "six", which they find equally good."""
    of = candidates(open_prepared(folder).records["images"])
    scores_M = of.rank_M.astype(np.float32)
    scores_M[(of.record_M == 3) & (of.rank_M == 1)] = 2
    write_scores(folder, "mine", "by hand", scores_M, of, {})
    found = lists_of(batch_of(folder, labels="order", num_candidates=6, judges=("mine",)))
    assert found[3] == ([30, 35, 34, 32, 33, 31], [0.3333, 0.2667, 0.2, 0.1, 0.1, 0])
    assert found[0] == ([0, 1], [1, 0])
    with pytest.raises(UserError, match="labels='soft' needs votes"):
        open_records(folder, "train", labels="soft", judges=("mine",))


def test_random_records_are_lists_of_any_length() -> None:
    records = open_records("random:3", "train", num_candidates=4, labels="order")
    batch = next(validation_batches(records, RawInputs(16, spell), batch_size=3))
    assert batch.inputs.images_BKHWC.shape[:2] == (3, 4)
    np.testing.assert_allclose(batch.preference_BK, np.tile([1 / 2, 1 / 3, 1 / 6, 0], (3, 1)), rtol=1e-6)
    assert len({image for i in range(3) for image in records.read_images(records[i])}) == 12
    pairs = RandomRecords(3, seed=0)
    assert pairs[1]["images"] == [2, 3]
    assert pairs[1]["preference"].tolist() == [1, 0]
