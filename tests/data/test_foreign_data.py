"""Data as other systems and programs write it gives the same records, or a reason that says what was found."""

import json
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dpo_jax.data.sources import SOURCES, Damaged, Dropped, Record
from dpo_jax.data.sources.values import index, number, truth

from .conftest import noise_jpeg
from .source_files import read, write_images, write_lines, write_tar

Write = Callable[..., Path]
TYPES = [
    pa.decimal128(5, 2), pa.int8(), pa.uint64(), pa.int32(), pa.float16(), pa.float32(), pa.bool_(), pa.string(),
    pa.large_string(), pa.dictionary(pa.int8(), pa.string()),
]  # fmt: skip


def test_numbers_truth_and_indices() -> None:
    stated = [1, 1.0, "1", " 1.0 ", True, Decimal("1.00"), "1e0", "+1."]
    assert [number(value) for value in stated] == [1.0] * len(stated)
    assert [index(value, 2) for value in stated] == [1] * len(stated)
    assert [truth(value) for value in stated] == [True] * len(stated)
    assert [truth(value) for value in ("False", "no", 0, "0", Decimal(0))] == [False] * 5
    assert [number(value) for value in ("one", "1_0", "\u0661", "0x1", "", None, [1], b"1")] == [None] * 8
    assert [index(value, 2) for value in (2, -1, 0.5, "x", float("nan"), None, 10**400)] == [None] * 7
    assert [truth(value) for value in (2, "maybe", None, "")] == [None] * 4


@pytest.mark.parametrize("type", TYPES, ids=str)
def test_labels_of_any_type(write_pairs: Write, type: pa.DataType) -> None:
    labels = pa.array([1, 0, None], pa.int8())
    if type == pa.bool_() or pa.types.is_primitive(type) or pa.types.is_decimal(type):
        column = labels.cast(type)
    else:
        column = pa.array(["1", "0.0", None]).cast(type)
    first, second, unlabelled = read("pickapic", write_pairs(3, label_0=column, label_1=None, has_label=None))
    assert (first.images[0], first.preference) == (noise_jpeg(0), (1.0, 0.0))
    assert (second.images[0], second.preference) == (noise_jpeg(3), (1.0, 0.0))
    assert isinstance(unlabelled, Dropped)


def test_a_table_may_be_a_folder_of_parts(write_pairs: Write, tmp_path: Path) -> None:
    folder = tmp_path / "table.parquet"
    (folder / "x").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"table.parquet is a folder without .parquet files"):
        SOURCES["pickapic"].chunks([folder])
    for name in ("part-1.parquet", "x/part-0.parquet"):
        write_pairs(2, f"table.parquet/{name}")
    for name in ("_SUCCESS", "_metadata.parquet", ".part-1.parquet.crc"):
        (folder / name).write_bytes(b"")
    wheres = [row.where.removeprefix(f"{folder}/") for row in read("pickapic", folder)]
    assert wheres == [
        "part-1.parquet row 0",
        "part-1.parquet row 1",
        "x/part-0.parquet row 0",
        "x/part-0.parquet row 1",
    ]


@pytest.mark.parametrize("values", [[1, 0, None], ["True", "false", ""], [1.0, 0.0, float("nan")]])
def test_has_label_of_any_type(write_pairs: Write, values: list[Any]) -> None:
    rows = read("pickapic", write_pairs(3, has_label=values))
    assert [type(row) for row in rows] == [Record, Dropped, Record]


@pytest.mark.parametrize(
    "type",
    [
        pa.large_binary(),
        pa.list_(pa.uint8()),
        pa.large_list(pa.uint8()),
        pa.list_(pa.int64()),
        pa.dictionary(pa.int32(), pa.binary()),
    ],
    ids=str,
)  # fmt: skip
def test_images_and_text_of_any_type(write_pairs: Write, type: pa.DataType) -> None:
    data = [noise_jpeg(1), None]
    values = [x and list(x) for x in data] if hasattr(type, "value_field") else data
    column = pa.array(values, type) if not pa.types.is_dictionary(type) else pa.array(data).cast(type)
    captions = pa.array([b"caf\xc3\xa9", b"b"])
    first, second = read("pickapic", write_pairs(2, jpg_0=column, caption=captions, label_0=[1, 1], label_1=None))
    assert (first.caption, first.images[0], second.images[0]) == ("café", noise_jpeg(1), None)


def test_lists_of_signed_bytes_and_of_other_numbers(write_pairs: Write) -> None:
    signed = pa.array([[-1, -40, 127], [0], [1]], pa.list_(pa.int8()))
    assert read("pickapic", write_pairs(3, jpg_0=signed))[0].images[1] == b"\xff\xd8\x7f"
    wrong = read("pickapic", write_pairs(3, jpg_0=[[256], [None], [0]]))
    assert [type(row) for row in wrong] == [Damaged, Damaged, Record]


