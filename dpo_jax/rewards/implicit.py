"""The implicit reward: how much better a tuned model denoises an image than its reference does.

A model trained by Diffusion-DPO defines a reward (arXiv 2311.12908, equation 8 and section 5.4): that of an image is
`beta log p_tuned / p_reference`, up to a term that depends on the caption alone. It is estimated at several timesteps.

Axes: N images, D draws of a timestep and noise, H x W pixels, h x w latent cells, C channels.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dpo_jax.data.images import View, fit
from dpo_jax.data.tokenizers import load_tokenizers
from dpo_jax.encode.images import posterior_moments, sample_posterior
from dpo_jax.encode.text import condition, encode_text
from dpo_jax.errors import UserError
from dpo_jax.models.pipeline import load_pipeline
from dpo_jax.objectives.denoising import compare_denoising
from dpo_jax.rewards import Images, Reward, Settings
from dpo_jax.rewards.batches import Batches, fitted
from dpo_jax.sharding import on_mesh, replicated

BETA = 5000.0
"""The value of the published runs; another value only scales the reward."""
DRAWS = 10
"""Timesteps per image, as in the paper."""


def open_implicit(source: str, settings: Settings) -> Reward:
    """Open the reward of `TUNED:REFERENCE`, two models (folders, hub ids or files) that `load_pipeline` opens.

    Both use the reference's VAE, text encoders and schedule. Raises UserError where their denoisers' structures differ.
    """
    # The colon of gs://bucket does not count.
    names = re.split(r":(?!//)", source)
    if len(names) != 2 or not all(names):
        raise UserError(f"the judge implicit={source} needs two models, as in implicit=TUNED:REFERENCE")
    tuned, reference = (load_pipeline(name, dtype=settings.dtype) for name in names)
    if tuned.denoiser.specs != reference.denoiser.specs:
        raise UserError(
            f"the {tuned.denoiser_name} of {names[0]} and that of {names[1]} have different structures; give a tuned "
            "model and the one it was tuned from"
        )
    batches = Batches(settings)
    placement, vae = batches.placement, reference.vae
    weights: Any = {
        name: reference.load(name, dtype=settings.dtype, sharding=placement) for name in reference.components
    }
    weights["policy"] = tuned.load(tuned.denoiser_name, dtype=settings.dtype, sharding=placement)
    resolution = reference.trained_resolution
    sizes_16 = jnp.array([[resolution, resolution, 0, 0, resolution, resolution]], jnp.float32)
    # All images get the same noises, so that images of one caption are compared fairly. The timesteps are evenly spaced
    # over those trained on; the paper draws them at random, which needs more of them for the same precision.
    trained = reference.schedule.training_timesteps
    t_D = jnp.asarray(trained[((np.arange(DRAWS) + 0.5) / DRAWS * len(trained)).astype(int)])

    def rate(weights: Any, images_NHWC: jax.Array, token_ids_NL: jax.Array) -> jax.Array:
        weights = {
            name: reference.gather(placement, "denoiser" if name == "policy" else name, params)
            for name, params in weights.items()
        }
        N = len(images_NHWC)
        moments_NhwC = posterior_moments(vae, weights["vae"], images_NHWC)
        keys_N = jnp.broadcast_to(jax.random.key(0), N)
        latents_N1hwC = sample_posterior(vae, moments_NhwC[:, None], keys_N)
        conditioning = condition(reference, encode_text(reference, weights, token_ids_NL), jnp.tile(sizes_16, (N, 1)))

        def of_draw(total_N: jax.Array, draw: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            d, t = draw
            noise_hwC = jax.random.normal(jax.random.key(d + 1), latents_N1hwC.shape[2:])
            log_ratios = compare_denoising(
                reference.denoise,
                weights["policy"],
                weights[reference.denoiser_name],
                reference.schedule,
                latents_N1hwC,
                jnp.broadcast_to(noise_hwC, (N, *noise_hwC.shape)),
                jnp.full(N, t),
                conditioning,
            )
            return total_N + log_ratios.log_ratio_BK[:, 0], None

        total_N, _ = jax.lax.scan(of_draw, jnp.zeros(N), (jnp.arange(DRAWS), t_D))
        return BETA * total_N / DRAWS

    jitted = jax.jit(on_mesh(placement.mesh, rate), out_shardings=replicated(placement.mesh))
    tokenizers = load_tokenizers(reference.folder, reference.tokenizers)

    def score(images: Images, captions: Sequence[str]) -> np.ndarray:
        def load(some: slice) -> tuple[np.ndarray, np.ndarray]:
            return fitted(images[some], _square, resolution), tokenizers(list(captions[some]))

        return batches(jitted, weights, len(captions), load)

    return score


def _square(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """Return the image as training sees it."""
    return fit(Image.fromarray(image_HWC), size, View())[0]
