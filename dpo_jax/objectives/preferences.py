"""Parts that losses share: the margin of a pair, which candidates are preferred, and a clamp.

Axes: B prompts, K candidates of a prompt, R rewards.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Real

from dpo_jax.errors import UserError

Scalar = float | Float[Array, ""]
"""A hyperparameter: a number of the config, or one that a plug-in computes in the step."""


def is_preferred(reward_BKR: Real[Array, "B K *R"]) -> Bool[Array, "B K K"]:
    """Return [B, K, K], true where the first candidate dominates the second: no reward is worse and one is better.

    This is Pareto dominance, by which D3PO's released code compares vectors of R rewards; it is possible that neither
    candidate dominates. One reward, also given as [B, K], simply orders them. A reward of NaN excludes its candidate.
    """
    reward_BKR = reward_BKR.reshape(*reward_BKR.shape[:2], -1)
    one_BK1R, other_B1KR = reward_BKR[:, :, None], reward_BKR[:, None]
    return (one_BK1R >= other_B1KR).all(axis=-1) & (one_BK1R > other_B1KR).any(axis=-1)


def is_better(preference_BK: Float[Array, "B K"], valid_BK: Bool[Array, "B K"]) -> Bool[Array, "B K K"]:
    """Return [B, K, K], true where the first candidate is preferred to the second; padding is not compared."""
    return is_preferred(preference_BK) & valid_BK[:, :, None] & valid_BK[:, None]


def clamp(x: Float[Array, "*shape"], low: float, high: float) -> Float[Array, "*shape"]:
    """`jnp.clip` with gradient 1 at the bounds themselves, as in PyTorch's clamp; JAX's gradient is 1/2 there.

    Float32 has so few numbers close to 1 that ratios do fall on their bounds.
    """
    return jnp.where((x >= low) & (x <= high), x, jnp.clip(x, low, high))


def margin(log_ratio_BK: Float[Array, "B K"]) -> Float[Array, " B"]:
    """Return `log_ratio_w - log_ratio_l` per prompt; times beta, it is the difference of implicit rewards.

    Raises:
        UserError: K is not 2.
    """
    if (K := log_ratio_BK.shape[1]) != 2:
        raise UserError(f"the batch has {K} candidates per prompt, but a loss of pairs needs 2")
    return log_ratio_BK[:, 0] - log_ratio_BK[:, 1]


def over_labels(
    loss: Callable[[Float[Array, " B"]], Float[Array, " B"]],
    log_ratio_BK: Float[Array, "B K"],
    preference_BK: Float[Array, "B K"],
) -> Float[Array, " B"]:
    """Return `p loss(margin) + (1 - p) loss(-margin)`, p being the share of the preference for the first candidate.

    For hard labels this is the loss of the margin itself; for soft ones, its expectation over which candidate is
    better.
    """
    margin_B = margin(log_ratio_BK)
    return preference_BK[:, 0] * loss(margin_B) + preference_BK[:, 1] * loss(-margin_B)


def implicit_accuracy(log_ratio_BK: Float[Array, "B K"]) -> Float[Array, " B"]:
    """Return 1 if the implicit reward prefers the winner, 0 if the loser, 1/2 for a tie; one number per prompt."""
    return (1 + jnp.sign(margin(log_ratio_BK))) / 2
