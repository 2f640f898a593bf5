"""A run that is killed after a step that no checkpoint has, and resumed."""

import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from dpo_jax.training.checkpoint import latest_step
from dpo_jax.training.loop import Loop
from dpo_jax.training.trainer import train


class Killed(BaseException):
    pass


def train_killed_and_resumed(config: ConfigDict, workdir: Path) -> list[float]:
    """Return the losses of two steps; the second is made, lost, and made again with the same loss."""
    log = Loop._log

    def log_and_die(loop, step, *rest):
        log(loop, step, *rest)
        if step == 2:
            loop.checkpoints.close()
            raise Killed

    def losses() -> list[float]:
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        return [row["train/loss"] for row in rows if "train/loss" in row]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_log", log_and_die)
        with pytest.raises(Killed):
            train(config, workdir)
    before = losses()
    assert len(before) == 2
    assert latest_step(workdir) == 1
    train(config, workdir)
    assert losses() == before
    return before
