"""Every method goes through training, a kill, plan, export and model card. Those that learn online are in rounds/."""

import math

import numpy as np
import pytest

from dpo_jax.methods import METHODS
from dpo_jax.planning.estimate import measure_work
from dpo_jax.training.checkpoint import read_config
from dpo_jax.training.export import export, exportable_run
from dpo_jax.training.run import open_run

from ..killed_run import train_killed_and_resumed

OFFLINE = [name for name, method in METHODS.items() if method.learns_from != "rollouts"]


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFLINE)
def test_it_trains_resumes_after_a_kill_plans_exports_and_has_a_card(tiny_config, tmp_path, name: str) -> None:
    fields = {"loss.name": name, "checkpoint.every": 1, "validation.every": 2, "optimizer.warmup_steps": 0}
    config = tiny_config("sd15", steps=2, **fields)
    workdir = tmp_path / "run"
    losses = train_killed_and_resumed(config, workdir)
    assert all(math.isfinite(loss) for loss in losses)

    run = open_run(workdir)
    assert run.step == 2
    assert any(np.any(np.asarray(run.params[name]) != np.asarray(run.base[name])) for name in run.params)
    saved = read_config(workdir)
    assert saved is not None
    assert saved["loss.name"] == name

    assert measure_work(config, "gpu").activation_bytes > 0
    tuned = export(exportable_run(workdir), tmp_path / "unet", format="unet", dtype=None, max_shard_bytes=10**10)
    card = (tuned / "README.md").read_text()
    assert METHODS[name].citation in card
    assert "for 2 steps" in card
