"""Every source on small files of its data set's layout; images are a few bytes, because sources do not decode them."""

import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_jax.data.sources import SOURCES, Chunk, Damaged, Dropped, Outcome, Record, json_rows, listings, missing, record
from dpo_jax.data.sources.record import rows_a_chunk

from .conftest import noise_jpeg

Write = Callable[..., Path]


def read(name: str, *files: Path) -> list[Outcome]:
    source = pickle.loads(pickle.dumps(SOURCES[name]))  # as when it is sent to spawned processes
    return [row for chunk in source.chunks(files) for row in source.read(chunk)]


def write_images(folder: Path, *names: str) -> None:
    """Write files that contain their own name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def write_lines(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def reasons(rows: list[Outcome]) -> list[str]:
    return [row.reason for row in rows if not isinstance(row, Record)]


def test_pickapic_best_first_with_ties_and_soft_labels(write_pairs: Write) -> None:
    file = write_pairs(
        6,
        label_0=[1.0, 0.0, 0.5, 1.0, 0.25, None],
        label_1=[0.0, 1.0, 0.5, 0.0, 0.75, None],
        has_label=[True, True, True, False, True, True],
    )
    first, second, tie, unlabelled, soft, unknown = read("pickapic", file)
    assert first == Record(f"{file} row 0", "prompt 0", (noise_jpeg(0), noise_jpeg(1)), (1.0, 0.0), ("a", "b"))
    assert second == Record(f"{file} row 1", "prompt 0", (noise_jpeg(3), noise_jpeg(2)), (1.0, 0.0), ("b", "a"))
    assert tie == Record(f"{file} row 2", "prompt 1", (noise_jpeg(4), noise_jpeg(5)), (0.5, 0.5), ("a", "b"))
    assert unlabelled == Dropped(f"{file} row 3", "without a label")
    assert (soft.preference, soft.images[0]) == ((0.75, 0.25), noise_jpeg(9))
    assert unknown == Dropped(f"{file} row 5", "without a label")


def test_pickapic_needs_only_the_needed_columns(write_pairs: Write) -> None:
    file = write_pairs(2, label_1=None, has_label=None, model_0=None, model_1=None, caption=["a", None])
    row, dropped = read("pickapic", file)
    assert (row.preference, row.images[0], row.models) == ((1.0, 0.0), noise_jpeg(1), ("", ""))
    assert dropped == Dropped(f"{file} row 1", "without a caption")


def test_pickapic_sets_impossible_labels_aside(write_pairs: Write) -> None:
    labels = {"label_0": [-1.0, 2.0, float("inf"), float("nan"), 0.0], "label_1": [1.0, None, 0.0, 0.0, 0.0]}
    rows = read("pickapic", write_pairs(5, **labels))
    assert [type(row) for row in rows] == [Damaged, Damaged, Damaged, Dropped, Dropped]
    assert set(reasons(rows[:3])) == {"a label is negative or not a number"}


def test_pickapic_hands_null_images_on_and_reads_the_structs_of_hugging_face(write_pairs: Write) -> None:
    paths = [(b"x", "x.jpg"), (None, None), (None, "y.jpg"), (None, "w.jpg")]
    structs = [*({"bytes": data, "path": path} for data, path in paths), None]
    file = write_pairs(5, jpg_0=structs, jpg_1=[b"z", b"z", b"z", b"z", None])
    write_images(file.parent, "y.jpg")
    rows = read("pickapic", file)
    missing = rows.pop(3)
    assert [row.images for row in rows] == [(b"z", b"x"), (None, b"z"), (b"z", b"y.jpg"), (None, None)]
    assert missing == Damaged(f"{file} row 3", "no image", f"there is no {file.parent}/w.jpg")


def test_pickapic_keeps_rows_whose_neighbours_text_is_not_utf8(write_pairs: Write) -> None:
    captions = pa.array([b"good", b"\xff\xfe", b"good"]).cast(pa.binary()).view(pa.string())
    rows = read("pickapic", write_pairs(3, caption=captions))
    assert [type(row) for row in rows] == [Record, Damaged, Record]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"jpg_1": None}, "has no column jpg_1; it has jpg_0, caption"),
        ({"label_0": [[1], [0]]}, "the column label_0 holds list<.*>, but should hold number values"),
        ({"jpg_0": ["a.jpg", "b.jpg"]}, "the column jpg_0 holds string, but should hold image values"),
    ],
)
def test_files_of_another_schema_are_refused_before_anything_is_read(
    write_pairs: Write, columns: dict, message: str
) -> None:
    good, bad = write_pairs(2), write_pairs(2, "bad.parquet", **columns)
    with pytest.raises(ValueError, match=message):
        SOURCES["pickapic"].chunks([good, bad])


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    names = ["jpg_0", "jpg_1", "caption", "label_0", "label_0"]
    table = pa.Table.from_arrays([[b"x"], [b"y"], ["c"], [1.0], [0.0]], names)
    pq.write_table(table, file := tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="has more than one column label_0"):
        SOURCES["pickapic"].chunks([file])


def test_chunks_are_row_groups_and_cover_every_row_once(write_pairs: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_jax.data.sources.tables.rows_a_chunk", lambda rows: 12)
    file = write_pairs(33)  # in groups of 5
    chunks = SOURCES["pickapic"].chunks([file])
    assert chunks == [Chunk(file, 0, 2), Chunk(file, 2, 4), Chunk(file, 4, 6), Chunk(file, 6, 7)]
    wheres = [row.where for chunk in chunks for row in SOURCES["pickapic"].read(chunk)]
    assert wheres == [f"{file} row {i}" for i in range(33)]


def test_many_workers_share_a_small_input_and_large_inputs_have_large_chunks() -> None:
    rows = [0, 1_200, 20_000, 129_000, 10**7]
    assert [rows_a_chunk(number) for number in rows] == [100, 100, 300, 2000, 2000]


def test_a_damaged_row_group_is_counted_and_the_next_ones_are_read(write_pairs: Write) -> None:
    file = write_pairs(17)
    group = pq.ParquetFile(file).metadata.row_group(1)
    data = bytearray(file.read_bytes())
    page = group.column(0).dictionary_page_offset or group.column(0).data_page_offset
    data[page : page + 20] = b"\xff" * 20
    file.write_bytes(data)
    rows = read("pickapic", file)
    assert [row.where for row in rows] == [f"{file} row {i}" for i in range(17)]
    assert [i for i, row in enumerate(rows) if isinstance(row, Damaged)] == [5, 6, 7, 8, 9]


def test_open_image_preferences(tmp_path: Path) -> None:
    columns = {
        "prompt": ["a cat", "a dog"],
        "chosen": [{"bytes": b"1", "path": "a"}, {"bytes": b"2", "path": "b"}],
        "rejected": [{"bytes": b"3", "path": "c"}, {"bytes": b"4", "path": "d"}],
        "chosen_model": ["dev", "sd"],
        "rejected_model": ["sd", "dev"],
    }
    pq.write_table(pa.table(columns), file := tmp_path / "train-00000-of-00001.parquet")
    first, second = read("open_image_preferences", file)
    assert first == Record(f"{file} row 0", "a cat", (b"1", b"3"), (1.0, 0.0), ("dev", "sd"))
    assert (second.images, second.models) == ((b"2", b"4"), ("sd", "dev"))


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


def test_pairs_folder(tmp_path: Path) -> None:
    write_images(tmp_path, "w/1.png", "l/1.jpg", "w/2.png", "l/2.png", "w/3.png", "l/3.png", "w/4.png", "l/5.png")
    (tmp_path / "w/1.txt").write_text("one\n", encoding="utf-8-sig")
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions/2.txt").write_text("two")
    (tmp_path / "l/2.txt").write_text("too")
    one, two, three, four, five = read("pairs_folder", tmp_path)
    assert one == Record(f"{tmp_path} 1", "one", (b"w/1.png", b"l/1.jpg"), (1.0, 0.0), ("", ""))
    assert (two.caption, two.captions) == ("two", ("two", "too"))
    assert three == Dropped(f"{tmp_path} 3", "without a caption")
    assert [type(row) for row in (four, five)] == [Damaged, Damaged]


@pytest.mark.parametrize("name", ["w", "l"])
def test_pairs_folder_refuses_other_folders(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="is not a folder with the folders w and l"):
        SOURCES["pairs_folder"].chunks([tmp_path])


def test_liked(tmp_path: Path) -> None:
    write_images(tmp_path, "liked/1.png", "liked/2.png", "disliked/1.webp", "disliked/notes.md")
    (tmp_path / "liked/1.txt").write_text("a cat")
    (tmp_path / "disliked/1.txt").write_text("a dog")
    assert read("liked", tmp_path) == [
        Record(f"{tmp_path}/liked/1.png", "a cat", (b"liked/1.png",), (1.0,), ("",)),
        Dropped(f"{tmp_path}/liked/2.png", "without a caption"),
        Record(f"{tmp_path}/disliked/1.webp", "a dog", (b"disliked/1.webp",), (0.0,), ("",)),
    ]


def test_captioned_folder(tmp_path: Path) -> None:
    write_images(tmp_path, "1.png", "2.webp", "3.png", "notes.md", "more/4.png")
    (tmp_path / "1.txt").write_text("a cat\n")
    (tmp_path / "2.txt").write_text("a dog")
    assert read("captioned_folder", tmp_path) == [
        Record(f"{tmp_path}/1.png", "a cat", (b"1.png",), (1.0,), ("",)),
        Record(f"{tmp_path}/2.webp", "a dog", (b"2.webp",), (1.0,), ("",)),
        Dropped(f"{tmp_path}/3.png", "without a caption"),
    ]
    with pytest.raises(ValueError, match=r"1\.png is not a folder of images"):
        SOURCES["captioned_folder"].chunks([tmp_path / "1.png"])


@pytest.mark.parametrize(("name", "places"), [("pairs_folder", ("w", "l")), ("liked", ("liked", "disliked"))])
def test_a_folder_is_listed_once_for_all_its_chunks(
    tmp_path: Path, name: str, places: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_jax.data.sources.folders.rows_a_chunk", lambda rows: 3)
    write_images(tmp_path, *(f"{place}/{i}.png" for place in places for i in range(10)))
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path.name) or scandir(path))
    rows = read(name, tmp_path)
    assert len({row.where for row in rows}) == len(rows) == (10 if name == "pairs_folder" else 20)
    assert sorted(listed) == sorted(places)


def write_tar(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            tar.addfile(_info(name, len(data)), io.BytesIO(data))
    return file


def _info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    return info


def test_a_hole_of_gigabytes_in_a_tar_is_skipped(tmp_path: Path) -> None:
    labelled = {"label_0": 0, "label_1": 1, "caption": "c"}
    members = {"0.jpg_0": b"0", "0.jpg_1": b"1", "0.json": json.dumps(labelled).encode()}
    file = write_tar(tmp_path / "a.tar", members)
    os.truncate(file, 300 * 2**30)
    assert [type(row) for row in read("pickapic_tar", file)] == [Damaged, Record]


def test_pickapic_tar_reads_every_way_to_name_members(tmp_path: Path) -> None:
    labelled = {"label_0": 0, "label_1": 1, "caption": "c", "has_label": True, "model_1": "m"}
    members = {
        **{"a/0.jpg_0.jpg": b"0", "a/0.jpg_1.jpg": b"1", "a/0.label_0.txt": b"0.0", "a/0.label_1.txt": b"1.0"},
        **{"a/0.original_prompt.txt": b"caf\xc3\xa9\n"},
        **{"1.jpg_0": b"2", "1.jpg_1": b"3", "1.label_0": b"0.5", "1.txt": b"tie"},
        **{"2.jpg_0.png": b"4", "2.jpg_1.png": b"5", "2.json": json.dumps(labelled).encode()},
        **{"3.jpg_0": b"6", "3.jpg_1": b"7", "3.json": json.dumps(labelled | {"has_label": False}).encode()},
        **{"4.jpg_0": b"8", "4.label_0": b"1", "4.caption.txt": b"c"},
        **{"5.jpg_0": b"8", "5.jpg_1": b"8", "5.label_0": b"one", "5.caption.txt": b"c"},
    }
    file = write_tar(tmp_path / "a.tar", members)
    assert read("pickapic_tar", file) == [
        Record(f"{file} a/0", "café", (b"1", b"0"), (1.0, 0.0), ("", "")),
        Record(f"{file} 1", "tie", (b"2", b"3"), (0.5, 0.5), ("", "")),
        Record(f"{file} 2", "c", (b"5", b"4"), (1.0, 0.0), ("m", "")),
        Dropped(f"{file} 3", "without a label"),
        Damaged(f"{file} 4", "without jpg_1"),
        Damaged(f"{file} 5", "a label is not a number", "{'label_0': 'one'}"),
    ]


@pytest.mark.parametrize(
    ("blocks", "lost"),
    [(0, ["byte 10240"]), (3.3, ["byte 11776", "2"]), (4.5, ["byte 12544", "2"])],
    ids=["between samples", "in a header", "in an image"],
)
def test_of_a_truncated_tar_the_whole_samples_are_read(tmp_path: Path, blocks: float, lost: list[str]) -> None:
    sample = {"jpg_0": b"0" * 600, "jpg_1": b"1" * 600, "label_0": b"1", "caption": b"c"}  # ten blocks
    file = write_tar(tmp_path / "a.tar", {f"{i}.{name}": data for i in range(5) for name, data in sample.items()})
    file.write_bytes(file.read_bytes()[: int((20 + blocks) * 512)])
    rows = read("pickapic_tar", file)
    assert [row.where for row in rows if isinstance(row, Record)] == [f"{file} 0", f"{file} 1"]
    assert [row.where for row in rows if isinstance(row, Damaged)] == [f"{file} {where}" for where in lost]


def test_a_hole_in_a_tar_is_counted(tmp_path: Path) -> None:
    image = b"1" * 12288
    members = {}
    for i in range(9):
        members |= {f"{i}.jpg_0": image, f"{i}.jpg_1": image, f"{i}.label_0": b"1", f"{i}.caption": b"c"}
    data = bytearray(write_tar(file := tmp_path / "a.tar", members).read_bytes())
    sample = 4 * 512 + 2 * 12288 + 2 * 512
    data[2 * sample : 5 * sample] = bytes(3 * sample)
    file.write_bytes(data)
    rows = read("pickapic_tar", file)
    whole = [f"{file} {i}" for i in (0, 1, 5, 6, 7, 8)]
    assert [row.where for row in rows if isinstance(row, Record)] == whole
    assert [row for row in rows if not isinstance(row, Record)] == [
        Damaged(f"{file} byte {2 * sample}", "a part of the tar is damaged or missing")
    ]


def test_tars_written_one_behind_the_other_are_read(tmp_path: Path) -> None:
    members = {"0.jpg_0": b"0", "0.jpg_1": b"1", "0.label_0": b"1", "0.caption": b"c"}
    data = write_tar(tmp_path / "a.tar", members).read_bytes()
    (file := tmp_path / "b.tar").write_bytes(data + data)
    assert [type(row) for row in read("pickapic_tar", file)] == [Record, Record]


def test_what_is_no_tar_is_refused(tmp_path: Path, write_pairs: Write) -> None:
    with pytest.raises(ValueError, match="is a Parquet file"):
        SOURCES["pickapic_tar"].chunks([write_pairs(1)])


def test_a_missing_input_says_what_to_download() -> None:
    message = str(missing("yuvalkirstain/pickapic_v2"))
    assert "no file matches --input=yuvalkirstain/pickapic_v2. A data set on the " in message
    assert "--input=hub:yuvalkirstain/pickapic_v2" in message
    assert "hf download --repo-type dataset yuvalkirstain/pickapic_v2 --local-dir data/pickapic_v2" in message
    assert "Pick-a-Pic left the hub in 2025" in message
    for name in ("open-image-preferences-v1-binarized", "MizzenAI/HPDv3", "zai-org/ImageRewardDB"):
        assert name in message
    assert "hub:OWNER/NAME" in str(missing("data/*.parquet"))
