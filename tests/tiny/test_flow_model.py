"""The shipped flow model is complete and small, draws in PyTorch what it draws here, and learns."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from dpo_jax.cli import load_config
from dpo_jax.data.tokenizers import load_tokenizers
from dpo_jax.diffusion.schedule import add_noise, network_times, training_target
from dpo_jax.encode.images import posterior_moments, sample_posterior
from dpo_jax.encode.text import condition, encode_text
from dpo_jax.models.pipeline import Pipeline, load_pipeline
from dpo_jax.sampling.generate import Generator, Sampling
from dpo_jax.sharding import Placement, make_mesh
from dpo_jax.tiny import world

FOLDER = Path(world.__file__).parent / "flow_model"
CAPTIONS = ["a red circle at the top left", "a black cross at the bottom right"]


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return load_pipeline(FOLDER, dtype=jnp.float32)


@pytest.fixture(scope="module")
def weights(pipeline: Pipeline) -> dict[str, Any]:
    return {name: pipeline.load(name, dtype=jnp.float32) for name in pipeline.components}


def test_it_is_a_small_stable_diffusion_3(pipeline: Pipeline) -> None:
    assert pipeline.family.name == "sd3"
    assert pipeline.class_name == "StableDiffusion3Pipeline"
    assert list(pipeline.components) == ["transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"]
    assert pipeline.text_lengths == (16, 16, 16)  # a T5 of the published size reads 256
    assert pipeline.schedule.is_flow
    files = [*FOLDER.rglob("*"), FOLDER.parent / "flow_pairs.parquet"]
    assert sum(file.stat().st_size for file in files if file.is_file()) < 4e6
    assert load_config("tiny_flow").model.endswith("dpo_jax/tiny/flow_model")


def test_pytorch_draws_the_same_images(pipeline: Pipeline, weights: dict[str, Any]) -> None:
    frozen = {name: params for name, params in weights.items() if name != "transformer"}
    tokenizers = load_tokenizers(pipeline.folder, pipeline.tokenizers)
    sampling = Sampling(steps=20, guidance=2.5)
    generator = Generator(
        pipeline, lambda: frozen, tokenizers, Placement(make_mesh()), sampling, resolution=32, batch_size=2
    )
    ours = generator(weights["transformer"], CAPTIONS, [3, 4])
    theirs = StableDiffusion3Pipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    noise_NCHW = np.asarray(generator.starting_noise([3, 4])).transpose(0, 3, 1, 2)
    images = theirs(
        CAPTIONS,
        latents=torch.tensor(noise_NCHW),
        num_inference_steps=20,
        guidance_scale=2.5,
        max_sequence_length=16,
        height=32,
        width=32,
        output_type="np",
    ).images
    assert np.abs(ours.astype(int) - np.round(images * 255).astype(int)).max() <= 2
    assert ours.std() > 10


def test_it_knows_the_captions_and_learns_in_a_few_steps(pipeline: Pipeline, weights: dict[str, Any]) -> None:
    captions, rng = world.split()[1], np.random.default_rng(5)
    images_NHWC = np.stack([world.render(caption, rng) for caption in captions])
    key, n = jax.random.key(0), len(captions)
    times_N = jnp.linspace(50, 950, n).astype(int)
    text = encode_text(pipeline, weights, jnp.asarray(load_tokenizers(FOLDER, pipeline.tokenizers)(captions)))
    conditioning = condition(pipeline, text, jnp.zeros((n, 6)))
    others = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), conditioning)

    @jax.jit
    def noisy(images_NHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        moments_NhwC = posterior_moments(pipeline.vae, weights["vae"], images_NHWC)
        latents_NhwC = sample_posterior(pipeline.vae, moments_NhwC[:, None], jax.random.split(key, n))[:, 0]
        noise_NhwC = jax.random.normal(key, latents_NhwC.shape)
        parts = pipeline.schedule, latents_NhwC, noise_NhwC, times_N
        return add_noise(*parts), training_target(*parts)

    x_NhwC, target_NhwC = noisy(images_NHWC)

    @jax.jit
    def error(params: Any, conditioning: Any) -> Any:
        def mean_error(params: Any) -> jax.Array:
            velocity = pipeline.denoise(params, x_NhwC, network_times(pipeline.schedule, times_N), conditioning)
            return jnp.mean(jnp.square(velocity - target_NhwC))

        return jax.value_and_grad(mean_error)(params)

    params, tx = weights["transformer"], optax.adam(3e-4)
    state = tx.init(params)
    first, _ = error(params, conditioning)
    assert first < 1
    assert first < error(params, others)[0]  # it sees which caption is whose
    for _ in range(4):
        _, gradient = error(params, conditioning)
        updates, state = tx.update(gradient, state)
        params = optax.apply_updates(params, updates)
    assert error(params, conditioning)[0] < 0.99 * first
