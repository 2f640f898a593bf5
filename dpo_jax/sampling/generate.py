"""Images from captions: the sampler, the text encoders and the VAE in one jitted function.

Axes: N images, E text encoders, L tokens, H x W pixels, h x w latent cells, C channels.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.data.tokenizers import Tokenizers
from dpo_jax.diffusion.samplers import (
    SamplerTable,
    classifier_free_guidance,
    make_table,
    sample,
    starting_latents,
)
from dpo_jax.encode.images import decode_latents, posterior_moments, sample_posterior
from dpo_jax.encode.text import make_conditionings
from dpo_jax.errors import UserError
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.sharding import Placement, batch_constraint, batch_parts, batch_sharding, on_mesh, replicated
from dpo_jax.weights.layout import Params

MAX_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How images are drawn."""

    steps: int
    """Denoising steps."""
    guidance: float
    """Classifier-free guidance scale; 1 or less turns it off."""
    sampler: str = ""
    """One of `diffusion.samplers.SAMPLERS`; "" is the one that the model's scheduler means."""
    eta: float = 0.0
    """DDIM's share of noise that is drawn anew, 0 to 1."""
    guidance_rescale: float = 0.0
    """How far guided predictions are brought back to the spread of the plain ones, 0 to 1 (arXiv 2305.08891)."""
    negative_prompt: str = ""
    """What guidance leads away from; "" is the empty caption, as the model embeds it."""
    strength: float = 1.0
    """With images to begin from: the share of the steps that are taken, the last ones."""


def plan_sampling(pipeline: Pipeline, sampling: Sampling, resolution: int) -> tuple[tuple[int, int, int], SamplerTable]:
    """Shape of an image's latents, and the sampler's table. Raises ValueError where the model can't be sampled so."""
    cells, rest = divmod(resolution, pipeline.vae_factor)
    halvings = 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
    if rest or cells % halvings or cells < 1:
        raise UserError(f"resolution={resolution} must be a multiple of {pipeline.vae_factor * halvings} pixels")
    options = {"eta": sampling.eta, "strength": sampling.strength}
    table = make_table(sampling.sampler, pipeline.sampling_schedule, sampling.steps, **options)
    return (cells, cells, pipeline.unet.config.in_channels), table


class Generator:
    """Samples images.

    Compiles once for all captions, seeds and UNet weights (once more for weights with a LoRA, and with images to begin
    from). The image of a caption and seed depends on nothing else, but for rounding: neither on the batch nor on the
    devices.

    Args:
        pipeline: the model's structure.
        encoders: gives the weights of the VAE and the text encoders by component; called before images are sampled, and
            what it returns is not kept.
        tokenizers: the model's own.
        placement: where the weights lie; every batch is split over its mesh.
        sampling: how.
        resolution: pixels, height and width.
        batch_size: images sampled at a time; rounded up to what the mesh divides.
        report: is told of images whose numbers are not finite, which are black then; by default they are an error.

    Raises ValueError for what the model can't be sampled with.
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
        self._components = set(pipeline.components) - {"unet"}
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
            unet: Params,
            frozen: Mapping[str, Params],
            token_ids_NEL: jax.Array,
            seeds_N: jax.Array,
            images_NHWC: jax.Array | None,
        ) -> tuple[jax.Array, jax.Array]:
            unet = pipeline.gather(placement, "unet", unet)
            frozen = {name: pipeline.gather(placement, name, params) for name, params in frozen.items()}
            sizes_N6 = jnp.tile(size_cond_16, (len(token_ids_NEL), 1))
            conditioning, unconditional = split(conditionings(frozen, token_ids_NEL, sizes_N6))
            denoise = classifier_free_guidance(
                lambda x, t, c: pipeline.denoise(unet, x, t, c),
                conditioning,
                unconditional,
                sampling.guidance,
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
        """Standard normal x_T, [N, h, w, C]: that of an image is a function of its seed alone."""
        return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), self.latent_shape))(
            jnp.asarray(seeds_N, jnp.uint32)
        )

    def __call__(
        self,
        unet: Params,
        captions: Sequence[str],
        seeds: Sequence[int],
        images: Sequence[np.ndarray] | None = None,
    ) -> np.ndarray:
        """One uint8 image [H, W, 3] for each pair of caption and seed; see `batches`."""
        return np.concatenate(list(self.batches(unet, captions, seeds, images)))

    def batches(
        self,
        unet: Params,
        captions: Sequence[str],
        seeds: Sequence[int],
        images: Sequence[np.ndarray] | None = None,
    ) -> Iterator[np.ndarray]:
        """The images in order, uint8 [up to `batch_size`, H, W, 3] at a time, the next in the making meanwhile.

        Args:
            unet: its weights, where `placement` has them.
            captions: one an image.
            seeds: one an image, 0 to `MAX_SEED`: all that is random follows from it.
            images: to begin from, uint8 [H, W, 3] of `resolution`; None begins from noise.

        Raises ValueError for images whose numbers are not finite, unless they are reported.
        """
        if len(seeds) and not 0 <= min(seeds) <= max(seeds) <= MAX_SEED:
            raise UserError(f"seeds {min(seeds)} to {max(seeds)} must be in 0..{MAX_SEED}")
        frozen = {name: params for name, params in self._encoders().items() if name in self._components}

        def fetched(batch: tuple[jax.Array, jax.Array], of_batch: range) -> np.ndarray:
            images_NHWC, finite_N = (np.asarray(x)[: len(of_batch)] for x in batch)
            self._check([of_batch[n] for n in np.flatnonzero(~finite_N)], captions, seeds)
            return images_NHWC

        pending: tuple[tuple[jax.Array, jax.Array], range] | None = None
        for start in range(0, len(captions), self.batch_size):
            of_batch = range(start, min(start + self.batch_size, len(captions)))
            padded = [of_batch[i % len(of_batch)] for i in range(self.batch_size)]
            rows = (
                self._tokenizers([captions[i] for i in padded]),
                np.array([seeds[i] for i in padded], np.uint32),
                None if images is None else np.stack([images[i] for i in padded]),
            )
            batch = self._generate(unet, frozen, *jax.device_put(rows, batch_sharding(self._mesh)))
            if pending is not None:
                yield fetched(*pending)
            pending = batch, of_batch
        if pending is not None:
            yield fetched(*pending)

    def _check(self, black: Sequence[int], captions: Sequence[str], seeds: Sequence[int]) -> None:
        """Tells of the images that are not finite."""
        if not black:
            return
        more = f" and {len(black) - 1} more" if len(black) > 1 else ""
        message = (
            f"the image of {captions[black[0]]!r}, seed {seeds[black[0]]}{more} came out black: its numbers are not "
            "finite (NaN or infinity); try dtype and vae_dtype float32 or another VAE, and if that does not help the "
            "weights are damaged"
        )
        if self._report is None:
            raise UserError(message)
        self._report(message)
