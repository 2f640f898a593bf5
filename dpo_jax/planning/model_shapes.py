"""The structure of a config's model, wherever its weights are."""

import tempfile
from pathlib import Path

from ml_collections import ConfigDict

from dpo_jax.cli import replaced
from dpo_jax.models.families import FAMILIES, PUBLISHED
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.training.model import open_model


def open_structure(config: ConfigDict) -> Pipeline:
    """The config's model with no weight read.

    A published model that is not here as a folder, and its replaced UNet or VAE, have the structure that the package
    knows of its family; nothing is fetched.
    """
    known = {family.published: family.name for family in FAMILIES.values()}
    if config.model in known and not Path(config.model).exists():
        family = known[config.model]
        own = {name: config[name] if config[name] and Path(config[name]).exists() else "" for name in ("unet", "vae")}
        config = replaced(config, {"model": str(PUBLISHED / family), "family": family, **own})
    with tempfile.TemporaryDirectory() as folder:
        return open_model(config, folder)
