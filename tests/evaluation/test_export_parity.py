"""An exported model opens in PyTorch diffusers and draws the same image as our sampler."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline

from dpo_jax.data.tokenizers import load_tokenizers
from dpo_jax.models.pipeline import load_pipeline
from dpo_jax.models.save import save_pipeline
from dpo_jax.sampling.generate import Generator, Sampling
from dpo_jax.sharding import Placement, make_mesh

CAPTIONS = ["a red circle at the top left", "a black cross at the bottom right"]


def test_exported_folder_draws_the_same_image_in_pytorch(tmp_path):
    pipeline = load_pipeline("dpo_jax/tiny/model", dtype=jnp.float32)
    weights = {name: pipeline.load(name, dtype=jnp.float32) for name in pipeline.components}
    # As if tuned: every weight of the UNet moves by a little, or exporting the base's own would pass too.
    keys = jax.random.split(jax.random.key(0), len(weights["unet"]))
    tuned = {
        name: value + 0.02 * jnp.std(value) * jax.random.normal(key, value.shape)
        for (name, value), key in zip(weights.pop("unet").items(), keys, strict=True)
    }
    save_pipeline(pipeline, tmp_path / "exported", tuned, dtype=jnp.float32, card="")

    generator = Generator(
        pipeline,
        lambda: weights,
        load_tokenizers(pipeline.folder, pipeline.tokenizers),
        Placement(make_mesh()),
        Sampling(steps=20, guidance=2.5),
        resolution=32,
        batch_size=2,
    )
    ours = generator(tuned, CAPTIONS, [3, 4])

    theirs = StableDiffusionXLPipeline.from_pretrained(tmp_path / "exported", torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    noise_NCHW = np.asarray(generator.starting_noise([3, 4])).transpose(0, 3, 1, 2)
    images = theirs(
        CAPTIONS,
        latents=torch.tensor(noise_NCHW),
        num_inference_steps=20,
        guidance_scale=2.5,
        height=32,
        width=32,
        output_type="np",
    ).images
    difference = np.abs(ours.astype(int) - np.round(images * 255).astype(int))
    assert difference.max() <= 2
    assert ours.std() > 10  # an image, not a plain colour

    # A float16 export takes half the space and opens as well.
    save_pipeline(pipeline, tmp_path / "half", tuned, dtype=jnp.float16, card="")
    sizes = [
        (tmp_path / n / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size for n in ("exported", "half")
    ]
    assert sizes[1] < 0.55 * sizes[0]
    StableDiffusionXLPipeline.from_pretrained(tmp_path / "half")
