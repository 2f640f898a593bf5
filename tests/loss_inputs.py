"""What losses read, from predictions that a test chooses, for oracles and gradients by the predictions."""

from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.batch import LossInputs


def loss_inputs(policy: jax.Array, reference: jax.Array, target: jax.Array, **fields: Any) -> LossInputs:
    """Return the inputs as a function of the predictions [B, K, H, W, C], with their gradient."""
    error_BK, reference_error_BK = (jnp.square(x - target).mean(axis=(2, 3, 4)) for x in (policy, reference))
    return LossInputs(
        -(error_BK - reference_error_BK) / 2,
        error_BK=error_BK,
        reference_error_BK=reference_error_BK,
        prediction_BKHWC=policy,
        reference_prediction_BKHWC=reference,
        target_BKHWC=target,
        **fields,
    )
