"""Samples images from captions: text encoders, sampler and VAE in one jitted function.

Axes: N images, L tokens, H x W pixels, h x w latent cells, C channels.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.data.tokenizers import Tokenizers
from dpo_jax.diffusion.guidance import classifier_free_guidance
from dpo_jax.diffusion.samplers import make_table
from dpo_jax.diffusion.steps import SamplerTable, sample, starting_latents
from dpo_jax.encode.images import decode_latents, posterior_moments, sample_posterior
from dpo_jax.encode.text import make_conditionings
from dpo_jax.errors import UserError
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.sharding import Placement, batch_constraint, batch_parts, batch_sharding, on_mesh, replicated
from dpo_jax.weights.layout import Params

MAX_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How images are sampled."""

    steps: int
    """Denoising steps."""
    guidance: float
    """Classifier-free guidance scale; 1 or less turns it off."""
    sampler: str = ""
    """One of `diffusion.samplers.SAMPLERS`; "" is the one that the model's scheduler stands for."""
    eta: float = 0.0
    """Share of fresh noise in each step of DDIM, 0 to 1."""
    guidance_rescale: float = 0.0
    """How far guided predictions are rescaled to the deviation of unguided ones, 0 to 1 (arXiv 2305.08891)."""
    negative_prompt: str = ""
    """The caption that guidance leads away from; "" is the empty caption, as the model embeds it."""
    strength: float = 1.0
    """With images to start from: the share of the steps that are run; these are the last ones."""


def plan_sampling(pipeline: Pipeline, sampling: Sampling, resolution: int) -> tuple[tuple[int, int, int], SamplerTable]:
    """Return the shape of an image's latents and the sampler's table; raises UserError where the model cannot do it."""
    cells, image_tokens = latent_sizes(pipeline, resolution)
    table = make_table(
        sampling.sampler,
        pipeline.sampling_schedule,
        sampling.steps,
        eta=sampling.eta,
        strength=sampling.strength,
        image_tokens=image_tokens,
    )
    return (cells, cells, pipeline.denoiser.config.latent_channels), table


