"""The shipped model folder is complete and small, and the judge recognises what it draws."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.data.tokenizers import load_tokenizers
from dpo_jax.encode.text import split_token_ids
from dpo_jax.models.pipeline import load_pipeline
from dpo_jax.tiny import judge, world

FOLDER = Path(world.__file__).parent / "model"


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(FOLDER, dtype=jnp.float32)


def test_it_is_a_small_sdxl(pipeline):
    assert pipeline.family.name == "sdxl"
    assert not pipeline.force_zeros_for_empty_prompt
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 4e6
    assert not [file for file in FOLDER.rglob("*.safetensors") if file.stat().st_size < 1e5]


def test_vae_reconstructs_held_out_images(pipeline):
    rng = np.random.default_rng(5)
    captions = world.split()[1] * 4
    images_NHWC = np.stack([world.render(caption, rng) for caption in captions])
    params = pipeline.load("vae", dtype=jnp.float32)

    @jax.jit
    def reconstruct(images_NHWC):
        latents_NhwC, _ = pipeline.vae(params, images_NHWC, method="encode")
        return latents_NhwC * pipeline.vae.config.scaling_factor, pipeline.vae(params, latents_NhwC, method="decode")

    latents_NhwC, decoded_NHWC = reconstruct(images_NHWC / 127.5 - 1.0)
    pixels_NHWC = (127.5 * np.asarray(decoded_NHWC) + 127.5).round().clip(0, 255).astype(np.uint8)
    error = np.mean((pixels_NHWC.astype(float) - images_NHWC) ** 2)
    assert latents_NhwC.shape[1:] == (8, 8, 4)
    assert latents_NhwC.std() == pytest.approx(1, abs=0.05)
    assert 10 * np.log10(255**2 / error) > 28
    assert (judge.score(pixels_NHWC, captions) == 1).mean() >= 0.99


def test_text_encoders_keep_words_apart(pipeline):
    tokenizers = load_tokenizers(FOLDER, pipeline.tokenizers)
    words = [*world.COLOURS, *world.SHAPES, "top", "bottom", "left", "right"]
    for e, (name, token_ids_NL) in enumerate(
        zip(["text_encoder", "text_encoder_2"], split_token_ids(pipeline, tokenizers(words)), strict=True)
    ):
        params = pipeline.load(name, dtype=jnp.float32)
        output = jax.jit(pipeline.text_encoders[e].__call__)(params, token_ids_NL)
        for vectors in (output.penultimate_NLD[:, 1], output.pooled_NP):
            distance = np.linalg.norm(vectors[:, None] - vectors[None], axis=-1)
            assert distance[~np.eye(len(words), dtype=bool)].min() > 0.25 * np.linalg.norm(vectors, axis=-1).mean(), (
                name
            )
