"""Linear-DPO: DPO's gradient with a weight that is linear in the margin, and bounded (arXiv 2605.21123)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo_jax.batch import LossInputs
from dpo_jax.fields import Field
from dpo_jax.methods.method import Method
from dpo_jax.objectives.preferences import Scalar, over_labels

SLOPE = 0.4
"""How fast the weight falls with beta times the margin; a tangent to DPO's weight would have 1/4."""


def linear_dpo(inputs: LossInputs, *, beta: Scalar, weight_clip: float) -> Float[Array, " B"]:
    """Return `-2 w margin` with the constant `w = clip(1/2 - 0.4 beta margin, weight_clip, 1 - weight_clip)`.

    The released code (WhynotChen0105/Linear-DPO) has `w (e_winner - e_loser)`, without the errors of the reference; the
    difference has no gradient, and makes 0 the value at the reference. Its beta is ours. Published: SDXL 500 with
    weight_clip 0, SD1.5 100 with 0.001, SD3 5000 with 0.05. The reference of SD1.5 is a moving average of the policy,
    here `moving_reference.every=1` and `moving_reference.decay=0.99`; those of SDXL and SD3 are fixed. The gradient
    lacks DPO's factor beta / 2, so it takes another learning rate: 1e-5 for SDXL, 5e-6 for SD1.5 and SD3, not scaled by
    their batch of 128.
    """

    def weighted(margin_B: Float[Array, " B"]) -> Float[Array, " B"]:
        weight_B = jnp.clip(0.5 - SLOPE * beta * margin_B, weight_clip, 1 - weight_clip)
        return jax.lax.stop_gradient(weight_B) * -2 * margin_B

    return over_labels(weighted, inputs.log_ratio_BK, inputs.preference_BK)


LINEAR_DPO = Method(
    name="linear_dpo",
    title="Linear-DPO",
    paper="2605.21123",
    loss=linear_dpo,
    fields={
        "beta": Field(500.0, "How fast the weight of a pair falls with its margin; published: 100 for SD1.5.", above=0),
        "weight_clip": Field(
            0.0,
            "Smallest weight of a pair; the largest is 1 less this. Published: 0.001 for SD1.5.",
            at_least=0,
            below=0.5,
        ),
    },
    margin_scale="beta",
    reads_log_ratios_alone=True,
)
