"""The policy that draws the images of a round lags behind the trained one, by the method's schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax.training.step import Frozen, TrainState, make_compare, make_train_step

from ..small_denoiser import SCHEDULE, denoise, encode, frozen_like, make_batch, perturbed
from .test_step import DPO

EVERY = 2


def decay(updates: jax.Array) -> jax.Array:
    return jnp.where(updates == EVERY, 0.0, 0.25)


def test_it_moves_when_a_round_ends_and_the_step_reads_it(params) -> None:
    seen = []
    compare = make_compare(encode, denoise, SCHEDULE, DPO, seed=3)

    def watched(params, frozen: Frozen, batch, step, training=False):
        seen.append(frozen.whole_old().keys())
        return compare(params, frozen, batch, step, training)

    optimizer = optax.adamw(1e-2)
    step = jax.jit(make_train_step(watched, DPO, optimizer, old_every=EVERY, old_decay=decay))
    state = TrainState(jnp.int32(0), params, optimizer.init(params), {}, old=perturbed(params))
    frozen, batch = frozen_like(perturbed(params)), make_batch()
    states = [state]
    for _ in range(2 * EVERY):
        states.append(step(states[-1], frozen, batch)[0])

    assert seen == [params.keys()]
    jax.tree.map(np.testing.assert_array_equal, states[1].old, state.old)
    jax.tree.map(np.testing.assert_array_equal, states[2].old, states[2].params)  # of which nothing remains
    jax.tree.map(np.testing.assert_array_equal, states[3].old, states[2].old)
    for name, policy in states[4].params.items():
        assert np.any(policy != states[2].params[name])
        np.testing.assert_allclose(states[4].old[name], 0.25 * states[2].old[name] + 0.75 * policy, rtol=1e-12)
    assert states[4].drawing is states[4].old
    assert states[4]._replace(old=None).drawing is states[4].params


@pytest.mark.parametrize("weight", [0.0, np.nan])
def test_a_step_without_an_update_still_ends_its_round(params, weight) -> None:
    optimizer = optax.adamw(1e-2)
    compare = make_compare(encode, denoise, SCHEDULE, DPO, seed=3)
    step = jax.jit(make_train_step(compare, DPO, optimizer, old_every=1, old_decay=lambda updates: jnp.float32(0)))
    batch = make_batch()._replace(weight_B=jnp.full(8, weight, jnp.float32))
    state = TrainState(jnp.int32(0), params, optimizer.init(params), {}, old=perturbed(params))
    after, _ = step(state, frozen_like(perturbed(params)), batch)
    jax.tree.map(np.testing.assert_array_equal, after.params, params)
    jax.tree.map(np.testing.assert_array_equal, after.old, params)
