"""The structure of a config's model, wherever its weights are."""

import tempfile
from pathlib import Path

from ml_collections import ConfigDict

from dpo_jax.models.families import FAMILIES, PUBLISHED
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.training.model import open_model


def open_structure(config: ConfigDict) -> Pipeline:
    """The config's model with no weight read.

    A published model that is not here as a folder, and its replaced UNet or VAE, have the structure that the package
    knows of its family; nothing is fetched.
    """
    known = {family.published: family.name for family in FAMILIES.values()}
    changed = config.copy_and_resolve_references()
    if config.model in known and not Path(config.model).exists():
        family = known[config.model]
        with changed.unlocked():
            changed.model, changed.family = str(PUBLISHED / family), family
            changed.unet, changed.vae = (
                path if path and Path(path).exists() else "" for path in (config.unet, config.vae)
            )
    with tempfile.TemporaryDirectory() as folder:
        return open_model(changed, folder)
