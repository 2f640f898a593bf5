"""A run whose judges are exploited says so, and ends by itself; by histories with known answers, and in whole runs."""

import json
import math

import jax
import numpy as np
import pytest
from PIL import Image

from dpo_jax.errors import UserError
from dpo_jax.rewards import Judge, find_judge
from dpo_jax.rounds.config import check
from dpo_jax.rounds.guard import RoundFigures, best_round, change, verdict
from dpo_jax.rounds.loop import learn
from dpo_jax.rounds.rollout import Drawn, StoredTrajectory
from dpo_jax.rounds.round_images import best_and_worst_images, diversity_of_prompts
from dpo_jax.training.checkpoint import finished_steps
from dpo_jax.training.loop import Loop
from dpo_jax.training.select_step import select_step

PROMPTS = ["a", "b", "c", "d"]


def figures(trained=1.0, watched=None, diversity=None, prompts=PROMPTS) -> RoundFigures:
    """Figures that are the same for every prompt, or are given by prompt."""

    def by_prompt(value):
        return np.broadcast_to(np.asarray(value, float), len(prompts))

    return RoundFigures(
        prompts,
        {"jpeg": by_prompt(trained)},
        {} if watched is None else {"shapes": by_prompt(watched)},
        None if diversity is None else by_prompt(diversity),
    )


def test_shared_prompts_are_compared_each_with_itself():
    before = np.array([1.0, 3.0, 5.0, 7.0])
    found = change("shapes", (PROMPTS, before), (["b", "a", "d", "c"], np.array([2.8, 0.8, 6.6, 4.6])))
    assert (found.first, found.now) == pytest.approx((4.0, 3.7))
    assert found.share == pytest.approx(-0.3 / 4)
    # The differences are -0.2, -0.2, -0.4 and -0.4, whose variance is 0.04 / 3.
    assert found.error == pytest.approx(math.sqrt(0.04 / 3 / 4) / 4)
    assert str(found) == "shapes fell by 7.5% (4 to 3.7)"
    assert found.has_fallen(0.05, 5)
    assert not found.has_fallen(0.05, 6), "it is within the noise"
    assert not found.has_fallen(0.08, 5), "it is above the bound"
    assert not found.has_fallen(0.0, 5), "0 is no bound"


def test_other_prompts_are_two_samples():
    before, after = np.array([1.0, 3.0, 5.0, 7.0]), np.array([1.0, 2.0, 3.0, 6.0])
    found = change("shapes", (PROMPTS, before), (["a", "x", "y", "z"], after))
    assert (found.first, found.now) == (4.0, 3.0)
    assert found.error == pytest.approx(math.sqrt(before.var(ddof=1) / 4 + after.var(ddof=1) / 4) / 4)
    assert not found.has_fallen(0.05, 3), "a quarter, but within the noise"


def test_scores_about_zero_are_measured_in_their_deviations():
    found = change("reward", (PROMPTS, np.array([-1.0, 1.0, -1.0, 1.0])), (PROMPTS, np.array([-1.5, 0.5, -1.5, 0.5])))
    assert found.share == pytest.approx(-0.5)
    assert str(found) == "reward fell by 0.5 standard deviations (0 to -0.5)"


def test_a_prompt_that_is_there_twice_counts_once_and_unknown_scores_not_at_all():
    found = change(
        "people", (["a", "a", "b"], np.array([1.0, 3.0, 4.0])), (["b", "a", "c"], np.array([5.0, 3.0, np.nan]))
    )
    assert (found.first, found.now, found.error) == (3.0, 4.0, 0.0)
    assert change("people", (["a"], np.array([np.nan])), (["a"], np.array([1.0]))) is None
    alone = change("people", (["a"], np.array([2.0])), (["a"], np.array([1.0])))
    assert not alone.has_fallen(0.1, 3), "one prompt tells nothing about the noise"


