"""Validation and grids that were due when a run was killed are made on resume, also those of step 0."""

from pathlib import Path

import pytest
from PIL import Image

from dpo_jax.sampling.grid import save_png
from dpo_jax.training import trainer
from dpo_jax.training.checkpoint import latest_step
from dpo_jax.training.loop import Loop
from dpo_jax.training.metrics import read_metrics
from dpo_jax.training.preemption import Preempted
from dpo_jax.training.trainer import train

FIELDS = {"checkpoint.every": 1, "validation.every": 1, "validation.max_pairs": 2, "sample.every": 1}


class Killed(BaseException):
    pass


def left(workdir: Path) -> dict[str, object]:
    """Return all figures of held-out pairs and all grids."""
    rows = [row for row in read_metrics(workdir) if "validation/pair_accuracy" in row]
    return {path.name: path.read_bytes() for path in (workdir / "samples").glob("*")} | {"rows": rows}


def kill_at(monkeypatch: pytest.MonkeyPatch, doing: str, step: int) -> None:
    done = getattr(Loop, doing)

    def act(loop: Loop, now: int, params: object) -> None:
        if now == step:
            monkeypatch.setattr(Loop, doing, done)
            raise Killed
        done(loop, now, params)

    monkeypatch.setattr(Loop, doing, act)


def test_a_run_that_was_killed_does_on_resume_what_was_due(
    tiny_config, no_network, tmp_path, monkeypatch, capsys
) -> None:
    def validate(loop: Loop, step: int, params: object) -> None:
        loop.writer.scalars(step, {"validation/pair_accuracy": step / 10})

    def sample(loop: Loop, step: int, params: object) -> None:
        save_png(loop._grid_file(step), Image.new("RGB", (4, 4)))

    monkeypatch.setattr(Loop, "_validate", validate)
    monkeypatch.setattr(Loop, "_sample", sample)
    config = tiny_config("sd15", steps=2, **FIELDS)
    for doing, step in (("_validate", 0), ("_sample", 0), ("_validate", 1), ("_sample", 2)):
        kill_at(monkeypatch, doing, step)
        with pytest.raises(Killed):
            train(config, tmp_path)
        assert latest_step(tmp_path) == (step or None)
    assert not (tmp_path / "samples" / "step_000002.png").exists()
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Notice, "received", lambda notice: True)
        with pytest.raises(Preempted, match="preempted after step 2; run the same command"):
            train(config, tmp_path)
    train(config, tmp_path)
    assert left(tmp_path)["rows"] == [{"step": step, "validation/pair_accuracy": step / 10} for step in (0, 1, 2)]
    assert left(tmp_path).keys() == {"step_000000.png", "step_000001.png", "step_000002.png", "rows"}
    for doing in ("_validate", "_sample"):  # nothing is due any more
        kill_at(monkeypatch, doing, 2)
    train(config, tmp_path)
    assert "all 2 steps are done" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("doing", ["_validate", "_sample"])
def test_figures_and_grids_are_those_of_a_run_that_nobody_killed(tiny_config, tmp_path, monkeypatch, doing) -> None:
    """The run is killed at each step in turn, and again while it catches up."""
    config = tiny_config("sd15", steps=2, **FIELDS)
    train(config, tmp_path / "whole")
    for step in (0, 0, 1, 1, 2, 2):
        kill_at(monkeypatch, doing, step)
        with pytest.raises(Killed):
            train(config, tmp_path / "killed")
        assert latest_step(tmp_path / "killed") == (step or None)
    train(config, tmp_path / "killed")
    assert left(tmp_path / "killed") == left(tmp_path / "whole")
    assert len(left(tmp_path / "killed")["rows"]) == 3
