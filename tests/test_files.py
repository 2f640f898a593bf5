"""Reading text and JSON from outside, and writing files whole."""

import json
import os
from pathlib import Path

import pytest
from typing_extensions import TypedDict

from dpo_jax import files

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4d" * 32 + "\nsize 12345\n"


@pytest.mark.parametrize(
    "data",
    [
        b"caf\xc3\xa9\nb\n",
        b"\xef\xbb\xbfcaf\xc3\xa9\r\nb\r\n",
        b"caf\xc3\xa9\rb",
        "café\nb\n".encode("utf-16"),
        b"\xfe\xff" + "café\r\nb".encode("utf-16-be"),
    ],
)
def test_lines_are_the_same_with_any_mark_and_line_end(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    assert files.read_lines(tmp_path / "a.txt") == ["café", "b"]


def test_only_line_ends_separate_lines(tmp_path: Path) -> None:
    text = "a\x0bb\x0cc\x1cd\x85e\u2028f"
    (tmp_path / "a.txt").write_text(text + "\n\nlast")
    assert files.read_lines(tmp_path / "a.txt") == [text, "", "last"]


def test_what_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\ncaf\xe9\n")
    with pytest.raises(ValueError, match=r"a\.txt, line 3 is not valid UTF-8"):
        files.read_text(tmp_path / "a.txt")


@pytest.mark.parametrize("data", [b"PK\x03\x04a red circle", b"\n<!DOCTYPE html>\n<html>", LFS.encode()])
def test_what_is_no_text_is_told(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.txt is a "):
        files.read_lines(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("<sks> dog\nversion 2 of a cat\n")
    assert len(files.read_lines(tmp_path / "a.txt")) == 2


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (LFS.encode(), "a Git LFS pointer"),
        (b"", "empty"),
        (b"\n <!DOCTYPE html><html>", "a web page"),
        (b"\x80\x04\x95K", "a Python pickle"),
        (b"PK\x03\x04....", "a zip archive"),
        (b"\x1f\x8b\x08\x00", "a gzip archive"),
        (bytes(100), "nothing but zero bytes"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', r"not valid JSON \(it has the field 'c' twice"),
        (b'{"a": 1,}', "not valid JSON .*line 1, column"),
        (b"[" * 100_000, r"not valid JSON \(nested too deeply"),
        (b"1" * 10_000, "not valid JSON"),
        (b'{"a": "caf\xe9"}', "line 1 is not valid UTF-8"),
    ],
)
def test_what_is_not_json_is_told_for_what_it_is(tmp_path: Path, data: bytes, told: str) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(ValueError, match=rf"^\S*a\.json.* {told}"):
        files.read_json(tmp_path / "a.json")


class Settings(TypedDict):
    steps: int
    name: str
    rate: float


def test_all_wrong_fields_are_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"steps": "3", "rate": None}))
    with pytest.raises(ValueError, match=r"a\.json: steps: .*not '3'; name: field required; rate: .*not None"):
        files.read_json(file, Settings)
    file.write_text(json.dumps({"steps": 3, "name": "x", "rate": 1}))
    assert files.read_json(file, Settings) == {"steps": 3, "name": "x", "rate": 1.0}


def test_lines_of_json_are_numbered_as_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n[2]\r\n')
    assert list(files.read_json_lines(tmp_path / "a.jsonl")) == [(1, {"a": 1}), (3, [2])]


def test_devices_pipes_and_huge_files_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "sparse", "wb") as sparse:
        sparse.truncate(300 * 2**30)
    for path, told in (
        ("/dev/zero", "regular"),
        (tmp_path / "pipe", "regular"),
        (tmp_path, "folder"),
        (tmp_path / "sparse", "bytes"),
    ):
        with pytest.raises(ValueError, match=told):
            files.read_text(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        files.read_text(tmp_path / "absent")


def test_a_file_is_written_whole_or_not_at_all_and_follows_no_link(tmp_path: Path) -> None:
    victim, target = tmp_path / "victim", tmp_path / "out" / "a.json"
    victim.write_text("mine")
    files.write_whole(target, "first")
    target.chmod(0o600)
    for name in ("a.json.partial", ".a.json.partial", ".a.json.unfinished"):
        (target.parent / name).symlink_to(victim)
    files.write_whole(target, b"second")
    assert target.read_text() == "second"
    assert victim.read_text() == "mine"
    with pytest.raises(RuntimeError), files.writing(target) as file:  # noqa: PT012
        file.write(b"third")
        raise RuntimeError
    assert target.read_text() == "second"
    assert sorted(path.name for path in target.parent.iterdir() if not path.is_symlink()) == ["a.json"]


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / files.partial_name("a.png")).write_text("half")
    (tmp_path / files.partial_name("b.png")).symlink_to(tmp_path / "victim")
    (tmp_path / files.partial_name("folder")).mkdir()
    files.remove_partials(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert (tmp_path / "victim").read_text() == "mine"
    files.remove_partials(tmp_path / "absent")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with files.new_folder(tmp_path / "a" / "b") as folder:
        (folder / "x").write_text("x")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    with pytest.raises(RuntimeError), files.new_folder(tmp_path / "c") as folder:  # noqa: PT012
        (folder / "x").write_text("x")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with pytest.raises(ValueError, match="already exists"), files.new_folder(tmp_path / "a"):
        pass
