"""Norms of the loss's gradient by the policy's predictions of winners and of losers: which side drives the training.

A norm over the parameters would need another backward pass for each side. By the predictions it follows from the loss
alone, without the network.

Axes: B prompts, K candidates of a prompt, best first, H x W latent cells, C channels.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo_jax.batch import LossInputs
from dpo_jax.methods.metrics import BY_NOISE, Metrics, best_and_worst, sum_by_noise
from dpo_jax.objectives.denoising import weighted_residual

SIDES = ("gradient_norm/winner_prediction", "gradient_norm/loser_prediction")
"""Names of the norms, in the order of `best_and_worst`."""


def squares_of_loss(loss: Callable[[LossInputs], jax.Array], inputs: LossInputs) -> Metrics:
    """Return `squares_of_sides` of the gradient of `loss(inputs)`, a sum over the batch; without a gradient itself.

    A loss may read log-ratios, errors and predictions, so the gradient by a prediction has three parts.
    """
    if not _has_sides(inputs):
        return {}
    inputs = jax.lax.stop_gradient(inputs)
    names = ("log_ratio_BK", "error_BK", "prediction_BKHWC")
    parts = {name: getattr(inputs, name) for name in names}
    slopes = jax.grad(lambda parts: loss(inputs._replace(**parts)))(parts)
    slope_BK = slopes["error_BK"] - slopes["log_ratio_BK"] / 2  # a log-ratio is -error / 2 and a constant
    return squares_of_sides(gradient_of_error(slope_BK, inputs) + slopes["prediction_BKHWC"], inputs)


def squares_of_slopes(slope_BK: Float[Array, "B K"], inputs: LossInputs) -> Metrics:
    """Return `squares_of_sides` of a loss with these slopes along the errors, which reads nothing else."""
    if not _has_sides(inputs):
        return {}
    inputs = jax.lax.stop_gradient(inputs)
    return squares_of_sides(gradient_of_error(slope_BK, inputs), inputs)


def gradient_of_error(slope_BK: Float[Array, "B K"], inputs: LossInputs) -> Float[Array, "B K H W C"]:
    """Return the gradient by the predictions of errors times their slopes."""
    residual_BKHWC = weighted_residual(inputs)
    cells = residual_BKHWC[0, 0].size
    return (slope_BK * 2 / cells)[:, :, None, None, None] * residual_BKHWC


def squares_of_sides(gradient_BKHWC: Float[Array, "B K H W C"], inputs: LossInputs) -> Metrics:
    """Return the squared norm over all winners and over all losers under the names of `SIDES`, also by noise level."""
    square_BK = jnp.square(gradient_BKHWC).sum(axis=(2, 3, 4))
    found = {}
    for name, candidate_B in zip(SIDES, best_and_worst(inputs), strict=True):
        is_it_BK = jnp.arange(square_BK.shape[1]) == candidate_B[:, None]
        square_B = jnp.where(is_it_BK, square_BK, 0).sum(axis=1)
        found[name] = square_B.sum()
        if inputs.log_snr_B is not None:
            found[f"{name}{BY_NOISE}"] = sum_by_noise(square_B, inputs)
    return found


def side_norms(means: Metrics, total_weight: jax.Array) -> Metrics:
    """Return the norms for the mean loss of the batch, from squares for its sum that were divided by the weight.

    A sum by noise level is later divided by the level's share of the weight, which gives the norm for the mean loss of
    the prompts of that level.
    """
    return {
        name: jnp.sqrt(mean / total_weight.astype(mean.dtype)) for name, mean in means.items() if name.startswith(SIDES)
    }


def _has_sides(inputs: LossInputs) -> bool:
    return inputs.prediction_BKHWC is not None and inputs.error_BK.shape[1] > 1
