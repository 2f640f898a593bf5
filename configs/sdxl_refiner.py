"""The SDXL refiner 1.0 with Diffusion-DPO on Pick-a-Pic v2: as the released code trains it, other values as for SDXL.

The refiner makes the last, nearly noiseless fifth of a trajectory, so it is trained on timesteps below 200, conditioned
on an aesthetic score of 6 and on its one text encoder. `:published` is the loss of the paper alone. `:tiny`
runs it in seconds.
"""

from ml_collections import ConfigDict

from dpo_jax.training.config import apply_variants, default_config, published, tiny


def get_config(arg: str | None = None) -> ConfigDict:
    c = default_config()
    c.model = "stabilityai/stable-diffusion-xl-refiner-1.0"
    c.vae = "madebyollin/sdxl-vae-fp16-fix"
    c.data.path = "data/pickapic"
    c.data.resolution = 1024
    c.data.batch_size = 2048
    c.data.micro_batch = 1
    c.data.caption_dropout = 0.2
    c.loss.beta = 5000.0
    c.steps = 2000
    c.optimizer.name = "adafactor"
    c.optimizer.learning_rate = 1e-8  # x 2048 = 2.048e-5
    c.optimizer.scale_by_batch = True
    c.optimizer.warmup_steps = 200
    c.mesh.data = 1
    c.mesh.fsdp = -1
    c.sample.every = 0  # the refiner starts from an image, and the grids start from pure noise
    return apply_variants(c, arg, {"published": published, "tiny": tiny("sdxl_refiner")})
