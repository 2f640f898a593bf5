"""Flow-GRPO: policy gradients on the noisy steps of a flow model, near the reference (arXiv 2505.05470)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dpo_jax.batch import LossInputs
from dpo_jax.fields import Field
from dpo_jax.methods.ddpo import DDPO, ddpo
from dpo_jax.methods.metrics import Metrics
from dpo_jax.objectives.transitions import beyond_ratio_to_sampled, transition_metrics


def flow_grpo(
    inputs: LossInputs,
    *,
    kl_weight: float,
    divergence: str,
    ratio: str,
    drift: float,
    clip: float,
    advantage_clip: float,
) -> Float[Array, " B"]:
    """Return a policy gradient plus `kl_weight` times the divergence of the policy's step from the reference's.

    The policy gradient is by `ratio`:

    - clip: that of `ddpo`, as in the released code (https://github.com/yifan123/flow_grpo).
    - guard: `ddpo` with GRPO-Guard's ratio, which has the same scale in all steps and, unlike the usual one, a mean of
      about 1, divided by |dt|, the length of the step (arXiv 2510.22319). The published clip is 2e-6.
    - mask: Flow-DPPO's `-A ratio`, without a gradient where the policy's step diverges from the one that sampled by
      `drift` or more, and following A would move the ratio further from 1.

    guard and mask read the means of the steps of the policy that sampled, so a round takes half as much more space on
    the disk.

    The divergence is the KL divergence of the two normal distributions of a step, the mean over its dimensions. The
    released code divides by the variance per unit of time instead of that of the step, so that it counts |dt| times as
    much; `divergence="released"` does the same.
    """
    if ratio == "mask":
        advantage_BK = jnp.clip(inputs.advantage_BK, -advantage_clip, advantage_clip)
        ratio_BK = jnp.exp(inputs.log_prob_BK - inputs.old_log_prob_BK)
        loss_B = jnp.where(_is_masked(inputs, drift), 0, -advantage_BK * ratio_BK).mean(axis=1)
    elif ratio == "guard":
        loss_B = ddpo(_with_standard_ratio(inputs), clip=clip, advantage_clip=advantage_clip) / inputs.level_fall_B
    else:
        loss_B = ddpo(inputs, clip=clip, advantage_clip=advantage_clip)
    if kl_weight:
        assert inputs.kl_BK is not None
        factor_B1 = inputs.level_fall_B[:, None] if divergence == "released" else 1.0
        loss_B += kl_weight * (factor_B1 * inputs.kl_BK).mean(axis=1)
    return loss_B


def _is_masked(inputs: LossInputs, drift: float) -> Bool[Array, "B K"]:
    """Return [B, K]: has the policy's step drifted so far that the candidate teaches nothing more in its direction?"""
    assert inputs.old_kl_BK is not None
    further_BK = inputs.advantage_BK * (inputs.log_prob_BK - inputs.old_log_prob_BK) > 0
    return (inputs.old_kl_BK >= drift) & further_BK


def _with_standard_ratio(inputs: LossInputs) -> LossInputs:
    """Return the inputs with GRPO-Guard's log-ratio in place of that of the log-probabilities."""
    assert inputs.standard_log_ratio_BK is not None
    zero_BK = jnp.zeros_like(inputs.standard_log_ratio_BK)
    return inputs._replace(log_prob_BK=inputs.standard_log_ratio_BK, old_log_prob_BK=zero_BK)


def metrics(inputs: LossInputs, *, ratio: str, drift: float, clip: float, **fields: Any) -> Metrics:
    """Return `transition_metrics`, where what is clipped is by `ratio`.

    If old means are read, `policy/drift` is the mean divergence of the policy's step from the one that sampled.
    """
    if ratio == "mask":
        clipped_BK = _is_masked(inputs, drift)
    else:
        compared = _with_standard_ratio(inputs) if ratio == "guard" else inputs
        clipped_BK = beyond_ratio_to_sampled(compared, clip=clip)
    found = transition_metrics(inputs, clipped_BK)
    return found if inputs.old_kl_BK is None else found | {"policy/drift": inputs.old_kl_BK.mean(axis=1)}


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
            "Weight of the divergence from the reference; published: 0.04 for the released divergence.",
            at_least=0,
        ),
        "divergence": Field(
            "exact",
            "KL divergence of a step: exact, or as released, which is the exact one times the length of the step.",
            choices=("exact", "released"),
        ),
        "ratio": Field(
            "clip",
            "How the policy is kept near the one that sampled: clip (PPO), guard (GRPO-Guard) or mask (Flow-DPPO).",
            choices=("clip", "guard", "mask"),
        ),
        "drift": Field(1e-5, "Divergence of a step from the one that sampled, from which on mask stops it.", above=0),
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
    reads_old_means=lambda fields: fields["loss.ratio"] != "clip",
    metrics=metrics,
    problem=problem,
)
