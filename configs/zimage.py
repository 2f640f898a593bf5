"""Z-Image (6 billion weights, Apache-2.0) with Diffusion-DPO for flow models, as a LoRA on Pick-a-Pic v2.

No run with preference pairs was published for this model, so the values follow released code of flow models: the LoRA
is on the layers of diffusers' train_dreambooth_lora_z_image.py, without its refiners. `loss.safeguard` keeps the
winner's error from rising (arXiv 2511.03317). `:full` trains all weights. `:tiny` runs either in seconds.
"""

from ml_collections import ConfigDict

from dpo_jax.training.config import apply_variants, default_config, tiny

LORA_TARGETS = r"^layers\.\d+\.attention\.(to_[qkv]|to_out\.0)$"


def get_config(arg: str | None = None) -> ConfigDict:
    c = default_config()
    c.model = "Tongyi-MAI/Z-Image"
    c.lora.rank = 32
    c.lora.alpha = 64.0
    c.lora.initializer = "gaussian"
    c.lora.targets = LORA_TARGETS
    c.data.path = "data/pickapic"  # written by python -m dpo_jax.prepare
    c.data.encoded_views = 2  # Qwen3 (7.5 GiB) is then not in memory while training; see prepare --encode
    c.data.random_crop = False
    c.data.resolution = 512
    c.data.text_length = 128  # with the 8 tokens of the chat; 512 would cost a third more work
    c.data.batch_size = 128
    c.data.micro_batch = 1
    c.data.caption_dropout = 0.1
    c.loss.beta = 2000.0
    c.steps = 2000
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 3e-5
    c.optimizer.scale_by_batch = False
    c.optimizer.warmup_steps = 100
    c.remat = "block"
    c.sample.sampler = ""  # flow_euler, the scheduler's own
    c.sample.steps = 28
    c.sample.guidance = 5.0  # 4 in diffusers' own definition for this model
    return apply_variants(c, arg, {"full": full, "tiny": tiny("z_image")})


def full(c: ConfigDict) -> None:
    """All weights: float32 weights and Adafactor's state take about 25 GiB, split over all devices."""
    c.lora.rank = 0
    c.lora.alpha = 0.0
    c.optimizer.name = "adafactor"
    c.optimizer.learning_rate = 5e-6
    c.mesh.data = 1
    c.mesh.fsdp = -1
