"""A reference that follows the policy: a moving average of it, or a copy that is renewed now and then."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.weights.layout import Params


class MovingReference(NamedTuple):
    """The part of the reference that moves, in a training state."""

    params: Any
    """The reference's counterpart of the trained weights (`Params`), float32: a whole denoiser, or a LoRA."""
    updates: Any
    """int32 scalar: the number of updates of the policy since the reference moved."""


def first_reference(params: Params) -> MovingReference:
    """Return the reference of a policy that is not trained yet, in memory of its own."""
    return MovingReference(jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32))


def follow(reference: MovingReference, params: Params, *, every: int, decay: float) -> MovingReference:
    """Return the reference to compare with in the next update: `decay reference + (1 - decay) params`, if it is due.

    It is due after `every` updates; a decay of 0 then makes it an exact copy. With `every` = 1, step n compares with an
    average that includes the weights before step n, as in Linear-DPO's train_sd_dpo.py, which averages after the
    optimizer's step. (Its train_sd3_dpo.py averages before that step, but no launcher turns it on.)
    """
    due = reference.updates >= every

    def towards(own: jax.Array, policy: jax.Array) -> jax.Array:
        return jnp.where(due, decay * own + (1 - decay) * policy if decay else policy, own)

    moved = jax.tree.map(towards, reference.params, params)
    return MovingReference(moved, jnp.where(due, 0, reference.updates))
