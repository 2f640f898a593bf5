"""Sources of tar files, whole and damaged. Images are a few bytes, because sources do not decode them."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_jax.data.sources import SOURCES, Damaged, Dropped, Record

from .source_files import read, write_tar

Write = Callable[..., Path]


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
