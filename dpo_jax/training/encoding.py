"""Stores the outputs of a config's frozen models for its data set, for training with `data.encoded_views`."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import jax
from ml_collections import ConfigDict

from dpo_jax import cluster
from dpo_jax.data.images import View
from dpo_jax.data.store.latents import folder_of, is_finished, open_latents
from dpo_jax.data.store.prepared import open_prepared
from dpo_jax.encode.dataset import DatasetEncoder, OnProgress
from dpo_jax.errors import UserError
from dpo_jax.files import check_inside
from dpo_jax.sharding import Placement, make_mesh
from dpo_jax.training.config import check
from dpo_jax.training.data import bucket_shapes, encoding_facts
from dpo_jax.training.model import load_encoders, load_tokenizers_of, open_model


def encode_data(config: ConfigDict, workers: int | None, say: Callable[[str], None], on_progress: OnProgress) -> Path:
    """Encode the images and captions of `config.data.path` that are not stored yet, and return the folder.

    It says first how much there is to do and how long it will take.

    Args:
        workers: threads that decode images; None for one per core.

    Raises:
        MissingFileError: there is no prepared data set.
        UserError: the config is wrong, or its views cannot be stored.
        OSError: the disk is full.
    """
    data = config.data
    if not data.encoded_views:
        raise UserError(
            "config.data.encoded_views=0 trains from images; set it to the number of views to store of each: 1 for the "
            "centre (with random_flip=False), 2 for it and its mirror image, more for random crops"
        )
    check(config)
    prepared = open_prepared(data.path)
    check_inside(prepared.folder / "encoded", prepared.folder)
    pipeline = open_model(config, prepared.folder / "encoded" / config.model.replace(":", "-"))
    facts = encoding_facts(config, pipeline)
    folder = folder_of(prepared.folder, facts)
    check_inside(folder, prepared.folder)
    if is_finished(folder):
        with contextlib.suppress(ValueError):  # damaged parts are made again
            open_latents(prepared.folder, facts)
            return folder
    with cluster.locked(folder.parent, "python -m dpo_jax.prepare --encode", f".{folder.name}.lock", what=folder):
        placement = Placement(make_mesh(devices=jax.local_devices()))
        encoder = DatasetEncoder(
            pipeline,
            load_encoders(config, pipeline, placement),
            load_tokenizers_of(pipeline),
            prepared,
            placement.mesh,
            folder,
            resolution=data.resolution,
            views=[View(**view) for view in facts["views"]],
            num_workers=workers or os.cpu_count() or 1,
            caption_lines=data.caption_lines,
            shapes=bucket_shapes(config, pipeline),
        )
        say(str(encoder))
        encoder.run(facts, on_progress)
    return folder
