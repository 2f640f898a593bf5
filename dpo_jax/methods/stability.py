"""Plug-ins for every loss on pairs that keep the winner's error from rising, and the scale of the margins in order.

They change the log-ratios and gradients that a loss sees (`LossInputs`), or add a term to its value. By default only
the safeguard is on.

Axes: B pairs, K = 2 candidates, winner first, H x W latent cells, C channels.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo_jax.batch import LossInputs
from dpo_jax.fields import NOT_ALL, NOT_NEGATIVE, SHARE, Field
from dpo_jax.methods.metrics import Metrics
from dpo_jax.objectives.denoising import weighted_residual
from dpo_jax.objectives.preferences import margin

PAIR_FIELDS = {
    "auto_beta": Field(False, "Let beta follow the size of the margins; the method's beta is that of the first step."),
    "winner_penalty": Field(
        0.0, "Weight of the winner's rise above the reference's error inside the margin (DPO-Positive).", **NOT_NEGATIVE
    ),
    "winner_weight": Field(
        0.0, "Weight of plain fine-tuning on the winner, in units of beta / 2 per error.", **NOT_NEGATIVE
    ),
    "loser_weight": Field(1.0, "Weight of the loser's log-ratio in the margin; below 1 it is pushed less.", **SHARE),
    "safeguard": Field(
        "pair",
        "Scale the loser's gradient so that the winner does not get worse (SDPO), per pair or over a micro-batch.",
        choices=("none", "pair", "batch"),
    ),
    "safeguard_margin": Field(
        0.6, "SDPO's mu: the share of the winner's gain that must remain; published: 0.6, for SD1.5 0.9.", **NOT_ALL
    ),
    "anchor": Field(
        0.0, "Weight of the squared distance to the reference's predictions, in units of beta / 2.", **NOT_NEGATIVE
    ),
    "pair_clip": Field(
        0.0, "Scale down pairs whose error is more than this many times the reference's; 0 is off.", **NOT_NEGATIVE
    ),
    "timestep_weights": Field(
        "none",
        "Weight of a timestep in the loss: none, or min_snr (min(SNR, 5) / SNR of epsilon prediction).",
        choices=("none", "min_snr"),
    ),
}
"""Hyperparameters, under `loss.`, of every method that learns from pairs and reads log-ratios."""

TARGET = math.log(4)
"""The mean |z| that `auto_beta` aims at: there, sigmoid(z) is 0.8."""
SMALLEST, LARGEST = 75.0, 7500.0
"""Bounds of beta times the reference's error under `auto_beta`. The published beta of 5000 is 750 at SD1.5's 0.15."""
MIN_SNR = 5.0
"""Largest signal-to-noise ratio that counts in full (arXiv 2303.09556, section 3.4)."""


def running_numbers(fields: Mapping[str, Any]) -> dict[str, Callable[[LossInputs], Float[Array, " B"]]]:
    """Return the numbers whose running means `auto_beta` needs; none if it is off."""
    if not fields["auto_beta"]:
        return {}
    return {
        "abs_margin": lambda inputs: jnp.abs(margin(inputs.log_ratio_BK)),
        "reference_error": lambda inputs: inputs.reference_error_BK.mean(axis=1),
    }


def auto_beta(inputs: LossInputs, beta: float) -> Float[Array, ""]:
    """Return the beta at which the mean |z| of the last steps is log 4, within bounds; `beta` itself in the first step.

    One setting then serves any resolution and any kind of prediction, since margins and errors share their unit. The
    bounds hold beta times the reference's error: without the lower one, beta would fall for ever while margins grow,
    and nothing would hold the policy near the reference. The idea, with other bounds, is SimpleTuner's flow_dpo.
    """
    error, size = inputs.running["reference_error"], inputs.running["abs_margin"]
    known = error > 0
    error = jnp.where(known, error, 1.0)
    wanted = TARGET / jnp.maximum(size, 1e-30)
    return jnp.where(known, jnp.clip(wanted, SMALLEST / error, LARGEST / error), beta)


def loser_gradient(inputs: LossInputs, mu: float, over: str) -> Float[Array, " B"]:
    """Return by how much the loser's gradient is scaled: `clip((1 - mu) |g_w|^2 / <g_w, g_l>, 0, 1)`, 1 if they differ.

    g is the gradient of an error by the prediction. This is Diffusion-SDPO's safeguard (arXiv 2511.03317 and its
    released code). The code sums over the micro-batch of a device (`over="batch"`), so that its results depend on their
    number; `over="pair"` does not. Published mu: 0.9 for SD1.5, 0.6 for SDXL.
    """
    residual_BKHWC = jax.lax.stop_gradient(weighted_residual(inputs))
    winner_BHWC, loser_BHWC = residual_BKHWC[:, 0], residual_BKHWC[:, 1]
    own_B = jnp.square(winner_BHWC).sum(axis=(1, 2, 3))
    common_B = (winner_BHWC * loser_BHWC).sum(axis=(1, 2, 3))
    if over == "batch":
        own_B, common_B = (jnp.broadcast_to((x_B * inputs.weight_B).sum(), x_B.shape) for x_B in (own_B, common_B))
    scale_B = jnp.clip((1 - mu) * own_B / jnp.where(common_B > 0, common_B, 1.0), 0, 1)
    return jnp.where(common_B > 0, scale_B, 1.0)


def scale_gradient(x_BK: Float[Array, "B K"], scale_BK: Float[Array, "B K"]) -> Float[Array, "B K"]:
    """Return x, whose gradient is multiplied by a scale."""
    scale_BK = jax.lax.stop_gradient(scale_BK)
    return scale_BK * x_BK + jax.lax.stop_gradient((1 - scale_BK) * x_BK)


def stabilised(
    loss: Callable[..., Float[Array, " B"]], values: Mapping[str, Any], fields: Mapping[str, Any], scale: str
) -> Callable[[LossInputs], Float[Array, " B"]]:
    """Return the loss with the plug-ins that `fields` turn on.

    Args:
        loss: of the method.
        values: hyperparameters of the method.
        fields: values of `PAIR_FIELDS`.
        scale: name of the hyperparameter that multiplies the margin; "" if there is none.
    """

    def stable(inputs: LossInputs) -> Float[Array, " B"]:
        beta = values.get(scale, 1.0)
        if fields["auto_beta"]:
            beta = auto_beta(inputs, beta)
        share_BK = jnp.ones_like(inputs.log_ratio_BK)
        if fields["safeguard"] != "none":
            loser_B = loser_gradient(inputs, fields["safeguard_margin"], fields["safeguard"])
            share_BK = share_BK.at[:, 1].multiply(loser_B)
        if fields["pair_clip"]:
            limit_BK = fields["pair_clip"] * inputs.reference_error_BK
            clipped_BK = jnp.where(inputs.error_BK > limit_BK, limit_BK / inputs.error_BK, 1)
            share_BK *= clipped_BK.min(axis=1, keepdims=True)
        if fields["safeguard"] != "none" or fields["pair_clip"]:
            inputs = inputs._replace(
                log_ratio_BK=scale_gradient(inputs.log_ratio_BK, share_BK),
                error_BK=scale_gradient(inputs.error_BK, share_BK),
            )
        winner_B, loser_B = inputs.log_ratio_BK[:, 0], inputs.log_ratio_BK[:, 1]
        if fields["winner_penalty"]:
            winner_B = winner_B - fields["winner_penalty"] * jax.nn.relu(-winner_B)
        seen = inputs._replace(log_ratio_BK=jnp.stack([winner_B, fields["loser_weight"] * loser_B], axis=1))
        loss_B = loss(seen, **(dict(values) | ({scale: beta} if scale else {})))
        if fields["winner_weight"]:
            loss_B = loss_B - fields["winner_weight"] * beta * inputs.log_ratio_BK[:, 0]
        if fields["anchor"]:
            apart_BKHWC = jnp.square(inputs.prediction_BKHWC - inputs.reference_prediction_BKHWC)
            loss_B = loss_B + fields["anchor"] * beta / 2 * apart_BKHWC.mean(axis=(2, 3, 4)).sum(axis=1)
        if fields["timestep_weights"] == "min_snr":
            loss_B = loss_B * jnp.minimum(1.0, MIN_SNR * jnp.exp(-inputs.log_snr_B))
        return loss_B

    return stable


def stability_metrics(
    metrics: Callable[[LossInputs], Metrics], fields: Mapping[str, Any], beta: float
) -> Callable[[LossInputs], Metrics]:
    """Return the metrics, with beta and the scale of the loser's gradient where plug-ins choose them."""

    def more(inputs: LossInputs) -> Metrics:
        found = dict(metrics(inputs))
        if fields["auto_beta"]:
            found["pair/beta"] = jnp.broadcast_to(auto_beta(inputs, beta), inputs.log_ratio_BK.shape[:1])
        if fields["safeguard"] != "none":
            found["pair/loser_gradient"] = loser_gradient(inputs, fields["safeguard_margin"], fields["safeguard"])
        return found

    return more
