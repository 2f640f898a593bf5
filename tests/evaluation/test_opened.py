"""A model with a LoRA at any scale draws what PyTorch's pipeline draws with it."""

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dpo_jax.evaluation.generate import Sampling
from dpo_jax.evaluation.opened import open_model
from dpo_jax.models.lora import find_targets
from dpo_jax.models.pipeline import load_pipeline
from dpo_jax.models.random_model import write_random_model
from dpo_jax.weights.lora_files import Adapter, write_peft

SAMPLING = Sampling(4, 3.0, "ddim")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_random_model("sdxl", folder / "model")
    pipeline = load_pipeline(folder / "model", dtype="float32")
    adapters = find_targets(pipeline.unet, r"to_q$|to_v$|ff\.net\.2$|conv1$", rank=4, alpha=2.0)
    random = np.random.default_rng(0)
    params = {
        name: random.normal(0, 0.3, spec.shape).astype(np.float32)
        for name, spec in pipeline.with_lora(adapters).trained_specs.items()
    }
    adapter = Adapter(params, {layer: size.alpha for layer, size in adapters.items()})
    write_peft(folder / "lora.safetensors", adapter, pipeline.unet.specs, dtype=np.float32)
    return folder


def draw(folder, **options):
    opened = open_model(str(folder / "model"), dtype=jnp.float32, **options)
    generator = opened.generator(SAMPLING, resolution=opened.resolution, batch_size=1)
    return opened, generator, generator(opened.unet, ["a red circle"], [7])


def test_a_lora_at_any_scale_is_that_of_diffusers(folder):
    plain = draw(folder)[2]
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(folder / "model")
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config, clip_sample=False)
    theirs.load_lora_weights(folder / "lora.safetensors", adapter_name="mine")
    for scale in (0.0, 0.7, -1.5):
        _, generator, ours = draw(folder, lora=str(folder / "lora.safetensors"), lora_scale=scale)
        theirs.set_adapters(["mine"], [scale])
        noise_NCHW = np.asarray(generator.starting_noise([7])).transpose(0, 3, 1, 2)
        images = theirs(
            "a red circle",
            latents=torch.tensor(noise_NCHW),
            num_inference_steps=SAMPLING.steps,
            guidance_scale=SAMPLING.guidance,
            height=32,
            width=32,
            output_type="np",
        ).images
        assert np.abs(ours - np.round(images * 255)).max() <= 2
        assert (np.abs(ours.astype(int) - plain).max() > 20) == (scale != 0)


def test_what_a_family_is_drawn_by(tmp_path, folder):
    opened = open_model(str(folder / "model"), dtype=jnp.float32)
    assert (opened.sampling, opened.resolution) == (Sampling(30, 5.0), 32)
    turbo = open_model(str(folder / "model"), dtype=jnp.float32, family="sdxl_turbo")
    assert turbo.sampling == Sampling(4, 0.0)


def test_a_lora_marks_the_model(folder):
    marks = {
        open_model(str(folder / "model"), dtype=jnp.float32, **options).fingerprint
        for options in (
            {},
            {"lora": str(folder / "lora.safetensors")},
            {"lora": str(folder / "lora.safetensors"), "lora_scale": 0.5},
        )
    }
    assert len(marks) == 3
    with pytest.raises(FileNotFoundError, match="absent"):
        open_model(str(folder / "model"), dtype=jnp.float32, lora=str(folder / "absent.safetensors"))
