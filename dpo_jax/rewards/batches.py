"""Runs a judge's jitted functions on batches of one size, split over a mesh, so that each is compiled only once.

Axes: N examples, H x W pixels, C channels.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.models.clip_vision import IMAGE_MEAN, IMAGE_STD
from dpo_jax.rewards import Images, Settings
from dpo_jax.rewards.images import Fit
from dpo_jax.sharding import Placement, batch_parts, batch_sharding, make_mesh, replicated
from dpo_jax.weights.layout import Params, Specs


class Batches:
    """Runs the functions of one judge.

    Attributes:
        placement: how its weights are distributed.
        size: examples per batch.
    """

    def __init__(self, settings: Settings):
        self.placement = settings.placement or Placement(make_mesh())
        parts = batch_parts(self.placement.mesh)
        self.size = -(-settings.batch_size // parts) * parts

    def jit(self, function: Callable[..., jax.Array], specs: Specs) -> Callable[..., jax.Array]:
        """Return `function(params, *arrays)`, jitted, for parameters distributed as `placement` says."""

        def run(params: Params, *arrays_N: jax.Array) -> jax.Array:
            gathered = {name: self.placement.gathered(name, specs[name], x) for name, x in params.items()}
            # By default TPUs multiply float32 as bfloat16 and GPUs as TF32. This does not affect bfloat16.
            with jax.default_matmul_precision("highest"):
                return function(gathered, *arrays_N)

        return jax.jit(run, out_shardings=replicated(self.placement.mesh))

    def __call__(
        self, run: Callable[..., jax.Array], params: Params, total: int, load: Callable[[slice], Sequence[np.ndarray]]
    ) -> np.ndarray:
        """Return `run(params, *load(batch))` of all batches of `total` examples, concatenated; the last one is padded.

        A batch is loaded while devices compute the previous one.
        """
        results: list[Any] = []
        for start in range(0, total, self.size):
            some = load(slice(start, min(start + self.size, total)))
            padded = tuple(np.concatenate([x, np.repeat(x[-1:], self.size - len(x), axis=0)]) for x in some)
            results[-1:] = map(np.asarray, results[-1:])  # waits for the previous batch, so that they do not pile up
            results.append(run(params, *jax.device_put(padded, batch_sharding(self.placement.mesh))))
        return np.concatenate(results)[:total]


def fitted(images: Images, fit: Fit, size: int) -> np.ndarray:
    """Return images of any sizes as images_NHWC of one size; all cores work on it."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.stack(list(pool.map(lambda image: fit(image, size), images)))


def normalised(images_NHWC: jax.Array) -> jax.Array:
    """Return pixels from 0 to 255 as CLIP's networks read them: normalised by its mean and deviation, float32."""
    return (images_NHWC.astype(jnp.float32) / 255 - jnp.asarray(IMAGE_MEAN)) / jnp.asarray(IMAGE_STD)
