"""SDXL base 1.0 by Diffusion-DPO on Pick-a-Pic v2, as published (arXiv 2311.12908 and its released code)."""

from ml_collections import ConfigDict

from dpo_jax.training.config import default_config, tiny_variant


def get_config(arg: str | None = None) -> ConfigDict:
    c = default_config()
    c.model = "models/stable-diffusion-xl-base-1.0"  # a diffusers folder, PyTorch or legacy Flax
    c.data.path = "data/pickapic"  # written by python -m dpo_jax.prepare
    c.data.resolution = 1024
    c.data.batch_size = 2048
    c.data.accumulation = 64  # 1 pair at a time on each of 32 devices; a pair takes about 28 GiB beside the model
    c.data.caption_dropout = 0.2
    c.loss.beta = 5000.0
    c.steps = 2000  # the published checkpoint is the best of one every 200 steps
    c.optimizer.name = "adafactor"  # a second AdamW moment of 2.6 billion parameters would not fit beside the rest
    c.optimizer.learning_rate = 1e-8  # x 2048 = 2.048e-5
    c.optimizer.scale_by_batch = True
    c.optimizer.warmup_steps = 200
    c.mesh.data = 1
    c.mesh.fsdp = -1  # masters, gradients and optimizer state need 30 GiB, split over all devices
    c.sample.guidance = 5.0  # what SDXL is usually sampled with
    if arg == "tiny":
        return tiny_variant(c, "sdxl")
    if arg is not None:
        raise ValueError(f"configs/sdxl.py has no variant {arg!r}; it has :tiny")
    return c
