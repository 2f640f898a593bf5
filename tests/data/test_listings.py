"""Sources of JSON that lists the paths of images. Images are a few bytes: sources do not decode them."""

import json
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_jax.data.sources import SOURCES, Damaged, Dropped, Record, json_rows, listings, record

from .source_files import read, write_images, write_lines

Write = Callable[..., Path]


@pytest.mark.parametrize("as_lines", [True, False])
def test_hpdv3(tmp_path: Path, as_lines: bool) -> None:
    write_images(tmp_path, "images/a.jpg", "images/b.jpg")
    pair = {"prompt": "é", "path1": "images/a.jpg", "path2": "images/b.jpg", "model1": "x", "model2": "y"}
    rows = [
        pair | {"choice_dist": [3, 12], "confidence": 0.9},
        pair | {"choice_dist": None},
        pair | {"path2": "no.jpg"},
    ]
    if as_lines:
        file = write_lines(tmp_path / "train.jsonl", *rows)
    else:
        (file := tmp_path / "train.json").write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")
    voted, plain, unread = read("hpdv3", file)
    assert voted.preference == pytest.approx((0.8, 0.2))
    assert voted[:3] == (f"{file} row 0", "é", (b"images/a.jpg", b"images/b.jpg"))
    assert (plain.preference, plain.models) == ((1.0, 0.0), ("x", "y"))
    assert unread == Damaged(f"{file} row 2", "no image", f"there is no {tmp_path}/no.jpg or {tmp_path}/train/no.jpg")


def test_hpdv2(tmp_path: Path) -> None:
    write_images(tmp_path, "test/a.jpg", "b.jpg", "test/c.jpg")
    rows = [
        {"prompt": "p", "file_path": ["a.jpg", "b.jpg"], "human_preference": [0, 1]},
        {"prompt": "p", "image_path": ["a.jpg", "b.jpg", "c.jpg"], "rank": [3, 1, 2], "raw_annotations": []},
        {"prompt": "p", "image_path": ["a.jpg", "b.jpg"]},
    ]
    (file := tmp_path / "test.json").write_text(json.dumps(rows))
    pair, ranked, unlabelled = read("hpdv3", file)
    assert (pair.images, pair.preference) == ((b"b.jpg", b"test/a.jpg"), (1.0, 0.0))
    assert ranked.images == (b"b.jpg", b"test/c.jpg", b"test/a.jpg")
    assert ranked.preference == pytest.approx((2 / 3, 1 / 3, 0))
    assert unlabelled == Dropped(f"{file} row 2", "without a label")


@pytest.mark.parametrize("suffix", [".parquet", ".json"])
def test_imagerewarddb_groups_the_images_of_a_prompt(tmp_path: Path, suffix: str) -> None:
    facts = [("p", 3), ("q", 1), ("p", 1), ("p", 1), ("q", 2), ("r", 1)]  # rows of a prompt need not be adjacent
    rows = [
        {"image_path": f"images/train/train_1/{i}.webp", "prompt_id": key, "prompt": f"of {key}", "rank": rank}
        for i, (key, rank) in enumerate(facts)
    ]
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file := tmp_path / "metadata-train.parquet")
    else:
        (file := tmp_path / "train_1.json").write_text(json.dumps(rows))
    write_images(tmp_path, "images/train/train_1/0.webp")
    with zipfile.ZipFile(tmp_path / "images/train/train_1.zip", "w") as archive:
        for i in (1, 2, 3):
            archive.writestr(f"{i}.webp", f"zipped {i}")
    three, two, single = read("imagerewarddb", file)
    assert three.images == (b"zipped 2", b"zipped 3", b"images/train/train_1/0.webp")
    assert three.preference == pytest.approx((0.5, 0.5, 0))
    assert two == Damaged(f"{file} prompt q", "no image", f"there is no {tmp_path}/images/train/train_1/4.webp")
    assert single == Damaged(f"{file} prompt r", "fewer than two images")


