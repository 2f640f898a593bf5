"""Stable Diffusion 1.5 by Diffusion-DPO on Pick-a-Pic v2, as published (arXiv 2311.12908 and its released code)."""

from ml_collections import ConfigDict

from dpo_jax.training.config import default_config, tiny_variant


def get_config(arg: str | None = None) -> ConfigDict:
    c = default_config()
    c.model = "models/stable-diffusion-v1-5"  # a diffusers folder, PyTorch or legacy Flax
    c.data.path = "data/pickapic"  # written by python -m dpo_jax.prepare
    c.data.resolution = 512
    c.data.batch_size = 2048  # 16 GPUs x 128 accumulated in the published run
    c.data.accumulation = 16  # 8 pairs at a time on each of 16 devices; a pair takes about 4.5 GiB beside the model
    c.data.caption_dropout = 0.2
    c.loss.beta = 5000.0  # the released code's; the paper prints 2000 for SD1.5
    c.steps = 2000
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 1e-8  # x 2048 = 2.048e-5, what the released launcher reaches
    c.optimizer.scale_by_batch = True
    c.optimizer.warmup_steps = 500
    if arg == "tiny":
        return tiny_variant(c, "sd15")
    if arg is not None:
        raise ValueError(f"configs/sd15.py has no variant {arg!r}; it has :tiny")
    return c
