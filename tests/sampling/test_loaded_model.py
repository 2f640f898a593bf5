"""A model with a LoRA at any scale draws the same image as PyTorch's pipeline."""

import shutil

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from dpo_jax.models.lora import find_targets
from dpo_jax.models.pipeline import load_pipeline
from dpo_jax.models.random_model import write_random_model
from dpo_jax.sampling.generate import Sampling
from dpo_jax.sampling.loaded_model import open_model
from dpo_jax.weights.lora_files import Adapter
from dpo_jax.weights.lora_write import write_peft

SAMPLING = Sampling(4, 3.0, "ddim")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_random_model("sdxl", folder / "model")
    pipeline = load_pipeline(folder / "model", dtype="float32")
    adapters = find_targets(pipeline.denoiser, r"to_q$|to_v$|ff\.net\.2$|conv1$", rank=4, alpha=2.0)
    random = np.random.default_rng(0)
    params = {
        name: random.normal(0, 0.3, spec.shape).astype(np.float32)
        for name, spec in pipeline.with_lora(adapters).trained_specs.items()
    }
    adapter = Adapter(params, {layer: size.alpha for layer, size in adapters.items()})
    write_peft(folder / "lora.safetensors", adapter, pipeline.denoiser.specs, dtype=np.float32)
    return folder


def draw(folder, **options):
    opened = open_model(str(folder / "model"), dtype=jnp.float32, **options)
    generator = opened.generator(SAMPLING, resolution=opened.resolution, batch_size=1)
    return opened, generator, generator(opened.denoiser, ["a red circle"], [7])


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


def test_images_that_are_not_finite_are_an_error_or_reported(folder, tmp_path, capsys):
    shutil.copytree(folder / "model", tmp_path / "model")
    file = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_out.bias"][0] = np.nan
    save_file(weights, file)
    sampling = Sampling(1, 0.0, "ddim")

    opened = open_model(str(tmp_path / "model"), dtype=jnp.float32)
    with pytest.raises(
        ValueError, match=r"unet/diffusion_pytorch_model.safetensors holds numbers .* in conv_out\.bias"
    ):
        _ = opened.denoiser

    allowed = open_model(str(tmp_path / "model"), dtype=jnp.float32, allow_nonfinite=True)
    drawn = allowed.generator(sampling, resolution=32, batch_size=2)(allowed.denoiser, ["a", "b", "c"], [5, 6, 7])
    assert drawn.shape == (3, 32, 32, 3)
    told = capsys.readouterr().err
    assert "the image of 'a', seed 5 and 1 more came out black: its values are not finite" in told
    assert "the image of 'c', seed 7 came out black" in told

    opened = open_model(str(folder / "model"), dtype=jnp.float32)
    generator = opened.generator(sampling, resolution=32, batch_size=2)
    with pytest.raises(ValueError, match=r"the image of 'a', seed 5 and 1 more came out black"):
        generator(allowed.denoiser, ["a", "b", "c"], [5, 6, 7])
    generator(opened.denoiser, ["a"], [5])


def test_a_model_that_is_not_finite_with_a_lora(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    file = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.weight"][0, 0, 0, 0] = np.inf
    save_file(weights, file)
    opened = open_model(str(tmp_path / "model"), dtype=jnp.float32, lora=str(folder / "lora.safetensors"))
    with pytest.raises(ValueError, match=r"unet holds numbers that are not finite as float32 .* in conv_in\.weight"):
        _ = opened.denoiser
