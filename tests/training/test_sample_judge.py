"""A judge scores the image grids of a run, which stops early and keeps its best checkpoint by these scores."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpo_jax.cli import replaced
from dpo_jax.errors import UserError
from dpo_jax.evaluation.plots import colours, curves
from dpo_jax.training import loop as loop_module
from dpo_jax.training.checkpoint import Checkpoints, finished_steps
from dpo_jax.training.config import default_config, resolve
from dpo_jax.training.loop import Loop
from dpo_jax.training.metrics import last_scores, read_metrics
from dpo_jax.training.sample_grids import SampleGrid, SampleGrids, open_sample_judge
from dpo_jax.training.select_step import select_step
from dpo_jax.training.trainer import train
from dpo_jax.training.watch import Watch

JUDGED = {"sample.judge": "shapes", "early_stop.metric": "judge", "early_stop.patience": 2, "checkpoint.best": "judge"}
SCORES = {0: 0.2, 1: 0.4, 2: 0.3, 3: 0.1}
STOPPED = "stopped early after step 3: the mean score of the samples by shapes was best at step 1 (0.4) and not better "


def row(value: float, whose: str = "reference") -> dict[str, float]:
    return {"samples/shapes/policy": value, f"samples/shapes/{whose}": 0.2}


def test_patience_counts_grids_and_not_validations() -> None:
    config = replaced(default_config(), JUDGED)
    samples = {400 * i: row(value) for i, value in enumerate((0.2, 0.5, 0.4, 0.5))}
    validations = {100 * i: {"validation/pair_accuracy": 0.9 - 0.01 * i} for i in range(13)}
    one = Watch(config, validations, print, samples)
    assert [bool(one.stop_reason(step)) for step in (400, 700, 800, 1100, 1200)] == [False] * 4 + [True]
    assert "not better in the 2 grids since. To continue, run the same command with a larger" in one.stop_reason(1200)
    assert one.best("judge", [0, 100, 800, 1200]) == 1200
    assert one.best("judge", [400, 1200]) == 400, "the earliest of equals"
    assert one.best("pair_accuracy", [100, 400]) == 100
    assert one.verdict({}).endswith("mean score of the samples by shapes: 0.5 (reference 0.2)")


def test_scores_of_another_judge_or_of_none_do_not_count() -> None:
    samples = {400 * i: row(value, "base") for i, value in enumerate((0.9, 0.5, 0.4, 0.5))}
    for judge in ("clipscore", "shapes"):
        one = Watch(replaced(default_config(), JUDGED | {"sample.judge": judge}), {}, print, samples)
        assert bool(one.stop_reason(1200)) == (judge == "shapes")
        assert one.verdict({}) == ("mean score of the samples by shapes: 0.5 (base 0.2)" if judge == "shapes" else "")


class Killed(Exception):
    """In place of SIGKILL."""


def with_scores(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Draw small grids with the scores of `SCORES`; return the steps that are drawn."""
    drawn: list[int] = []
    sample = Loop._sample

    def noting(loop: Loop, step: int, state: object) -> None:
        drawn.append(step)
        sample(loop, step, state)

    def draw(grids: SampleGrids, params: object) -> SampleGrid:
        return SampleGrid(Image.new("RGB", (8, 8)), 0, row(SCORES[drawn[-1]]) if grids.judge else {})

    monkeypatch.setattr(Loop, "_sample", noting)
    monkeypatch.setattr(SampleGrids, "draw", draw)
    return drawn


def small(tiny_config, **fields):
    every = {"sample.every": 1, "checkpoint.every": 5, "log_every": 5, "checkpoint.keep": 1}
    return tiny_config("sd15", steps=5, **every | JUDGED | fields)


def test_a_run_stops_by_its_scores_says_so_again_and_keeps_the_best(
    tiny_config, no_network, tmp_path, monkeypatch, capsys
) -> None:
    drawn = with_scores(monkeypatch)
    for _ in range(2):
        train(small(tiny_config), tmp_path)
        told = capsys.readouterr()
        assert STOPPED in told.out
        assert "In the end, mean score of the samples by shapes: 0.1 (reference 0.2)" in told.out
        assert finished_steps(tmp_path) == [1, 3]
        assert drawn == [0, 1, 2, 3]
    assert [r for r in read_metrics(tmp_path) if "train/loss" not in r] == [
        {"step": step} | row(SCORES[step]) for step in range(4)
    ]
    assert select_step(tmp_path, "best") == 1
    assert "step 1 has the best mean score of the samples by shapes of the checkpoints: 0.4" in capsys.readouterr().err
    assert last_scores(tmp_path, 2) == {"step": 2} | row(0.3)


