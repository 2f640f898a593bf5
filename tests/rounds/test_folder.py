"""The files of a round: whole or not there, told when damaged, and read by the page that people vote on."""

import json
import os

import numpy as np
import pytest

from dpo_jax.data.images import read_image
from dpo_jax.rounds.folder import Rewards, RoundFolder, read_said
from dpo_jax.rounds.rollout import StoredTrajectory
from dpo_jax.sampling.image_folder import read_list
from dpo_jax.voting.study import MODES, read_folder

PROMPTS = ["a cat", "a dog: große, rote!", "a red circle"]
K, S, R = 3, 4, 2


def trajectory(p: int) -> StoredTrajectory:
    rng = np.random.default_rng(p)
    shapes = (S, K, 2, 2, 4), (S, K, 2, 2, 4), (S, K), (S, K, 2, 2, 4)
    arrays = [rng.normal(size=shape) for shape in shapes]
    return StoredTrajectory(*(array.astype(np.float32) for array in arrays))


def images_KHWC(p: int) -> np.ndarray:
    return np.random.default_rng(p).integers(256, size=(K, 8, 8, 3)).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    return RoundFolder(tmp_path, 3, PROMPTS)


def test_what_was_sampled_comes_back(folder, tmp_path):
    rewards = Rewards(np.array([[1.0, 2], [np.nan, 3], [0, 0]]), np.arange(float(S * K * R)).reshape(S, K, R))
    assert folder.path == tmp_path / "rounds" / "00003"
    assert folder.missing() == [0, 1, 2]
    folder.write_trajectory(1, trajectory(1), rewards)
    assert folder.missing() == [0, 2]
    folder.write_trajectory(0, trajectory(0), Rewards(rewards.shown_KR))
    folder.write_trajectory(2, trajectory(2), Rewards(rewards.shown_KR))
    assert folder.missing() == []

    for p in range(3):
        for found, expected in zip(folder.read_trajectory(p, S, K, K, with_means=True), trajectory(p), strict=True):
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, expected)
    assert folder.read_trajectory(0, S, K, K).mean_SJhwC is None
    first, second, _ = folder.read_rewards((K, R), None)
    np.testing.assert_array_equal(first.shown_KR, rewards.shown_KR)
    assert first.steps_SKR is second.steps_SKR is None
    with pytest.raises(ValueError, match=r"00000\.npz cannot be read \('steps_SKR is not a file in the archive'\)"):
        folder.read_rewards((K, R), (S, K, R))
    for p in range(3):
        folder.write_trajectory(p, trajectory(p), rewards)
    np.testing.assert_array_equal(folder.read_rewards((K, R), (S, K, R))[1].steps_SKR, rewards.steps_SKR)
    with pytest.raises(ValueError, match=r"00000\.npz cannot be read \('watched_KW is not a file in the archive'\)"):
        folder.read_rewards((K, R), None, (K, 1))
    for p in range(3):
        folder.write_trajectory(p, trajectory(p), rewards._replace(watched_KW=np.full((K, 1), float(p))))
    assert [np.unique(found.watched_KW) for found in folder.read_rewards((K, R), None, (K, 1))] == [0, 1, 2]
    assert RoundFolder(tmp_path, 3, PROMPTS).missing() == []  # a later start sees the same
    assert RoundFolder(tmp_path, 4, PROMPTS).missing() == [0, 1, 2]


@pytest.mark.parametrize("cut", ["before the content is there", "before it has its name"])
def test_a_write_that_is_cut_off_leaves_the_prompt_missing(folder, monkeypatch, cut):
    folder.write_trajectory(0, trajectory(0), None)
    folder.write_images(0, images_KHWC(0))

    def fail(*arguments, **options):
        raise OSError("the machine is gone")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace" if "name" in cut else "fsync", fail)
        with pytest.raises(OSError, match="is gone"):
            folder.write_trajectory(1, trajectory(1), None)
        with pytest.raises(OSError, match="is gone"):
            folder.write_images(1, images_KHWC(1))

    assert folder.missing() == [1, 2]
    assert len(list(folder.images.glob("*.png"))) == K
    folder.write_trajectory(1, trajectory(1), None)  # and what was left is in nobody's way
    folder.write_images(1, images_KHWC(1))
    assert folder.missing() == [2]
    np.testing.assert_array_equal(folder.read_trajectory(1, S, K, K).log_prob_SK, trajectory(1).log_prob_SK)


