"""Weights that the user's own records state, from their files to the batch."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_jax.data.load.records import open_records
from dpo_jax.data.prepare import worker
from dpo_jax.data.prepare.builder import prepare
from dpo_jax.data.sources import SOURCES, Damaged, Record
from dpo_jax.data.store.prepared import OPTIONAL, RECORDS, open_prepared
from dpo_jax.data.store.scores import candidates, write_scores
from dpo_jax.errors import UserError
from dpo_jax.training.data import _say_weights

from .conftest import bytes_of, encode, noise_jpeg, write_prepared
from .source_files import read, write_images, write_lines

Write = Callable[..., Path]


def write_table(folder: Path, name: str, weights: list[Any]) -> Path:
    """Write pairs with a column of weights in the layout of a source."""
    write_images(folder, "a", "b")
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "weight": weight} for weight in weights]
    if name == "jsonl":
        return write_lines(folder / "pairs.jsonl", *rows)
    if name == "csv":
        with open(folder / "pairs.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return folder / "pairs.csv"
    columns = {"prompt": ["p"] * len(rows), "chosen": [b"a"] * len(rows), "rejected": [b"b"] * len(rows)}
    pq.write_table(pa.table(columns | {"weight": weights}), file := folder / "pairs.parquet")
    return file


@pytest.mark.parametrize(("name", "unit"), [("jsonl", "row"), ("csv", "line"), ("open_image_preferences", "row")])
def test_sources_read_weights(tmp_path: Path, name: str, unit: str) -> None:
    file = write_table(tmp_path, name, [2.5, None, 0.0, -1.0, 1e30])
    first, blank, zero, *wrong = read(name, file)
    assert [row.weight for row in (first, blank, zero) if isinstance(row, Record)] == [2.5, None, 0.0]
    begin = 2 if unit == "line" else 0  # a table has a header, and counts from 1
    found = [repr(str(value) if name == "csv" else value) for value in (-1.0, 1e30)]
    assert wrong == [
        Damaged(f"{file} {unit} {begin + 3}", "a weight is not a number from 0 to 1e+09", found[0]),
        Damaged(f"{file} {unit} {begin + 4}", "a weight is not a number from 0 to 1e+09", found[1]),
    ]


@pytest.mark.parametrize("value", ["much", [1], "inf", True])
def test_other_weights_are_not_numbers(tmp_path: Path, value: Any) -> None:
    (row,) = read("jsonl", write_table(tmp_path, "jsonl", [value]))
    assert (row.weight == 1) if value is True else (isinstance(row, Damaged) and row.found == repr(value))


def test_prepare_keeps_weights_and_writes_none_where_there_are_none(write_pairs: Write, tmp_path: Path) -> None:
    """Data without weights are the same bytes as those of earlier versions, whose unfinished parts have no column."""
    plain = write_pairs(4, "plain.parquet")
    weighted = write_pairs(4, "weighted.parquet", weight=[0.5, None, 2.0, 0.0], label_1=None)
    assert prepare(SOURCES["pickapic"], [plain], tmp_path / "plain", workers=0).weighted == 0
    summary = prepare(SOURCES["pickapic"], [plain, weighted], tmp_path / "both", workers=0)
    assert summary.weighted == json.loads((tmp_path / "both" / "summary.json").read_text())["weighted"] == 3
    assert "8 pairs, 0 ties; 8 with 2 candidates; 3 with a weight" in str(summary)
    schemas = [pa.ipc.open_file(str(tmp_path / name / "records.arrow")).schema for name in ("plain", "both")]
    assert schemas == [RECORDS, RECORDS.append(OPTIONAL[0])]
    np.testing.assert_array_equal(open_prepared(tmp_path / "both").weight_N, [1, 1, 1, 1, 0.5, 1, 2, 0])
    np.testing.assert_array_equal(open_prepared(tmp_path / "plain").weight_N, np.ones(4))


def test_parts_of_earlier_versions_are_merged(
    write_pairs: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [write_pairs(4, "a.parquet"), write_pairs(4, "b.parquet", weight=[3.0] * 4)]
    prepare(SOURCES["pickapic"], files, tmp_path / "new", workers=0)
    new, make_part = worker.RECORDS, worker.make_part

    def by_an_earlier_version(source: Any, chunk: Any, folder: Path) -> None:
        is_earlier = chunk.file == files[0]
        monkeypatch.setattr(worker, "RECORDS", new.remove(new.get_field_index("weight")) if is_earlier else new)
        make_part(source, chunk, folder)

    monkeypatch.setattr(worker, "make_part", by_an_earlier_version)
    prepare(SOURCES["pickapic"], files, tmp_path / "mixed", workers=0)
    assert bytes_of(tmp_path / "mixed") == bytes_of(tmp_path / "new")


def weighted_data(folder: Path, weights: list[float]) -> Path:
    records = [
        {"caption": f"{i}", "images": [noise_jpeg(2 * i), noise_jpeg(2 * i + 1)], "weight": weight, "split": split}
        for i, (weight, split) in enumerate(zip(weights, ["train"] * 3 + ["validation"], strict=True))
    ]
    return write_prepared(folder, records)


def test_training_has_the_weights_with_a_mean_of_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are multiplied by those of the scores; held-out pairs count equally."""
    folder = weighted_data(tmp_path / "data", [1.0, 4.0, 1.0, 7.0])

    def weights(split: str = "train", **options: Any) -> list[float]:
        records = open_records(folder, split, **options)
        return [records[i]["weight"] for i in range(len(records))]

    assert weights(pair_weights="none") == [0.5, 2, 0.5]
    assert weights() == [1, 1, 1]
    assert weights("validation") == [1]
    of = candidates(open_prepared(folder).records["images"])
    write_scores(folder, "a", "by hand", np.float32([3, 0, 1, 0, 2, 0, 0, 0]), of, {})
    by_gap = np.asarray([5 / 3, 1 / 3, 1]) * [1, 4, 1]
    np.testing.assert_allclose(weights(pair_weights="gap", score_judge="a"), by_gap / by_gap.mean(), rtol=1e-12)
    _say_weights(open_records(folder, "train", pair_weights="none"))
    assert capsys.readouterr().out == "weights in the loss: 0.5 to 2, with a mean of 1\n"
    _say_weights(open_records(folder, "train"))
    assert capsys.readouterr().out == ""


