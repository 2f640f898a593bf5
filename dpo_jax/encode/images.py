"""Maps images to latents: pixels to a sample of the VAE's posterior.

Axes: B prompts, K candidates, N images, H x W pixels, h x w latent cells, C channels; moments have 2 C channels, the
mean and then the log variance.
"""

import jax
import jax.numpy as jnp

from dpo_jax.models.network import Network
from dpo_jax.weights.layout import Params


def to_unit_range(images: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Map uint8 in 0..255 to -1..1."""
    return images.astype(dtype) / 127.5 - 1.0


def to_pixels(images: jax.Array) -> jax.Array:
    """Map -1..1 to uint8 in 0..255, rounded as in diffusers."""
    return jnp.round(jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)


def mirror(images_NHWC: jax.Array, mirrored_N: jax.Array) -> jax.Array:
    """Mirror, left to right, the images for which `mirrored_N` is True."""
    return jnp.where(mirrored_N[:, None, None, None], images_NHWC[:, :, ::-1], images_NHWC)


def posterior_moments(vae: Network, params: Params, images_NHWC: jax.Array) -> jax.Array:
    """Return the moments_NhwC of the posteriors of uint8 images, in the dtype that the VAE computes in."""
    moments = vae(params, to_unit_range(images_NHWC, jnp.float32), method="encode")
    return jnp.concatenate(moments, axis=-1)


def sample_posterior(vae: Network, moments_BKhwC: jax.Array, keys_B: jax.Array) -> jax.Array:
    """Return scaled latents_BKhwC in float32: a sample of each image's posterior, drawn with its prompt's key."""
    mean, logvar = jnp.split(moments_BKhwC.astype(jnp.float32), 2, axis=-1)
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys_B)
    return (mean + jnp.exp(0.5 * logvar) * noise - _shift(vae)) * vae.config.scaling_factor


def encode_images(
    vae: Network, params: Params, images_BKHWC: jax.Array, mirrored_BK: jax.Array, keys_B: jax.Array
) -> jax.Array:
    """Return scaled latents_BKhwC of uint8 images; those with `mirrored_BK` are mirrored first."""
    B, K = images_BKHWC.shape[:2]
    images_NHWC = mirror(images_BKHWC.reshape(B * K, *images_BKHWC.shape[2:]), mirrored_BK.reshape(B * K))
    moments_NhwC = posterior_moments(vae, params, images_NHWC)
    return sample_posterior(vae, moments_NhwC.reshape(B, K, *moments_NhwC.shape[1:]), keys_B)


def decode_latents(vae: Network, params: Params, latents_NhwC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return uint8 images_NHWC from scaled latents, and finite_N: False for images with infinity or NaN (black)."""
    images_NHWC = vae(params, latents_NhwC / vae.config.scaling_factor + _shift(vae), method="decode")
    return to_pixels(images_NHWC), jnp.isfinite(images_NHWC).all(axis=(1, 2, 3))


def _shift(vae: Network) -> float:
    return vae.config.shift_factor or 0.0
