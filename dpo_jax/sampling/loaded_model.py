"""A model that is ready to draw; its weights are loaded when they are first used."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from PIL import Image

from dpo_jax.data.tokenizers import Tokenizers, load_tokenizers
from dpo_jax.diffusion.samplers import own_sampler
from dpo_jax.models.pipeline import Pipeline, load_pipeline
from dpo_jax.sampling.generate import Generator, Sampling
from dpo_jax.sharding import Placement, make_mesh
from dpo_jax.weights.finite import is_finite, refuse_nonfinite
from dpo_jax.weights.hub import find_lora
from dpo_jax.weights.io import fingerprint
from dpo_jax.weights.layout import Params, torch_name
from dpo_jax.weights.lora_files import Adapter, Array, Merged, lora_files_of, read_adapters


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to draw, with the LoRA that was added to it, if any."""

    pipeline: Pipeline
    placement: Placement
    fingerprint: str
    """Identifies the model, its LoRA, and the step of a training run."""
    load_denoiser: Callable[[], Params]
    load_encoders: Callable[[], Mapping[str, Params]]
    sampling: Sampling
    """How images are sampled by default."""
    resolution: int
    """Height and width of images by default, in pixels."""

    @functools.cached_property
    def denoiser(self) -> Params:
        """Weights of the denoiser, in the compute dtype, distributed as `placement` says."""
        return self.load_denoiser()

    @functools.cached_property
    def encoders(self) -> Mapping[str, Params]:
        """Weights of the VAE and the text encoders, by component."""
        return self.load_encoders()

    @functools.cached_property
    def tokenizers(self) -> Tokenizers:
        return load_tokenizers(self.pipeline.folder, self.pipeline.tokenizers)

    def generator(self, sampling: Sampling, *, resolution: int, batch_size: int) -> Generator:
        """Return a generator, which loads no weights yet; call it with `denoiser`."""
        return Generator(
            self.pipeline,
            lambda: self.encoders,
            self.tokenizers,
            self.placement,
            sampling,
            resolution=resolution,
            batch_size=batch_size,
            report=functools.partial(print, file=sys.stderr) if self.pipeline.allow_nonfinite else None,
        )

    def sampling_with(self, **given: Any) -> Sampling:
        """Return how the model is drawn with, with other values of some settings; a value of None changes nothing."""
        changed = {name: value for name, value in given.items() if value is not None}
        sampling = dataclasses.replace(self.sampling, **changed)
        return dataclasses.replace(sampling, sampler=sampling.sampler or own_sampler(self.pipeline.sampling_schedule))

    def sample(
        self,
        prompts: str | Sequence[str],
        *,
        seeds: int = 1,
        seed: int = 0,
        sampler: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        guidance_rescale: float = 0.0,
        negative_prompt: str = "",
        eta: float = 0.0,
        resolution: int | None = None,
        batch_size: int = 8,
    ) -> list[Image.Image]:
        """Draw images; each depends on its prompt and its seed alone, not on the batch or the devices.

        Args:
            prompts: one prompt or several.
            seeds: number of images of each prompt, from seeds that follow each other.
            seed: first seed.
            sampler: "ddim", "euler", "euler_ancestral", "dpmsolver++" or "lcm", and for flow models "flow_euler",
                "flow_sde" or "flow_cps"; by default the one of the model, as with `steps`, `guidance` and `resolution`
                (in pixels).
            steps: denoising steps.
            guidance: classifier-free guidance scale; 1 or less turns it off.
            guidance_rescale: how far guided predictions are brought back to the spread of plain ones, 0 to 1.
            negative_prompt: what guidance leads away from.
            eta: share of noise that ddim draws anew in each step, 0 to 1.
            batch_size: images drawn at a time, by all devices together.

        Returns:
            RGB images: all of the first prompt, then all of the second, and so on.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        sampling = self.sampling_with(
            sampler=sampler,
            steps=steps,
            guidance=guidance,
            guidance_rescale=guidance_rescale,
            negative_prompt=negative_prompt,
            eta=eta,
        )
        generator = self.generator(sampling, resolution=resolution or self.resolution, batch_size=batch_size)
        captions = [prompt for prompt in prompts for _ in range(seeds)]
        numbers = [seed + n for _ in prompts for n in range(seeds)]
        if not captions:
            return []
        return [Image.fromarray(image) for image in generator(self.denoiser, captions, numbers)]


def open_model(
    model: str,
    *,
    lora: str = "",
    lora_scale: float = 1.0,
    dtype: DTypeLike,
    vae_dtype: DTypeLike | None = None,
    fsdp: int = 1,
    **options: Any,
) -> LoadedModel:
    """Return the loaded model of a folder, a hub id or a file; for training runs see `training.run`.

    Args:
        model: a folder, a hub id or a single file.
        lora: a LoRA to add: a file, its folder, or a hub id.
        lora_scale: factor that the LoRA is multiplied by.
        dtype: compute dtype, and that of the weights in memory.
        vae_dtype: the same for the VAE, if it differs.
        fsdp: devices that share one copy of the weights; further devices hold further copies.
        options: further arguments of `load_pipeline`.

    Raises MissingFileError or UserError as `load_pipeline` does.
    """
    pipeline = load_pipeline(model, dtype=dtype, vae_dtype=vae_dtype, **options)
    placement, name = Placement(make_mesh(fsdp=fsdp)), pipeline.denoiser_name
    adapters = read_lora_for(pipeline, lora) if lora else {}

    def load_denoiser() -> Params:
        if lora:
            return add_lora(pipeline.read(name), pipeline, placement, name, adapters[name], lora_scale)
        return pipeline.load(name, dtype=dtype, sharding=placement)

    return LoadedModel(
        pipeline,
        placement,
        pipeline.fingerprint() + lora_mark(lora, lora_scale),
        load_denoiser,
        lambda: load_encoders(pipeline, placement, vae_dtype or dtype, adapters, lora_scale),
        Sampling(pipeline.family.sampling_steps, pipeline.family.guidance),
        pipeline.trained_resolution,
    )


def load_encoders(
    pipeline: Pipeline,
    placement: Placement,
    vae_dtype: DTypeLike,
    adapters: Mapping[str, Adapter] = MappingProxyType({}),
    scale: float = 1.0,
    only: Collection[str] | None = None,
) -> dict[str, Params]:
    """Return the weights of the VAE and the text encoders, all or `only` some, with `scale` times what a LoRA adds."""
    encoders = {}
    for name in pipeline.components:
        if name == pipeline.denoiser_name or (only is not None and name not in only):
            continue
        if name in adapters and not adapters[name].is_empty:
            encoders[name] = add_lora(pipeline.read(name), pipeline, placement, name, adapters[name], scale)
        else:
            dtype = vae_dtype if name == "vae" else pipeline.dtype
            encoders[name] = pipeline.load(name, dtype=dtype, sharding=placement)
    return encoders


def read_lora_for(pipeline: Pipeline, lora: str) -> dict[str, Adapter]:
    """Return what a LoRA adds to the denoiser and the text encoders of a model; see `read_adapters`."""
    specs = {name: network.specs for name, network in pipeline.components.items() if name != "vae"}
    return read_adapters(find_lora(lora), specs, allow_nonfinite=pipeline.allow_nonfinite)


def add_lora(
    weights: Mapping[str, Array],
    pipeline: Pipeline,
    placement: Placement,
    component: str,
    adapter: Adapter,
    scale: float,
) -> Params:
    """Return a network plus `scale` times a LoRA, added in float32 on the host, in the compute dtype."""
    specs = pipeline.components[component].specs
    params, nonfinite = {}, []
    for name, value in Merged(weights, adapter, scale).items():
        array = np.asarray(value, pipeline.dtype)
        nonfinite += [] if pipeline.allow_nonfinite or is_finite(array) else [name]
        params[name] = jax.device_put(array, placement(name, specs[name]))
    refuse_nonfinite(map(torch_name, nonfinite), pipeline.weights[component], pipeline.dtype.name)
    return params


def lora_mark(lora: str, scale: float) -> str:
    """Return what a LoRA adds to a model's fingerprint."""
    return f" + {scale} x {fingerprint(lora_files_of(find_lora(lora)))}" if lora else ""
