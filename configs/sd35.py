"""Stable Diffusion 3.5 medium with Diffusion-DPO for flow models, on Pick-a-Pic v2.

No full run with preference pairs was published for this model, so the values follow released code of flow models:
timesteps as in diffusers' SD3 scripts, and the loss as in flow_grpo's train_sd3_dpo.py. Its beta of 100 is for rates
of 3e-4; the full run takes Diffusion-DPO's 2000 with a rate like LongCat-Image's. `loss.safeguard` keeps the winner's
error from rising (arXiv 2511.03317). `:lora` trains a LoRA with flow_grpo's settings. `:tiny` runs either in seconds.
Other sizes: --config.model=stabilityai/stable-diffusion-3.5-large.
"""

from ml_collections import ConfigDict

from dpo_jax.training.config import apply_variants, default_config, tiny

LORA_TARGETS = r"\battn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$"


def get_config(arg: str | None = None) -> ConfigDict:
    c = default_config()
    c.model = "stabilityai/stable-diffusion-3.5-medium"
    c.data.path = "data/pickapic"  # written by python -m dpo_jax.prepare
    c.data.encoded_views = 2  # T5 (8.9 GiB) is then not in memory while training; see prepare --encode
    c.data.random_crop = False
    c.data.resolution = 1024  # what it was trained on
    c.data.text_length = 128  # as in flow_grpo; most captions are shorter, and each token takes 8 kB
    c.data.batch_size = 128
    c.data.micro_batch = 1
    c.data.caption_dropout = 0.1  # as in LongCat-Image
    c.loss.beta = 2000.0
    c.steps = 2000
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 5e-6  # as in LongCat-Image
    c.optimizer.scale_by_batch = False
    c.optimizer.warmup_steps = 100
    c.ema.decay = 0.999
    c.mesh.data = 1
    c.mesh.fsdp = -1  # float32 weights, gradients and optimizer state take 33 GiB, split over all devices
    c.remat = "block"
    c.sample.sampler = ""  # flow_euler, the scheduler's own
    c.sample.steps = 28
    c.sample.guidance = 4.5
    return apply_variants(c, arg, {"lora": lora, "tiny": tiny("sd3")})


def lora(c: ConfigDict) -> None:
    """flow_grpo's train_sd3_dpo.py at 512 pixels (arXiv 2505.05470), with one draw of the timestep a pair, not 39."""
    c.lora.rank = 32
    c.lora.alpha = 64.0
    c.lora.initializer = "gaussian"
    c.lora.targets = LORA_TARGETS
    c.data.resolution = 512
    c.data.micro_batch = 4
    c.loss.beta = 100.0
    c.optimizer.learning_rate = 3e-4
    c.ema.decay = 0.0
    c.mesh.data = -1
    c.mesh.fsdp = 1
