"""A run tells in words what goes wrong, keeps its best checkpoint, and stops early."""

from pathlib import Path

import numpy as np
import pytest

from dpo_jax.cli import replaced
from dpo_jax.errors import UserError
from dpo_jax.training.checkpoint import Checkpoints, finished_steps
from dpo_jax.training.config import default_config, resolve
from dpo_jax.training.defaults import with_fields
from dpo_jax.training.loop import Loop
from dpo_jax.training.metrics import MetricWriter, read_metrics
from dpo_jax.training.select_step import select_step
from dpo_jax.training.trainer import train
from dpo_jax.training.watch import REPEAT, Watch, count_blank, is_blank

from .test_faults import state_at


def watch(validations=None, **fields) -> tuple[Watch, list[str]]:
    said: list[str] = []
    config = replaced(default_config(), {"optimizer.learning_rate": 3e-2} | fields)
    return Watch(config, validations if validations is not None else {}, said.append), said


def test_a_rise_of_the_winners_error_is_told_once_and_again_after_many_steps() -> None:
    one, said = watch()
    for step in (10, 20, 30, 20 + REPEAT, 30 + REPEAT):
        one.trained(step, {"error/winner_rise": 0.04 if step == 10 else 0.12})
    assert [line.split(":")[1] for line in said] == [" step 20", f" step {20 + REPEAT}"]
    assert said[0] == (
        "warning: step 20: the winner's error is 12.0% above the reference's on training data, so the model gets "
        "worse at the images that it should prefer. In a new --workdir, lower optimizer.learning_rate (now 0.03) or "
        "raise loss.beta (now 5000) or raise loss.safeguard_margin (now 0.6)"
    )


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({"loss.safeguard": "none"}, "loss.beta (now 5000) or set loss.safeguard=pair"),
        ({"loss.name": "sft"}, "In a new --workdir, lower optimizer.learning_rate (now 1e-08)"),
    ],
)
def test_the_remedy_names_fields_that_the_method_has(fields, remedy) -> None:
    said: list[str] = []
    Watch(with_fields(default_config(), fields), {}, said.append).trained(10, {"error/winner_rise": 1.0})
    assert said[0].endswith(remedy)


@pytest.mark.parametrize(
    ("fields", "rise", "is_told"),
    [
        ({}, 0.06, True),
        ({}, 0.05, False),
        ({}, -0.5, False),
        ({"monitor.winner_rise": 0.2}, 0.1, False),
        ({"monitor.winner_rise": 0.0}, 1e3, False),
    ],
)
def test_the_bound_is_a_field_and_0_never_warns(fields, rise, is_told) -> None:
    one, said = watch(**fields)
    one.trained(10, {"error/winner_rise": rise})
    assert bool(said) == is_told


def test_a_collapse_is_told_as_a_multiple_also_without_a_reference() -> None:
    validations = {0: {"validation/error_winner": 0.18}, 50: {"validation/error_winner": 346.0}}
    one, said = watch(validations)
    validations[50] |= one.since_start(validations[50])
    one.validated(50)
    assert "the winner's error is 1.92e+03 times its value before training on held-out data" in said[0]
    assert one.verdict({}).startswith("the winner's error is 1.92e+03 times its value before training. The model denoi")
    assert "lower optimizer.learning_rate" in one.verdict({})


def accuracies(*values: float, pairs: float = 100.0) -> dict[int, dict[str, float]]:
    return {
        200 * i: {"validation/pair_accuracy": value, "validation/pairs": pairs, "validation/error_winner": 1 + value}
        for i, value in enumerate(values)
    }


def test_accuracy_of_chance_is_told_after_many_validations() -> None:
    fields = {"optimizer.warmup_steps": 0}
    for values, step, is_told in (
        ([0.5, 0.51, 0.49, 0.52, 0.5, 0.55], 1000, True),
        ([0.5, 0.51, 0.49, 0.52, 0.5, 0.55], 800, False),
        ([0.5, 0.51, 0.62, 0.52, 0.5, 0.55], 1000, False),
    ):
        one, said = watch(accuracies(*values), **fields)
        one.validated(step)
        assert bool(said) == is_told
    one, said = watch(accuracies(0.5, 0.55, 0.55, 0.55, 0.55, 0.55, pairs=1000), **fields)
    one.validated(1000)
    assert not said, "of 1000 pairs, 0.55 is no chance"
    one, said = watch(accuracies(*[0.5] * 6), **fields, **{"moving_reference.every": 200})
    one.validated(1000)
    assert not said, "a reference that follows the policy is as good"


def test_the_accuracy_of_lists_varies_less_by_chance() -> None:
    rows = {step: {"validation/pair_accuracy": 0.57, "validation/prompts": 100.0} for step in range(200, 1200, 200)}
    for number, is_told in ((2, True), (4, False)):
        fields = {"optimizer.warmup_steps": 0, "loss.name": "plackett_luce", "data.candidates": number}
        one, said = watch(rows, **fields)
        one.validated(1000)
        assert bool(said) == is_told
        if is_told:
            assert "accuracy on 100 held-out prompts is still 0.57" in said[0]
            assert "Look at some prompts" in said[0]
        assert one.verdict({}) == "held-out accuracy 0.57 (100 prompts)"


def test_the_verdict_is_of_held_out_pairs_or_else_of_training() -> None:
    row = {"validation/error_winner_rise": -0.004, "validation/pair_accuracy": 0.62, "validation/pairs": 50.0}
    assert watch({200: row})[0].verdict({"error/winner_rise": 0.3}) == (
        "the winner's error is 0.4% below the reference's; held-out accuracy 0.62 (50 pairs)"
    )
    assert watch()[0].verdict({"error/winner_rise": 0.02}) == "the winner's error is 2.0% above the reference's"
    assert watch()[0].verdict({"train/loss": 1.0}) == ""


