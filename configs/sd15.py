"""Stable Diffusion 1.5 with Diffusion-DPO on Pick-a-Pic v2, with the values of its released code (arXiv 2311.12908).

One thing is added: `loss.safeguard` keeps the winner's error from rising (arXiv 2511.03317). `:published` turns it off.
`:lora` trains a LoRA with the settings of the diffusers script. `:tiny` runs either in seconds.
"""

from ml_collections import ConfigDict

from dpo_jax.training.config import apply_variants, default_config, published, tiny


def get_config(arg: str | None = None) -> ConfigDict:
    c = default_config()
    c.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    c.data.path = "data/pickapic"  # written by python -m dpo_jax.prepare
    c.data.resolution = 512  # what SD1.5 was trained on
    c.data.batch_size = 2048  # in the published run 16 GPUs, each with 128 accumulated pairs
    c.data.micro_batch = 8  # a pair takes about 1.7 GiB beside the model
    c.data.caption_dropout = 0.2
    c.loss.beta = 5000.0  # as in the released code; the paper says 2000 for SD1.5
    c.loss.safeguard_margin = 0.9  # as published for SD1.5
    c.steps = 2000
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 1e-8  # x 2048 = 2.048e-5, the rate of the released launcher
    c.optimizer.scale_by_batch = True
    c.optimizer.warmup_steps = 500
    return apply_variants(c, arg, {"published": published, "lora": lora, "tiny": tiny("sd15")})


def lora(c: ConfigDict) -> None:
    """diffusers' train_diffusion_dpo.py with the arguments of its README, except 8-bit AdamW and float16.

    The script crops and mirrors the two images of a pair independently; here both are treated alike.
    """
    c.lora.rank = 8  # alpha = rank, on the queries, keys, values and outputs of every attention layer
    c.lora.initializer = "gaussian"
    c.data.batch_size = 32  # the script's 16, accumulated twice
    c.data.micro_batch = 4
    c.data.caption_dropout = 0.0  # as in the script
    c.loss.beta = 5000.0  # 2500 in the script, whose loss lacks the factor 1/2
    c.steps = 10_000
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 1e-5
    c.optimizer.scale_by_batch = False
    c.optimizer.schedule = "constant"
