"""Calls with arrays of the wrong shape or dtype raise, which shows that the annotations are checked in all tests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from dpo_jax.batch import Conditioning, LossInputs, PreferenceBatch, Raw
from dpo_jax.diffusion import samplers, schedule, steps, trajectories
from dpo_jax.methods.dpo import dpo
from dpo_jax.methods.sft import sft
from dpo_jax.objectives import advantages, denoising, transitions

from .array_checks import agrees

SCHEDULE = schedule.make_schedule(
    {"num_train_timesteps": 10, "beta_schedule": "linear", "beta_start": 0.01, "beta_end": 0.02}
)
TABLE = samplers.make_table("ddim", SCHEDULE, 5, eta=1.0)
X_NHWC = jnp.zeros((3, 2, 2, 4))
INPUTS = LossInputs(jnp.zeros((4, 2)), preference_BK=jnp.ones((4, 2)), error_BK=jnp.zeros((4, 2)))


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (advantages.group_advantages, [np.zeros(3)]),
        (denoising.keys_for, [jax.random.key(0), jnp.zeros(3)]),
        (dpo, [INPUTS._replace(preference_BK=jnp.ones((3, 2)))]),
        (dpo, [INPUTS._replace(error_BK=jnp.zeros((4, 3)))]),
        (transitions.beyond_ratio_to_sampled, [LossInputs(jnp.zeros(4))]),
        (schedule.add_noise, [SCHEDULE, X_NHWC, X_NHWC[:2], jnp.zeros(3, int)]),
        (schedule.add_noise, [SCHEDULE._replace(noise_T=np.ones(9)), X_NHWC, X_NHWC, jnp.zeros(3, int)]),
        (steps.starting_latents, [TABLE, X_NHWC[0]]),
        (steps.step_noise, [jax.random.split(jax.random.key(0), 2), 0, X_NHWC]),
        (trajectories.log_prob, [TABLE.steps, X_NHWC, X_NHWC[:2]]),
        (trajectories.transitions_at, [trajectories.Trajectory(X_NHWC, X_NHWC), jnp.zeros(1, int)]),
    ],
)
def test_wrong_arrays_raise(function, arguments):
    options = {dpo: {"beta": 1.0}, transitions.beyond_ratio_to_sampled: {"clip": 0.1}}.get(function, {})
    with pytest.raises(TypeCheckError, match="Type-check error whilst checking the parameters"):
        function(*arguments, **options)


def test_wrong_arrays_raise_inside_jit_and_vmap():
    def loss(error_BK):
        return sft(INPUTS._replace(error_BK=error_BK))

    assert jax.jit(jax.vmap(loss))(jnp.zeros((3, 4, 2))).shape == (3, 4)
    with pytest.raises(TypeCheckError, match="error_BK=f32"):
        jax.jit(jax.vmap(loss))(jnp.zeros((3, 5, 2)))


def batch_of(B=4, K=2):
    return PreferenceBatch(
        inputs=Raw(np.zeros((B, K, 8, 8, 3), np.uint8), np.zeros((B, K), bool), np.zeros((B, 1, 7), np.int32)),
        size_cond_BK6=np.zeros((B, K, 6), np.float32),
        preference_BK=np.zeros((B, K), np.float32),
        valid_BK=np.ones((B, K), bool),
        weight_B=np.ones(B, np.float32),
        index_B=np.arange(B, dtype=np.int32),
    )


def test_fields_of_a_batch_are_checked():
    batch = batch_of()
    assert agrees(batch)
    assert agrees(batch._replace(preference_BK=np.zeros((4, 2, 3), np.float32))), "rewards of three judges"
    assert not agrees(batch._replace(weight_B=np.ones(5, np.float32)))
    assert not agrees(batch._replace(index_B=np.ones(4, np.float32)))
    assert not agrees(batch._replace(size_cond_BK6=np.zeros((4, 2, 5), np.float32)))
    assert not agrees(batch._replace(inputs=batch_of(K=3).inputs))
    assert not agrees(batch._replace(inputs=None))
    assert agrees(Conditioning(np.zeros((4, 7, 8), np.float32)))
    assert not agrees(Conditioning(np.zeros((4, 7, 8), np.float32), np.zeros((3, 8), np.float32)))
