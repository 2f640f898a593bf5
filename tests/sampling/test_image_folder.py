"""Folders of images with their prompts, from dpo_jax and from other programs."""

import json

import numpy as np
import pytest
from PIL import Image

from dpo_jax.data.images import read_image
from dpo_jax.evaluation.compare import match
from dpo_jax.sampling.draw import list_entries
from dpo_jax.sampling.image_folder import Entry, image_name, read_list, write_list
from dpo_jax.sampling.prompts import Prompt, distinct, read_prompts


def _image(path):
    Image.fromarray(np.full((4, 5, 3), 7, np.uint8)).save(path)


def test_what_is_written_is_read(tmp_path):
    entries = [
        Entry(image_name(0, "a red, red / square!", 3), "a red, red / square!", 3, "shapes"),
        Entry("b.png", "b", 0),
    ]
    assert entries[0].image == "00000_a-red-red-square_3.png"
    for entry in entries:
        _image(tmp_path / entry.image)
    write_list(tmp_path, entries)
    assert read_list(tmp_path) == entries
    assert read_image(tmp_path / "b.png").shape == (4, 5, 3)


def test_folders_of_other_programs(tmp_path):
    for name in ("00001.jpg", "00001-2.png", "0_first.png"):
        _image(tmp_path / name)
    prompts = [Prompt("a", "letters", 0), Prompt("b", "", 1)]
    expected = [Entry("0_first.png", "a", 0, "letters"), Entry("00001-2.png", "b", 0), Entry("00001.jpg", "b", 1)]
    assert read_list(tmp_path, prompts) == expected
    (tmp_path / "00001.txt").write_text("a caption of its own\n")
    assert Entry("00001.jpg", "a caption of its own", 0) in read_list(tmp_path, prompts)
    with pytest.raises(ValueError, match=r"00001-2.png has no known prompt"):
        read_list(tmp_path, prompts[:1])


def test_seeds_follow_the_numbers_in_names(tmp_path):
    for name in ("0-2.png", "0-10.png", "0-1.png"):
        _image(tmp_path / name)
    assert [entry.image for entry in read_list(tmp_path, [Prompt("a", "", 0)])] == ["0-1.png", "0-2.png", "0-10.png"]


def test_numbers_are_lines_of_the_file_whatever_is_repeated_or_blank(tmp_path):
    (tmp_path / "prompts.txt").write_text("a\nb\nb\n\nc\n")
    for number in (0, 1, 2, 4):
        _image(tmp_path / f"{number:05d}.png")
    prompts = read_prompts(tmp_path / "prompts.txt", repeated=True)
    expected = [("00000.png", "a"), ("00001.png", "b"), ("00002.png", "b"), ("00004.png", "c")]
    assert [entry[:2] for entry in read_list(tmp_path, prompts)] == expected
    contest = match({"x": tmp_path, "y": tmp_path}, prompts)
    assert [(file.name, text) for file, text in zip(contest.images["y"], contest.captions, strict=True)] == expected
    drawn = list_entries(distinct(prompts), 7, 1)
    assert [entry.image for entry in drawn] == ["00000_a_7.png", "00001_b_7.png", "00004_c_7.png"]
    for entry in drawn:
        _image(tmp_path / entry.image)
    with_numbers = {entry.image: entry.prompt for entry in read_list(tmp_path, prompts)}
    assert all(with_numbers[entry.image] == entry.prompt for entry in drawn)
    _image(tmp_path / "00003.png")
    with pytest.raises(ValueError, match=r"00003.png has no known prompt"):
        read_list(tmp_path, prompts)


def test_captions_and_lists_of_other_systems(tmp_path):
    for name in ("a.png", "cafe\u0301.png"):
        _image(tmp_path / name)
    (tmp_path / "a.txt").write_bytes("\ufeffa café\r\nby night\r\n".encode())
    (tmp_path / "cafe\u0301.txt").write_bytes("two".encode("utf-16"))
    captions = [Entry("a.png", "a café\nby night", 0), Entry("cafe\u0301.png", "two", 0)]
    assert read_list(tmp_path) == captions
    (tmp_path / "prompts.jsonl").write_bytes(
        '\ufeff{"image": "a.png", "prompt": "one\u2028line", "seed": "3", "category": null}\r\n\r\n'
        '{"image": "caf\xe9.png", "prompt": "two", "seed": 4.0}'.encode()
    )
    assert read_list(tmp_path) == [Entry("a.png", "one\u2028line", 3), Entry("cafe\u0301.png", "two", 4)]
    (tmp_path / "prompts.jsonl").unlink()
    (tmp_path / "a.txt").write_bytes("one\ncaf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a.txt, line 2 is not valid UTF-8"):
        read_list(tmp_path)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "sub/x.png", "gone.png"])
def test_a_list_names_images_of_its_folder_only(tmp_path, name):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for path in (folder / "a.png", folder / "sub" / "x.png", tmp_path / "secret.png"):
        _image(path)
    (folder / "prompts.jsonl").write_text(json.dumps({"image": name, "prompt": "a", "seed": 0}) + "\n")
    with pytest.raises(ValueError, match="line 1: there is no image"):
        read_list(folder)


def test_other_faults_are_told_in_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder of images"):
        read_list(tmp_path / "gone")
    with pytest.raises(ValueError, match="has no images"):
        read_list(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"image": "a.png"}\n')
    with pytest.raises(ValueError, match="line 1: prompt: field required; seed: field required"):
        read_list(tmp_path)
    (tmp_path / "a.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        read_image(tmp_path / "a.png")
