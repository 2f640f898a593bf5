"""Tasks made from folders."""

import json
import os
import subprocess

import pytest
from PIL import Image

from dpo_jax.sampling.image_folder import LIST
from dpo_jax.voting.study import MODES, TIE, TaskImage, read_folder, study_digest, warnings


def _tasks(mode, paths):
    return MODES[mode].tasks([read_folder(path) for path in paths])


def _drop_lines(folder, numbers):
    lines = (folder / LIST).read_text().splitlines()
    (folder / LIST).write_text("".join(f"{line}\n" for k, line in enumerate(lines) if k not in numbers))


def test_folders_meet_where_prompt_and_seed_agree(make_folders):
    a, b, c = make_folders("a", "b", "c", prompts=3, seeds=2)
    _drop_lines(b, {0})  # prompt 0, seed 0
    _drop_lines(c, {5})  # prompt 2, seed 1
    pairs = _tasks("pairs", [a, b, c])
    folders = [tuple(image.folder for image in task.images) for task in pairs]
    assert [folders.count(two) for two in ((0, 1), (0, 2), (1, 2))] == [5, 5, 4]
    assert ("prompt 0", 0, (0, 1)) not in {(t.prompt, t.seed, f) for t, f in zip(pairs, folders, strict=True)}
    assert all(len({image.name for image in task.images}) == 1 for task in pairs)
    ranked = _tasks("rank", [a, b, c])
    assert [(task.prompt, task.seed) for task in ranked] == [
        ("prompt 0", 1), ("prompt 1", 0), ("prompt 1", 1), ("prompt 2", 0)
    ]  # fmt: skip
    assert ranked[0].images == (TaskImage(0, "0-1.png"), TaskImage(1, "0-1.png"), TaskImage(2, "0-1.png"))


def test_one_folder_compares_the_seeds_of_a_prompt(make_folders):
    (a,) = make_folders("a", prompts=2, seeds=3)
    _drop_lines(a, {4, 5})  # prompt 1 keeps one image
    (task,) = _tasks("points", [a])
    assert (task.prompt, task.seed, [image.name for image in task.images]) == (
        "prompt 0", None, ["0-0.png", "0-1.png", "0-2.png"]
    )  # fmt: skip
    assert len(_tasks("tag", [a])) == 4


def test_folders_that_do_not_fit_are_told_in_a_sentence(make_folders, tmp_path):
    a, b = make_folders("a", "b", prompts=1)
    with pytest.raises(ValueError, match="two folders or more"):
        _tasks("pairs", [a])
    with pytest.raises(ValueError, match="no prompt with two or more images"):
        _tasks("rank", [a])
    (b / LIST).write_text(json.dumps({"image": "0-0.png", "prompt": "another", "seed": 0}) + "\n")
    with pytest.raises(ValueError, match=r"a and .*b have no image of the same prompt and seed"):
        _tasks("pairs", [a, b])
    line = (a / LIST).read_text()
    (a / LIST).write_text(line * 2)
    with pytest.raises(ValueError, match="two images of the prompt 'prompt 0' and seed 0"):
        read_folder(a)
    (a / LIST).write_text(line)
    whole = (a / "0-0.png").read_bytes()
    (a / "0-0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"0-0.png cannot be read as an image"):
        read_folder(a)


def test_the_digest_knows_pixels_prompts_and_mode_but_not_places(make_folders):
    paths = make_folders("a", "b", prompts=2)
    read = [read_folder(path) for path in paths]
    digest = study_digest("pairs", read)
    moved = paths[0].rename(paths[0].with_name("moved"))
    assert study_digest("pairs", [read_folder(moved), read[1]]) == digest
    assert study_digest("rank", read) != digest
    assert study_digest("pairs", read[::-1]) != digest  # only the pixels differ
    Image.new("RGB", (8, 8), "red").save(moved / "0-0.png")
    assert study_digest("pairs", [read_folder(moved), read[1]]) != digest


@pytest.mark.parametrize(
    ("mode", "good", "bad"),
    [
        ("pairs", [(1, 0), (0, 1), TIE], [(1, 1), (0, 0), (2, 0), (0.5, 0.4), (float("nan"), 0)]),
        ("rank", [(1, 2, 3), (3, 1, 2)], [(1, 1, 2), (0, 1, 2), (1, 2, 4), (1.5, 1, 3), (float("nan"), 1, 2)]),
        ("points", [(1, 5, 5)], [(0, 1, 2), (6, 1, 1), (1.5, 2, 2), (float("inf"), 1, 1)]),
        ("tag", [(0,), (1,)], [(2,), (0.5,), (-1,)]),
    ],
)
def test_answers_that_a_mode_knows(mode, good, bad):
    assert all(map(MODES[mode].is_answer, good))
    assert not any(map(MODES[mode].is_answer, bad))


def test_scores_rise_with_what_raters_like():
    assert MODES["rank"].scores((1, 3, 2)) == (2, 0, 1)
    assert MODES["tag"].scores((1,)) == (0,)
    assert [MODES["pairs"].side(answer) for answer in ((1, 0), (0, 1), TIE)] == [1, -1, 0]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n8 8 scale\nshowpage\n", "is not supported"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not supported"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not an image|Git LFS pointer"),
        (b"", "not an image|empty"),
    ],
    ids=["postscript", "svg", "pointer", "empty"],
)
def test_what_is_no_image_is_told_and_starts_no_program(make_folders, monkeypatch, data, reason):
    def start(*arguments, **fields):
        raise AssertionError(f"a program was started: {arguments}")

    for module, name in ((subprocess, "Popen"), (os, "system"), (os, "posix_spawn")):
        monkeypatch.setattr(module, name, start)
    (folder,) = make_folders("a")
    (folder / "1-0.png").write_bytes(data)
    with pytest.raises(ValueError, match=rf"1-0.png .*({reason})"):
        read_folder(folder)


def test_pairs_that_say_nothing_or_tell_are_counted(make_folders):
    paths = make_folders("a", "b", prompts=4)
    assert warnings([read_folder(path) for path in paths], _tasks("pairs", paths), "comparisons") == []
    (paths[1] / "1-0.png").write_bytes((paths[0] / "1-0.png").read_bytes())
    for prompt in (2, 3):
        Image.new("RGB", (9, 8)).save(paths[1] / f"{prompt}-0.png")
    assert warnings([read_folder(path) for path in paths], _tasks("pairs", paths), "comparisons") == [
        "1 of 4 comparisons show the same image twice, so their answers mean nothing",
        "2 of 4 comparisons show images of different sizes, so raters can tell the folders apart",
    ]
