"""CSV and TSV tables of image paths, and JSON lines with chosen and rejected images."""

import json
from pathlib import Path

import pytest

from dpo_jax.data.sources import SOURCES, Damaged, Dropped, Outcome, Record

NAMES = [f"{i}.png" for i in range(4)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in NAMES:
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def read(name: str, file: Path) -> list[Outcome]:
    source = SOURCES[name]
    return [row for chunk in source.chunks([file]) for row in source.read(chunk)]


def write(file: Path, text: str, **options: str) -> Path:
    file.write_text(text, newline="", **options)
    return file


def test_chosen_and_rejected(folder: Path) -> None:
    text = 'prompt,chosen,rejected,chosen_model\r\n"a cat, ""red""\r\non a mat",0.png,1.png,sdxl\r\n'
    text += "\r\nb,2.png,./0.png,\r\n"
    for ending, table in ((".csv", text), (".csv", "\ufeff" + text), (".csv", text.replace(",", ";"))):
        rows = read("csv", write(folder / f"pairs{ending}", table))
        first, second = rows
        assert isinstance(first, Record)
        assert isinstance(second, Record)
        cat = 'a cat; "red"\r\non a mat' if table.startswith("prompt;") else 'a cat, "red"\r\non a mat'
        assert (first.caption, first.images, first.models) == (cat, (b"0.png", b"1.png"), ("sdxl", ""))
        assert first.preference == (1, 0)
        assert (second.caption, second.images, second.models) == ("b", (b"2.png", b"0.png"), ("", ""))
        assert [row.where.rpartition(" line ")[2] for row in rows] == ["2", "5"]


def test_several_images_and_the_index_of_the_best(folder: Path) -> None:
    header = "preferred\timage_0\timage_1\timage_2\tmodel_1\tPrompt"
    table = (
        f"{header}\n1\t0.png\t1.png\t2.png\tsd\tone\n\t0.png\t1.png\t2.png\t\ttwo\n3\t0.png\t1.png\t2.png\t\tthree\n"
    )
    first, second, third = read("csv", write(folder / "pairs.tsv", table))
    assert isinstance(first, Record)
    assert (first.images, first.preference) == ((b"1.png", b"0.png", b"2.png"), (1, 0, 0))
    assert first.models == ("sd", "", "")
    assert isinstance(second, Dropped)
    assert second.reason == "without a label"
    assert isinstance(third, Damaged)
    assert third == Damaged(f"{folder}/pairs.tsv line 4", '"preferred" is not the index of an image', "3")


def test_what_is_wrong_is_told_with_its_line(folder: Path) -> None:
    table = "prompt,chosen,rejected\na,0.png,1.png\nb,2.png\nc,0.png,9.png\n,0.png,1.png\n"
    record, short, absent, without = read("csv", write(folder / "a.csv", table))
    assert isinstance(record, Record)
    where = f"{folder}/a.csv line"
    assert short == Damaged(f"{where} 3", "a row does not have as many fields as the header", "2 instead of 3")
    assert absent == Damaged(f"{where} 4", "no image", f"there is no {folder}/9.png")
    assert without == Dropped(f"{where} 5", "without a caption")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a\.csv is empty; it needs a header with the columns prompt, chosen, rejected; or prompt, image_0"),
        (b"prompt,a,b\nx,0.png,1.png\n", r"a\.csv has the columns prompt, a, b; it needs prompt, chosen, rejected"),
        (b"prompt,chosen,rejected,Chosen\n", r"a\.csv has more than one column 'chosen'; rename or remove one"),
        (b"prompt,chosen,rejected\nx,y,z\nx,\xff,z\n", r"a\.csv, line 3 is not valid UTF-8 \(byte 0xff\); save"),
        (b'prompt,chosen,rejected\nx,y,z\n"x,y,z\n', r"a\.csv, line 3 cannot be read as a table: unexpected end"),
        ("prompt".encode("utf-16"), r"a\.csv is UTF-16; save the file as UTF-8"),
    ],
)
def test_tables_that_cannot_be_read(folder: Path, content: bytes, message: str) -> None:
    (folder / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read("csv", folder / "a.csv")


def test_chunks_hold_every_row_once_in_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f'"prompt\n{i}",0.png,1.png\n' + ("\n" if i % 7 == 0 else "") for i in range(450)]
    file = write(folder / "a.csv", "prompt,chosen,rejected\n" + "".join(lines))
    chunks = SOURCES["csv"].chunks([file])
    assert [chunk.stop - chunk.start for chunk in chunks] == [100, 100, 100, 100, 50]
    rows = [row for chunk in chunks for row in SOURCES["csv"].read(chunk)]
    assert [row.caption for row in rows if isinstance(row, Record)] == [f"prompt\n{i}" for i in range(450)]
    text = file.read_text().split("\n")
    assert all(text[int(row.where.split()[-1]) - 1] == '"prompt' for row in rows)
    assert text[int(rows[-1].where.split()[-1])] == '449",0.png,1.png'


def test_json_lines_of_chosen_and_rejected(folder: Path) -> None:
    rows = [
        {"prompt": "a", "chosen": "0.png", "rejected": "1.png"},
        {"prompt": "b", "chosen": "2.png", "rejected": "3.png", "rejected_model": "sd", "other": 1},
        {"prompt": "c", "chosen": "2.png"},
        {"prompt": "d", "chosen": "2.png", "rejected": "3.png", "preferred": 1},
    ]
    file = write(folder / "a.jsonl", "\n".join(map(json.dumps, rows)))
    first, second, third, fourth = read("jsonl", file)
    assert isinstance(first, Record)
    assert isinstance(second, Record)
    assert (first.caption, first.images, first.preference) == ("a", (b"0.png", b"1.png"), (1, 0))
    assert (second.images, second.models) == ((b"2.png", b"3.png"), ("", "sd"))
    assert isinstance(third, Damaged)
    assert third.reason == '"chosen" and "rejected" are not two paths'
    assert isinstance(fourth, Damaged)
    assert fourth.reason == '"chosen" and "rejected" stand beside preferred; give one or the other'
