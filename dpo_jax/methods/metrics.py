"""Numbers to watch while training, one per prompt, and their sums by noise level.

Axes: B prompts, K candidates of a prompt, best first, N noise levels.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo_jax.batch import LossInputs
from dpo_jax.objectives.preferences import implicit_accuracy, is_better, margin

Metrics = dict[str, jax.Array]

LOG_SNR_EDGES = (0.0, -2.0, -4.0)
"""Logarithms of the signal-to-noise ratio that part the four noise levels, from little noise to much. Of SD's 1000
timesteps, they are those below 355, 650, 875, and the rest; of flow models, the levels sigma below 0.5, 0.73, 0.88,
and the rest."""
BY_NOISE = "/by_noise"
"""End of the names of sums by noise level."""
WEIGHT_BY_NOISE = f"weight{BY_NOISE}"
"""Name of the weight of each noise level."""
WATCHED_BY_NOISE = (
    *("error/winner", "error/loser", "error/reference_winner", "error/reference_loser", "error/drift"),
    *("pair/accuracy", "reward/margin", "vote/accuracy"),
)


def pair_metrics(inputs: LossInputs, **fields: float) -> Metrics:
    """Return the errors of the best and worst candidate and, if there are two, accuracy and margin.

    If there is a reference, its errors are returned too, and how far the policy's predictions are from its own.
    """
    metrics = {"error/winner": inputs.error_BK[:, 0]}
    if inputs.error_BK.shape[1] > 1:
        metrics["error/loser"] = inputs.error_BK[:, -1]
        metrics["pair/accuracy"] = implicit_accuracy(inputs.log_ratio_BK)
        metrics["reward/margin"] = margin(inputs.log_ratio_BK)
    if inputs.reference_error_BK is not None:
        metrics["error/reference_winner"] = inputs.reference_error_BK[:, 0]
        if inputs.error_BK.shape[1] > 1:
            metrics["error/reference_loser"] = inputs.reference_error_BK[:, -1]
    if inputs.drift_BK is not None:
        metrics["error/drift"] = inputs.drift_BK.mean(axis=1)
    return metrics


def list_metrics(inputs: LossInputs, **fields: float) -> Metrics:
    """Return the numbers of `pair_metrics` for lists: the winner is the best candidate, the loser the worst.

    The accuracy is the share of all pairs of a list, ties left out, in which the implicit reward prefers the better
    one; 1/2 if all are ties. Padding takes no part.
    """
    log_ratio_BK, valid_BK = inputs.log_ratio_BK, inputs.valid_BK
    best_B, worst_B = best_and_worst(inputs)

    def of(candidate_B: Int[Array, " B"], x_BK: Float[Array, "B K"]) -> Float[Array, " B"]:
        return jnp.take_along_axis(x_BK, candidate_B[:, None], axis=1)[:, 0]

    is_better_BKK = is_better(inputs.preference_BK, valid_BK)
    agrees_BKK = (1 + jnp.sign(log_ratio_BK[:, :, None] - log_ratio_BK[:, None])) / 2
    pairs_B = is_better_BKK.sum(axis=(1, 2))
    share_B = jnp.where(is_better_BKK, agrees_BKK, 0).sum(axis=(1, 2)) / jnp.maximum(pairs_B, 1)
    metrics = {
        "error/winner": of(best_B, inputs.error_BK),
        "error/loser": of(worst_B, inputs.error_BK),
        "pair/accuracy": jnp.where(pairs_B > 0, share_B, 0.5),
        "reward/margin": of(best_B, log_ratio_BK) - of(worst_B, log_ratio_BK),
    }
    if inputs.reference_error_BK is not None:
        metrics["error/reference_winner"] = of(best_B, inputs.reference_error_BK)
        metrics["error/reference_loser"] = of(worst_B, inputs.reference_error_BK)
    if inputs.drift_BK is not None:
        metrics["error/drift"] = inputs.drift_BK.mean(axis=1, where=valid_BK)
    return metrics


def best_and_worst(inputs: LossInputs) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Return the indices of the first and of the last candidate that is not padding: the winner and the loser."""
    valid_BK = inputs.valid_BK
    return valid_BK.argmax(axis=1), valid_BK.shape[1] - 1 - valid_BK[:, ::-1].argmax(axis=1)


def sums_by_noise(numbers: Metrics, inputs: LossInputs) -> dict[str, Float[Array, " N"]]:
    """Return the weighted sum of numbers [B] over the prompts of each noise level, and the weight of each level.

    A mean is the sum of many batches divided by their weight; a level that no prompt has drawn has weight 0. Empty if
    there are no noise levels, as for images that the model drew.
    """
    if inputs.log_snr_B is None:
        return {}
    watched = {name: numbers[name] for name in WATCHED_BY_NOISE if name in numbers} | {
        "weight": jnp.ones_like(inputs.weight_B)
    }
    return {f"{name}{BY_NOISE}": sum_by_noise(value_B * inputs.weight_B, inputs) for name, value_B in watched.items()}


def sum_by_noise(x_B: Float[Array, " B"], inputs: LossInputs) -> Float[Array, " N"]:
    """Return the sum of x over the prompts of each noise level."""
    level_B = sum((inputs.log_snr_B < edge).astype(jnp.int32) for edge in LOG_SNR_EDGES)
    is_at_NB = level_B == jnp.arange(len(LOG_SNR_EDGES) + 1)[:, None]
    return jnp.where(is_at_NB, x_B, 0).sum(axis=1)