def damages(data: bytes):
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    return {"cut": data[: len(data) // 2], "flipped": bytes(flipped), "empty": b"", "text": b"no arrays at all"}


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "gone"])
def test_a_damaged_trajectory_is_told_with_the_remedy(folder, damage):
    folder.write_trajectory(0, trajectory(0), Rewards(np.zeros((K, R))))
    file = folder.path / "trajectories" / "00000.npz"
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(damages(file.read_bytes())[damage])
    message = (
        r"00000\.npz cannot be read \(.+\). Restore it from a backup. Without one, remove the file and run again "
        "to sample it anew, if round 3 is not trained on yet; otherwise start in another --workdir"
    )
    reads = [lambda: folder.read_trajectory(0, S, K, K), lambda: folder.read_rewards((K, R), None)]
    for read in reads[:1] if damage == "flipped" else reads:  # a bit of the latents, which say nothing of rewards
        with pytest.raises(ValueError, match=message) as error:
            read()
        assert "\n" not in str(error.value)


def test_objects_are_not_unpickled(folder):
    folder.write_trajectory(0, trajectory(0), None)
    np.savez(folder.path / "trajectories" / "00000.npz", x_SJhwC=np.array([print], object))
    with pytest.raises(ValueError, match="cannot be read"):
        folder.read_trajectory(0, S, K, K)


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("x_SJhwC", lambda x: x[1:], r"x_SJhwC is float32 \[3, 3, 2, 2, 4\], not float \[4, 3, any, any, any\]"),
        ("x_SJhwC", lambda x: x[:, :1], r"x_SJhwC is float32 \[4, 1, 2, 2, 4\]"),
        ("x_SJhwC", lambda x: x[..., 1:], "not finite, or its latents differ in size"),
        ("x_SJhwC", lambda x: x * np.nan, "not finite, or its latents differ in size"),
        ("x_SJhwC", lambda x: x + np.inf, "x_SJhwC contains an infinite number"),
        ("next_x_SKhwC", lambda x: x[0], r"next_x_SKhwC is float32 \[3, 2, 2, 4\]"),
        ("next_x_SKhwC", lambda x: x.astype(str), r"next_x_SKhwC is <U\d+ \["),
        ("log_prob_SK", lambda x: x.T, r"log_prob_SK is float32 \[3, 4\], not float \[4, 3\]"),
        ("log_prob_SK", None, "log_prob_SK is not a file in the archive"),
    ],
)
def test_the_trajectory_of_another_round_is_told(folder, name, change, problem):
    arrays = trajectory(0)._asdict()
    del arrays[name]
    if change:
        arrays[name] = change(trajectory(0)._asdict()[name])
    folder.write_trajectory(0, trajectory(0), None)
    np.savez(folder.path / "trajectories" / "00000.npz", **arrays)
    with pytest.raises(ValueError, match=rf"00000\.npz cannot be read \(.*{problem}.*\). Restore it"):
        folder.read_trajectory(0, S, K, K)


@pytest.mark.parametrize(
    ("data", "problem"),
    [(bytes(99), "nothing but zero bytes"), (b"\x80\x04\x95os", "a Python pickle"), (b"arrays", "not an .npz file")],
)
def test_what_is_no_trajectory_is_told_without_advice_to_unpickle_it(folder, data, problem):
    folder.write_trajectory(0, trajectory(0), None)
    (folder.path / "trajectories" / "00000.npz").write_bytes(data)
    with pytest.raises(ValueError, match=rf"00000\.npz cannot be read \(it is {problem}") as error:
        folder.read_trajectory(0, S, K, K)
    assert "allow_pickle" not in str(error.value)


def test_a_pipe_in_place_of_a_trajectory_is_not_waited_for(folder):
    folder.write_trajectory(0, trajectory(0), None)
    file = folder.path / "trajectories" / "00000.npz"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match=r"00000\.npz cannot be read \(.*is not a regular file\)"):
        folder.read_trajectory(0, S, K, K)