def test_a_fall_is_warned_of_once_and_then_ends_the_run(online):
    config = online(**{"online.watched_judges": ("shapes",)})
    falls = [figures(1 + 0.1 * number, watched=0.5 * share) for number, share in enumerate((1, 0.96, 0.94, 0.93, 0.91))]
    assert verdict(config, falls[:1]) == verdict(config, falls[:2]) == (0, "", "")
    warned = verdict(config, falls[:3])
    assert warned.warning == (
        "round 3: since round 1, shapes fell by 6.0% (0.5 to 0.47), while jpeg rose by 20.0% (1 to 1.2). The model may "
        "exploit jpeg, and its images get worse. To do better, in a new --workdir lower optimizer.learning_rate (now "
        "5e-05) or raise loss.beta (now 0.1), or add shapes to online.judges. The run ends past "
        "online.watched_stop=0.075"
    )
    assert not warned.stop
    assert verdict(config, falls[:4]) == (0, "", ""), "it was told"
    ended = verdict(config, falls)
    assert not ended.warning
    assert ended.stop.startswith("since round 1, shapes fell by 9.0% (0.5 to 0.455), while jpeg rose by 40.0%")
    assert "a larger --config.online.watched_stop; to do better, in a new --workdir lower" in ended.stop


def test_a_run_is_not_ended_by_noise_nor_without_a_rise(online):
    config = online(**{"online.watched_judges": ("shapes",)})
    sudden = [figures(1.0, watched=0.5), figures(1.1, watched=0.5), figures(1.2, watched=0.1)]
    assert verdict(config, sudden).stop
    falling = [figures(1.0 - 0.1 * number, watched=0.5 - 0.1 * number) for number in range(4)]
    assert verdict(config, falling) == (0, "", "")
    # Fallen by 0.1 on average, with standard errors of 0.1 / 3.5, 0.1 / 2.5 and 0.1 / 4.5.
    for errors, warned, ended in ((3.5, True, False), (2.5, False, False), (4.5, False, True)):
        apart = 0.1 / errors * math.sqrt(3)  # twice +1 and twice -1 of it have this standard error over 4 prompts
        noisy = [figures(1.0, watched=0.5), figures(1.1, watched=0.4 + apart * np.array([1, -1, 1, -1]))]
        found = verdict(config, noisy)
        assert (bool(found.warning), bool(found.stop)) == (warned, ended)


def test_diversity_has_its_own_bounds(online):
    lost = [figures(1 + number, diversity=2 * share) for number, share in enumerate((1, 0.6, 0.4, 0.05))]
    assert verdict(online(), lost[:2]).warning == ""
    found = verdict(online(), lost[:3])
    assert "the diversity fell by 60.0% (2 to 0.8)" in found.warning
    assert "online.judges" not in found.warning
    assert verdict(online(), lost) == (3, "", ""), "by default it only warns"
    ended = verdict(online(**{"online.diversity_stop": 0.9}), lost)
    assert "--config.online.diversity_stop; to do better" in ended.stop


def test_bounds_of_zero_are_none(online):
    fallen = [figures(1 + number, watched=0.5 - 0.1 * number) for number in range(4)]
    config = online(**{"online.watched_fall": 0.0, "online.watched_stop": 0.0})
    assert verdict(config, fallen) == (0, "", "")
    ends = verdict(online(**{"online.watched_fall": 0.0}), fallen)
    assert ends.stop
    assert not ends.warning


def test_the_best_round_is_that_of_the_watched_judges():
    assert best_round([figures(number) for number in (1.0, 3.0, 2.0, 3.0)]) == 1
    assert best_round([figures(1.0, 0.5), figures(2.0, 0.6), figures(9.0, 0.2)]) == 1
    assert best_round([figures(-1.0), figures(-2.0)]) == 0
    assert best_round([figures(1.0, 0.5)]) == 0


def test_diversity_is_that_of_each_prompt():
    features_ND = np.array([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0], [1.0, 1.0]])
    assert diversity_of_prompts(features_ND, ["a", "b"]) == [5.0, 0.0]
    assert diversity_of_prompts(features_ND, ["a", "b", "c", "a"]) == [
        pytest.approx(math.sqrt(2)),
        None,
        None,
        pytest.approx(math.sqrt(2)),
    ]


