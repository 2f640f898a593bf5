"""Diffusion-KTO: learn from single images, each liked or disliked (arXiv 2404.04465)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo_jax.batch import LossInputs
from dpo_jax.fields import SHARE, Field
from dpo_jax.methods.method import Method
from dpo_jax.methods.metrics import Metrics

VOTE_FIELDS: Mapping[str, Field] = {
    "data.positive_share": Field(
        0.8, "Share of liked images among the examples of training; each kind is shuffled on its own.", **SHARE
    )
}
"""Fields of all methods that learn from votes, by dotted path."""


def kto(inputs: LossInputs, *, beta: float) -> Float[Array, " B"]:
    """Return `1 - sigmoid(+-beta (log_ratio - z0))`: plus for a liked image, minus for a disliked one.

    `z0` is the mean log-ratio over the whole batch, at least 0, without a gradient. A vote between 0 and 1, as of a
    tied pair, mixes both. Published beta: 1000 times the gain, which is twice our log-ratio, hence 2000 here.
    """
    z_B = beta * (inputs.log_ratio_BK[:, 0] - baseline(inputs))
    liked_B = inputs.preference_BK[:, 0]
    return liked_B * jax.nn.sigmoid(-z_B) + (1 - liked_B) * jax.nn.sigmoid(z_B)


def baseline(inputs: LossInputs) -> Float[Array, ""]:
    """Return z0. Images of weight 0, such as padding, have no part in it."""
    log_ratio_B, weight_B = jax.lax.stop_gradient(inputs.log_ratio_BK[:, 0]), inputs.weight_B
    return jnp.maximum(0, jnp.sum(weight_B * log_ratio_B) / jnp.maximum(jnp.sum(weight_B), 1e-8))


def vote_metrics(inputs: LossInputs) -> Metrics:
    """Return whether the implicit reward agrees with the vote (1/2 if it is 0), the signed log-ratio, and errors."""
    signed_B = jnp.sign(2 * inputs.preference_BK[:, 0] - 1) * inputs.log_ratio_BK[:, 0]
    metrics = {
        "vote/accuracy": (1 + jnp.sign(signed_B)) / 2,
        "reward/signed": signed_B,
        "error/image": inputs.error_BK[:, 0],
    }
    if inputs.reference_error_BK is not None:
        metrics["error/reference_image"] = inputs.reference_error_BK[:, 0]
    return metrics


def metrics(inputs: LossInputs, **fields: float) -> Metrics:
    """Return `vote_metrics` and z0."""
    return vote_metrics(inputs) | {"reward/baseline": jnp.broadcast_to(baseline(inputs), inputs.weight_B.shape)}


KTO = Method(
    name="kto",
    title="Diffusion-KTO",
    paper="2404.04465",
    loss=kto,
    learns_from="votes",
    fields={"beta": Field(2000.0, "Strength of the pull towards the reference.", above=0)},
    over_whole_batch=True,
    metrics=metrics,
    held_out_metrics=vote_metrics,
)
