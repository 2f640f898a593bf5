"""FLUX.1-dev with Diffusion-DPO for flow models, as a LoRA on Pick-a-Pic v2; 12 billion weights stay as they are.

No run with preference pairs was published for this model, so the values follow released code of flow models:
timesteps as in diffusers' FLUX scripts, which train at the unshifted levels (LongCat-Image shifts them;
`loss.timestep_shift`), and the LoRA as in flow_grpo, at a tenth of its rate. `loss.safeguard` keeps the winner's
error from rising (arXiv 2511.03317). `:schnell` trains FLUX.1-schnell, which is Apache-2.0. `:full` trains all
weights, for eight GPUs or more. `:tiny` runs each in seconds.
"""

from ml_collections import ConfigDict

from dpo_jax.training.config import apply_variants, default_config, tiny

LORA_TARGETS = r"\battn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$"


def get_config(arg: str | None = None) -> ConfigDict:
    c = default_config()
    c.model = "black-forest-labs/FLUX.1-dev"
    c.guidance = 3.5  # as diffusers' script and kohya's train; others tell the model 1
    c.lora.rank = 32
    c.lora.alpha = 64.0
    c.lora.initializer = "gaussian"
    c.lora.targets = LORA_TARGETS
    c.data.path = "data/pickapic"  # written by python -m dpo_jax.prepare
    c.data.encoded_views = 2  # T5 (8.9 GiB) is then not in memory while training; see prepare --encode
    c.data.random_crop = False
    c.data.resolution = 512
    c.data.text_length = 128  # most captions are shorter, and each token takes 8 kB
    c.data.batch_size = 128
    c.data.micro_batch = 1
    c.data.caption_dropout = 0.0  # it has no guidance by an empty caption
    c.loss.beta = 2000.0
    c.steps = 2000
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 3e-5
    c.optimizer.scale_by_batch = False
    c.optimizer.warmup_steps = 100
    c.remat = "block"
    c.sample.sampler = ""  # flow_euler, the scheduler's own
    c.sample.steps = 28
    c.sample.guidance = 3.5
    return apply_variants(c, arg, {"schnell": schnell, "full": full, "tiny": tiny("flux")})


def schnell(c: ConfigDict) -> None:
    """FLUX.1-schnell, which draws in four steps and is not told a guidance scale."""
    c.model = "black-forest-labs/FLUX.1-schnell"
    c.sample.steps = 4
    c.sample.guidance = 0.0


def full(c: ConfigDict) -> None:
    """All weights: float32 weights and Adafactor's state take about 50 GiB, split over all devices."""
    c.lora.rank = 0
    c.lora.alpha = 0.0
    c.optimizer.name = "adafactor"
    c.optimizer.learning_rate = 5e-6
    c.mesh.data = 1
    c.mesh.fsdp = -1