def test_imagerewarddb_of_another_schema_is_refused(tmp_path: Path, write_pairs: Write) -> None:
    with pytest.raises(ValueError, match="its rows should have prompt_id, prompt, image_path, rank"):
        SOURCES["imagerewarddb"].chunks([write_pairs(1)])


@pytest.mark.parametrize(
    ("name", "value", "shares"),
    [
        ("preferred", 1, (0, 1, 0)),
        ("votes", [1, 5, 2], (Fraction(1, 8), Fraction(5, 8), Fraction(2, 8))),
        ("ranks", [2, 1, 3], (Fraction(1, 3), Fraction(2, 3), 0)),
        ("ranks", [1, 1, 2], (Fraction(1, 2), Fraction(1, 2), 0)),
        ("scores", [0.1, 100, 0.2], (0, Fraction(2, 3), Fraction(1, 3))),
        ("scores", [7, 7, 7], (Fraction(1, 3),) * 3),
        # annotators disagree: means 2, 3, 1.5
        ("scores", [[1, 5, 2], [3, 1, 1]], (Fraction(1, 3), Fraction(2, 3), 0)),
    ],
)
def test_shares_of_every_kind_of_preference(name: str, value: Any, shares: tuple) -> None:
    found = listings.shares_of(name, value, 3)
    assert [x / sum(found) for x in found] == pytest.approx([float(share) for share in shares])


def test_borda_counts_won_comparisons() -> None:
    points = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    won = [sum((p > q) + 0.5 * (p == q) for j, q in enumerate(points) if i != j) for i, p in enumerate(points)]
    assert record.borda(points) == won
    assert sum(won) == len(points) * (len(points) - 1) / 2


def test_jsonl(tmp_path: Path) -> None:
    write_images(tmp_path, *(f"im/{i}.png" for i in range(7)))
    paths = [f"im/{i}.png" for i in range(7)]
    file = write_lines(
        tmp_path / "pairs.jsonl",
        {"prompt": "p", "images": paths[:2], "preferred": 1, "models": ["x", None]},
        {"prompt": "p", "images": paths, "scores": [[1, 2, 3, 4, 5, 7, 6], [1, 2, 3, 4, 5, 7, 6]]},
        {"prompt": "p", "images": paths[:3], "ranks": [2, 1, 2], "captions": ["a", "b", "c"]},
        {"prompt": "p", "images": paths[:2]},
        {"images": paths[:2], "preferred": 0},
        {"prompt": ["a cat", "a\n black cat "], "images": paths[:2], "preferred": 0},
        {"prompt": ["a cat", " "], "images": paths[:2], "preferred": 0},
    )
    pair, seven, own, unlabelled, untold, several, one_is_empty = read("jsonl", file)
    assert pair == Record(f"{file} row 0", "p", (b"im/1.png", b"im/0.png"), (1.0, 0.0), ("", "x"))
    assert seven.images == tuple(f"im/{i}.png".encode() for i in (5, 6, 4, 3, 2, 1, 0))
    assert seven.preference == pytest.approx([k / 21 for k in (6, 5, 4, 3, 2, 1, 0)])
    assert (own.images, own.captions) == ((b"im/1.png", b"im/0.png", b"im/2.png"), ("b", "a", "c"))
    assert isinstance(several, Record)
    assert several.caption == "a cat\na black cat"
    assert isinstance(one_is_empty, Damaged)
    assert one_is_empty.reason == '"prompt" is a list with an entry that is not a caption'
    assert unlabelled == Dropped(f"{file} row 3", "without a label")
    assert untold == Dropped(f"{file} row 4", "without a caption")


