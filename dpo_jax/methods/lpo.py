"""LPO: step-level preferences by a reward in latents (arXiv 2502.01051)."""

import dataclasses

from dpo_jax.fields import Field
from dpo_jax.methods.spo import SPO

LPO = dataclasses.replace(
    SPO,
    name="lpo",
    title="LPO's step-level preferences",
    paper="2502.01051",
    fields={"beta": Field(500.0, "Strength of the pull towards the reference.", above=0)},
    problem=lambda config: (
        None
        if config["online.latent_judge"]
        else 'config.loss.name="lpo" judges latents, but online.latent_judge is empty. Name a tuned UNet, or set '
        'loss.name="spo"'
    ),
)
"""The paper trains a reward model in latents. Here it is the implicit reward of two UNets, such as a model tuned by
DPO and its base: `online.latent_judge`. Of the paper, only the loss and the way to sample are here."""
