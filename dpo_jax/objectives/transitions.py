"""From transitions of sampled images to the scores that a loss reads: how likely policy and reference make each.

D3PO (arXiv 2311.13231), DDPO (arXiv 2305.13301) and DPOK (arXiv 2305.16381) all read these. Each candidate is evaluated
once, whatever the number of pairs it is in: a loss makes its pairs of the [B, K] scores.

Axes: B prompts, K candidates of a prompt, H x W latent cells, C channels.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.batch import LogRatios, Transitions
from dpo_jax.diffusion.samplers import SamplerTable, Steps
from dpo_jax.diffusion.trajectories import kl_divergence, log_prob, steps_at, transition_mean
from dpo_jax.objectives.denoising import Denoise, per_candidate
from dpo_jax.objectives.losses import clamp, is_preferred


def score_transitions(
    denoise: Denoise,
    policy: Any,
    reference: Any | None,
    table: SamplerTable,
    transitions: Transitions,
    conditioning: Any,
    *,
    clip: float = 0.1,
    advantage_BK: jax.Array | None = None,
) -> LogRatios:
    """The log-probabilities of all candidates' transitions and their clamped ratio (arXiv 2311.13231).

    `log_ratio = log clamp(p_policy / p_reference, 1 - clip, 1 + clip)`, clamped for each candidate by itself as in
    D3PO's released code (https://github.com/yk7333/d3po): from beyond the clamp no gradient comes. Each log-probability
    is the mean over H, W and C of `log N(x'; mean, d^2)`. Under the weights that sampled, it is
    `transitions.log_prob_BK` but for rounding: to 1e-6 in a batch of that shape; in another, which the compiler may
    treat otherwise, to 2e-6 in float32 and 1e-3 in bfloat16.

    Args:
        denoise: the network, guided as in sampling; called once with each set of weights.
        policy: weights that are trained.
        reference: frozen weights. None compares with the weights that sampled, whose log-probabilities are stored, and
            saves half of the work where those are the reference, as in a round of D3PO's human feedback.
        table: the sampler that the transitions were sampled with.
        transitions: one of each candidate.
        conditioning: what `denoise` takes, each array with B rows (shared by the candidates) or B * K.
        clip: how far the ratio may be from 1.
        advantage_BK: passed on to the losses that want it.
    """
    step = steps_at(table, transitions.step_B, transitions.x_BKHWC)
    mean_BKHWC = _mean(denoise, policy, step, transitions, conditioning)
    log_prob_BK = log_prob(step, mean_BKHWC, transitions.next_x_BKHWC)
    reference_log_prob_BK, kl_BK = transitions.log_prob_BK, None
    if reference is not None:
        reference_BKHWC = jax.lax.stop_gradient(_mean(denoise, reference, step, transitions, conditioning))
        reference_log_prob_BK = log_prob(step, reference_BKHWC, transitions.next_x_BKHWC)
        kl_BK = kl_divergence(step, mean_BKHWC, reference_BKHWC)
    # The clamp of the ratio, but exp can't overflow.
    log_ratio_BK = clamp(log_prob_BK - reference_log_prob_BK, math.log(1 - clip), math.log(1 + clip))
    return LogRatios(
        log_ratio_BK,
        log_prob_BK=log_prob_BK,
        old_log_prob_BK=transitions.log_prob_BK,
        advantage_BK=advantage_BK,
        kl_BK=kl_BK,
    )


def beyond_ratio_to_sampled(scores: LogRatios, *, clip: float) -> jax.Array:
    """[B, K], whether the ratio to the weights that sampled is further than `clip` from 1, as DDPO's code counts it."""
    return jnp.abs(jnp.exp(scores.log_prob_BK - scores.old_log_prob_BK) - 1) > clip


def beyond_log_ratio(scores: LogRatios, *, clip: float) -> jax.Array:
    """[B, K], whether `score_transitions` has clamped the log-ratio at this `clip`, or all but."""
    log_ratio_BK = scores.log_ratio_BK
    return (log_ratio_BK <= math.log(1 - clip)) | (log_ratio_BK >= math.log(1 + clip))


def transition_metrics(
    scores: LogRatios, preference_BK: jax.Array, *, is_clipped: Callable[[LogRatios], jax.Array]
) -> dict[str, jax.Array]:
    """Numbers to watch, one a prompt.

    `policy/clipped` is the share of the candidates of which `is_clipped`, [B, K], says that the loss clips their ratio.

    `policy/change` is how far log-probabilities have moved since the images were sampled, on average: 0 but for
    rounding before the first update. `policy/kl` is DDPO's estimate of the divergence, half of its square.
    `pair/accuracy` is the share of the pairs that the log-ratios order as the rewards do, and 1/2 where all are ties.
    """
    preferred_BKK = is_preferred(preference_BK)
    pairs_B = preferred_BKK.sum(axis=(1, 2))
    margin_BKK = scores.log_ratio_BK[:, :, None] - scores.log_ratio_BK[:, None, :]
    agreed_B = jnp.where(preferred_BKK, (1 + jnp.sign(margin_BKK)) / 2, 0).sum(axis=(1, 2))
    margin_B = jnp.where(preferred_BKK, margin_BKK, 0).sum(axis=(1, 2))
    change_BK = scores.log_prob_BK - scores.old_log_prob_BK
    metrics = {
        "pair/accuracy": jnp.where(pairs_B > 0, agreed_B / jnp.maximum(pairs_B, 1), 0.5),
        "pair/count": pairs_B.astype(margin_B.dtype),
        "reward/margin": margin_B / jnp.maximum(pairs_B, 1),
        "policy/change": jnp.abs(change_BK).mean(axis=1),
        "policy/kl": jnp.square(change_BK).mean(axis=1) / 2,
        "policy/clipped": is_clipped(scores).astype(margin_B.dtype).mean(axis=1),
    }
    return metrics if scores.kl_BK is None else metrics | {"policy/reference_kl": scores.kl_BK.mean(axis=1)}


def _mean(denoise: Denoise, params: Any, step: Steps, transitions: Transitions, conditioning: Any) -> jax.Array:
    x_BKHWC = transitions.x_BKHWC
    B, K = x_BKHWC.shape[:2]
    x_NHWC = x_BKHWC.reshape(B * K, *x_BKHWC.shape[2:])
    prediction_NHWC = denoise(params, x_NHWC, *per_candidate((step.t, conditioning), B, K))
    return transition_mean(step, x_BKHWC, prediction_NHWC.reshape(x_BKHWC.shape))
