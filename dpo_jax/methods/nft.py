"""DiffusionNFT: towards good images, and away from bad ones, in the forward process (arXiv 2509.16117)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo_jax.batch import LossInputs
from dpo_jax.fields import Field
from dpo_jax.methods.method import Method
from dpo_jax.methods.metrics import Metrics

FLOOR = 1e-5
"""Least mean absolute error that a squared error is divided by, as in the released code."""


def nft(
    inputs: LossInputs, *, strength: float, advantage_clip: float, kl_weight: float, **fields: float
) -> Float[Array, " B"]:
    """Return the mean over candidates of `C (r e+ + (1 - r) e-) / b + kl_weight |v - v_ref|^2`.

    With b = `strength`, C = `advantage_clip` and `r = (clip(A, -C, C) / C + 1) / 2`, e+ is the error of the image that
    `b v + (1 - b) v_old` leads to, and e- that of `(1 + b) v_old - b v`: their mean square over their mean absolute
    value, which is held fixed. Bad images (r below 1/2) move v away from what denoises them.

    This is the released code (https://github.com/NVlabs/DiffusionNFT). The paper has no factor C, and maps advantages
    to r by their largest. At v = v_old the gradient is that of `A e` for any b and C.
    """
    b, C = strength, advantage_clip
    r_BK = (jnp.clip(inputs.advantage_BK, -C, C) / C + 1) / 2
    towards_BKHWC = b * inputs.prediction_BKHWC + (1 - b) * inputs.old_prediction_BKHWC
    away_BKHWC = (1 + b) * inputs.old_prediction_BKHWC - b * inputs.prediction_BKHWC
    loss_BK = C / b * (r_BK * _error(inputs, towards_BKHWC) + (1 - r_BK) * _error(inputs, away_BKHWC))
    if kl_weight:
        loss_BK += kl_weight * distance_to_reference(inputs)
    return loss_BK.mean(axis=1)


def _error(inputs: LossInputs, prediction_BKHWC: Float[Array, "B K H W C"]) -> Float[Array, "B K"]:
    """Return the mean square of the error of the image that follows from a prediction, over its mean size."""
    x0_per_prediction_B1111 = inputs.x0_per_prediction_B[:, None, None, None, None]
    apart_BKHWC = x0_per_prediction_B1111 * (prediction_BKHWC - inputs.target_BKHWC)
    size_BK = jnp.maximum(jax.lax.stop_gradient(jnp.abs(apart_BKHWC).mean(axis=(2, 3, 4))), FLOOR)
    return jnp.square(apart_BKHWC).mean(axis=(2, 3, 4)) / size_BK


def distance_to_reference(inputs: LossInputs) -> Float[Array, "B K"]:
    """Return the mean squared difference of the predictions of policy and reference."""
    assert inputs.reference_prediction_BKHWC is not None
    return jnp.square(inputs.prediction_BKHWC - inputs.reference_prediction_BKHWC).mean(axis=(2, 3, 4))


def metrics(inputs: LossInputs, **fields: float) -> Metrics:
    """Return metrics by name, one number per prompt.

    `policy/change` is the mean squared difference of the predictions of the policy and of the one that drew,
    `error/good` and `error/bad` the mean squared errors of the images above and below their expectation, 0 where there
    are none, and `policy/reference_distance` that of `distance_to_reference`.
    """
    change_BK = jnp.square(inputs.prediction_BKHWC - inputs.old_prediction_BKHWC).mean(axis=(2, 3, 4))
    found = {"policy/change": change_BK.mean(axis=1)}
    for name, chosen_BK in (("good", inputs.advantage_BK > 0), ("bad", inputs.advantage_BK < 0)):
        error_B = jnp.where(chosen_BK, inputs.error_BK, 0).sum(axis=1)
        found[f"error/{name}"] = error_B / jnp.maximum(chosen_BK.sum(axis=1), 1)
    if inputs.reference_prediction_BKHWC is not None:
        found["policy/reference_distance"] = distance_to_reference(inputs).mean(axis=1)
    return found


def pulls_to_reference(config: Mapping[str, Any]) -> bool:
    """Whether the loss reads the reference."""
    return bool(config["loss.kl_weight"])


def old_decay(config: Mapping[str, Any], updates: jax.Array) -> jax.Array:
    """Return how much of the policy that draws remains when a round ends, after `updates` optimizer steps."""
    since = jnp.maximum(updates - config["loss.old_decay_from"], 0)
    return jnp.minimum(config["loss.old_decay_rate"] * since, config["loss.old_decay_most"])


NFT = Method(
    name="nft",
    title="DiffusionNFT",
    paper="2509.16117",
    loss=nft,
    learns_from="rollouts",
    fields={
        "strength": Field(1.0, "How far the two predictions are from what drew; 0.1 for several judges.", above=0),
        "advantage_clip": Field(5.0, "Largest advantage.", above=0),
        "kl_weight": Field(1e-4, "Weight of the distance from the reference; 0 needs no reference.", at_least=0),
        "old_decay_rate": Field(0.001, "Growth per update of what remains of the policy that draws.", at_least=0),
        "old_decay_most": Field(0.5, "Most that remains of the policy that draws.", at_least=0, at_most=1),
        "old_decay_from": Field(0, "Updates after which something of it remains.", at_least=0),
    },
    sets={
        "online.advantage": "round",
        "online.candidates": 8,
        "online.guidance": 1.0,
        "online.eta": 0.0,
        "online.timesteps": 0.9,
    },
    needs_reference=pulls_to_reference,
    reads_advantages=True,
    reads_transitions=False,
    old_decay=old_decay,
    metrics=metrics,
)
