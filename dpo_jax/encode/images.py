"""Images to latents: pixels in, a sample of the VAE's posterior out.

Axes: B prompts, K candidates, H x W pixels, h x w latent cells, C channels.
"""

import jax
import jax.numpy as jnp

from dpo_jax.models.network import Network
from dpo_jax.weights.layout import Params


def to_unit_range(images: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """uint8 0..255 to -1..1."""
    return images.astype(dtype) / 127.5 - 1.0


def to_pixels(images: jax.Array) -> jax.Array:
    """-1..1 to uint8 0..255, rounded as diffusers rounds."""
    return jnp.round(jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)


def encode_images(vae: Network, params: Params, images_BKHWC: jax.Array, keys_B: jax.Array) -> jax.Array:
    """Scaled latents_BKhwC in float32: a sample of each image's posterior, by its prompt's key."""
    B, K = images_BKHWC.shape[:2]
    images_NHWC = to_unit_range(images_BKHWC.reshape(B * K, *images_BKHWC.shape[2:]), jnp.float32)
    mean_NhwC, logvar_NhwC = vae(params, images_NHWC, method="encode")
    mean, logvar = (moment.reshape(B, K, *moment.shape[1:]).astype(jnp.float32) for moment in (mean_NhwC, logvar_NhwC))
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys_B)
    return (mean + jnp.exp(0.5 * logvar) * noise - _shift(vae)) * vae.config.scaling_factor


def decode_latents(vae: Network, params: Params, latents_NhwC: jax.Array) -> jax.Array:
    """Scaled latents to uint8 images_NHWC."""
    return to_pixels(vae(params, latents_NhwC / vae.config.scaling_factor + _shift(vae), method="decode"))


def _shift(vae: Network) -> float:
    return vae.config.shift_factor or 0.0
