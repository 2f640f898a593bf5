"""Diffusion-LPO: learn from lists of ranked images by the Plackett-Luce model (arXiv 2510.01540)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo_jax.batch import LossInputs
from dpo_jax.fields import Field
from dpo_jax.methods.method import Method
from dpo_jax.objectives.preferences import is_better

LIST_FIELDS: Mapping[str, Field] = {
    "data.candidates": Field(
        4,
        "Images of a prompt in a step: of more, the best ones and the worst; fewer are filled up with padding.",
        at_least=2,
        at_most=256,
    )
}
"""Fields of all methods that learn from lists, by dotted path."""


def plackett_luce(inputs: LossInputs, *, beta: float) -> Float[Array, " B"]:
    """Return `-sum_k log(exp(beta l_k) / sum_j exp(beta l_j))`, where j is k itself and all that are worse than k.

    l are log-ratios. Without ties, this is the negative log-likelihood of the ranking under the Plackett-Luce model:
    the best candidate wins against all, the second against the rest, and so on. It is the sum over the positions, as
    published, so long lists weigh more. Candidates with equal preference do not compete with each other: each has to
    win against those that are strictly worse. Padding takes no part. With two candidates it is Diffusion-DPO's loss;
    a list in which all are equal has loss 0.

    The published formula has beta times the gain, which is twice our log-ratio, so a published beta doubles here. The
    authors' code is not public; the default is that of Diffusion-DPO.
    """
    log_ratio_BK = inputs.log_ratio_BK
    is_better_BKK = is_better(inputs.preference_BK, inputs.valid_BK)
    has_worse_BK = is_better_BKK.any(axis=2)
    # The term of k is softplus(log sum_j exp(beta (l_j - l_k))) over the worse j, which is exact where it is tiny.
    ahead_BKK = jnp.where(is_better_BKK, beta * (log_ratio_BK[:, None] - log_ratio_BK[:, :, None]), 0)
    counted_BKK = is_better_BKK | ~has_worse_BK[:, :, None]  # a sum over nothing would have no gradient
    loss_BK = jax.nn.softplus(jax.nn.logsumexp(ahead_BKK, axis=2, where=counted_BKK))
    return jnp.where(has_worse_BK, loss_BK, 0).sum(axis=1)


PLACKETT_LUCE = Method(
    name="plackett_luce",
    title="Diffusion-LPO (Plackett-Luce)",
    paper="2510.01540",
    loss=plackett_luce,
    learns_from="lists",
    fields={"beta": Field(5000.0, "Strength of the pull towards the reference.", above=0)},
)
