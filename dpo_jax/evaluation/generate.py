"""Images from captions: the sampler, the text encoders and the VAE's decoder in one jitted function.

Axes: N images, E text encoders, L tokens, h x w latent cells, C channels.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.batch import Conditioning
from dpo_jax.data.tokenizers import Tokenizers
from dpo_jax.diffusion.samplers import classifier_free_guidance, ddim
from dpo_jax.encode.images import decode_latents
from dpo_jax.encode.text import condition, encode_text
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.sharding import Placement, batch_parts, batch_sharding, replicated
from dpo_jax.weights.layout import Params


class Generator:
    """Samples images by DDIM with classifier-free guidance.

    Compiles once for all captions, seeds and UNet weights (once more for weights with a LoRA).

    Args:
        pipeline: the model's structure.
        encoders: gives the weights of the VAE and the text encoders by component; called before images are sampled, and
            what it returns is not kept.
        tokenizers: the model's own.
        placement: where the weights lie; every batch is split over its mesh.
        resolution: pixels, height and width.
        num_steps: DDIM steps.
        guidance_scale: 1 or less turns guidance off.
        batch_size: images sampled at a time.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        encoders: Callable[[], Mapping[str, Params]],
        tokenizers: Tokenizers,
        placement: Placement,
        *,
        resolution: int,
        num_steps: int,
        guidance_scale: float,
        batch_size: int,
    ):
        self._encoders = encoders
        self._components = set(pipeline.components) - {"unet"}
        self._tokenizers = tokenizers
        self._mesh = mesh = placement.mesh
        self._batch_size = -(-batch_size // batch_parts(mesh)) * batch_parts(mesh)
        cells = resolution // pipeline.vae_factor
        self.latent_shape = (cells, cells, pipeline.unet.config.in_channels)
        size_cond = jnp.array([resolution, resolution, 0, 0, resolution, resolution], jnp.float32)

        def conditioning_of(frozen: Mapping[str, Params], token_ids_NEL: jax.Array) -> Conditioning:
            text = encode_text(pipeline, frozen, token_ids_NEL)
            return condition(pipeline.family, *text, jnp.tile(size_cond, (len(token_ids_NEL), 1)))

        def generate(
            unet: Params, frozen: Mapping[str, Params], token_ids_NEL: jax.Array, empty_NEL: jax.Array, x_T: jax.Array
        ) -> jax.Array:
            unet = pipeline.gather(placement, "unet", unet)
            frozen = {name: pipeline.gather(placement, name, params) for name, params in frozen.items()}
            conditioning, unconditional = (conditioning_of(frozen, ids) for ids in (token_ids_NEL, empty_NEL))
            if pipeline.force_zeros_for_empty_prompt:
                zeros = jax.tree.map(jnp.zeros_like, unconditional)
                unconditional = zeros._replace(time_ids_NT=unconditional.time_ids_NT)
            denoise = classifier_free_guidance(
                lambda x, t, c: pipeline.denoise(unet, x, t, c), conditioning, unconditional, guidance_scale
            )
            latents = ddim(denoise, pipeline.sampling_schedule, x_T, num_steps=num_steps)
            return decode_latents(pipeline.vae, frozen["vae"], latents)

        self._generate = jax.jit(generate, out_shardings=replicated(mesh))

    def starting_noise(self, seeds: Sequence[int]) -> jax.Array:
        """Standard normal x_T, [N, h, w, C]: a function of the seed alone."""
        return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), self.latent_shape))(
            jnp.asarray(seeds, jnp.uint32)
        )

    def __call__(self, unet: Params, captions: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        """One uint8 image [H, W, 3] for each pair of caption and seed; the same seeds give the same starting noise."""
        images = []
        frozen = {name: params for name, params in self._encoders().items() if name in self._components}
        for start in range(0, len(captions), self._batch_size):
            some = list(captions[start : start + self._batch_size])
            padding = self._batch_size - len(some)
            token_ids_NEL = self._tokenizers(some + [""] * padding)
            empty_NEL = self._tokenizers([""] * self._batch_size)
            noise = self.starting_noise([*seeds[start : start + self._batch_size], *[0] * padding])
            token_ids_NEL, empty_NEL, noise = jax.device_put(
                (token_ids_NEL, empty_NEL, noise), batch_sharding(self._mesh)
            )
            batch = self._generate(unet, frozen, token_ids_NEL, empty_NEL, noise)
            images.append(np.asarray(batch)[: len(some)])
        return np.concatenate(images)
