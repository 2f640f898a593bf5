"""People vote on a round through the page, and the model learns from what they said."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dpo_jax.data.images import read_image
from dpo_jax.rounds.loop import learn
from dpo_jax.rounds.rollout import Rollout
from dpo_jax.sampling.image_folder import read_list
from dpo_jax.tiny import judge
from dpo_jax.training.loop import Loop
from dpo_jax.training.model import load_encoders, load_tokenizers_of
from dpo_jax.training.run import open_run
from dpo_jax.training.step import Frozen

P, K = 4, 3
FIELDS = {"online.judges": (), "lora.rank": 4, "optimizer.learning_rate": 0.05}

Taste = Callable[[np.ndarray, str], float]
"""(image, prompt) -> points"""


def exact(image_HWC: np.ndarray, prompt: str) -> float:
    """1 to 4 points by the exact judge of the tiny world."""
    return 1 + round(3 * float(judge.score(image_HWC[None], [prompt])[0]))


def bright(image_HWC: np.ndarray, prompt: str) -> float:
    """1 to 5 points to images that are not like one another."""
    return 1 + int(image_HWC.astype(int).sum()) % 5


def vote(url: str, name: str, taste: Taste) -> int:
    """All that the page asks this person, answered by the images that it shows; how many tasks that was."""
    with httpx2.Client(base_url=url, timeout=30) as browser:
        browser.post("/api/start", json={"name": name}).raise_for_status()
        state, answered = browser.get("/api/state").json(), 0
        while state["now"] is not None:
            now = state["now"]
            shown = []
            for id in now["images"]:
                with Image.open(browser.get(f"/image/{id}")) as image:
                    shown.append(np.asarray(image))
            answer = [taste(image_HWC, now["prompt"]) for image_HWC in shown]
            body = {"task": now["task"], "question": now["question"], "answer": answer}
            reply = browser.post("/api/vote", json=body)
            reply.raise_for_status()
            state, answered = reply.json(), answered + 1
        return answered


def points(images: Path, taste: Taste) -> np.ndarray:
    """[prompt][candidate], by the files themselves."""
    entries = read_list(images)
    assert [entry.seed for entry in entries] == list(range(K)) * P
    return np.array([taste(read_image(images / entry.image), entry.prompt) for entry in entries], float).reshape(P, K)


def untied(scores_PK: np.ndarray) -> int:
    return sum(len({(i, j) for i in range(K) for j in range(i) if row[i] != row[j]}) for row in scores_PK)


def metrics_of(workdir: Path) -> list[dict]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "train/loss" in row]


@pytest.fixture
def run(command) -> Callable[..., str]:
    """The output of a command."""

    def run(name: str, *arguments: object) -> str:
        done = command(name, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    return run


@pytest.mark.parametrize("update_by", ["prompt", pytest.param("pair", marks=pytest.mark.slow)])
def test_votes_on_the_page_are_learned_from(run, tmp_path, serve, update_by):
    """By the commands that the first one prints."""
    workdir = tmp_path / "run"
    flags = [f"--config.{name}={value}" for name, value in FIELDS.items()] + [f"--config.online.update_by={update_by}"]
    online = "online", "--config=configs/tiny_online.py:tiny", f"--workdir={workdir}", *flags

    said = run(*online, "--stage=sample")
    images, votes = workdir / "rounds/00000/images", workdir / "rounds/00000/votes.sqlite"
    feedback = workdir / "rounds/00000/feedback.json"
    assert f"python -m dpo_jax.vote --images={images} --mode=points --output={votes}\n" in said
    assert f"python -m dpo_jax.vote --output={votes} --export={feedback}\n" in said
    assert is_untrained(workdir)

    server = serve(f"--images={images}", "--mode=points", f"--output={votes}")
    for name, taste in (("ann", exact), ("bob", bright)):
        assert vote(server.url, name, taste) == P
    server.stop()
    run("vote", f"--output={votes}", f"--export={feedback}")
    means_PK = (points(images, exact) + points(images, bright)) / 2
    np.testing.assert_array_equal(json.loads(feedback.read_text()), means_PK)
    assert untied(means_PK) > 3, "or there is nothing to learn"

    run(*online, "--stage=train")
    scores = json.loads((workdir / "rounds/00000/scores.json").read_text())
    assert scores["judges"] == ["people"]
    np.testing.assert_array_equal(np.array(scores["scores"])[..., 0], means_PK)
    trained, updates = metrics_of(workdir), 2 if update_by == "prompt" else 6
    assert [row["step"] for row in trained] == list(range(1, updates + 1))
    assert all(math.isfinite(row["train/loss"]) for row in trained)
    # Updates by pairs begin where those before have led, so ratios may be clamped by then and have no gradient.
    assert all(row["train/gradient_norm"] > 0 for row in trained[:2])
    if update_by == "prompt":  # 2 prompts in each of 2 updates
        assert sum(row["pair/count"] for row in trained) == pytest.approx(untied(means_PK) / 2)
        assert trained[0]["train/loss"] == pytest.approx(trained[0]["pair/count"] * math.log(2), rel=1e-3)
    learned = open_run(workdir)
    assert learned.step == updates

    assert "round 2 is sampled" in run(*online, "--stage=sample")
    assert_sampled_by(learned, workdir)


def is_untrained(workdir: Path) -> bool:
    return not list((workdir / "checkpoints").iterdir()) and not metrics_of(workdir)


def assert_sampled_by(learned, workdir: Path) -> None:
    """The images of round 1 are those of what round 0 has taught, and not those of the model it began with."""
    entries = read_list(workdir / "rounds/00001/images")
    captions = [entry.prompt for entry in entries[::K]]
    on_disk = np.stack([read_image(workdir / "rounds/00001/images" / entry.image) for entry in entries]).astype(int)
    encoders = load_encoders(learned.config, learned.pipeline, learned.placement)
    rollout = Rollout(learned.config, learned.pipeline, learned.placement, load_tokenizers_of(learned.pipeline))
    for params, is_it in ((learned.params, True), (jax.tree.map(jnp.zeros_like, learned.params), False)):
        drawn = rollout(params, Frozen(base=learned.base, encoders=encoders), captions, [P + p for p in range(P)])()
        difference = np.abs(drawn.images_BKHWC.reshape(on_disk.shape) - on_disk)
        assert (difference.max() <= 1) == is_it


@pytest.fixture
def sampled(tmp_path, online):
    """(config, its work directory): a round that is sampled on a random model; one update each."""
    fields = {"online.judges": (), "online.candidates": K, "sample.every": 0, "optimizer.learning_rate": 1e-2}
    config = online("d3po:tiny", **fields, **{"data.batch_size": 2})
    learn(config, tmp_path / "run", "sample")
    return config, tmp_path / "run"


def write(path: Path, rows) -> str:
    path.write_text(json.dumps(rows))
    return str(path)


@pytest.mark.slow
def test_files_of_feedback_are_averaged_and_the_opposite_teaches_the_opposite(sampled, tmp_path):
    """Adam's first step is the sign of the gradient; of a LoRA's second factors, which begin as zeros."""
    config, workdir = sampled
    files = {
        "good": [
            write(tmp_path / "a.json", [[4, 1, None], [2, None, 1]]),
            write(tmp_path / "b.json", [[5, 1, None], [2, 2, 3]]),
        ],
        "bad": [write(tmp_path / "c.json", [[1, 4.5, None], [2, 2, 2]])],
    }
    learned = {}
    for name, feedback in files.items():
        shutil.copytree(workdir, tmp_path / name)
        learn(config, tmp_path / name, "train", feedback)
        params = open_run(tmp_path / name).params
        learned[name] = np.concatenate([np.ravel(value) for key, value in params.items() if ".lora_B." in key])

    scores = json.loads((tmp_path / "good" / "rounds/00000/scores.json").read_text())["scores"]
    assert scores == [[[4.5], [1.0], [None]], [[2.0], [2.0], [2.0]]]
    assert (np.abs(learned["good"]) > 5e-3).mean() > 0.5
    np.testing.assert_allclose(learned["bad"], -learned["good"], rtol=1e-4, atol=5e-5)
    (row,) = metrics_of(tmp_path / "good")
    assert row["pair/count"] == 1  # of the one prompt that has a pair


def test_feedback_that_is_missing_or_of_another_shape_is_told(sampled, tmp_path):
    config, workdir = sampled
    before = sorted(workdir.rglob("*"))
    for feedback, error, message in (
        ([], ValueError, r"round 1 has no scores"),
        ([str(tmp_path / "gone.json")], FileNotFoundError, r"the feedback file .*gone\.json does not exist"),
        (
            [write(tmp_path / "a.json", [[1, 2, 3]])],
            ValueError,
            r"for 1 prompts with 3 candidates .* 2 prompts with 3",
        ),
    ):
        with pytest.raises(error, match=message):
            learn(config, workdir, "train", feedback)
    assert [path for path in sorted(workdir.rglob("*")) if path not in before and "tfevents" not in path.name] == []


@pytest.fixture
def stopping(monkeypatch):
    """`stopping(steps)`: the next runs end after that many steps of theirs, as if they were killed."""
    original = Loop.run

    def stop(steps: int | None) -> None:
        def run(self, state, updates, end):
            return original(self, state, updates, end if steps is None else int(state.step) + steps)

        monkeypatch.setattr(Loop, "run", run)

    return stop


def test_other_feedback_counts_until_the_round_is_trained_on(online, tmp_path, stopping):
    fields = {"online.judges": (), "online.candidates": 2, "sample.every": 0, "data.batch_size": 1}
    config, workdir = online("d3po:tiny", **fields), tmp_path / "run"
    first, second = (write(tmp_path / f"{a}.json", [[a, 2], [3, 4]]) for a in (1, 5))
    learn(config, workdir, "sample")

    def scores():
        return np.array(json.loads((workdir / "rounds/00000/scores.json").read_text())["scores"])[..., 0].tolist()

    stopping(0)
    learn(config, workdir, "train", [first])
    assert scores() == [[1, 2], [3, 4]]
    stopping(1)
    learn(config, workdir, "train", [second])
    assert scores() == [[5, 2], [3, 4]]
    stopping(None)
    with pytest.raises(
        ValueError, match=r"--feedback differs from .*scores\.json, with which round 1 is already trained up to step 1"
    ):
        learn(config, workdir, "train", [first])
    assert open_run(workdir).step == 1
    learn(config, workdir, "train", [second])  # as it was begun
    assert open_run(workdir).step == 2
    result = json.loads((workdir / "result.json").read_text())
    assert result["rounds"][0]["scores"]["people"]["mean"] == 3.5