@pytest.mark.parametrize("lost", ["the checkpoint", pytest.param("the score", marks=pytest.mark.slow)])
def test_a_run_that_is_killed_after_a_grid_decides_the_same(
    tiny_config, no_network, tmp_path, monkeypatch, capsys, lost
) -> None:
    """Either before the checkpoint of the stop, or between a grid and its scores."""
    drawn = with_scores(monkeypatch)
    save, write = Checkpoints.save, loop_module.save_png

    def save_but_not_3(checkpoints: Checkpoints, state, **position) -> None:
        if int(state.step) == 3:
            raise Killed
        save(checkpoints, state, **position)

    def write_and_die(path, image) -> None:
        write(path, image)
        if "000002" in str(path):
            raise Killed

    with monkeypatch.context() as patch:
        if lost == "the score":
            patch.setattr(loop_module, "save_png", write_and_die)
        else:
            patch.setattr(Checkpoints, "save", save_but_not_3)
        with pytest.raises(Killed):
            train(small(tiny_config, **{"checkpoint.every": 2}), tmp_path)
    assert drawn == ([0, 1, 2] if lost == "the score" else [0, 1, 2, 3])
    del drawn[:]

    train(small(tiny_config, **{"checkpoint.every": 2}), tmp_path)

    assert drawn == ([2, 3] if lost == "the score" else [3])
    assert STOPPED in capsys.readouterr().out
    assert finished_steps(tmp_path) == [1, 3]


def test_scores_alone_tell_the_best_step_of_a_run_without_held_out_data(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("dpo_jax.training.select_step.read_config", lambda workdir: {"sample.judge": "shapes"})
    monkeypatch.setattr("dpo_jax.training.select_step.finished_steps", lambda workdir: [1, 2, 3])
    rows = [{"step": step} | row(value) for step, value in ((1, 0.2), (2, 0.6), (3, float("nan")))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert select_step(tmp_path, "best") == 2
    held_out = [{"step": step, "validation/pair_accuracy": 0.5 + step / 10} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows + held_out))
    assert select_step(tmp_path, "best") == 3, "checkpoint.best does not name the judge"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sample.judge": ""}, r"early_stop.metric=judge needs a judge of the image grids; set sample.judge, for exam"),
        ({"sample.every": 0}, r"early_stop.metric=judge needs image grids; set sample.every above 0$"),
        ({"sample.judge": "shape"}, r"config.sample.judge=shape: there is no judge 'shape'; choose one of shapes, "),
        ({"sample.judge": "hpsv2"}, r"config.sample.judge=hpsv2: the judge hpsv2 needs HPS_v2_compressed.pt"),
    ],
)
def test_fields_that_cannot_work_are_refused(tiny_config, fields, message) -> None:
    with pytest.raises(UserError, match=message):
        resolve(small(tiny_config, **fields), device_count=1, process_count=1)


@pytest.mark.parametrize("method", ["sft", "kto"])
def test_runs_without_pairs_may_be_judged(tiny_config, method) -> None:
    resolve(small(tiny_config, **{"loss.name": method}), device_count=1, process_count=1)


def test_missing_weights_are_told_before_anything_is_loaded(tiny_config, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("dpo_jax.training.trainer.build", pytest.fail)
    spec = f"hpsv2={tmp_path / 'nothing.safetensors'}"
    with pytest.raises(UserError, match=r"config\.sample\.judge=hpsv2=.*nothing\.safetensors: "):
        train(small(tiny_config, **{"sample.judge": spec}), tmp_path / "run")


def test_without_grids_no_judge_is_opened(tiny_config) -> None:
    assert open_sample_judge(tiny_config("sd15", **{"sample.judge": "hpsv2=nowhere"})) is None


def test_a_report_plots_the_scores_beside_those_of_the_reference() -> None:
    rows = [{"step": step} | row(value) for step, value in SCORES.items()]
    (plot,) = curves({"run": rows}, colours(["run"]))
    assert plot.text == (
        "Training curves: mean score of the samples in training by shapes by step. run, policy: 0.1 at step 3; "
        "run, reference: 0.2 at step 3."
    )


@pytest.mark.slow
def test_the_exact_judge_scores_policy_and_reference(tiny_config, tmp_path: Path, capsys) -> None:
    prompts = ("a red circle at the top left", "a blue square at the bottom right")
    fields = {"sample.every": 1, "sample.judge": "shapes", "sample.prompts": prompts, "optimizer.warmup_steps": 0}
    train(tiny_config("sd15", steps=1, **fields), tmp_path)
    scores = {r["step"]: r for r in read_metrics(tmp_path) if "train/loss" not in r}
    assert scores.keys() == {0, 1}
    for one in scores.values():
        assert one.keys() == {"step", "samples/shapes/policy", "samples/shapes/reference"}
        assert np.isclose(one["samples/shapes/policy"] * 6, round(one["samples/shapes/policy"] * 6))
    assert scores[0]["samples/shapes/policy"] == scores[0]["samples/shapes/reference"]
    assert "mean score by shapes: " in capsys.readouterr().err
