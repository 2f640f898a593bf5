"""Losses: functions of the scores and the preference over K candidates, one value per prompt, unreduced.

Axes: B prompts, K candidates of a prompt, best first. `preference_BK` sums to 1 over K: (1, 0) for a clear winner. The
losses of transitions take candidates in any order, and with them any scores, of which higher is better.
"""

import jax
import jax.numpy as jnp

from dpo_jax.batch import LogRatios
from dpo_jax.errors import UserError


def dpo(scores: LogRatios, preference_BK: jax.Array, *, beta: float) -> jax.Array:
    """Diffusion-DPO: `-log sigmoid(z)` with `z = beta (log_ratio_w - log_ratio_l)` (arXiv 2311.12908, equation 14).

    Soft preferences mix both directions, `-p log sigmoid(z) - (1 - p) log sigmoid(-z)`, which is the formula above at
    p = 1. Published beta: 5000 in the released code, whose unit is ours; the paper prints 2000 for SD1.5.
    """
    z_B = beta * margin(scores)
    return -(preference_BK[:, 0] * jax.nn.log_sigmoid(z_B) + preference_BK[:, 1] * jax.nn.log_sigmoid(-z_B))


def sft(scores: LogRatios, preference_BK: jax.Array) -> jax.Array:
    """Supervised fine-tuning: the winner's denoising error (arXiv 2006.11239, equation 14). Needs no reference."""
    return scores.error_BK[:, 0]


def d3po(scores: LogRatios, preference_BK: jax.Array, *, beta: float) -> jax.Array:
    """D3PO: `-log sigmoid(beta (log_ratio_w - log_ratio_l))`, summed over all pairs (arXiv 2311.13231).

    Published beta: 0.1, with ratios clamped at 0.1; see `score_transitions`. A prompt of K candidates has up to
    K (K - 1) / 2 pairs. A tie is no pair: neither loss nor gradient. (The released code counts a constant log 2.)

    Args:
        scores: of transitions, or any with a log-ratio.
        preference_BK: a score of each candidate, or with one more axis several; see `is_preferred`.
        beta: how sharply the ratios are compared.
    """
    margin_BKK = scores.log_ratio_BK[:, :, None] - scores.log_ratio_BK[:, None, :]
    loss_BKK = jnp.where(is_preferred(preference_BK), -jax.nn.log_sigmoid(beta * margin_BKK), 0)
    return loss_BKK.sum(axis=(1, 2))


def is_preferred(reward_BKR: jax.Array) -> jax.Array:
    """[B, K, K], true where the first candidate dominates the second: nowhere worse, and better in one of R rewards.

    That is Pareto dominance, by which D3PO's released code compares vectors of rewards; of two candidates neither need
    dominate. One reward, also as [B, K], simply orders them. A candidate with NaN is compared with none.
    """
    reward_BKR = reward_BKR.reshape(*reward_BKR.shape[:2], -1)
    one_BK1R, other_B1KR = reward_BKR[:, :, None], reward_BKR[:, None]
    return (one_BK1R >= other_B1KR).all(axis=-1) & (one_BK1R > other_B1KR).any(axis=-1)


def ddpo(scores: LogRatios, preference_BK: jax.Array, *, clip: float = 1e-4, advantage_clip: float = 5.0) -> jax.Array:
    """DDPO's importance-sampled policy gradient: `max(-A ratio, -A clamp(ratio, 1 - clip, 1 + clip))`.

    The ratio is to the weights that sampled, the mean over the candidates; arXiv 2305.13301, with the clipping of
    arXiv 1707.06347, equation 7. The default clips are those of its released code. Needs no reference; what is
    preferred is in the advantages already.
    """
    advantage_BK = jnp.clip(scores.advantage_BK, -advantage_clip, advantage_clip)
    ratio_BK = jnp.exp(scores.log_prob_BK - scores.old_log_prob_BK)
    clamped_BK = clamp(ratio_BK, 1 - clip, 1 + clip)
    return jnp.maximum(-advantage_BK * ratio_BK, -advantage_BK * clamped_BK).mean(axis=1)


def dpok(
    scores: LogRatios,
    preference_BK: jax.Array,
    *,
    kl_weight: float = 0.01,
    clip: float = 1e-4,
    advantage_clip: float = 5.0,
) -> jax.Array:
    """DPOK as D3PO's authors compare with it: `ddpo` and a divergence from the reference (arXiv 2305.16381).

    The divergence is that of the two Gaussians of a transition. In the released code of that comparison it is one
    between softmaxes over the batch, so 0 for a batch of one; DPOK's own code penalises `|eps - eps_reference|^2`.
    """
    policy_B = ddpo(scores, preference_BK, clip=clip, advantage_clip=advantage_clip)
    return policy_B + kl_weight * scores.kl_BK.mean(axis=1)


def clamp(x: jax.Array, low: float, high: float) -> jax.Array:
    """`jnp.clip` with gradient 1 on the very bounds, as PyTorch's clamp has it, where JAX says 1/2.

    In float32 there are so few numbers close to 1 that ratios do fall on their bounds.
    """
    return jnp.where((x >= low) & (x <= high), x, jnp.clip(x, low, high))


def margin(scores: LogRatios) -> jax.Array:
    """`log_ratio_w - log_ratio_l` per prompt; times beta it is the difference of implicit rewards."""
    if scores.log_ratio_BK.shape[1] != 2:
        raise UserError(f"a pair has 2 candidates, this batch has {scores.log_ratio_BK.shape[1]}")
    return scores.log_ratio_BK[:, 0] - scores.log_ratio_BK[:, 1]


def implicit_accuracy(scores: LogRatios) -> jax.Array:
    """1 where the implicit reward prefers the winner, 0 where the loser, 1/2 for a tie."""
    return (1 + jnp.sign(margin(scores))) / 2