def test_the_grid_shows_the_best_and_the_worst(tmp_path):
    files = []
    for n, value in enumerate((10, 90, 50, 70, 70, 70)):  # 2 prompts of 3 images
        files.append(tmp_path / f"{n}.png")
        Image.new("RGB", (8, 8), (value, value, value)).save(files[-1])
    grid = np.asarray(best_and_worst_images(files, ["a", "b"], np.array([[0.0, 2.0, np.nan], [1.0, 1.0, 1.0]])))
    cell = grid.shape[1] - 160, grid.shape[0] - 26  # beside the captions, below the titles
    assert cell == (2 * 136, 136), "one row: the images of b are equally good"
    assert (grid[60, 165] == 90).all()
    assert (grid[60, 165 + 136] == 10).all()
    assert best_and_worst_images(files, ["a", "b"], np.ones((2, 3))) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"online.judges": (), "online.watched_judges": ("shapes",)},
            r"watched_judges=\('shapes',\) are compared .* online\.judges is empty\. Name judges there",
        ),
        (
            {"online.watched_judges": ("shapes",)},
            r"watched_judges has shapes, which online\.judges trains on.*Remove it",
        ),
        (
            {
                "online.judges": ("pickscore",),
                "online.watched_judges": ("pickscore=yuvalkirstain/PickScore_v1",),
            },
            r"has pickscore=yuvalkirstain/PickScore_v1, which online\.judges trains on",
        ),
        (
            {"online.watched_stop": 0.01},
            r"watched_stop=0\.01 would end the run before it warns at online\.watched_fall",
        ),
        ({"online.diversity_stop": 0.2}, r"diversity_stop=0\.2 .*Set diversity_stop to 0\.5 or more, or to 0"),
        ({"online.watched_fall": 1.5}, r"watched_fall=1\.5 must be at least 0 and below 1"),
    ],
)
def test_wrong_settings_are_one_sentence(online, fields, message):
    with pytest.raises(UserError, match=message) as error:
        check(online(**fields))
    assert "\n" not in str(error.value)


