"""Classifier-free guidance: one denoiser of two predictions.

Axes: N images, H x W latent cells, C channels.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real, Shaped

from dpo_jax.diffusion.steps import Denoiser


def classifier_free_guidance(
    denoise: Callable[[Float[Array, "N H W C"], Real[Array, " N"], Any], Float[Array, "N H W C"]],
    conditioning: Any,
    unconditional: Any,
    scale: float,
    rescale: float = 0.0,
) -> Denoiser:
    """Return a denoiser that extrapolates from the unconditional to the conditional prediction (arXiv 2207.12598).

    Both predictions come from one batch of 2N in which those of an image are neighbours, so that a sharded batch is not
    moved. As in diffusers, a scale of 1 or less means no guidance and half the work.

    Args:
        denoise: `denoise(x_NHWC, t_N, conditioning)` with the weights already bound.
        conditioning: N rows of conditioning.
        unconditional: N rows of conditioning for the empty (or negative) prompt.
        scale: guidance scale.
        rescale: how far to bring the result back to the standard deviation of the conditional prediction, from 0 (not
            at all) to 1 (fully; arXiv 2305.08891, section 3.4).
    """
    if scale <= 1:
        return lambda x_NHWC, t_N: denoise(x_NHWC, t_N, conditioning)

    def side_by_side(a_N: Shaped[Array, "N ..."], b_N: Shaped[Array, "N ..."]) -> Shaped[Array, "2*N ..."]:
        return jnp.stack([a_N, b_N], axis=1).reshape(-1, *a_N.shape[1:])

    def spread(x_NHWC: Float[Array, "N H W C"]) -> Float[Array, "N 1 1 1"]:
        return jnp.std(x_NHWC.astype(jnp.promote_types(x_NHWC.dtype, jnp.float32)), axis=(1, 2, 3), keepdims=True)

    both = jax.tree.map(side_by_side, unconditional, conditioning)

    def guided(x_NHWC: Float[Array, "N H W C"], t_N: Real[Array, " N"]) -> Float[Array, "N H W C"]:
        prediction = denoise(side_by_side(x_NHWC, x_NHWC), side_by_side(t_N, t_N), both)
        prediction = prediction.reshape(-1, 2, *x_NHWC.shape[1:])
        result = prediction[:, 0] + scale * (prediction[:, 1] - prediction[:, 0])
        if rescale:
            result *= rescale * spread(prediction[:, 1]) / spread(result) + (1 - rescale)
        return result

    return guided


def with_guidance(
    denoise: Callable[..., Float[Array, "N H W C"]], scale: float, rescale: float = 0.0
) -> Callable[[Any, Float[Array, "N H W C"], Real[Array, " N"], tuple[Any, Any]], Float[Array, "N H W C"]]:
    """Return `guided(params, x_NHWC, t_N, (conditioning, unconditional))`; see `classifier_free_guidance`.

    Args:
        denoise: `denoise(params, x_NHWC, t_N, conditioning)`, the network without guidance.
        scale: guidance scale.
        rescale: as in `classifier_free_guidance`.
    """

    def guided(
        params: Any, x_NHWC: Float[Array, "N H W C"], t_N: Real[Array, " N"], both: tuple[Any, Any]
    ) -> Float[Array, "N H W C"]:
        bound = functools.partial(denoise, params)
        return classifier_free_guidance(bound, *both, scale, rescale)(x_NHWC, t_N)

    return guided