def latent_sizes(pipeline: Pipeline, resolution: int) -> tuple[int, int]:
    """Return an image's latent cells per side and its number of tokens; UserError if the resolution does not fit."""
    cells, rest = divmod(resolution, pipeline.vae_factor)
    multiple = pipeline.denoiser.config.size_multiple
    if rest or cells % multiple or cells < 1:
        raise UserError(f"resolution={resolution} must be a multiple of {pipeline.vae_factor * multiple} pixels")
    return cells, (cells // multiple) ** 2


class Generator:
    """Samples images from captions and seeds.

    It compiles once for all captions, seeds and weights (again for weights with a LoRA, and for images to start from).
    Up to rounding, the image of a caption and seed depends neither on the batch nor on the devices.

    Args:
        pipeline: the model's structure.
        encoders: returns the weights of the VAE and the text encoders by component; called before images are sampled,
            and its result is not kept.
        tokenizers: the model's own.
        placement: how the weights are distributed; every batch is split over its mesh.
        sampling: how images are sampled.
        resolution: height and width in pixels.
        batch_size: images sampled at a time; rounded up to a multiple that the mesh divides.
        report: called with a message about images with values that are not finite, which are black; by default such
            images are an error.

    Raises UserError for settings that the model cannot be sampled with.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        encoders: Callable[[], Mapping[str, Params]],
        tokenizers: Tokenizers,
        placement: Placement,
        sampling: Sampling,
        *,
        resolution: int,
        batch_size: int,
        report: Callable[[str], None] | None = None,
    ):
        self._encoders = encoders
        self._report = report
        self._components = set(pipeline.components) - {pipeline.denoiser_name}
        self._tokenizers = tokenizers
        self._mesh = mesh = placement.mesh
        self.resolution = resolution
        self.batch_size = -(-batch_size // batch_parts(mesh)) * batch_parts(mesh)
        """Images sampled at a time."""
        self.latent_shape, table = plan_sampling(pipeline, sampling, resolution)
        conditionings = make_conditionings(
            pipeline,
            tokenizers([sampling.negative_prompt]),
            sampling.guidance,
            negative_is_empty=not sampling.negative_prompt,
        )
        size_cond_16 = jnp.array([[resolution, resolution, 0, 0, resolution, resolution]], jnp.float32)
        split = batch_constraint(mesh)

        def generate(
            denoiser: Params,
            frozen: Mapping[str, Params],
            token_ids_NL: jax.Array,
            seeds_N: jax.Array,
            images_NHWC: jax.Array | None,
        ) -> tuple[jax.Array, jax.Array]:
            denoiser = pipeline.gather(placement, "denoiser", denoiser)
            frozen = {name: pipeline.gather(placement, name, params) for name, params in frozen.items()}
            sizes_N6 = jnp.tile(size_cond_16, (len(token_ids_NL), 1))
            conditioning, unconditional = split(conditionings(frozen, token_ids_NL, sizes_N6))
            denoise = classifier_free_guidance(
                lambda x, t, c: pipeline.denoise(denoiser, x, t, c),
                conditioning,
                unconditional,
                pipeline.guidance_scale(sampling.guidance),
                sampling.guidance_rescale,
            )
            keys_N = jax.vmap(jax.random.key)(seeds_N)
            posterior_keys_N, step_keys_N = (jax.vmap(jax.random.fold_in, (0, None))(keys_N, i) for i in range(2))
            x0 = None
            if images_NHWC is not None:
                moments_NhwC = posterior_moments(pipeline.vae, frozen["vae"], images_NHWC)
                x0 = sample_posterior(pipeline.vae, moments_NhwC[:, None], posterior_keys_N)[:, 0]
            x_T = starting_latents(table, self.starting_noise(seeds_N), x0)
            latents = sample(denoise, table, x_T, step_keys_N)
            return decode_latents(pipeline.vae, frozen["vae"], latents)

        self._generate = jax.jit(on_mesh(mesh, generate), out_shardings=replicated(mesh))

    def starting_noise(self, seeds_N: Sequence[int] | jax.Array) -> jax.Array:
        """Return standard normal x_T, [N, h, w, C]; that of an image depends on its seed alone."""
        return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), self.latent_shape))(
            jnp.asarray(seeds_N, jnp.uint32)
        )

    def __call__(
        self,
        denoiser: Params,
        captions: Sequence[str],
        seeds: Sequence[int],
        images: Sequence[np.ndarray] | None = None,
    ) -> np.ndarray:
        """Return uint8 images [N, H, W, 3], one for each pair of caption and seed; see `batches`."""
        return np.concatenate(list(self.batches(denoiser, captions, seeds, images)))

    def batches(
        self,
        denoiser: Params,
        captions: Sequence[str],
        seeds: Sequence[int],
        images: Sequence[np.ndarray] | None = None,
    ) -> Iterator[np.ndarray]:
        """Yield the images in order, uint8 [up to `batch_size`, H, W, 3] at a time, while the next batch is computed.

        Args:
            denoiser: weights of the denoiser, distributed as `placement` says.
            captions: one per image.
            seeds: one per image, 0 to `MAX_SEED`; all randomness follows from it.
            images: images to start from, uint8 [H, W, 3] of `resolution`; None starts from noise.

        Raises UserError for images with values that are not finite, unless these are reported.
        """
        if len(seeds) and not 0 <= min(seeds) <= max(seeds) <= MAX_SEED:
            raise UserError(f"seeds {min(seeds)} to {max(seeds)} must be from 0 to {MAX_SEED}")
        frozen = {name: params for name, params in self._encoders().items() if name in self._components}

        def fetched(batch: tuple[jax.Array, jax.Array], of_batch: range) -> np.ndarray:
            images_NHWC, finite_N = (np.asarray(x)[: len(of_batch)] for x in batch)
            self._check([of_batch[n] for n in np.flatnonzero(~finite_N)], captions, seeds)
            return images_NHWC

        pending: tuple[tuple[jax.Array, jax.Array], range] | None = None
        for start in range(0, len(captions), self.batch_size):
            of_batch = range(start, min(start + self.batch_size, len(captions)))
            padded = [of_batch[i % len(of_batch)] for i in range(self.batch_size)]
            examples = (
                self._tokenizers([captions[i] for i in padded]),
                np.array([seeds[i] for i in padded], np.uint32),
                None if images is None else np.stack([images[i] for i in padded]),
            )
            batch = self._generate(denoiser, frozen, *jax.device_put(examples, batch_sharding(self._mesh)))
            if pending is not None:
                yield fetched(*pending)
            pending = batch, of_batch
        if pending is not None:
            yield fetched(*pending)

    def _check(self, black: Sequence[int], captions: Sequence[str], seeds: Sequence[int]) -> None:
        """Report images with values that are not finite, or raise UserError."""
        if not black:
            return
        more = f" and {len(black) - 1} more" if len(black) > 1 else ""
        message = (
            f"the image of {captions[black[0]]!r}, seed {seeds[black[0]]}{more} came out black: its values are not "
            "finite (NaN or infinity); try dtype and vae_dtype float32 or another VAE. If that does not help, the "
            "weights are damaged"
        )
        if self._report is None:
            raise UserError(message)
        self._report(message)