def test_a_watched_judge_that_is_not_there_is_told_before_anything_is_loaded(online, tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_jax.rounds.loop.open_model", lambda *_: pytest.fail("opened the model"))
    monkeypatch.setattr("dpo_jax.rounds.judges.open_judge", lambda *_: pytest.fail("opened a judge"))
    with pytest.raises(UserError, match=r"online\.watched_judges=\('beauty',\): there is no judge 'beauty'.*write"):
        learn(online(**{"online.watched_judges": ("beauty",)}), tmp_path)


@pytest.fixture
def untrained(monkeypatch):
    """Rounds that sample noise, and training that only counts its steps: nothing is compiled."""

    class Noise:
        batch_size = 4

        def __init__(self, config, pipeline, placement, text_of):
            self.shape_SK = config.online.sampling_steps, config.online.candidates

        def __call__(self, params, frozen, captions, numbers, rounds=0):
            rng = np.random.default_rng(numbers)
            latents = np.zeros((*self.shape_SK, 2, 2, 4), np.float32)
            trajectory = StoredTrajectory(latents, latents, np.zeros(self.shape_SK, np.float32))
            images = rng.integers(256, size=(len(captions), self.shape_SK[1], 32, 32, 3), dtype=np.uint8)
            drawn = Drawn(dict.fromkeys(range(len(captions)), trajectory), images, None)
            return lambda: drawn

    def count(self, state, updates, end):
        for step in range(int(state.step) + 1, end + 1):
            state = state._replace(step=jax.device_put(np.int32(step), state.step.sharding))
            self.checkpoints.save(state, {"position": step})
        return state

    monkeypatch.setattr("dpo_jax.rounds.loop.Rollout", Noise)
    monkeypatch.setattr(Loop, "run", count)


@pytest.fixture
def scripted(monkeypatch):
    """`scripted(shapes=[...], jpeg_compressibility=[...])`: judges that give these scores, round after round.

    It returns the list of what was asked. Images of a prompt differ by a little, so that there is something to learn.
    """

    def use(**scores):
        asked = []

        def open_scripted(spec):
            name, _ = find_judge(spec)

            def score(images, captions):
                asked.append(name)
                K = len(captions) // len(dict.fromkeys(captions))
                return scores[name][asked.count(name) - 1] + 1e-3 * (np.arange(len(captions)) % K)

            return Judge(name, score)

        monkeypatch.setattr("dpo_jax.rounds.judges.open_judge", open_scripted)
        return asked

    return use


def test_an_exploited_judge_ends_the_run_and_the_best_round_is_kept(online, tmp_path, untrained, scripted, capsys):
    """The second round is the best, and the fourth is not trained on before its user allows it."""
    fields = {
        **{"sample.every": 0, "checkpoint.keep": 1, "online.rounds": 5, "online.watched_judges": ("shapes",)},
        **{"online.candidates": 2, "online.prompts_per_round": 4, "data.batch_size": 2},
    }
    config = online("d3po:compressibility,tiny", **fields)
    asked = scripted(jpeg_compressibility=[1.0, 1.1, 1.2, 1.3, 1.4], shapes=[0.5, 0.52, 0.47, 0.45, 0.4])

    def run(config) -> tuple[str, dict]:
        learn(config, tmp_path)
        said = " ".join("".join(capsys.readouterr()).split())
        return said, json.loads((tmp_path / "result.json").read_text())

    said, result = run(config)
    updates = result["a_round"]["updates"]
    assert asked == ["jpeg_compressibility", "shapes"] * 4
    assert " watched shapes 0.5005 diversity " in said
    assert said.count("warning: round 3: since round 1, shapes fell by 6.0%") == 1
    assert f"stopped early after step {3 * updates}, before training on round 4, because since round 1, shapes" in said
    assert f"those of round 2; the checkpoint of step {updates}, which drew them, is kept" in said
    assert result["best"] == {"round": 1, "step": updates}
    assert result["stopped"].startswith("since round 1, shapes fell by 10.0% (0.5005 to 0.4505)")
    assert result["watched_judges"] == ["shapes"]
    assert [round(row["watched"]["shapes"]["mean"], 4) for row in result["rounds"]] == [0.5005, 0.5205, 0.4705, 0.4505]
    assert result["rounds"][0]["drift"] == 0
    assert all(row["drift"] > 0 and row["diversity"] > 0 for row in result["rounds"][1:])
    assert finished_steps(tmp_path) == [updates, 3 * updates]
    assert select_step(tmp_path, "best") == updates
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    noted = [row for row in rows if "online/round" in row]
    assert [row["online/watched/shapes"] for row in noted] == pytest.approx([0.5005, 0.5205, 0.4705, 0.4505])
    assert all({"online/diversity", "online/drift"} <= row.keys() for row in noted)
    assert (tmp_path / "rounds/00003/best_and_worst.png").exists()

    config.online.watched_stop = 0.15
    said, result = run(config)
    assert len(asked) == 10, "the scores of the earlier rounds are on the disk"
    assert f"stopped early after step {4 * updates}, before training on round 5" in said
    assert "warning" not in said, "it was told"
    assert result["best"] == {"round": 1, "step": updates}
    assert finished_steps(tmp_path) == [updates, 4 * updates]


@pytest.mark.slow
def test_small_files_are_not_bought_with_a_tenth_of_what_images_show(online, tmp_path, capsys):
    """The tiny model learns to make small files, and forgets what it was asked for."""
    learn(online("tiny_online:guarded"), tmp_path)
    said = "".join(capsys.readouterr())
    assert "stopped early after step" in said
    result = json.loads((tmp_path / "result.json").read_text())
    assert "shapes fell by" in result["stopped"]
    shapes = [row["watched"]["shapes"]["mean"] for row in result["rounds"]]
    kilobytes = [-row["scores"]["jpeg_compressibility"]["mean"] for row in result["rounds"]]
    assert 0.9 * shapes[0] < shapes[-1] < 0.95 * shapes[0]
    assert kilobytes[-1] < kilobytes[0]
    assert result["best"]["round"] < len(shapes) - 1
