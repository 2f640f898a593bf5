"""Runs whose steps need no network, for tests of what surrounds the steps."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dpo_jax.batch import PreferenceBatch
from dpo_jax.training.experiment import Experiment
from dpo_jax.training.step import TrainState


def step_without_network(state: TrainState, frozen: Any, batch: PreferenceBatch) -> tuple[TrainState, dict[str, Any]]:
    """Add to one weight a number that follows from all of the batch."""
    seen = jnp.float32(sum(float(jnp.mean(x.astype(jnp.float32))) for x in jax.tree.leaves(batch)))
    name = min(state.params)
    metrics = dict.fromkeys(("train/loss", "train/gradient_norm", "train/update_norm"), seen)
    return state._replace(step=state.step + 1, params=state.params | {name: state.params[name] + seen}), metrics


@pytest.fixture(scope="module")
def one_step(tmp_path_factory, tiny_config):
    """The work directory of a run of one step, without a network; tests copy it."""
    from dpo_jax.training.trainer import train

    workdir = tmp_path_factory.mktemp("one_step")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experiment, "train_step", lambda experiment: step_without_network)
        train(tiny_config("sd15", steps=1), workdir)
    return workdir


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are those of `step_without_network`, which need no compilation."""
    monkeypatch.setattr(Experiment, "train_step", lambda experiment: step_without_network)
