"""DPOK: DDPO's policy gradient plus a divergence from the reference (arXiv 2305.16381)."""

import dataclasses

from jaxtyping import Array, Float

from dpo_jax.batch import LossInputs
from dpo_jax.fields import Field
from dpo_jax.methods.ddpo import DDPO, ddpo


def dpok(
    inputs: LossInputs, *, kl_weight: float = 0.01, clip: float = 1e-4, advantage_clip: float = 5.0
) -> Float[Array, " B"]:
    """Return `ddpo` plus a divergence from the reference, as D3PO's authors compare with it (arXiv 2305.16381).

    The divergence is the KL divergence of the two Gaussians of a transition. The released code of that comparison takes
    it between softmaxes over the batch, which is 0 for a batch of one; DPOK's own code penalises
    `|eps - eps_reference|^2`.
    """
    return ddpo(inputs, clip=clip, advantage_clip=advantage_clip) + kl_weight * inputs.kl_BK.mean(axis=1)


DPOK = dataclasses.replace(
    DDPO,
    name="dpok",
    title="DPOK",
    paper="2305.16381",
    loss=dpok,
    fields={"kl_weight": Field(0.01, "Weight of the divergence from the reference.", at_least=0), **DDPO.fields},
    sets={"online.reference": "initial"},
    needs_reference=True,
    problem=lambda config: (
        None
        if config["online.reference"] == "initial"
        else 'loss.name="dpok" needs a reference network. Set config.online.reference="initial"'
    ),
)
