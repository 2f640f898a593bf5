"""Stable Diffusion 1.5 by Diffusion-DPO on Pick-a-Pic v2, as published (arXiv 2311.12908 and its released code).

`:lora` trains a LoRA as the diffusers script does; `:tiny` runs either in seconds.
"""

from ml_collections import ConfigDict

from dpo_jax.training.config import apply_variants, default_config, tiny


def get_config(arg: str | None = None) -> ConfigDict:
    c = default_config()
    c.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    c.data.path = "data/pickapic"  # written by python -m dpo_jax.prepare
    c.data.resolution = 512  # what SD1.5 was trained on
    c.data.batch_size = 2048  # 16 GPUs x 128 accumulated in the published run
    c.data.micro_batch = 8  # pairs per device at a time; each takes about 1.7 GiB beside the model
    c.data.caption_dropout = 0.2
    c.loss.beta = 5000.0  # the released code's; the paper prints 2000 for SD1.5
    c.steps = 2000
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 1e-8  # x 2048 = 2.048e-5, what the released launcher reaches
    c.optimizer.scale_by_batch = True
    c.optimizer.warmup_steps = 500
    return apply_variants(c, arg, {"lora": lora, "tiny": tiny("sd15")})


def lora(c: ConfigDict) -> None:
    """diffusers' train_diffusion_dpo.py with the arguments of its README, but for 8-bit AdamW and float16.

    The script crops and mirrors the two images of a pair independently; here they share both.
    """
    c.lora.rank = 8  # alpha = rank; queries, keys, values and outputs of every attention
    c.lora.initializer = "gaussian"
    c.data.batch_size = 32  # the script's 16 x 2 accumulated
    c.data.micro_batch = 4
    c.data.caption_dropout = 0.0  # the script has none
    c.loss.beta = 5000.0  # the script's 2500, whose loss is written without the factor 1/2
    c.steps = 10_000
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 1e-5
    c.optimizer.scale_by_batch = False
    c.optimizer.schedule = "constant"
