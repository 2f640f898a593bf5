import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dpo_jax.data.builder import open_prepared, prepare
from dpo_jax.data.sources import Dropped, Record, pickapic

from .conftest import noise_jpeg

Write = Callable[..., Path]


def test_best_first_with_ties_and_unlabelled_rows_dropped(write_pairs: Write) -> None:
    file = write_pairs(
        6,
        label_0=[1.0, 0.0, 0.5, 1.0, 0.25, None],
        label_1=[0.0, 1.0, 0.5, 0.0, 0.75, None],
        has_label=[True, True, True, False, True, True],
    )
    rows = list(pickapic([file]))
    assert [row.reason for row in rows if isinstance(row, Dropped)] == ["tie", "unlabelled", "unlabelled"]
    first, second, soft = [row for row in rows if isinstance(row, Record)]
    assert first.images == (noise_jpeg(0), noise_jpeg(1))
    assert second.images == (noise_jpeg(3), noise_jpeg(2))
    assert (second.preference, second.models) == ((1.0, 0.0), ("b", "a"))
    assert (soft.preference, soft.images[0]) == ((0.75, 0.25), noise_jpeg(9))
    assert soft.where == f"{file} row 4"


def test_only_the_needed_columns_are_needed(write_pairs: Write) -> None:
    file = write_pairs(2, label_1=None, has_label=None, model_0=None, model_1=None)
    records = list(pickapic([file]))
    assert [record.preference for record in records] == [(1.0, 0.0), (1.0, 0.0)]
    assert records[0].images[0] == noise_jpeg(1)


def test_images_can_be_left_unread(write_pairs: Write) -> None:
    file = write_pairs(6)
    with_images, without = list(pickapic([file])), list(pickapic([file], with_images=False))
    assert without == [row._replace(images=()) for row in with_images]


