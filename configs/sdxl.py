"""SDXL base 1.0 with Diffusion-DPO on Pick-a-Pic v2, with the values of its released code (arXiv 2311.12908).

One thing is added: `loss.safeguard` keeps the winner's error from rising (arXiv 2511.03317). `:published` turns it off.
`:lora` trains a LoRA with the settings of the diffusers script. `:tiny` runs either in seconds.
"""

from ml_collections import ConfigDict

from dpo_jax.training.config import apply_variants, default_config, published, tiny


def get_config(arg: str | None = None) -> ConfigDict:
    c = default_config()
    c.model = "stabilityai/stable-diffusion-xl-base-1.0"
    c.vae = "madebyollin/sdxl-vae-fp16-fix"  # SDXL's own VAE overflows in half precision
    c.data.path = "data/pickapic"  # written by python -m dpo_jax.prepare
    c.data.resolution = 1024  # what SDXL was trained on
    c.data.batch_size = 2048
    c.data.micro_batch = 1  # a pair takes about 8 GiB beside the model
    c.data.caption_dropout = 0.2
    c.loss.beta = 5000.0
    c.steps = 2000  # the released launcher saves a checkpoint every 200 steps
    c.optimizer.name = "adafactor"  # AdamW's second moment of 2.6 billion parameters would not fit
    c.optimizer.learning_rate = 1e-8  # x 2048 = 2.048e-5
    c.optimizer.scale_by_batch = True
    c.optimizer.warmup_steps = 200
    c.mesh.data = 1
    c.mesh.fsdp = -1  # float32 weights, gradients and optimizer state take 30 GiB, split over all devices
    c.sample.guidance = 5.0  # the usual scale for SDXL
    return apply_variants(c, arg, {"published": published, "lora": lora, "tiny": tiny("sdxl")})


def lora(c: ConfigDict) -> None:
    """diffusers' train_diffusion_dpo_sdxl.py with the arguments of its README, except 8-bit AdamW and float16.

    The script resizes the second image of a pair to the size of the first, and gives the model that size for both. Here
    each image is resized on its own, and the model gets its own size.
    """
    c.vae_dtype = "float32"  # as in the script
    c.lora.rank = 8  # alpha = rank, on the queries, keys, values and outputs of every attention layer
    c.lora.initializer = "gaussian"
    c.data.batch_size = 16  # the script's 8, accumulated twice
    c.data.caption_dropout = 0.0  # as in the script
    c.data.size_conditioning = "real"  # as in the script; the published full run uses "constant"
    c.loss.beta = 5000.0  # the script's default; its loss also has the factor 1/2
    c.steps = 2000
    c.optimizer.name = "adamw"  # an adapter's moments are small
    c.optimizer.learning_rate = 1e-5
    c.optimizer.scale_by_batch = False
    c.optimizer.schedule = "constant"