def test_views_of_text_are_text(tmp_path: Path) -> None:
    from dpo_jax.data.sources.tables import _is_of

    assert _is_of(pa.string_view(), "text")
    assert _is_of(pa.binary_view(), "image")
    assert not _is_of(pa.timestamp("s"), "number")


@pytest.mark.parametrize("best", [1, 1.0, "1", True, "1.0"])
def test_an_index_of_any_type(tmp_path: Path, best: Any) -> None:
    write_images(tmp_path, "a", "b")
    file = write_lines(tmp_path / "a.jsonl", {"prompt": "p", "images": ["a", "b"], "preferred": best})
    assert read("jsonl", file)[0].images == (b"b", b"a")


def test_nulls_of_pandas_are_nulls(tmp_path: Path) -> None:
    write_images(tmp_path, "a", "b")
    row = {"prompt": "p", "images": ["a", "b"], "models": float("nan"), "captions": None, "preferred": float("nan")}
    rows = [row | {"ranks": ["2", 1.0]}, row, row | {"preferred": 0, "prompt": float("nan")}]
    file = write_lines(tmp_path / "a.jsonl", *rows)
    ranked, unlabelled, untold = read("jsonl", file)
    assert (ranked.images, ranked.models) == ((b"b", b"a"), ("", ""))
    assert (unlabelled, untold) == (
        Dropped(f"{file} row 1", "without a label"),
        Dropped(f"{file} row 2", "without a caption"),
    )


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_json_with_a_byte_order_mark(tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_jax.data.sources.json_rows.MIN_ROWS_A_CHUNK", 2)
    monkeypatch.setattr("dpo_jax.data.sources.record.MIN_ROWS_A_CHUNK", 2)
    monkeypatch.setattr("dpo_jax.data.sources.record.rows_a_chunk", lambda rows: 2)
    write_images(tmp_path, "a", "b")
    rows = [{"prompt": f"é {i}", "path1": "a", "path2": "b", "images": ["a", "b"], "preferred": 0} for i in range(5)]
    texts = {
        "jsonl": end.join(map(json.dumps, rows)),
        "hpdv3": json.dumps(rows, indent=1, ensure_ascii=False).replace("\n", end),
    }
    for name, text in texts.items():
        plain, marked = tmp_path / "plain.json", tmp_path / "marked.json"
        plain.write_bytes(text.encode())
        marked.write_bytes(text.encode("utf-8-sig"))
        expected = [row._replace(where="") for row in read(name, plain)]
        assert len(expected) == 5
        assert [row._replace(where="") for row in read(name, marked)] == expected


@pytest.mark.parametrize("name", ["jsonl", "hpdv3"])
def test_what_is_not_utf8_is_named(tmp_path: Path, name: str) -> None:
    write_images(tmp_path, "a", "b")
    good = json.dumps(
        {"prompt": "é", "path1": "a", "path2": "b", "images": ["a", "b"], "preferred": 0}, ensure_ascii=False
    )
    file = tmp_path / "latin.jsonl"
    file.write_text(good, encoding="latin-1")
    with pytest.raises(
        ValueError, match=r"latin.jsonl,? (line 1|row 0) is not UTF-8; save the file as UTF-8 \(byte 0xe9\)"
    ):
        read(name, file)
    file.write_bytes(f"{good}\n".encode() + good.encode("latin-1"))
    assert read(name, file)[1] == Damaged(f"{file} row 1", "not UTF-8; save the file as UTF-8", "byte 0xe9")
    file.write_text(good, encoding="utf-16")
    with pytest.raises(ValueError, match=r"latin.jsonl is UTF-16; save the file as UTF-8"):
        read(name, file)


@pytest.mark.parametrize("name", ["pickapic", "jsonl", "hpdv3", "pickapic_tar"])
def test_what_a_file_really_is(tmp_path: Path, name: str) -> None:
    file = tmp_path / "a.parquet"
    for data, what in (
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html>", "web page"),
    ):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=f"a.parquet is a {what}"):
            SOURCES[name].chunks([file])
    with pytest.raises(ValueError, match="/dev/zero is not a regular file"):
        SOURCES[name].chunks([Path("/dev/zero")])


def test_a_line_without_end_is_refused(tmp_path: Path) -> None:
    with open(tmp_path / "a.jsonl", "wb") as sparse:
        sparse.write(b'{"prompt": "')
        sparse.truncate(10**11)
    with pytest.raises(ValueError, match="the line at byte 0 has more than 16777216 bytes"):
        SOURCES["jsonl"].chunks([tmp_path / "a.jsonl"])


NFC, NFD = "caf\xe9 à.png", "cafe\u0301 a\u0300.png"


