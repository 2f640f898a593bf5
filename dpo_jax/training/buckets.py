"""The shapes that a config crops images to, and the lines that tell what they keep.

Axes: M candidates of all records together.
"""

import math
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from dpo_jax.data import buckets
from dpo_jax.data.images import Shape
from dpo_jax.data.load.bucket_order import BucketOrder
from dpo_jax.errors import UserError
from dpo_jax.models.pipeline import Pipeline


def all_shapes(config: ConfigDict, pipeline: Pipeline) -> list[Shape]:
    """Return all shapes that the config and the model allow; the square alone if the config has no buckets."""
    data, factor, denoiser = config.data, pipeline.vae_factor, pipeline.denoiser.config
    if not data.buckets:
        return [(data.resolution, data.resolution)]
    shapes = buckets.list_shapes(data.buckets, data.resolution, factor * denoiser.size_multiple)
    most = factor * (denoiser.most_cells or max(map(max, shapes)))
    if not (allowed := [shape for shape in shapes if max(shape) <= most]):
        raise UserError(
            f"config.data.resolution={data.resolution} is too large: this model has positions for {most} pixels "
            "a side; set data.resolution lower"
        )
    return allowed


def largest_shape(config: ConfigDict, pipeline: Pipeline) -> Shape:
    """Return the shape with the most pixels, the squarest of several: plans count with it."""
    return max(all_shapes(config, pipeline), key=lambda shape: (math.prod(shape), min(shape)))


def describe(shapes: Sequence[Shape], sizes_M2: np.ndarray, record_M: np.ndarray, batch_size: int) -> str:
    """Return lines about buckets: their pairs, the padding, and how much of the images is cropped away.

    Args:
        shapes: those of the buckets.
        sizes_M2: (height, width) of each candidate.
        record_M: the pair of each candidate.
        batch_size: pairs in a batch.
    """
    bucket_N = buckets.nearest(shapes, sizes_M2, record_M)
    lines, cropped_M = [], np.empty(len(record_M))
    for number, shape in enumerate(shapes):
        is_here_M = bucket_N[record_M] == number
        cropped_M[is_here_M] = buckets.share_cropped(shape, sizes_M2[is_here_M])
        pairs = int((bucket_N == number).sum())
        lines.append(f"{buckets.shown(shape)}: {pairs:,} pairs, {cropped_M[is_here_M].mean():.1%} cropped")
    if len(shapes) > 1:
        batches = BucketOrder(bucket_N, 0, batch_size).batches
        padding = 1 - len(bucket_N) / (batches * batch_size)
        lines.append(f"an epoch has {batches:,} batches of {batch_size:,}; {padding:.1%} of that is padding")
    with_squares = buckets.share_cropped((1, 1), sizes_M2).mean()
    lines.append(f"in all, {cropped_M.mean():.1%} of an image is cropped, {with_squares:.1%} with squares")
    return "buckets: " + "\n         ".join(lines)
