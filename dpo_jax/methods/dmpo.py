"""DMPO: the reverse KL divergence between the policy's preference and the label (arXiv 2507.07510)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo_jax.batch import LossInputs
from dpo_jax.fields import Field
from dpo_jax.methods.method import Method
from dpo_jax.objectives.preferences import Scalar, over_labels


def dmpo(inputs: LossInputs, *, beta: Scalar, label_smoothing: float) -> Float[Array, " B"]:
    """Return `p log(p / q) + (1 - p) log((1 - p) / (1 - q))`, p = sigmoid(beta margin), q = 1 - label_smoothing.

    This is the formula of Diffusion-SDPO's train.py, the only public code, with its 1/2, so that its beta is ours: 2000
    for SD1.5, 6000 for SDXL; label_smoothing 0.01. The gradient vanishes for hopeless pairs and at p = q.
    """
    wanted, unwanted = jnp.log1p(-label_smoothing), jnp.log(label_smoothing)

    def divergence(margin_B: Float[Array, " B"]) -> Float[Array, " B"]:
        z_B = beta * margin_B
        won_B = jax.nn.sigmoid(z_B) * (jax.nn.log_sigmoid(z_B) - wanted)
        return won_B + jax.nn.sigmoid(-z_B) * (jax.nn.log_sigmoid(-z_B) - unwanted)

    return over_labels(divergence, inputs.log_ratio_BK, inputs.preference_BK)


DMPO = Method(
    name="dmpo",
    title="DMPO",
    paper="2507.07510",
    loss=dmpo,
    fields={
        "beta": Field(2000.0, "Strength of the pull towards the reference; published: 6000 for SDXL.", above=0),
        "label_smoothing": Field(0.01, "Share of labels that are taken to be wrong.", above=0, below=0.5),
    },
    margin_scale="beta",
    reads_log_ratios_alone=True,
)
