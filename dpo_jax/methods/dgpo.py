"""DGPO: Diffusion-DPO's loss for a group of drawn images instead of a pair (arXiv 2510.08425)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo_jax.batch import LossInputs
from dpo_jax.fields import Field
from dpo_jax.methods import nft
from dpo_jax.methods.method import Method


def dgpo(
    inputs: LossInputs, *, beta: float, advantage_clip: float, clip: float, kl_weight: float
) -> Float[Array, " B"]:
    """Return `-log sigmoid(-G) / beta + kl_weight mean |v - v_ref|^2`, with `G = beta mean_K(A (e - e_ref))`.

    The gradient is that of the released code (https://github.com/Luo-Yihong/DGPO), `sigmoid(G) mean_K(A e)` with the
    sigmoid held fixed. Two candidates with advantages 1 and -1 make it that of Diffusion-DPO with the same beta, over
    beta. Beyond a ratio `exp(e_old - e)` of 1 + clip a good image has no gradient, below 1 - clip a bad one; e_old is
    the error of the policy that drew.
    """
    advantage_BK = jnp.clip(inputs.advantage_BK, -advantage_clip, advantage_clip)
    ratio_BK = jnp.exp(error_of(inputs, inputs.old_prediction_BKHWC) - inputs.error_BK)
    is_far_BK = jnp.where(advantage_BK > 0, ratio_BK > 1 + clip, ratio_BK < 1 - clip)
    error_BK = jnp.where(is_far_BK, jax.lax.stop_gradient(inputs.error_BK), inputs.error_BK)
    apart_BK = error_BK - error_of(inputs, inputs.reference_prediction_BKHWC)
    loss_B = -jax.nn.log_sigmoid(-beta * (advantage_BK * apart_BK).mean(axis=1)) / beta
    return loss_B + kl_weight * nft.distance_to_reference(inputs).mean(axis=1)


def error_of(inputs: LossInputs, prediction_BKHWC: Float[Array, "B K H W C"] | None) -> Float[Array, "B K"]:
    """Return the mean squared error of a prediction."""
    assert prediction_BKHWC is not None
    return jnp.square(prediction_BKHWC - inputs.target_BKHWC).mean(axis=(2, 3, 4))


DGPO = Method(
    name="dgpo",
    title="DGPO",
    paper="2510.08425",
    loss=dgpo,
    learns_from="rollouts",
    fields={
        "beta": Field(100.0, "Strength of the pull towards the reference.", above=0),
        "advantage_clip": Field(5.0, "Largest advantage.", above=0),
        "clip": Field(0.01, "How far the ratio to the policy that drew may be from 1.", above=0),
        "kl_weight": Field(0.0, "Weight of the distance from the reference.", at_least=0),
    },
    sets=nft.NFT.sets,
    reads_advantages=True,
    reads_transitions=False,
    shares_noise=True,
    old_decay=lambda config, updates: jnp.zeros(()),
    metrics=nft.metrics,
)
