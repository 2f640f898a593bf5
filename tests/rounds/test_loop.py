"""Whole runs on small models: each method learns, people are asked."""

import json
import math
import shutil

import pytest

from dpo_jax.rounds.folder import RoundFolder
from dpo_jax.rounds.loop import learn
from dpo_jax.rounds.result import FIELDS
from dpo_jax.sampling.image_folder import read_list
from dpo_jax.training.run import open_run

SLOW = [
    *(f"d3po:{method}" for method in ("", "ddpo,", "dpok,", "grpo,", "dgpo,", "spo,", "incompressibility,")),
    *("flow_grpo:cps,fast,", "flow_grpo:flux,guard,", "nft:"),
]
CONFIGS = [
    *("flow_grpo:", "nft:sd15,"),  # D3PO is learned by in test_people.py, branching is run in test_config.py
    *(pytest.param(config, marks=pytest.mark.slow) for config in SLOW),
]

FLOW_METHODS = ["", "ddpo,", "dpok,", "grpo,", "flow_grpo,", "spo,"]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_method(online, tmp_path, name):
    """The tasks differ in their judges and prompts; see test_config.py."""
    prompts = tmp_path / "fresh.txt"
    prompts.write_text("an owl\na koala\nan otter\n")
    fields = {"online.evaluate_every": 3, "online.evaluation_prompts": str(prompts)}
    workdir = tmp_path / "run"
    config = online(f"{name}tiny", **fields)
    check_run(config, workdir)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    evaluated = [(row["evaluation/round"], row["step"]) for row in rows if "evaluation/round" in row]
    assert evaluated == [(0, 0), (2, 4)]  # of two rounds: before the first, and after the last
    (judge,) = config.online.judges
    scores = [row[f"evaluation/{judge}"] for row in rows if "evaluation/round" in row]
    assert all(math.isfinite(score) for score in scores)
    assert scores[0] != scores[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        "",
        "ddpo,",
        "dpok,",
        "grpo,",
        "nft,",
        "dgpo,",
        "spo,",
        "compressibility,",
        "flow,nft,",
        *(f"{m}flow," for m in FLOW_METHODS),
    ],
)
def test_the_tiny_world_by_every_method(online, tmp_path, method):
    check_run(online(f"tiny_online:{method}tiny"), tmp_path)


@pytest.mark.slow
def test_images_are_drawn_and_learned_from_with_quantised_weights(online, tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_jax.weights.quantised.SMALL", 1024)
    check_run(online("nft:sd15,tiny", **{"memory.frozen": "int8"}), tmp_path)


def check_run(config, workdir):
    learn(config, workdir)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "train/loss" in row]
    updates = config.online.rounds * config.online.prompts_per_round // config.data.batch_size
    assert [row["step"] for row in trained] == list(range(1, updates + 1))
    assert all(math.isfinite(value) for row in trained for value in row.values())
    assert trained[0]["policy/change"] < 1e-5
    assert max(row["train/gradient_norm"] for row in trained) > 0
    assert trained[-1]["policy/change"] != trained[0]["policy/change"]
    run = open_run(workdir)
    assert run.step == updates
    result = json.loads((workdir / "result.json").read_text())
    a_round = result["a_round"]
    for number, row in enumerate(result["rounds"]):
        assert row["round"] == number
        assert row["unet_evaluations"] == number * a_round["unet_evaluations"]
        (scores,) = row["scores"].values()
        shown = config.online.prompts_per_round * (1 if config.online.branching else config.online.candidates)
        assert scores["count"] == shown
        assert math.isfinite(scores["mean"])
        assert len(read_list(workdir / "rounds" / f"{number:05d}" / "images")) == shown
    assert len(result["rounds"]) == config.online.rounds
    assert result["method"] == config.loss.name
    for name in FIELDS:
        assert result[name] == config.online[name]
    assert result["judges"] == list(config.online.judges)
    if config.sample.every:
        assert (workdir / "samples" / f"step_{updates:06d}.png").read_bytes()[:4] == b"\x89PNG"
    learn(config, workdir)  # there is nothing left to do
    assert open_run(workdir).step == updates


def test_figures_that_a_kill_has_kept_from_their_files_are_written_later(online, no_network, tmp_path, monkeypatch):
    config = online("d3po:compressibility,tiny", **{"sample.every": 0})
    write = RoundFolder.write_scores

    def killed(self, *arguments):
        write(self, *arguments)
        raise KeyboardInterrupt

    for number in range(config.online.rounds):
        with monkeypatch.context() as patch:
            patch.setattr(RoundFolder, "write_scores", killed)
            with pytest.raises(KeyboardInterrupt):
                learn(config, tmp_path)
        assert (tmp_path / f"rounds/{number:05d}/scores.json").exists()
    learn(config, tmp_path)

    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    noted = [(row["online/round"], row["step"]) for row in rows if "online/round" in row]
    assert noted == [(0, 0), (1, 2)]
    assert len(json.loads((tmp_path / "result.json").read_text())["rounds"]) == 2


@pytest.mark.slow
def test_rounds_begun_anew_are_judged_anew(online, tmp_path):
    """As after all checkpoints were damaged: what is left of the rounds is of weights that are gone."""
    config = online("d3po:compressibility,tiny", **{"sample.every": 0})
    learn(config, tmp_path)
    files = [tmp_path / f"rounds/{number:05d}/scores.json" for number in range(2)]
    said = [json.loads(file.read_text())["scores"] for file in files]
    shutil.rmtree(tmp_path / "checkpoints")
    for number, file in enumerate(files):
        wrong = [[[9.0] for _ in of_prompt] for of_prompt in said[number]]
        file.write_text(json.dumps(json.loads(file.read_text()) | {"scores": wrong}))
    trajectories = tmp_path / "rounds/00001/trajectories"
    trajectories.mkdir(exist_ok=True)
    (trajectories / "00000.npz").write_bytes(b"of other weights")

    learn(config, tmp_path)

    assert [json.loads(file.read_text())["scores"] for file in files] == said


@pytest.mark.slow
def test_a_task_for_people_ends_with_images_to_vote_on(online, tmp_path, capsys):
    config = online("d3po:hands,tiny")
    learn(config, tmp_path)
    assert "Let people vote, then continue with --stage=train" in "".join(capsys.readouterr())
    assert len(read_list(tmp_path / "rounds/00000/images")) == config.online.prompts_per_round * 3
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("rounds", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_judge_that_rates_all_alike_ends_the_run(online, tmp_path, monkeypatch, capsys, rounds):
    monkeypatch.setattr("dpo_jax.rewards.jpeg.kilobytes", lambda image_HWC: 9.0)
    config = online("d3po:compressibility,tiny", **{"sample.every": 0, "online.rounds": rounds})
    for _ in range(2):  # the second call finds what the first one noted
        first = "first round" if rounds == 1 else f"first {rounds} rounds"
        message = rf"all candidates of the {first} are equal.*Correct config\.online\.judges"
        with pytest.raises(ValueError, match=message):
            learn(config, tmp_path)
    said = "".join(capsys.readouterr())
    assert "prompts have equal candidates according to jpeg_compressibility" in said.replace("\n", " ")
    assert "this round teaches nothing" in said.replace("\n", " ")
