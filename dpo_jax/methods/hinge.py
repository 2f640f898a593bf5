"""Hinge loss: pairs whose margin is large enough have neither loss nor gradient (SLiC-HF, arXiv 2305.10425)."""

import jax
from jaxtyping import Array, Float

from dpo_jax.batch import LossInputs
from dpo_jax.fields import Field
from dpo_jax.methods.method import Method
from dpo_jax.objectives.preferences import Scalar, over_labels


def hinge(inputs: LossInputs, *, beta: Scalar) -> Float[Array, " B"]:
    """Return `relu(1 - beta margin)`, as in diffusers' train_diffusion_dpo.py.

    That script has no factor 1/2: it writes `relu(1 - b d)` with `d = 2 margin`, and its b = 2500 is our beta = 5000.
    """
    return over_labels(lambda margin_B: jax.nn.relu(1 - beta * margin_B), inputs.log_ratio_BK, inputs.preference_BK)


HINGE = Method(
    name="hinge",
    title="hinge loss",
    paper="2305.10425",
    loss=hinge,
    fields={
        "beta": Field(5000.0, "Strength of the pull towards the reference: learned at a margin of 1 / beta.", above=0)
    },
    margin_scale="beta",
    reads_log_ratios_alone=True,
)
