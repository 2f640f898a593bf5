"""Losses: functions of the log-ratios and the preference over K candidates, which return one value per prompt.

Axes: B prompts, K candidates of a prompt, best first. `preference_BK` sums to 1 over K: (1, 0) for a clear winner. The
losses of transitions take candidates in any order; their `preference_BK` holds rewards, of which higher is better.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Real

from dpo_jax.batch import LogRatios
from dpo_jax.errors import UserError


def dpo(log_ratios: LogRatios, preference_BK: Float[Array, "B K"], *, beta: float) -> Float[Array, " B"]:
    """Diffusion-DPO: `-log sigmoid(z)` with `z = beta (log_ratio_w - log_ratio_l)` (arXiv 2311.12908, equation 14).

    Soft preferences mix both directions, `-p log sigmoid(z) - (1 - p) log sigmoid(-z)`, which is the formula above at
    p = 1. Published beta: 5000 in the released code, in the same unit; the paper prints 2000 for SD1.5.
    """
    z_B = beta * margin(log_ratios)
    return -(preference_BK[:, 0] * jax.nn.log_sigmoid(z_B) + preference_BK[:, 1] * jax.nn.log_sigmoid(-z_B))


def sft(log_ratios: LogRatios, preference_BK: Float[Array, "B K"]) -> Float[Array, " B"]:
    """Supervised fine-tuning: the winner's denoising error (arXiv 2006.11239, equation 14), without a reference."""
    return log_ratios.error_BK[:, 0]


def d3po(log_ratios: LogRatios, preference_BK: Float[Array, "B K *R"], *, beta: float) -> Float[Array, " B"]:
    """D3PO: `-log sigmoid(beta (log_ratio_w - log_ratio_l))`, summed over all pairs (arXiv 2311.13231).

    Published beta: 0.1, with ratios clamped at 0.1; see `transition_log_ratios`. A prompt of K candidates has up to
    K (K - 1) / 2 pairs. A tie is not a pair: it has no loss and no gradient. (The released code counts log 2 for it.)

    Args:
        log_ratios: log-ratios of transitions.
        preference_BK: rewards of the candidates, or [B, K, R] for R rewards per candidate; see `is_preferred`.
        beta: scale of the difference of two log-ratios.
    """
    margin_BKK = log_ratios.log_ratio_BK[:, :, None] - log_ratios.log_ratio_BK[:, None, :]
    loss_BKK = jnp.where(is_preferred(preference_BK), -jax.nn.log_sigmoid(beta * margin_BKK), 0)
    return loss_BKK.sum(axis=(1, 2))


def is_preferred(reward_BKR: Real[Array, "B K *R"]) -> Bool[Array, "B K K"]:
    """Return [B, K, K], true where the first candidate dominates the second: no reward is worse and one is better.

    This is Pareto dominance, by which D3PO's released code compares vectors of R rewards; it is possible that neither
    candidate dominates. One reward, also given as [B, K], simply orders them. A reward of NaN excludes its candidate.
    """
    reward_BKR = reward_BKR.reshape(*reward_BKR.shape[:2], -1)
    one_BK1R, other_B1KR = reward_BKR[:, :, None], reward_BKR[:, None]
    return (one_BK1R >= other_B1KR).all(axis=-1) & (one_BK1R > other_B1KR).any(axis=-1)


def ddpo(
    log_ratios: LogRatios, preference_BK: Float[Array, "B K *R"], *, clip: float = 1e-4, advantage_clip: float = 5.0
) -> Float[Array, " B"]:
    """DDPO's importance-sampled policy gradient: `max(-A ratio, -A clamp(ratio, 1 - clip, 1 + clip))`.

    The ratio compares with the weights that sampled; the loss is the mean over the candidates (arXiv 2305.13301, with
    the clipping of arXiv 1707.06347, equation 7). The defaults are those of DDPO's released code. It needs no reference
    and ignores `preference_BK`, because the advantages hold the preference.
    """
    advantage_BK = jnp.clip(log_ratios.advantage_BK, -advantage_clip, advantage_clip)
    ratio_BK = jnp.exp(log_ratios.log_prob_BK - log_ratios.old_log_prob_BK)
    clamped_BK = clamp(ratio_BK, 1 - clip, 1 + clip)
    return jnp.maximum(-advantage_BK * ratio_BK, -advantage_BK * clamped_BK).mean(axis=1)


def dpok(
    log_ratios: LogRatios,
    preference_BK: Float[Array, "B K *R"],
    *,
    kl_weight: float = 0.01,
    clip: float = 1e-4,
    advantage_clip: float = 5.0,
) -> Float[Array, " B"]:
    """DPOK as D3PO's authors compare with it: `ddpo` plus a divergence from the reference (arXiv 2305.16381).

    The divergence is the KL divergence of the two Gaussians of a transition. The released code of that comparison takes
    it between softmaxes over the batch, which is 0 for a batch of one; DPOK's own code penalises
    `|eps - eps_reference|^2`.
    """
    policy_B = ddpo(log_ratios, preference_BK, clip=clip, advantage_clip=advantage_clip)
    return policy_B + kl_weight * log_ratios.kl_BK.mean(axis=1)


def clamp(x: Float[Array, "*shape"], low: float, high: float) -> Float[Array, "*shape"]:
    """`jnp.clip` with gradient 1 at the bounds themselves, as in PyTorch's clamp; JAX's gradient is 1/2 there.

    Float32 has so few numbers close to 1 that ratios do fall on their bounds.
    """
    return jnp.where((x >= low) & (x <= high), x, jnp.clip(x, low, high))


def margin(log_ratios: LogRatios) -> Float[Array, " B"]:
    """Return `log_ratio_w - log_ratio_l` per prompt; times beta, it is the difference of implicit rewards."""
    if (K := log_ratios.log_ratio_BK.shape[1]) != 2:
        raise UserError(f"the batch has {K} candidates per prompt, but a loss of pairs needs 2")
    return log_ratios.log_ratio_BK[:, 0] - log_ratios.log_ratio_BK[:, 1]


def implicit_accuracy(log_ratios: LogRatios) -> Float[Array, " B"]:
    """Return 1 if the implicit reward prefers the winner, 0 if the loser, 1/2 for a tie; one number per prompt."""
    return (1 + jnp.sign(margin(log_ratios))) / 2
