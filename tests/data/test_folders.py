"""Sources that are folders of images. Images are a few bytes, because sources do not decode them."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_jax.data.sources import SOURCES, Damaged, Dropped, Record

from .source_files import read, write_images

Write = Callable[..., Path]


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
