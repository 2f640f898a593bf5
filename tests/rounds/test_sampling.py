"""What is written of a round, in which order, and what is sampled again of one that was cut off."""

import numpy as np
import pytest

from dpo_jax.rounds import loop
from dpo_jax.rounds.folder import RoundFolder
from dpo_jax.rounds.loop import learn
from dpo_jax.rounds.rollout import Rollout


@pytest.fixture
def config(online):
    """4 prompts, 2 at a time."""
    fields = {"online.prompts_per_round": 4, "online.candidates": 2, "sample.every": 0}
    return online("d3po:tiny", **fields, **{"online.prompts_at_a_time": 2})


@pytest.fixture
def said(monkeypatch):
    """What has happened, in order."""
    events = []

    def record(owner, name, describe):
        original = getattr(owner, name)

        def recorded(*arguments):
            result = original(*arguments)
            events.append(describe(*arguments))
            return result

        monkeypatch.setattr(owner, name, recorded)

    record(Rollout, "__call__", lambda self, params, frozen, captions, numbers, number: f"drew {list(numbers)}")
    record(RoundFolder, "write_images", lambda self, p, images: f"images {p}")
    record(RoundFolder, "write_trajectory", lambda self, p, trajectory, rewards: f"trajectory {p}")
    record(loop.Rounds, "_judge", lambda self, drawn, captions: f"judged {len(captions)}")
    record(loop.cluster, "wait", lambda name: name)
    return events


def test_a_batch_that_was_cut_off_is_drawn_whole_and_only_what_is_missing_is_written(config, tmp_path, said):
    learn(config, tmp_path, "sample")
    trajectories = sorted((tmp_path / "rounds/00000/trajectories").iterdir())
    before = [dict(np.load(file)) for file in trajectories]
    trajectories[1].unlink()
    said.clear()

    learn(config, tmp_path, "sample")

    assert [event for event in said if "round" not in event] == [
        "drew [0, 1]",
        "judged 2",
        "images 1",
        "wrote images",
        "trajectory 1",
    ]
    for file, arrays in zip(trajectories, before, strict=True):
        for name, values in np.load(file).items():
            np.testing.assert_array_equal(values, arrays[name])


def test_a_batch_is_judged_and_written_while_the_next_one_is_drawn(config, tmp_path, said):
    """And its images are there before any of its trajectories, which other processes may write."""
    learn(config, tmp_path, "sample")
    finished = []
    for a, b in ((0, 1), (2, 3)):
        images, trajectories = ([f"{what} {p}" for p in (a, b)] for what in ("images", "trajectory"))
        finished += ["judged 2", *images, "wrote images", *trajectories]
    assert [event for event in said if "round" not in event] == ["drew [0, 1]", "drew [2, 3]", *finished]
