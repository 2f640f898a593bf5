"""Flow-GRPO: policy gradients on the noisy steps of a flow model, near the reference (arXiv 2505.05470)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float

from dpo_jax.batch import LossInputs
from dpo_jax.fields import Field
from dpo_jax.methods.ddpo import DDPO, ddpo


def flow_grpo(
    inputs: LossInputs,
    *,
    kl_weight: float = 0.004,
    divergence: str = "exact",
    clip: float = 1e-4,
    advantage_clip: float = 5.0,
) -> Float[Array, " B"]:
    """Return `ddpo` plus the divergence of the policy's step from the reference's.

    The divergence is the KL divergence of the two normal distributions of a step, the mean over its dimensions. The
    released code (https://github.com/yifan123/flow_grpo) divides by the variance per unit of time instead of that of
    the step, so that its steps of length |dt| count |dt| times as much; `divergence="released"` does the same.
    """
    loss_B = ddpo(inputs, clip=clip, advantage_clip=advantage_clip)
    if not kl_weight:
        return loss_B
    assert inputs.kl_BK is not None
    factor_B1 = inputs.level_fall_B[:, None] if divergence == "released" else 1.0
    return loss_B + kl_weight * (factor_B1 * inputs.kl_BK).mean(axis=1)


def pulls_to_reference(config: Mapping[str, Any]) -> bool:
    """Whether the loss reads the reference."""
    return bool(config["loss.kl_weight"])


def problem(config: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a config."""
    if config["loss.kl_weight"] and config["online.reference"] != "initial":
        return (
            f"config.loss.kl_weight={config['loss.kl_weight']} needs a reference network. Set "
            'config.online.reference="initial", or kl_weight=0'
        )
    if config["loss.divergence"] == "released" and config["online.sampler"] != "flow_sde":
        return (
            'config.loss.divergence="released" is that of the steps of flow_sde, but config.online.sampler='
            f'"{config["online.sampler"]}". Set loss.divergence="exact"'
        )
    return None


FLOW_GRPO = dataclasses.replace(
    DDPO,
    name="flow_grpo",
    title="Flow-GRPO",
    paper="2505.05470",
    loss=flow_grpo,
    fields={
        "kl_weight": Field(
            0.004,
            "Weight of the divergence from the reference; 0 needs no reference. The published 0.04 is for "
            'divergence="released", about a tenth of the exact one with 10 steps.',
            at_least=0,
        ),
        "divergence": Field(
            "exact",
            "KL divergence of a step, exact or as released, times the length of the step.",
            choices=("exact", "released"),
        ),
        **DDPO.fields,
    },
    sets={
        "online.reference": "initial",
        "online.advantage": "round",
        "online.candidates": 8,
        "online.sampler": "flow_sde",
        "online.sampling_steps": 10,
        "online.guidance": 4.5,
    },
    needs_reference=pulls_to_reference,
    problem=problem,
)
