"""Rows through a jitted function in batches of one size, so that it is compiled once, split over a mesh.

Axes: N rows or images, H x W pixels, C channels.
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
    """How one judge runs its functions.

    Attributes:
        placement: where its weights lie.
        size: rows in a batch.
    """

    def __init__(self, settings: Settings):
        self.placement = settings.placement or Placement(make_mesh())
        parts = batch_parts(self.placement.mesh)
        self.size = -(-settings.batch_size // parts) * parts

    def jit(self, function: Callable[..., jax.Array], specs: Specs) -> Callable[..., jax.Array]:
        """Compiles `function(params, *rows)`, whose parameters lie as `placement` says, to return whole results."""

        def run(params: Params, *rows_N: jax.Array) -> jax.Array:
            gathered = {name: self.placement.gathered(name, specs[name], x) for name, x in params.items()}
            # Left to themselves, TPUs multiply float32 as bfloat16 and GPUs as TF32; bfloat16 takes no notice.
            with jax.default_matmul_precision("highest"):
                return function(gathered, *rows_N)

        return jax.jit(run, out_shardings=replicated(self.placement.mesh))

    def __call__(
        self, run: Callable[..., jax.Array], params: Params, total: int, rows: Callable[[slice], Sequence[np.ndarray]]
    ) -> np.ndarray:
        """`run(params, *rows(slice))` for all slices of `total` rows, joined; the last is filled up and cut off.

        The rows of a batch are made while devices compute the one before.
        """
        results: list[Any] = []
        for start in range(0, total, self.size):
            some = rows(slice(start, min(start + self.size, total)))
            padded = tuple(np.concatenate([x, np.repeat(x[-1:], self.size - len(x), axis=0)]) for x in some)
            results[-1:] = map(np.asarray, results[-1:])  # waits for the one before, so that they don't pile up
            results.append(run(params, *jax.device_put(padded, batch_sharding(self.placement.mesh))))
        return np.concatenate(results)[:total]


def fitted(images: Images, fit: Fit, size: int) -> np.ndarray:
    """Images of any sizes as images_NHWC of one, by all cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.stack(list(pool.map(lambda image: fit(image, size), images)))


def normalised(images_NHWC: jax.Array) -> jax.Array:
    """0 to 255 as CLIP's networks take it; float32."""
    return (images_NHWC.astype(jnp.float32) / 255 - jnp.asarray(IMAGE_MEAN)) / jnp.asarray(IMAGE_STD)
