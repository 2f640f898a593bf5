"""Opens the data that a config names: chooses pairs, and makes batches of them.

Axes: N records, M candidates of all records together.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dpo_jax import cluster
from dpo_jax.cli import flatten, replaced
from dpo_jax.data import buckets
from dpo_jax.data.images import Shape
from dpo_jax.data.load.curriculum import CurriculumOrder
from dpo_jax.data.load.inputs import CachedInputs, Inputs, RawInputs
from dpo_jax.data.load.pipeline import NUM_WORKERS, BatchIterator, make_iterator, validation_batches
from dpo_jax.data.load.records import PreparedRecords, RandomRecords, TrainingRecords, open_records
from dpo_jax.data.load.votes import VoteOrder, Votes
from dpo_jax.data.store.latents import bucket_facts, choose_views, open_latents
from dpo_jax.data.store.prepared import open_prepared
from dpo_jax.data.store.scores import scores_file
from dpo_jax.data.store.select import NothingChosenError
from dpo_jax.methods import find_method
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.streams import warn
from dpo_jax.training.announce import announce_epochs
from dpo_jax.training.buckets import all_shapes, describe
from dpo_jax.training.config import Derived
from dpo_jax.training.model import load_tokenizers_of
from dpo_jax.training.pair_scores import score_judge
from dpo_jax.weights.io import fingerprint


def check_data(config: ConfigDict) -> ConfigDict:
    """Open the splits that the run will read, choose pairs, and print the number of epochs, before slow work begins.

    Returns the config. Where no pair is held out, as in small data sets, it turns validation off and says so. Warns
    where a part of every list would be padding.
    """
    records: TrainingRecords = _training_pairs(config)
    _say_weights(records)
    _say_masks(records, config.data.masks)
    most = int(records.candidates()[0].max())
    if _learns_from_lists(config) and most < config.data.candidates:
        warn(
            f"config.data.candidates={config.data.candidates}, but no prompt has more than {most} images. The rest is "
            f"padding, which takes time and memory. Set data.candidates={most}"
        )
    if _learns_from_votes(config):
        records = Votes(records)
        VoteOrder(records.liked_V, config.seed, config.data.positive_share)  # checks that there are both kinds
    announce_epochs(config, len(records))
    if config.validation.every:
        try:
            _validation_pairs(config)
        except NothingChosenError as error:
            _say(f"validation is off: {error}. To validate, prepare more prompts or a larger --validation_fraction")
            return replaced(config, {"validation.every": 0})
    return config


def _say_weights(records: TrainingRecords) -> None:
    """Print the range of the weights in the loss, unless they are all equal."""
    if isinstance(records, PreparedRecords) and (weight_N := records.weight_N).min() < weight_N.max():
        _say(f"weights in the loss: {weight_N.min():.3g} to {weight_N.max():.3g}, with a mean of 1")


def _say_masks(records: TrainingRecords, used: bool) -> None:
    """Print how many records have a mask, if any have, and whether masks count."""
    if isinstance(records, PreparedRecords) and (number := records.number_masked):
        use = "" if used else ", which only data.masks=True uses"
        _say(f"masks: {number} of {len(records)} records have one{use}")


def _say(message: str) -> None:
    if cluster.is_first():
        print(message, flush=True)


def make_inputs(config: ConfigDict, pipeline: Pipeline) -> Inputs:
    """Return what makes the inputs of a batch: images and captions, or latents that `prepare --encode` stored.

    Raises:
        MissingFileError: nothing was stored with these models and settings.
    """
    data = config.data
    if data.encoded_views:
        return CachedInputs(open_latents(Path(data.path), encoding_facts(config, pipeline)))
    tokenizers = load_tokenizers_of(pipeline)
    shapes = bucket_shapes(config, pipeline)
    return RawInputs(data.resolution, tokenizers, data.random_crop, data.random_flip, pipeline.vae_factor, shapes)


def bucket_shapes(config: ConfigDict, pipeline: Pipeline) -> list[Shape]:
    """Return the shapes that images are cropped to if the config has buckets; none for squares.

    A bucket that would have fewer pairs than half a batch is left out, so that no batch is more than half empty.
    """
    if not config.data.buckets:
        return []
    shapes = all_shapes(config, pipeline)
    return buckets.used_shapes(shapes, *_training_pairs(config).sizes(), least=config.data.batch_size / 2)


def say_buckets(config: ConfigDict, inputs: Inputs) -> None:
    """Print how many pairs each bucket has, and how much of their images is cropped away, if the config has buckets."""
    if config.data.buckets:
        _say(describe(inputs.shapes, *_training_pairs(config).sizes(), config.data.batch_size))


def encoding_facts(config: ConfigDict, pipeline: Pipeline) -> dict[str, Any]:
    """Return everything that stored latents depend on; they are stored and found by it."""
    data = config.data
    views = choose_views(data.encoded_views, random_crop=data.random_crop, random_flip=data.random_flip)
    encoders = zip(pipeline.family.text_encoders, pipeline.text_lengths, strict=True)
    chosen = [length for encoder, length in encoders if encoder.length]
    return {
        "family": pipeline.family.name,
        "models": pipeline.fingerprint([name for name in pipeline.components if name != pipeline.denoiser_name]),
        "dtype": config.dtype,
        "vae_dtype": config.vae_dtype,
        "resolution": data.resolution,
        "views": [view._asdict() for view in views],
        "data": data_fingerprint(data.path),
        # Data stored by older versions has none of these facts.
        **(bucket_facts(open_prepared(data.path), bucket_shapes(config, pipeline)) if data.buckets else {}),
        **({"caption_lines": True} if data.caption_lines else {}),
        **({"text_length": chosen[0]} if chosen else {}),
    }


def data_fingerprints(config: ConfigDict) -> dict[str, str]:
    """Return fields for config.json: digests of the prepared data set and of the scores that the run reads."""
    data = config.data
    if data.path.startswith("random:"):
        return {"fingerprints.data": data.path}
    digests = {"fingerprints.data": data_fingerprint(data.path)}
    if data.judges:
        files = [epath.Path(scores_file(Path(data.path), judge)) for judge in data.judges]
        digests["fingerprints.scores"] = fingerprint(files)
    if judge := score_judge(config):
        digests["fingerprints.pair_scores"] = fingerprint([epath.Path(scores_file(Path(data.path), judge))])
    return digests


def data_fingerprint(folder: str) -> str:
    return fingerprint([epath.Path(folder) / name for name in ("records.arrow", "images.arrow")])


def open_training_batches(config: ConfigDict, derived: Derived, inputs: Inputs) -> BatchIterator:
    """Return this process's share of the endless training stream; it reads only the data set's index at first."""
    data, records, curriculum = config.data, _training_pairs(config), None
    if data.order == "curriculum":
        assert isinstance(records, PreparedRecords)  # others have no scores
        positions = config.steps * data.batch_size
        curriculum = CurriculumOrder(records.gap_N, config.seed, blocks=data.curriculum_blocks, positions=positions)
    return make_iterator(
        records,
        inputs,
        batch_size=derived.local_batch_size,
        seed=config.seed,
        caption_dropout=data.caption_dropout,
        relabel=data.relabel,
        positive_share=data.positive_share if _learns_from_votes(config) else None,
        curriculum=curriculum,
        num_workers=data.num_workers or NUM_WORKERS,
        bucket_N=_bucket_N(records, inputs),
        **_options(config),
    )


def open_validation_batches(config: ConfigDict, derived: Derived, inputs: Inputs) -> BatchIterator:
    """Return this process's share of the first `validation.max_pairs` held-out pairs, once; padding has weight 0."""
    batch_size = derived.local_batch_size // derived.accumulation
    pairs = _validation_pairs(config)
    records = Votes(pairs) if _learns_from_votes(config) else pairs
    return validation_batches(
        records,
        inputs,
        batch_size=batch_size,
        bucket_N=_bucket_N(pairs, inputs),
        most=config.validation.max_pairs,
        **_options(config),
    )