def test_stored_as_it_came(write_pairs: Write, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()  # an empty folder is no obstacle
    summary = prepare(
        pickapic, [write_pairs(10), write_pairs(3, "b.parquet")], tmp_path / "out", validation_fraction=0.3
    )
    stored = {}
    for split in ("train", "validation"):
        records = open_prepared(tmp_path / "out", split)
        assert len(records) == summary.pairs[split]
        for record in records:
            stored[record["images"][0]] = record
    expected = {noise_jpeg(2 * i + 1 - i % 2): noise_jpeg(2 * i + i % 2) for i in range(10)}
    assert {best: record["images"][1] for best, record in stored.items()} == expected
    record = stored[noise_jpeg(1)]
    np.testing.assert_array_equal(record["sizes"], [[56, 40], [40, 56]])
    np.testing.assert_array_equal(record["preference"], np.float32([1, 0]))
    assert (record["caption"], list(record["models"])) == (b"prompt 0", [b"b", b"a"])
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["resolutions"] == {"56x40": 13, "40x56": 13}
    assert summary.rows == sum(summary.pairs.values()) == 13


def test_no_prompt_is_in_both_splits(write_pairs: Write, tmp_path: Path) -> None:
    captions = [f"{'A' if i % 3 else 'a'} cat  {i % 10}" if i % 2 else f"a cat {i % 10}" for i in range(30)]
    summary = prepare(pickapic, [write_pairs(30, caption=captions)], tmp_path / "out", validation_fraction=0.3)

    def prompts(split: str) -> set[str]:
        return {" ".join(r["caption"].decode().lower().split()) for r in open_prepared(tmp_path / "out", split)}

    held_out = {f"a cat {i}" for i in range(10) if hashlib.sha256(f"a cat {i}".encode()).digest()[0] < 0.3 * 256 - 1}
    assert prompts("validation") == held_out
    assert prompts("train") == {f"a cat {i}" for i in range(10)} - held_out
    assert summary.prompts == {"train": 10 - len(held_out), "validation": len(held_out)}


def test_a_small_data_set_keeps_a_prompt_on_both_sides(write_pairs: Write, tmp_path: Path) -> None:
    file = write_pairs(4)
    assert prepare(pickapic, [file], tmp_path / "a", validation_fraction=1e-6).prompts == {"train": 1, "validation": 1}
    assert prepare(pickapic, [file], tmp_path / "b", validation_fraction=1.0).prompts == {"train": 1, "validation": 1}
    assert prepare(pickapic, [file], tmp_path / "c", validation_fraction=0.0).prompts == {"train": 2}
    with pytest.raises(ValueError, match="has no split 'validation'; it has train"):
        open_prepared(tmp_path / "c", "validation")


def test_damaged_images_are_set_aside(write_pairs: Write, tmp_path: Path) -> None:
    jpg_0 = [noise_jpeg(2 * i) for i in range(10)]
    jpg_0[2], jpg_0[5], jpg_0[8] = jpg_0[2][:-200], b"not an image at all", None
    file = write_pairs(10, jpg_0=jpg_0)
    summary = prepare(pickapic, [file], tmp_path / "out", max_damaged_fraction=0.3)
    assert summary.damaged == {"image file is truncated": 1, "not an image": 1, "no image": 1}
    assert sum(summary.pairs.values()) == 7
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert sorted((line["where"], line["candidate"]) for line in lines) == [
        (f"{file} row 2", 1),
        (f"{file} row 5", 0),
        (f"{file} row 8", 1),
    ]
    with pytest.raises(ValueError, match=r"pairs have a damaged image .* --max_damaged_fraction=0.2 allows"):
        prepare(pickapic, [file], tmp_path / "over", max_damaged_fraction=0.2)
    with pytest.raises(ValueError, match="no usable pair for the split train"):
        prepare(pickapic, [write_pairs(2, jpg_0=[b"", b""])], tmp_path / "over", max_damaged_fraction=1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pairs.parquet"]


def test_unusable_input(write_pairs: Write, tmp_path: Path) -> None:
    def fails(message: str, **columns: object) -> None:
        with pytest.raises(ValueError, match=message):
            prepare(pickapic, [write_pairs(4, **columns)], tmp_path / "out")

    fails(r"pairs.parquet misses the column jpg_1, caption; it has jpg_0, label_0, label_1", jpg_1=None, caption=None)
    fails("the column jpg_0 holds string, but encoded images are binary", jpg_0=["a", "b", "c", "d"])
    fails(r"no usable pair among 4 rows \(4 tie\)", label_0=[0.5] * 4, label_1=[0.5] * 4)
    pq.write_table(pq.read_table(write_pairs(1)).slice(0, 0), tmp_path / "pairs.parquet")
    with pytest.raises(ValueError, match=r"no usable pair among 0 rows \(none\)"):
        prepare(pickapic, [tmp_path / "pairs.parquet"], tmp_path / "out")
    (tmp_path / "text.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match=r"text.parquet is not a readable parquet file"):
        prepare(pickapic, [tmp_path / "text.parquet"], tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(FileExistsError, match="already exists and is not an empty folder"):
        prepare(pickapic, [write_pairs(4)], tmp_path / "full")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_same_input_same_bytes(write_pairs: Write, tmp_path: Path) -> None:
    file = write_pairs(20)
    for name in ("a", "b"):
        prepare(pickapic, [file], tmp_path / name, pairs_per_shard=10)
    files = sorted(os.listdir(tmp_path / "a"))
    assert len([name for name in files if "array_record" in name]) == 3
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_killed_halfway_leaves_no_output_and_does_not_hinder_the_next(write_pairs: Write, tmp_path: Path) -> None:
    file, output = write_pairs(100), tmp_path / "out"
    code = (
        "import os, sys; from pathlib import Path; from dpo_jax.data.builder import prepare; "
        "from dpo_jax.data.sources import pickapic; "
        "prepare(pickapic, [Path(sys.argv[1])], Path(sys.argv[2]), "
        "on_progress=lambda done, total: os.kill(os.getpid(), 9) if done == 64 else None)"
    )
    assert subprocess.run([sys.executable, "-c", code, file, output]).returncode == -9
    assert not output.exists()
    prepare(pickapic, [file], output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pairs.parquet"]


def test_command(write_pairs: Write, tmp_path: Path) -> None:
    write_pairs(10)
    command = [sys.executable, "-m", "dpo_jax.prepare", "--source=pickapic"]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], capture_output=True, text=True)

    done = run(f"--input={tmp_path}/*.parquet", f"--output={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    assert "pairs kept  8 train, 2 validation" in done.stdout
    assert len(open_prepared(tmp_path / "out", "validation")) == 2
    wrong = run(f"--input={tmp_path}/none*", f"--output={tmp_path}/other")
    assert (wrong.returncode, wrong.stderr) == (1, f"error: no file matches --input={tmp_path}/none*\n")
