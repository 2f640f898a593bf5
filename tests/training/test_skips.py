"""Steps that are not finite, or whose gradient spikes, make no update; they are counted, told, and their batch kept."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax.errors import UserError
from dpo_jax.training import experiment, trainer
from dpo_jax.training.config import resolve
from dpo_jax.training.metrics import read_metrics
from dpo_jax.training.step import GRADIENT_NORM, TrainState, make_compare, make_train_step
from dpo_jax.training.trainer import train

from ..conftest import step_without_network
from ..small_denoiser import SCHEDULE, denoise, encode, frozen_like, make_batch, perturbed
from .test_step import DPO


def small_step(params, *, skip_spikes=0.0, accumulation=1):
    optimizer = optax.adamw(1e-3, weight_decay=0.1)
    compare = make_compare(encode, denoise, SCHEDULE, DPO, seed=3)
    step = make_train_step(compare, DPO, optimizer, accumulation=accumulation, ema_decay=0.5, skip_spikes=skip_spikes)
    running = {GRADIENT_NORM: (jnp.zeros(()), jnp.zeros(()))} if skip_spikes else {}
    return jax.jit(step), TrainState(jnp.int32(0), params, optimizer.init(params), params, running)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_batch_that_is_not_finite_is_no_update(params, accumulation):
    step, state = small_step(params, accumulation=accumulation)
    frozen, batch = frozen_like(perturbed(params)), make_batch()
    state, metrics = step(state, frozen, batch)
    assert metrics["train/skipped"] == 0
    bad = batch._replace(preference_BK=batch.preference_BK.at[2].set(jnp.nan))

    after, metrics = step(state, frozen, bad)

    assert metrics["train/skipped"] == 1
    assert not np.isfinite(metrics["train/loss"])
    assert after.step == 2
    jax.tree.map(np.testing.assert_array_equal, after[1:], state[1:])
    went_on, metrics = step(after, frozen, batch)
    assert metrics["train/skipped"] == 0
    assert not np.allclose(went_on.params["in"], state.params["in"], rtol=1e-9)
    _, metrics = step(state, frozen, bad._replace(weight_B=jnp.zeros(8)))
    assert metrics["train/skipped"] == 0, "a batch without weight is no fault"


def test_a_spike_is_no_update_and_no_part_of_the_mean(params):
    step, state = small_step(params, skip_spikes=20.0)
    frozen, batch = frozen_like(perturbed(params)), make_batch()
    large = batch._replace(preference_BK=batch.preference_BK * 1000)  # a gradient 1000 times as large
    _, metrics = step(state, frozen, large)
    assert metrics["train/skipped"] == 0, "nothing is known of the first steps"
    norms = []
    for _ in range(12):
        state, metrics = step(state, frozen, batch)
        norms.append(float(metrics["train/gradient_norm"]))
        assert metrics["train/skipped"] == 0
    total, weight = state.running[GRADIENT_NORM]
    shares = 0.99 ** np.arange(12)[::-1]
    assert total / weight == pytest.approx(np.average(norms, weights=shares), rel=1e-5)

    after, metrics = step(state, frozen, large)

    assert metrics["train/skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, after[1:], state[1:])


@pytest.fixture
def failing(monkeypatch):
    """`failing(3, 4)`: the steps of these numbers are not finite; the others need no network."""

    def fail_at(*steps: int) -> None:
        def step(state, frozen, batch):
            new, metrics = step_without_network(state, frozen, batch)
            bad = int(new.step) in steps
            if bad:
                new = state._replace(step=new.step)
                metrics = metrics | {"train/loss": jnp.float32(jnp.nan)}
            return new, metrics | {"train/skipped": jnp.float32(bad)}

        monkeypatch.setattr(experiment.Experiment, "train_step", lambda self: step)

    return fail_at


def seen_positions(monkeypatch) -> list[int]:
    """Return a list that receives the position of every example that is trained on."""
    seen: list[int] = []
    place = trainer.Loop.__init__

    def noting(loop, *arguments):
        place(loop, *arguments)
        on_devices, loop.place = loop.place, lambda batch: (seen.extend(batch.index_B.tolist()), on_devices(batch))[1]

    monkeypatch.setattr(trainer.Loop, "__init__", noting)
    return seen


def test_a_skipped_step_is_counted_and_told_and_the_data_goes_on(tiny_config, failing, tmp_path, monkeypatch, capfd):
    seen = seen_positions(monkeypatch)
    failing(1, 3)
    train(tiny_config("sd15", steps=6, log_every=3, **{"checkpoint.every": 3}), tmp_path)
    said = capfd.readouterr().err
    assert "warning: train/loss is nan at step 3, which is skipped; the batch of made pair" in said
    assert f"is kept in {tmp_path}/errors/step_000003.npz (to see which examples are not finite, add --replay" in said
    assert len((tmp_path / "errors" / "step_000003.txt").read_text().splitlines()) == 4
    rows = [row for row in read_metrics(tmp_path) if "train/skipped" in row]
    assert [(row["step"], row["train/skipped"]) for row in rows] == [(3, 2), (6, 0)]
    assert all(np.isfinite(row["train/loss"]) for row in rows)
    assert seen == list(range(24))


def test_too_many_in_a_row_end_the_run(tiny_config, failing, tmp_path):
    failing(2, 4, 5, 6)
    config = tiny_config("sd15", steps=9, **{"checkpoint.every": 3, "optimizer.max_skips": 2})
    with pytest.raises(UserError, match=r"train/loss is nan at step 6, after 2 skipped steps; last good .* step 3 in"):
        train(config, tmp_path)
    assert sorted(path.name for path in (tmp_path / "errors").glob("*.npz")) == [
        f"step_00000{step}.npz" for step in (2, 4, 5, 6)
    ]


def test_few_batches_are_kept(tiny_config, failing, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("dpo_jax.training.loop.MOST_KEPT", 1)
    failing(2, 4)
    train(tiny_config("sd15", steps=5), tmp_path)
    assert [path.name for path in (tmp_path / "errors").glob("*.npz")] == ["step_000002.npz"]
    assert f"is not kept: {tmp_path}/errors has those of 1 steps" in capfd.readouterr().err


def test_spikes_are_multiples_above_1(tiny_config):
    with pytest.raises(UserError, match=r"optimizer.skip_spikes=0.5 must be 0, or above 1"):
        resolve(tiny_config("sd15", **{"optimizer.skip_spikes": 0.5}), device_count=1, process_count=1)
