"""IPO: the squared distance of the margin from a target, which bounds how far a pair is pushed (arXiv 2310.12036)."""

import jax

from dpo_jax.batch import LossInputs
from dpo_jax.fields import Field
from dpo_jax.methods.method import Method
from dpo_jax.objectives.preferences import Scalar, over_labels


def ipo(inputs: LossInputs, *, beta: Scalar) -> jax.Array:
    """Return `(beta margin - 1/2)^2`: `b^2 (d - 1 / (2 b))^2` with `b = beta / 2` and `d = 2 margin`.

    Without b^2 it is equation 17, and diffusers' train_diffusion_dpo.py, whose IPO crashes; b = 2500 there is beta =
    5000 here. b^2 moves no minimum, and lifts the gradients, 4e-4 at first, above AdamW's epsilon and to DPO's scale.
    """
    return over_labels(lambda margin_B: (beta * margin_B - 0.5) ** 2, inputs.log_ratio_BK, inputs.preference_BK)


BETA = {"beta": Field(5000.0, "Pull towards the reference: each pair aims at a margin of 1 / (2 beta).", above=0)}
IPO = Method(
    name="ipo", title="IPO", paper="2310.12036", loss=ipo, fields=BETA, margin_scale="beta", reads_log_ratios_alone=True
)
