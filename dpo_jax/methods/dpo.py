"""Diffusion-DPO: denoise the winner better than the reference does, and the loser worse (arXiv 2311.12908)."""

import jax
from jaxtyping import Array, Float

from dpo_jax.batch import LossInputs
from dpo_jax.fields import Field
from dpo_jax.methods.method import Method
from dpo_jax.objectives.preferences import Scalar, over_labels


def dpo(inputs: LossInputs, *, beta: Scalar, label_smoothing: float = 0.0) -> Float[Array, " B"]:
    """Return `-log sigmoid(z)` with `z = beta (log_ratio_w - log_ratio_l)` (arXiv 2311.12908, equation 14).

    Soft preferences mix both directions, `-p log sigmoid(z) - (1 - p) log sigmoid(-z)`, which is the formula above at
    p = 1. Label smoothing moves p towards 1/2 by that share of labels which are taken to be wrong; this is conservative
    DPO. Published beta: 5000 in the released code, in the same unit; the paper prints 2000 for SD1.5.

    Flow models take the same formula with errors of the velocity. The released code of flow_grpo for SD3.5-medium
    (yifan123/flow_grpo, scripts/train_sd3_dpo.py) has `-0.5 beta ((e_w - e_ref_w) - (e_l - e_ref_l))` with MEAN squared
    errors over C, H and W, which is z here: its beta of 100 is ours. LongCat-Image leaves the 1/2 out, so its 2000 is
    our 4000. SimpleTuner's flow_dpo sums by default, so its beta times C * H * W is ours.
    """
    preference_BK = inputs.preference_BK
    smoothed_BK = (1 - label_smoothing) * preference_BK + label_smoothing * preference_BK[:, ::-1]
    return over_labels(lambda margin_B: -jax.nn.log_sigmoid(beta * margin_B), inputs.log_ratio_BK, smoothed_BK)


DPO = Method(
    name="dpo",
    title="Diffusion-DPO",
    paper="2311.12908",
    loss=dpo,
    fields={
        "beta": Field(
            5000.0, "Strength of the pull towards the reference, in the unit of the published code.", above=0
        ),
        "label_smoothing": Field(
            0.0, "Share of labels that are taken to be wrong (conservative DPO).", at_least=0, below=0.5
        ),
    },
    margin_scale="beta",
    reads_log_ratios_alone=True,
)
