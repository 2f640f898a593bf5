"""The implicit reward agrees with its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.data.tokenizers import load_tokenizers
from dpo_jax.encode.images import to_unit_range
from dpo_jax.encode.text import condition, encode_text
from dpo_jax.models.pipeline import load_pipeline
from dpo_jax.models.save import save_pipeline
from dpo_jax.rewards import open_judge
from dpo_jax.rewards.implicit import BETA, DRAWS

BASE = "dpo_jax/tiny/model"
CAPTIONS = ["a red circle at the top left", "a blue square at the bottom right", "a red circle at the top left"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The base with slightly changed weights."""
    pipeline = load_pipeline(BASE, dtype=jnp.float32)
    unet = pipeline.load("unet", dtype=jnp.float32)
    keys = jax.random.split(jax.random.key(0), len(unet))
    moved = {
        name: x + 0.02 * jnp.std(x) * jax.random.normal(key, x.shape)
        for (name, x), key in zip(unet.items(), keys, strict=True)
    }
    folder = tmp_path_factory.mktemp("tuned") / "model"
    save_pipeline(pipeline, folder, moved, dtype=jnp.float32, card="")
    return folder


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((32, 32, 3), (40, 50, 3), (32, 32, 3))]


def test_it_is_the_mean_difference_of_errors_times_half_beta(tuned, images):
    """It equals the formula (arXiv 2311.12908, equation 14), computed for one draw and one image at a time."""
    models = [load_pipeline(folder, dtype=jnp.float32) for folder in (tuned, BASE)]
    unets = [model.load("unet", dtype=jnp.float32) for model in models]
    base = models[1]
    frozen = {name: base.load(name, dtype=jnp.float32) for name in base.components if name != "unet"}
    tokens = load_tokenizers(base.folder, base.tokenizers)(CAPTIONS[:1])
    conditioning = condition(base, encode_text(base, frozen, tokens), jnp.array([[32.0, 32, 0, 0, 32, 32]]))
    mean, logvar = base.vae(frozen["vae"], to_unit_range(images[0][None], jnp.float32), method="encode")
    noise = jax.random.normal(jax.random.key(0), mean.shape)
    latents = (mean + jnp.exp(logvar / 2) * noise[..., :]) * base.vae.config.scaling_factor
    timesteps = [50 + 100 * i for i in range(DRAWS)]
    denoise = jax.jit(lambda unet, x_t, t: base.denoise(unet, x_t, t, conditioning))
    gains = []
    for d, t in enumerate(timesteps):
        eps = jax.random.normal(jax.random.key(d + 1), latents.shape[1:])
        x_t = base.schedule.signal_T[t] * latents + base.schedule.noise_T[t] * eps
        errors = [jnp.square(denoise(unet, x_t, jnp.array([t])) - eps).mean() for unet in unets]
        gains.append(errors[1] - errors[0])
    expected = BETA / 2 * float(np.mean(gains))
    scores = open_judge(f"implicit={tuned}:{BASE}").score(images[:1], CAPTIONS[:1])
    assert scores[0] == pytest.approx(expected, rel=2e-3, abs=1e-3 * BETA / 2 * float(np.max(np.abs(gains))))


def test_scores_depend_on_image_and_caption_alone(tuned, images):
    judge = open_judge(f"implicit={tuned}:{BASE}", batch_size=2)
    together = judge.score(images, CAPTIONS)
    apart = [judge.score([image], [caption])[0] for image, caption in zip(images, CAPTIONS, strict=True)]
    np.testing.assert_allclose(together, apart, rtol=1e-3, atol=1e-2)
    assert len(set(together.tolist())) == 3
    # The reward of the reference over the tuned model is the opposite.
    np.testing.assert_allclose(
        open_judge(f"implicit={BASE}:{tuned}", batch_size=2).score(images, CAPTIONS), -together, rtol=1e-3, atol=1e-2
    )


def test_a_model_against_itself_has_no_preference(images):
    assert not open_judge(f"implicit={BASE}:{BASE}", batch_size=3).score(images, CAPTIONS).any()


@pytest.mark.parametrize("source", ["dpo_jax/tiny/model", "a:b:c", ":dpo_jax/tiny/model"])
def test_it_needs_two_models(source):
    with pytest.raises(ValueError, match=r"needs two models, as in implicit=TUNED:REFERENCE"):
        open_judge(f"implicit={source}")
