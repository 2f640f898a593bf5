"""Judges' scores are kept, and reused only for the same images."""

import sys

import numpy as np
import pytest
from PIL import Image

from dpo_jax.errors import UserError
from dpo_jax.evaluation import judge_contest
from dpo_jax.evaluation.compare import match
from dpo_jax.evaluation.judge_contest import check_judges, features_of
from dpo_jax.rewards import Judge, Settings
from dpo_jax.sampling.image_folder import Entry, write_list


@pytest.fixture
def contest(tmp_path):
    """Two models with 10 grey images each: the pixels of the first are 0 to 9, those of the second 10 to 19."""
    for model in range(2):
        entries = [Entry(f"{i}.png", f"prompt {i // 2}", i) for i in range(10)]
        (tmp_path / str(model)).mkdir()
        for i, entry in enumerate(entries):
            grey = np.full((8, 8, 3), 10 * model + i, np.uint8)
            Image.fromarray(grey).save(tmp_path / str(model) / entry.image)
        write_list(tmp_path / str(model), entries)
    return match({"first": tmp_path / "0", "second": tmp_path / "1"})


@pytest.fixture
def asked(monkeypatch):
    """Replace every judge by one of brightness; the list of captions that it was asked about."""
    asked = []

    def score(images, captions):
        asked.extend(captions)
        return np.array([image.mean() for image in images], np.float32)

    monkeypatch.setattr(judge_contest, "open_judge", lambda spec, **settings: Judge(spec.partition("=")[0], score))
    monkeypatch.setattr(judge_contest, "CHUNK", 4)
    return asked


def run(contest, folder, specs=("brightness",)):
    return judge_contest.judge_contest(specs, Settings(), contest, folder, lambda *progress: None)


def test_scores_are_in_the_order_of_the_images(contest, asked, tmp_path):
    scores = run(contest, tmp_path / "scores")
    np.testing.assert_array_equal(scores["brightness"]["first"], np.arange(10))
    np.testing.assert_array_equal(scores["brightness"]["second"], 10 + np.arange(10))
    assert asked == 2 * [f"prompt {i // 2}" for i in range(10)]


def test_what_was_judged_is_not_judged_again_unless_it_changed(contest, asked, tmp_path):
    before = run(contest, tmp_path / "scores")
    asked.clear()
    np.testing.assert_array_equal(
        run(contest, tmp_path / "scores")["brightness"]["first"], before["brightness"]["first"]
    )
    assert asked == []
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(contest.images["first"][3])
    after = run(contest, tmp_path / "scores")
    assert len(asked) == 10
    assert after["brightness"]["first"][3] == pytest.approx(noise.mean(), rel=1e-6)


def test_scores_that_were_damaged_are_judged_again(contest, asked, tmp_path):
    before = run(contest, tmp_path / "scores")
    kept = tmp_path / "scores/brightness/first.json"
    whole = kept.read_text()
    for damaged in (whole.replace("3.0", "3.5"), whole[:-9], "", "[]", whole.replace("checksum", "checksun")):
        kept.write_text(damaged)
        asked.clear()
        after = run(contest, tmp_path / "scores")
        assert len(asked) == 10
        np.testing.assert_array_equal(after["brightness"]["first"], before["brightness"]["first"])
        assert kept.read_text() == whole


def test_an_image_of_the_same_length_is_judged_again(contest, asked, tmp_path):
    run(contest, tmp_path / "scores")
    asked.clear()
    first, second = contest.images["first"][3:5]
    one, other = first.read_bytes(), second.read_bytes()
    assert len(one) == len(other)
    first.write_bytes(other)
    second.write_bytes(one)
    assert run(contest, tmp_path / "scores")["brightness"]["first"].tolist() == [0, 1, 2, 4, 3, 5, 6, 7, 8, 9]


def test_two_judges_of_one_kind_are_told_apart(contest, asked, tmp_path):
    scores = run(contest, tmp_path / "scores", ["brightness=a/b", "brightness=c"])
    assert list(scores) == ["brightness", "brightness=c"]
    assert {path.name for path in (tmp_path / "scores").iterdir()} == {"brightness", "brightness=c"}


def test_features(contest):
    found = features_of("thumbnails", Settings(), contest, lambda *progress: None)
    np.testing.assert_allclose(found["second"], np.repeat((10 + np.arange(10))[:, None] / 255, 192, axis=1))
    with pytest.raises(ValueError, match="must be thumbnails or clip="):
        features_of("dino=x", Settings(), contest, lambda *progress: None)


def test_judges_are_tried_on_one_image_beforehand(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "my_broken_judge.py").write_text("def score(images, captions): return [1] * len(no_such)")
    grey = np.full((64, 64, 3), 128, np.uint8)
    check_judges(["jpeg_compressibility"], "thumbnails", Settings(), grey, "a cat")
    for spec, features, message in (
        ("shapes", "thumbnails", "the shapes judge reads uint8 images"),
        ("python=my_broken_judge:score", "thumbnails", "my_broken_judge:score raises NameError"),
        ("command=./no_such_judge", "thumbnails", "no_such_judge can't be run"),
        ("jpeg_compressibility", "clip=nowhere", "no folder or file nowhere"),
    ):
        with pytest.raises(UserError, match=message):
            check_judges(["jpeg_compressibility", spec], features, Settings(), grey, "a cat")