def test_judges_leave_weights_with_their_records(tmp_path: Path) -> None:
    folder = weighted_data(tmp_path / "data", [1.0, 4.0, 1.0, 7.0])
    of = candidates(open_prepared(folder).records["images"])
    write_scores(folder, "a", "by hand", np.float32([0, 1] * 4), of, {})
    records = open_records(folder, "train", judges=("a",), pair_weights="none")
    assert [(records[i]["images"], records[i]["weight"]) for i in range(3)] == [
        ([1, 0], 0.5),
        ([3, 2], 2),
        ([5, 4], 0.5),
    ]


@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf, None])
def test_a_damaged_weight_is_told(tmp_path: Path, weight: float | None) -> None:
    image = encode(np.zeros((8, 8, 3), np.uint8), "PNG")
    folder = write_prepared(tmp_path / "data", [{"caption": "p", "images": [image] * 2, "weight": weight}])
    with pytest.raises(
        UserError, match=r"records.arrow: weight is (null|negative or not finite) \(record 0\); prepare"
    ):
        open_prepared(folder)


def test_a_run_needs_one_weight_above_0(tmp_path: Path) -> None:
    folder = weighted_data(tmp_path / "data", [0.0, 0.0, 0.0, 1.0])
    with pytest.raises(UserError, match=r"all 3 chosen records of .*data have the weight 0"):
        open_records(folder, "train", pair_weights="none")
