"""D3PO: Diffusion-DPO's loss on the transitions of images that the model draws itself (arXiv 2311.13231)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo_jax.batch import LossInputs
from dpo_jax.fields import Field
from dpo_jax.methods.method import Method
from dpo_jax.methods.metrics import Metrics
from dpo_jax.objectives.preferences import is_preferred
from dpo_jax.objectives.transitions import transition_metrics


def d3po(inputs: LossInputs, *, beta: float) -> Float[Array, " B"]:
    """Return `-log sigmoid(beta (log_ratio_w - log_ratio_l))`, summed over all pairs (arXiv 2311.13231).

    Published beta: 0.1, with ratios clamped at 0.1; see `transition_log_ratios`. A prompt of K candidates has up to
    K (K - 1) / 2 pairs. A tie is not a pair: it has no loss and no gradient. (The released code counts log 2 for it.)

    Args:
        inputs: log-ratios of transitions; their `preference_BK` holds the rewards of the candidates, in any order, or
            [B, K, R] for R rewards per candidate; see `is_preferred`.
        beta: scale of the difference of two log-ratios.
    """
    margin_BKK = inputs.log_ratio_BK[:, :, None] - inputs.log_ratio_BK[:, None, :]
    loss_BKK = jnp.where(is_preferred(inputs.preference_BK), -jax.nn.log_sigmoid(beta * margin_BKK), 0)
    return loss_BKK.sum(axis=(1, 2))


def metrics(inputs: LossInputs, **fields: float) -> Metrics:
    """Return `transition_metrics`; what is clipped are the log-ratios."""
    return transition_metrics(inputs, inputs.is_clamped_BK)


def compares_with_initial(config: Mapping[str, Any]) -> bool:
    """Whether the reference is the initial policy; the one that sampled a round is known by its log-probabilities."""
    return bool(config["online.reference"] == "initial")


D3PO = Method(
    name="d3po",
    title="D3PO",
    paper="2311.13231",
    loss=d3po,
    learns_from="rollouts",
    fields={"beta": Field(0.1, "Strength of the pull towards the reference.", above=0)},
    needs_reference=compares_with_initial,
    metrics=metrics,
)