def test_blank_and_saturated_images() -> None:
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (8, 8, 3))
    red = np.tile([200, 10, 10], (8, 8, 1))
    clipped = np.where(photo > 128, 255, 0)
    assert is_blank(np.stack([photo, red, clipped]).astype(np.uint8)).tolist() == [False, True, True]
    compared = rng.integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    assert count_blank(np.stack([photo, red, clipped]).astype(np.uint8), compared) == 2
    assert count_blank(np.stack([photo] * 3).astype(np.uint8), compared) == 3, "all prompts have the same image"
    assert count_blank(np.stack([photo] * 3).astype(np.uint8), np.stack([red] * 3).astype(np.uint8)) == 0
    one, said = watch()
    one.sampled(200, 0, 4, "grid.png")
    one.sampled(400, 3, 4, "grid.png")
    assert len(said) == 1
    assert "step 400: 3 of 4 samples are of one colour, saturated or all alike" in said[0]


def test_a_run_stops_when_patience_is_over() -> None:
    fields = {"early_stop.metric": "pair_accuracy", "early_stop.patience": 2}
    one, _ = watch(accuracies(0.5, 0.6, 0.7, 0.7, 0.65, 0.6), **fields)
    assert [bool(one.stop_reason(200 * i)) for i in range(6)] == [False, False, False, False, True, True]
    assert "best at step 400 (0.7) and not better in the 2 validations since" in one.stop_reason(800)
    of_error, _ = watch(accuracies(0.5, 0.6, 0.7), **fields | {"early_stop.metric": "winner_error"})
    assert "winner_error on held-out data was best before training (1.5)" in of_error.stop_reason(400)
    assert not watch(accuracies(0.5, 0.4, 0.4, 0.4))[0].stop_reason(600), "it is off by default"
    lost, _ = watch(accuracies(0.5, 0.6, float("nan"), float("nan")), **fields)
    assert lost.stop_reason(600), "what is not finite is not better"


def test_the_best_checkpoint_stays_beside_the_newest(tmp_path: Path) -> None:
    manager = Checkpoints(tmp_path, keep=1)
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 5), (6, 5)):
        manager.save(state_at(step), {"position": step})
        manager.best.step = best
    manager.close()
    assert finished_steps(tmp_path) == [5, 6]


def with_accuracies(monkeypatch, by_step: dict[int, float]) -> None:
    def validate(loop: Loop, step: int, state: object) -> None:
        loop.writer.scalars(step, {"validation/pair_accuracy": by_step[step], "validation/pairs": 4.0})

    monkeypatch.setattr(Loop, "_validate", validate)


def test_a_run_stops_early_says_so_again_and_continues_where_it_stopped(
    tiny_config, no_network, tmp_path, monkeypatch, capsys
) -> None:
    with_accuracies(monkeypatch, {0: 0.5, 1: 0.8, 2: 0.6, 3: 0.7, 4: 0.6, 5: 0.6})
    fields = {"validation.every": 1, "checkpoint.every": 5, "log_every": 5, "checkpoint.keep": 1}
    stops = {"early_stop.metric": "pair_accuracy", "early_stop.patience": 2, "checkpoint.best": "pair_accuracy"}
    train(tiny_config("sd15", steps=5, **fields), tmp_path / "whole")
    config = tiny_config("sd15", steps=5, **fields | stops)
    for _ in range(2):
        capsys.readouterr()
        train(config, tmp_path / "run")
        said = capsys.readouterr().out
        assert "stopped early after step 3: pair_accuracy on held-out data was best at step 1 (0.8)" in said
        assert "In the end, held-out accuracy 0.7 (4 pairs)" in said
        assert finished_steps(tmp_path / "run") == [1, 3]
    assert select_step(tmp_path / "run", "best") == 1
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "train/loss" in row] == [3]
    train(replaced(config, {"early_stop.patience": 9}), tmp_path / "run")
    assert "all 5 steps are done: held-out accuracy 0.6 (4 pairs)" in capsys.readouterr().out
    assert finished_steps(tmp_path / "run") == [1, 5]
    last = [row["train/loss"] for row in read_metrics(tmp_path / "whole") if "train/loss" in row]
    parts = [row["train/loss"] for row in read_metrics(tmp_path / "run") if "train/loss" in row]
    assert (3 * parts[0] + 2 * parts[1]) / 5 == pytest.approx(last[0])


def test_best_is_by_the_figure_of_the_config(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("dpo_jax.training.select_step.read_config", lambda workdir: {"checkpoint.best": "winner_error"})
    manager = Checkpoints(tmp_path, keep=0)
    for step in (1, 2):
        manager.save(state_at(step), {"position": step})
    manager.close()
    writer = MetricWriter(tmp_path, 0)
    writer.scalars(1, {"validation/pair_accuracy": 0.9, "validation/error_winner": 0.3})
    writer.scalars(2, {"validation/pair_accuracy": 0.6, "validation/error_winner": 0.2})
    assert select_step(tmp_path, "best") == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"early_stop.metric": "pair_accuracy", "validation.every": 0}, "needs held-out data; set validation.every"),
        ({"checkpoint.best": "pair_accuracy", "loss.name": "sft"}, "compares no pairs; set checkpoint.best=winner_err"),
        ({"early_stop.metric": "accuracy"}, "must be one of '', 'pair_accuracy', 'winner_error'"),
    ],
)
def test_fields_that_cannot_work_are_refused(tiny_config, fields, message) -> None:
    with pytest.raises(UserError, match=message):
        resolve(tiny_config("sd15", **{"validation.every": 2} | fields), device_count=1, process_count=1)