@pytest.mark.parametrize(
    "name",
    [
        f"im/{NFC}", f"im/{NFD}", f"im\\{NFC}", f".\\im\\{NFD}", f"FOLDER/im/{NFC}", f"FOLDER/x/../im/{NFD}",
        f"REAL/im/{NFD}", "im/caf%C3%A9%20a%CC%80.png", f"file://FOLDER/im/{NFC}", f"~/data/im/{NFD}",
        f"im/./x/../{NFD}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("stored", [NFC, NFD])
def test_paths_of_other_systems(tmp_path: Path, name: str, stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "home").symlink_to(tmp_path / "real")
    folder = tmp_path / "home" / "data"
    write_images(folder, f"im/{stored}", "b.png")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    name = name.replace("FOLDER", str(folder)).replace("REAL", str(tmp_path / "real" / "data"))
    file = folder / "a.jsonl"
    row = {"prompt": "p", "images": [name, "b.png"], "preferred": 0}
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n")
    (found,) = read("jsonl", file)
    assert isinstance(found, Record), found
    assert found.images == (f"im/{stored}".encode(), b"b.png")


def test_a_name_is_first_taken_literally(tmp_path: Path) -> None:
    write_images(tmp_path, "a%20b.png", "a b.png", "x\\y.png", "x/y.png")
    file = write_lines(tmp_path / "a.jsonl", {"prompt": "p", "images": ["a%20b.png", "x\\y.png"], "preferred": 0})
    assert read("jsonl", file)[0].images == (b"a%20b.png", b"x\\y.png")


@pytest.mark.parametrize(
    ("name", "reason", "found"),
    [
        ("gone/a.png", "no image", "there is no FOLDER/gone/a.png"),
        ("C:\\data\\a.png", "no image", "there is no FOLDER/C:/data/a.png"),
        ("https://example.com/a.png", "an address on the web", "https://example.com/a.png"),
        ("../secret.png", "leads out of the data set's folder", "../secret.png is not inside FOLDER"),
        ("..\\secret.png", "leads out of the data set's folder", "../secret.png is not inside FOLDER"),
        ("%2e%2e/secret.png", "leads out of the data set's folder", "../secret.png is not inside FOLDER"),
        ("FOLDER/../secret.png", "leads out of the data set's folder", "FOLDER/../secret.png is not inside FOLDER"),
        ("file:///etc/passwd", "leads out of the data set's folder", "/etc/passwd is not inside FOLDER"),
        ("FOLDERx/a.png", "leads out of the data set's folder", "FOLDERx/a.png is not inside FOLDER"),
        (5, "path is not text", "5"),
    ],
)
def test_the_reason_names_what_was_looked_for(tmp_path: Path, name: Any, reason: str, found: str) -> None:
    folder = tmp_path / "data"
    write_images(tmp_path, "secret.png", "datax/a.png", "data/b.png")
    name = name.replace("FOLDER", str(folder)) if isinstance(name, str) else name
    file = write_lines(folder / "a.jsonl", {"prompt": "p", "images": [name, "b.png"], "preferred": 0})
    (row,) = read("jsonl", file)
    assert isinstance(row, Damaged)
    assert reason in row.reason
    assert row.found == found.replace("FOLDER", str(folder))


def test_folders_with_names_in_both_forms(tmp_path: Path) -> None:
    stem, other = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")
    write_images(tmp_path, f"w/{stem}.png", f"l/{other}.png", "w/b.png", "l/b.png", "liked/a.png")
    (tmp_path / f"w/{other}.txt").write_bytes("\ufeffone\r\n".encode())
    (tmp_path / "w/b.txt").write_bytes("caf\xe9".encode("latin-1"))
    damaged, row = read("pairs_folder", tmp_path)
    assert (row.caption, row.images) == ("one", (f"w/{stem}.png".encode(), f"l/{other}.png".encode()))
    assert (damaged.reason, damaged.found[-48:]) == (
        "the caption cannot be read", "is not valid UTF-8 (byte 0xe9); save the file as UTF-8"[-48:],
    )  # fmt: skip


def test_labels_and_captions_of_tars(tmp_path: Path) -> None:
    both = {"jpg_0": b"a", "jpg_1": b"b"}
    members = {f"0.{name}": data for name, data in both.items()} | {
        "0.label_0.txt": "\ufeff1\r\n".encode(),
        "0.caption.txt": "é".encode("utf-16"),
        "0.json": json.dumps({"has_label": "True", "label_1": "0"}).encode(),
    }
    members |= {f"1.{name}": data for name, data in both.items()} | {"1.caption": b"c", "1.json": b'{"label_0": [1]}'}
    members |= {f"2.{name}": data for name, data in both.items()} | {"2.caption": b"\xe9", "2.label_0": b"1"}
    first, second, third = read("pickapic_tar", write_tar(tmp_path / "a.tar", members))
    assert (first.caption, first.preference, first.images) == ("é", (1.0, 0.0), (b"a", b"b"))
    assert (second.reason, second.found) == ("a label is not a number", "{'label_0': [1]}")
    assert "caption, line 1 is not valid UTF-8" in third.found
