"""Log-ratios of transitions of sampled images, which losses read: how likely policy and reference make each.

D3PO (arXiv 2311.13231), DDPO (arXiv 2305.13301) and DPOK (arXiv 2305.16381) all read these. Each candidate is evaluated
once, in however many pairs it is: a loss compares the [B, K] log-ratios in pairs.

Axes: B prompts, K candidates of a prompt, H x W latent cells, C channels.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dpo_jax.batch import LossInputs, Transitions
from dpo_jax.diffusion.steps import SamplerTable, Steps
from dpo_jax.diffusion.trajectories import kl_divergence, log_prob, steps_at, transition_mean
from dpo_jax.objectives.denoising import Denoise, per_candidate
from dpo_jax.objectives.preferences import clamp, is_preferred


def compare_transitions(
    denoise: Denoise,
    policy: Any,
    reference: Any | None,
    table: SamplerTable,
    transitions: Transitions,
    conditioning: Any,
    *,
    clip: float = 0.1,
) -> LossInputs:
    """Return the log-probabilities of all candidates' transitions and their clamped log-ratio (arXiv 2311.13231).

    `log_ratio = log clamp(p_policy / p_reference, 1 - clip, 1 + clip)`, clamped for each candidate separately as in
    D3PO's released code (https://github.com/yk7333/d3po); beyond the clamp there is no gradient. Each log-probability
    is the mean over H, W and C of `log N(x'; mean, d^2)`. With the weights that sampled, it matches
    `transitions.log_prob_BK` up to rounding: to 1e-6 in a batch of the same shape. In a batch of another shape, which
    the compiler may treat differently, it matches to 2e-6 in float32 and 1e-3 in bfloat16.

    Args:
        denoise: the network, guided as in sampling; called once with each set of weights.
        policy: weights that are trained.
        reference: frozen weights. None compares with the weights that sampled, whose log-probabilities are stored. This
            halves the work if they are the reference, as in a round of D3PO's human feedback.
        table: the sampler that the transitions were sampled with.
        transitions: one transition of each candidate.
        conditioning: conditioning of `denoise`, each array with B rows (shared by the candidates) or B * K.
        clip: largest distance of the ratio from 1.
    """
    step = steps_at(table, transitions.step_B, transitions.x_BKHWC)
    mean_BKHWC = _mean(denoise, policy, step, transitions, conditioning)
    log_prob_BK = log_prob(step, mean_BKHWC, transitions.next_x_BKHWC)
    reference_log_prob_BK, kl_BK = transitions.log_prob_BK, None
    if reference is not None:
        reference_BKHWC = jax.lax.stop_gradient(_mean(denoise, reference, step, transitions, conditioning))
        reference_log_prob_BK = log_prob(step, reference_BKHWC, transitions.next_x_BKHWC)
        kl_BK = kl_divergence(step, mean_BKHWC, reference_BKHWC)
    old_kl_BK = standard_log_ratio_BK = None
    if transitions.old_mean_BKHWC is not None:
        old_kl_BK = kl_divergence(step, mean_BKHWC, transitions.old_mean_BKHWC)
        noise_BKHWC = (transitions.next_x_BKHWC - transitions.old_mean_BKHWC) / jnp.where(step.d > 0, step.d, 1)
        standard_log_ratio_BK = ((mean_BKHWC - transitions.old_mean_BKHWC) * noise_BKHWC).mean(axis=(-3, -2, -1))
    fall_S = -np.diff(table.steps.noise, append=0)
    # This clamps the ratio without an exp, which could overflow.
    low, high = math.log(1 - clip), math.log(1 + clip)
    log_ratio_BK = clamp(log_prob_BK - reference_log_prob_BK, low, high)
    return LossInputs(
        log_ratio_BK,
        log_prob_BK=log_prob_BK,
        old_log_prob_BK=transitions.log_prob_BK,
        kl_BK=kl_BK,
        old_kl_BK=old_kl_BK,
        standard_log_ratio_BK=standard_log_ratio_BK,
        level_fall_B=jnp.asarray(fall_S, log_prob_BK.dtype)[transitions.step_B],
        is_clamped_BK=(log_ratio_BK <= low) | (log_ratio_BK >= high),
    )


def beyond_ratio_to_sampled(inputs: LossInputs, *, clip: float) -> Bool[Array, "B K"]:
    """Return [B, K]: is the ratio to the weights that sampled further than `clip` from 1? DDPO's code counts these."""
    return jnp.abs(jnp.exp(inputs.log_prob_BK - inputs.old_log_prob_BK) - 1) > clip


def transition_metrics(inputs: LossInputs, clipped_BK: Bool[Array, "B K"]) -> dict[str, Float[Array, " B"]]:
    """Return metrics by name, one number per prompt.

    `policy/clipped` is the share of candidates whose ratio the loss clips, according to `clipped_BK`.
    `policy/change` is the mean absolute change of the log-probabilities since the images were sampled; before the first
    update it is 0 up to rounding. `policy/kl` is DDPO's estimate of the divergence, half of the mean squared change.
    `pair/accuracy` is the share of pairs that the log-ratios order as the rewards do; 1/2 if all candidates tie.
    """
    preferred_BKK = is_preferred(inputs.preference_BK)
    pairs_B = preferred_BKK.sum(axis=(1, 2))
    margin_BKK = inputs.log_ratio_BK[:, :, None] - inputs.log_ratio_BK[:, None, :]
    agreed_B = jnp.where(preferred_BKK, (1 + jnp.sign(margin_BKK)) / 2, 0).sum(axis=(1, 2))
    margin_B = jnp.where(preferred_BKK, margin_BKK, 0).sum(axis=(1, 2))
    change_BK = inputs.log_prob_BK - inputs.old_log_prob_BK
    metrics = {
        "pair/accuracy": jnp.where(pairs_B > 0, agreed_B / jnp.maximum(pairs_B, 1), 0.5),
        "pair/count": pairs_B.astype(margin_B.dtype),
        "reward/margin": margin_B / jnp.maximum(pairs_B, 1),
        "policy/change": jnp.abs(change_BK).mean(axis=1),
        "policy/kl": jnp.square(change_BK).mean(axis=1) / 2,
        "policy/clipped": clipped_BK.astype(margin_B.dtype).mean(axis=1),
    }
    return metrics if inputs.kl_BK is None else metrics | {"policy/reference_kl": inputs.kl_BK.mean(axis=1)}


def _mean(
    denoise: Denoise, params: Any, step: Steps, transitions: Transitions, conditioning: Any
) -> Float[Array, " B #K H W C"]:
    x_BKHWC = transitions.x_BKHWC
    B, K = x_BKHWC.shape[:2]
    x_NHWC = x_BKHWC.reshape(B * K, *x_BKHWC.shape[2:])
    prediction_NHWC = denoise(params, x_NHWC, *per_candidate((step.t, conditioning), B, K))
    return transition_mean(step, x_BKHWC, prediction_NHWC.reshape(x_BKHWC.shape))
