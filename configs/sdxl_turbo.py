"""SDXL-Turbo with Diffusion-DPO on Pick-a-Pic v2, with the values of its released code (arXiv 2311.12908).

One thing is added: `loss.safeguard` keeps the winner's error from rising (arXiv 2511.03317). `:published` turns it off.
`:lora` trains a LoRA with the settings of the diffusers script. `:tiny` runs either in seconds.
"""

from ml_collections import ConfigDict

from dpo_jax.training.config import apply_variants, default_config, published, tiny


def get_config(arg: str | None = None) -> ConfigDict:
    c = default_config()
    c.model = "stabilityai/sdxl-turbo"
    c.family = "sdxl_turbo"  # its files look like SDXL's; this sets timesteps 249, 499, 749, 999 and zero terminal SNR
    c.vae = "madebyollin/sdxl-vae-fp16-fix"
    c.data.path = "data/pickapic"
    c.data.resolution = 512  # the resolution that Turbo was distilled at
    c.data.batch_size = 2048
    c.data.micro_batch = 4
    c.data.caption_dropout = 0.0  # Turbo is sampled without guidance, so it needs no unconditional model
    c.loss.beta = 5000.0
    c.steps = 2000
    c.optimizer.name = "adafactor"
    c.optimizer.learning_rate = 1e-8  # x 2048 = 2.048e-5
    c.optimizer.scale_by_batch = True
    c.optimizer.warmup_steps = 200
    c.mesh.data = 1
    c.mesh.fsdp = -1  # as in configs/sdxl.py
    c.sample.steps = 4
    c.sample.guidance = 0.0
    return apply_variants(c, arg, {"published": published, "lora": lora, "tiny": tiny("sdxl_turbo")})


def lora(c: ConfigDict) -> None:
    """diffusers' train_diffusion_dpo_sdxl.py --is_turbo with the arguments of its README; see configs/sdxl.py."""
    c.vae_dtype = "float32"  # as in the script
    c.lora.rank = 8
    c.lora.initializer = "gaussian"
    c.data.batch_size = 16  # the script's 8, accumulated twice
    c.data.size_conditioning = "real"
    c.loss.beta = 5000.0  # the script's default; its loss also has the factor 1/2
    c.steps = 2000
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 1e-5
    c.optimizer.scale_by_batch = False
    c.optimizer.schedule = "constant"
