"""Sources of Parquet tables. Images are a few bytes, because sources do not decode them."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_jax.data.sources import SOURCES, Chunk, Damaged, Dropped, Record
from dpo_jax.data.sources.record import rows_a_chunk

from .conftest import noise_jpeg
from .source_files import read, reasons, write_images

Write = Callable[..., Path]


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