def test_a_line_that_says_two_things_says_nothing(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png")
    good = '{"prompt": "p", "images": ["a.png", "b.png"], "preferred": 0}'
    (tmp_path / "pairs.jsonl").write_text(f'{good}\n{good[:-1]}, "preferred": 1}}\n')
    assert [type(row) for row in read("jsonl", tmp_path / "pairs.jsonl")] == [Record, Damaged]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"images": ["a.png"]}, "not a list of two or more paths"),
        ({"images": "a.png"}, "not a list of two or more paths"),
        ({"images": ["a.png", "../secret.png"]}, "leads out of the data set's folder"),
        ({"images": ["a.png", "/etc/passwd"]}, "leads out of the data set's folder"),
        ({"images": ["a.png", 3]}, "path is not text"),
        ({"images": ["a.png", "a\0.png"]}, "path is not text"),
        ({"preferred": 2}, "not the index of an image"),
        ({"preferred": 0.5}, "not the index of an image"),
        ({"votes": [1, 2]}, "more than one of"),
        ({"preferred": None, "votes": [1, -2]}, "negative or not a number"),
        ({"preferred": None, "votes": [1, 2, 3]}, "not a list with one number per image"),
        ({"preferred": None, "ranks": [1, "two"]}, "not a finite number"),
        ({"preferred": None, "ranks": [1, 10**400]}, "not a finite number"),
        ({"preferred": None, "scores": [[1, 2], [1]]}, "not a list with one number per image"),
        ({"preferred": None, "scores": [1, float("nan")]}, "not a finite number"),
        ({"prompt": 3}, "a caption or model is not text"),
        ({"prompt": "\ud800"}, "not a JSON object"),
        ({"images": ["/\ud800.png", "a.png"]}, "not a JSON object"),
        ({"images": ["a.png"] * 257}, "more than 256 candidates"),
        ({"captions": ["a"]}, "the number of models or captions is not that of the candidates"),
        ({"models": "x"}, '"models" or "captions" is not a list'),
    ],
)
def test_jsonl_sets_a_wrong_line_aside_and_says_why(tmp_path: Path, change: dict, reason: str) -> None:
    write_images(tmp_path, "data/a.png", "data/b.png", "secret.png")
    good = {"prompt": "p", "images": ["a.png", "b.png"], "preferred": 0}
    first, wrong, last = read("jsonl", write_lines(tmp_path / "data/pairs.jsonl", good, good | change, good))
    assert isinstance(first, Record)
    assert isinstance(last, Record)
    assert isinstance(wrong, Damaged)
    assert reason in wrong.reason


def test_votes_of_nobody_are_no_preference(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", {"prompt": "p", "images": ["a.png", "b.png"], "votes": [0, 0]})
    assert read("jsonl", file) == [Dropped(f"{file} row 0", "without a label")]


@pytest.mark.parametrize("indent", [None, 2])
def test_chunks_of_json_begin_anywhere(tmp_path: Path, indent: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "MIN_ROWS_A_CHUNK", 7)
    monkeypatch.setattr("dpo_jax.data.sources.record.MIN_ROWS_A_CHUNK", 7)
    monkeypatch.setattr("dpo_jax.data.sources.record.rows_a_chunk", lambda rows: rows // 25 * 14)
    monkeypatch.setattr(json_rows, "BLOCK_BYTES", 200)  # so that rows cross blocks
    write_images(tmp_path, "a", "b")
    rows = [{"prompt": f"é {{]}} {i}", "path1": "a", "path2": "b"} for i in range(25)]
    (file := tmp_path / "a.json").write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
    source = SOURCES["hpdv3"]
    chunks = source.chunks([file])
    assert [(chunk.start, chunk.stop) for chunk in chunks] == [(0, 14), (14, 25)]
    for chunk in reversed(chunks):
        found = list(source.read(chunk))
        assert [row.where for row in found] == [f"{file} row {i}" for i in range(chunk.start, chunk.stop)]
        assert [row.caption for row in found] == [row["prompt"] for row in rows[chunk.start : chunk.stop]]


@pytest.mark.parametrize(
    "text", ['[{"path1": "a"}, {"path1": ]', '[{"path1": "a"}', '[{"path1": "a"}] {}', "[" * 100000]
)
def test_a_damaged_json_list_is_refused(tmp_path: Path, text: str) -> None:
    (file := tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="is not valid JSON: the object at byte"):
        SOURCES["hpdv3"].chunks([file])


@pytest.mark.parametrize("name", ["jsonl", "hpdv3"])
def test_json_of_another_schema_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="has another layout: a row should look like"):
        SOURCES[name].chunks([write_lines(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"})])