def _bucket_N(records: PreparedRecords | RandomRecords, inputs: Inputs) -> np.ndarray | None:
    """Return the number of each record's shape among those of the inputs; None if there is only one."""
    return buckets.nearest(inputs.shapes, *records.sizes()) if len(inputs.shapes) > 1 else None


def _training_pairs(config: ConfigDict) -> PreparedRecords | RandomRecords:
    data = config.data
    return open_records(
        data.path,
        "train",
        ties=data.ties,
        limit=data.limit,
        limit_seed=data.limit_seed,
        score_judge=score_judge(config),
        pair_weights=data.pair_weights,
        **_choices(config) | ({} if _learns_from_lists(config) else {"labels": data.labels}),
    )


def _validation_pairs(config: ConfigDict) -> PreparedRecords | RandomRecords:
    """Return the held-out pairs without ties, which have no right order."""
    return open_records(config.data.path, "validation", **_choices(config))


def _choices(config: ConfigDict) -> dict[str, Any]:
    """Return the options that training and validation pairs share."""
    data, method = config.data, find_method(config.loss.name)
    return {
        "labels": "order" if _learns_from_lists(config) else "hard",
        "num_candidates": max(method.images_per_example(flatten(config)), 2),
        "judges": data.judges,
        "combine": data.combine,
        "generators": data.generators,
        "min_agreement": data.min_agreement,
        "min_side": data.min_side,
        "masks": data.masks,
        "liked_images": method.learns_from == "images",
        "single_images": _learns_from_votes(config),
    }


def _learns_from_votes(config: ConfigDict) -> bool:
    return find_method(config.loss.name).learns_from == "votes"


def _learns_from_lists(config: ConfigDict) -> bool:
    return find_method(config.loss.name).learns_from == "lists"


def _options(config: ConfigDict) -> dict[str, Any]:
    """Return the options that training and validation batches share."""
    return {
        "size_conditioning": config.data.size_conditioning,
        "caption_lines": config.data.caption_lines,
        "mask_floor": config.data.mask_floor if config.data.masks else None,
        "shard_index": jax.process_index(),
        "shard_count": jax.process_count(),
    }