def test_scores_come_back_with_what_nobody_said(folder):
    assert folder.read_scores((K, R)) is None
    shown_PKR = np.array([[[1.5, np.nan], [2, 3]], [[np.nan, np.nan], [0, -1]], [[0.1, 1 / 3], [1e9, 1e-9]]])
    folder.write_scores({"round": 3, "step": 12, "judges": ["a", "b"]}, shown_PKR)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    json.loads((folder.path / "scores.json").read_text(), parse_constant=refuse)
    scores = read_said(folder.path / "scores.json", 3)
    assert (scores["round"], scores["step"], scores["judges"], scores["prompts"]) == (3, 12, ["a", "b"], PROMPTS)
    np.testing.assert_array_equal(folder.read_scores((2, R)), shown_PKR)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"round": 3', '"round": "x"', "round: input should be a valid integer, not 'x'"),
        ('"step"', '"stop"', "step: field required"),
        ("1.5", "[1.5]", r"scores.0.0.0: input should be a valid number, not \[1.5\]"),
        ("1.5, null", "1.5", r"its scores are not \[prompt\]\[candidate\]\[judge\]"),
        ("}", "", "is not valid JSON"),
        ("1.5", "NaN", "scores.0.0.0: input should be a finite number"),
        ('"round": 3', '"round": 4', "belongs to round 4, not 3"),
        ("a cat", "a car", "has other prompts, candidates or judges than round 3"),
        (", [2.0, 3.0]", "", "has other prompts, candidates or judges than round 3"),
    ],
)
def test_damaged_scores_are_named(folder, old, new, message):
    folder.write_scores({"round": 3, "step": 12, "judges": ["a", "b"]}, np.array([[[1.5, np.nan], [2, 3]]] * 3))
    file = folder.path / "scores.json"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ValueError, match=f"scores.json.*{message}"):
        folder.read_scores((2, R))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[[7.0], [8.0]]", "[[7.0]]", r"its watched are not \[prompt\]\[candidate\]\[judge\]"),
        ('["shapes"]', '["shapes", "x"]', r"its watched are not \[prompt\]\[candidate\]\[judge\]"),
        ('"watched_judges"', '"watched_judge"', r"its watched are not \[prompt\]\[candidate\]\[judge\]"),
        ("0.5, null", "0.5", r"its diversity is not \[prompt\]"),
        ("8.0", "Infinity", "watched.0.1.0: input should be a finite number"),
    ],
)
def test_damaged_watched_scores_are_named(folder, old, new, message):
    watched = {
        "watched_judges": ["shapes"],
        "watched": [[[7.0], [8.0]]] * 3,
        "diversity": [0.5, None, 0.25],
        "drift": 1,
    }
    folder.write_scores({"round": 3, "step": 12, "judges": ["a"], **watched}, np.ones((3, 2, 1)))
    file = folder.path / "scores.json"
    assert read_said(file, 3)["watched"] == watched["watched"]
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=f"scores.json.*{message}"):
        read_said(file, 3)


def test_images_are_found_by_others_and_asked_about_prompt_by_prompt(folder):
    for p in (2, 0, 1):  # in whatever order they were sampled
        folder.write_images(p, images_KHWC(p))
    folder.write_list(K)

    entries = read_list(folder.images)
    assert [(entry.prompt, entry.seed) for entry in entries] == [(text, k) for text in PROMPTS for k in range(K)]
    assert folder.image_files(K) == [folder.images / entry.image for entry in entries]
    for i, entry in enumerate(entries):
        np.testing.assert_array_equal(read_image(folder.images / entry.image), images_KHWC(i // K)[i % K])
    for mode in ("points", "rank"):
        tasks = MODES[mode].tasks([read_folder(folder.images)])
        assert [task.prompt for task in tasks] == PROMPTS
        assert [[image.name for image in task.images] for task in tasks] == [
            [entry.image for entry in entries[p * K : (p + 1) * K]] for p in range(3)
        ]
    assert len(MODES["tag"].tasks([read_folder(folder.images)])) == 3 * K


def test_feedback_is_what_people_left_in_the_folder(folder):
    assert folder.feedback() == []
    folder.path.mkdir(parents=True)
    for name in ("feedback_bob.json", "feedback.json", "scores.json", "votes.sqlite", "feedback.json.partial"):
        (folder.path / name).write_text("[]")
    assert [path.name for path in folder.feedback()] == ["feedback.json", "feedback_bob.json"]


def test_trajectories_are_removed_and_nothing_else(folder):
    folder.remove_trajectories()  # there are none: nothing to do
    folder.write_trajectory(0, trajectory(0), None)
    folder.write_images(0, images_KHWC(0))
    folder.write_scores({}, np.zeros((1, 1, 1)))
    folder.remove_trajectories()
    assert sorted(path.name for path in folder.path.iterdir()) == ["images", "scores.json"]
    assert folder.missing() == [0, 1, 2]
