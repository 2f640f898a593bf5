"""The data that a config names, opened: pairs chosen, what they become, and batches of them."""

from pathlib import Path
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from dpo_jax import cluster
from dpo_jax.cli import replaced
from dpo_jax.data.load.inputs import CachedInputs, Inputs, RawInputs
from dpo_jax.data.load.pipeline import (
    NUM_WORKERS,
    BatchIterator,
    TrainingRecords,
    make_iterator,
    open_records,
    validation_batches,
)
from dpo_jax.data.store.latents import choose_views, open_latents
from dpo_jax.data.store.prepared import NothingChosenError
from dpo_jax.data.store.scores import scores_file
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.training.announce import announce_epochs
from dpo_jax.training.config import Derived
from dpo_jax.training.model import load_tokenizers_of
from dpo_jax.weights.io import fingerprint


def check_data(config: ConfigDict) -> ConfigDict:
    """Opens the splits that the run will read and chooses from them, before anything else takes time.

    Returns the config; where no pair is held out, as in small data sets, with validation turned off, and says so.
    """
    pairs = len(_training_pairs(config))
    announce_epochs(config, pairs)
    if config.validation.every:
        try:
            _validation_pairs(config)
        except NothingChosenError as error:
            _say(f"validation is off: {error}. To validate, prepare more prompts or a larger --validation_fraction")
            return replaced(config, {"validation.every": 0})
    return config


def _say(message: str) -> None:
    if cluster.is_first():
        print(message, flush=True)


def make_inputs(config: ConfigDict, pipeline: Pipeline) -> Inputs:
    """What images and captions become: encoded by the step, or stored before by `prepare --encode`.

    Raises FileNotFoundError when nothing was stored by these models with these settings.
    """
    data = config.data
    if data.encoded_views:
        return CachedInputs(open_latents(Path(data.path), encoding_facts(config, pipeline)))
    return RawInputs(data.resolution, load_tokenizers_of(pipeline), data.random_crop, data.random_flip)


def encoding_facts(config: ConfigDict, pipeline: Pipeline) -> dict[str, Any]:
    """All that stored encodings depend on. They are stored and looked up by it."""
    data = config.data
    views = choose_views(data.encoded_views, random_crop=data.random_crop, random_flip=data.random_flip)
    return {
        "family": pipeline.family.name,
        "models": pipeline.fingerprint([name for name in pipeline.components if name != "unet"]),
        "dtype": config.dtype,
        "vae_dtype": config.vae_dtype,
        "resolution": data.resolution,
        "views": [view._asdict() for view in views],
        "data": data_fingerprint(data.path),
        **({"caption_lines": True} if data.caption_lines else {}),  # what was stored before there was a choice has none
    }


def data_fingerprints(config: ConfigDict) -> dict[str, str]:
    """Fields for config.json: digests of the prepared data set and of the scores that order its images."""
    data = config.data
    if data.path.startswith("random:"):
        return {"fingerprints.data": data.path}
    digests = {"fingerprints.data": data_fingerprint(data.path)}
    if data.judges:
        files = [epath.Path(scores_file(Path(data.path), judge)) for judge in data.judges]
        digests["fingerprints.scores"] = fingerprint(files)
    return digests


def data_fingerprint(folder: str) -> str:
    return fingerprint([epath.Path(folder) / name for name in ("records.arrow", "images.arrow")])


def open_training_batches(config: ConfigDict, derived: Derived, inputs: Inputs) -> BatchIterator:
    """This process's share of the endless training stream; reads nothing but the data set's index yet."""
    data = config.data
    return make_iterator(
        _training_pairs(config),
        inputs,
        batch_size=derived.local_batch_size,
        seed=config.seed,
        caption_dropout=data.caption_dropout,
        relabel=data.relabel,
        num_workers=data.num_workers or NUM_WORKERS,
        **_options(config),
    )


def open_validation_batches(config: ConfigDict, derived: Derived, inputs: Inputs) -> BatchIterator:
    """This process's share of the held-out pairs, once, in order; the last batches may hold rows of weight 0."""
    batch_size = derived.local_batch_size // derived.accumulation
    return validation_batches(_validation_pairs(config), inputs, batch_size=batch_size, **_options(config))


def _training_pairs(config: ConfigDict) -> TrainingRecords:
    data = config.data
    return open_records(
        data.path,
        "train",
        ties=data.ties,
        labels=data.labels,
        limit=data.limit,
        limit_seed=data.limit_seed,
        **_choices(config),
    )


def _validation_pairs(config: ConfigDict) -> TrainingRecords:
    """Without ties, which no model can order rightly or wrongly."""
    return open_records(config.data.path, "validation", **_choices(config))


def _choices(config: ConfigDict) -> dict[str, Any]:
    """What training and validation pairs have in common."""
    data = config.data
    return {
        "judges": data.judges,
        "combine": data.combine,
        "generators": data.generators,
        "min_agreement": data.min_agreement,
        "min_side": data.min_side,
        "liked_images": config.loss.name == "sft",
    }


def _options(config: ConfigDict) -> dict[str, Any]:
    """What training and validation batches have in common."""
    return {
        "size_conditioning": config.data.size_conditioning,
        "caption_lines": config.data.caption_lines,
        "shard_index": jax.process_index(),
        "shard_count": jax.process_count(),
    }
