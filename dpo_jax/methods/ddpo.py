"""DDPO: policy gradients on the steps that drew an image, weighted by its advantage (arXiv 2305.13301)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo_jax.batch import LossInputs
from dpo_jax.fields import Field
from dpo_jax.methods.method import Method
from dpo_jax.methods.metrics import Metrics
from dpo_jax.objectives.preferences import clamp
from dpo_jax.objectives.transitions import beyond_ratio_to_sampled, transition_metrics


def ddpo(inputs: LossInputs, *, clip: float = 1e-4, advantage_clip: float = 5.0) -> Float[Array, " B"]:
    """Return DDPO's importance-sampled policy gradient: `max(-A ratio, -A clamp(ratio, 1 - clip, 1 + clip))`.

    The ratio compares with the weights that sampled; the loss is the mean over the candidates (arXiv 2305.13301, with
    the clipping of arXiv 1707.06347, equation 7). The defaults are those of DDPO's released code. It needs no reference
    and ignores `preference_BK`, because the advantages hold the preference.
    """
    advantage_BK = jnp.clip(inputs.advantage_BK, -advantage_clip, advantage_clip)
    ratio_BK = jnp.exp(inputs.log_prob_BK - inputs.old_log_prob_BK)
    clamped_BK = clamp(ratio_BK, 1 - clip, 1 + clip)
    return jnp.maximum(-advantage_BK * ratio_BK, -advantage_BK * clamped_BK).mean(axis=1)


def metrics(inputs: LossInputs, *, clip: float, **fields: float) -> Metrics:
    """Return `transition_metrics`; what is clipped are the ratios to the weights that sampled."""
    return transition_metrics(inputs, beyond_ratio_to_sampled(inputs, clip=clip))


DDPO = Method(
    name="ddpo",
    title="DDPO",
    paper="2305.13301",
    loss=ddpo,
    learns_from="rollouts",
    fields={
        # In bfloat16 rounding alone can move a ratio further (1e-3, see objectives/transitions.py); in float32 not.
        "clip": Field(1e-4, "How far the ratio to the sampling policy may be from 1.", above=0),
        "advantage_clip": Field(5.0, "Largest advantage.", above=0),
    },
    needs_reference=False,
    reads_advantages=True,
    metrics=metrics,
)
