"""Losses: functions of the scores and the preference over K candidates, one value per prompt, unreduced.

Axes: B prompts, K candidates of a prompt, best first. `preference_BK` sums to 1 over K: (1, 0) for a clear winner.
"""

import jax
import jax.numpy as jnp

from dpo_jax.batch import Scores


def dpo(scores: Scores, preference_BK: jax.Array, *, beta: float) -> jax.Array:
    """Diffusion-DPO: `-log sigmoid(z)` with `z = beta (log_ratio_w - log_ratio_l)` (arXiv 2311.12908, equation 14).

    Soft preferences mix both directions, `-p log sigmoid(z) - (1 - p) log sigmoid(-z)`, which is the formula above at
    p = 1. Published beta: 5000 in the released code, whose unit is ours; the paper prints 2000 for SD1.5.
    """
    z_B = beta * margin(scores)
    return -(preference_BK[:, 0] * jax.nn.log_sigmoid(z_B) + preference_BK[:, 1] * jax.nn.log_sigmoid(-z_B))


def sft(scores: Scores, preference_BK: jax.Array) -> jax.Array:
    """Supervised fine-tuning: the winner's denoising error (arXiv 2006.11239, equation 14). Needs no reference."""
    return scores.error_BK[:, 0]


def margin(scores: Scores) -> jax.Array:
    """`log_ratio_w - log_ratio_l` per prompt; times beta it is the difference of implicit rewards."""
    if scores.log_ratio_BK.shape[1] != 2:
        raise ValueError(f"a pair has 2 candidates, this batch has {scores.log_ratio_BK.shape[1]}")
    return scores.log_ratio_BK[:, 0] - scores.log_ratio_BK[:, 1]


def implicit_accuracy(scores: Scores) -> jax.Array:
    """1 where the implicit reward prefers the winner, 0 where the loser, 1/2 for a tie."""
    return (1 + jnp.sign(margin(scores))) / 2
