"""Opens the structure of a config's model without its weights."""

import tempfile
from pathlib import Path

from ml_collections import ConfigDict

from dpo_jax.cli import replaced
from dpo_jax.models.families import DENOISERS, FAMILIES, PUBLISHED
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.training.model import open_model


def open_structure(config: ConfigDict) -> Pipeline:
    """Return the config's model without reading its weights, and without downloading anything.

    A published model that is not a local folder, and a denoiser or VAE named in its place, get the structure that the
    package knows for the family.
    """
    known = {name: family for family in FAMILIES.values() for name in (family.published, *family.also_published)}
    if config.model in known and not Path(config.model).exists():
        family = known[config.model]
        own = {
            name: config[name] if config[name] and Path(config[name]).exists() else "" for name in (*DENOISERS, "vae")
        }
        denoiser = family.denoiser.folder
        own[denoiser] = own[denoiser] or str(family.published_denoiser(config.model))
        config = replaced(config, {"model": str(PUBLISHED / family.name), "family": family.name, **own})
    with tempfile.TemporaryDirectory() as folder:
        return open_model(config, folder)
