"""The default: a tiny SDXL-shaped model of a small captioned world, trained on two CPU cores in minutes.

`:lora` trains a LoRA. `:base` trained the base model itself, by plain denoising of captioned images.
"""

from ml_collections import ConfigDict

from dpo_jax.bundled import package_path
from dpo_jax.training.config import apply_variants, choose_method, default_config, tiny


def get_config(arg: str | None = None) -> ConfigDict:
    c = default_config()
    c.model = package_path("dpo_jax/tiny/model")
    c.dtype = c.vae_dtype = "float32"  # CPUs emulate bfloat16
    c.steps = 200
    c.loss.beta = 2000.0  # with 500 and twice the rate the errors of both images grow, and the model drifts
    c.data.path = "runs/tiny/data"
    c.data.batch_size = 32
    c.data.micro_batch = 64  # all at once
    c.data.resolution = 32
    c.data.caption_dropout = 0.1  # as in the training of the base
    c.data.random_flip = False  # captions say left and right
    c.optimizer.learning_rate = 5e-5
    c.optimizer.scale_by_batch = False
    c.optimizer.schedule = "linear"  # to 0, since the last steps of a constant rate leave noise in the weights
    c.optimizer.warmup_steps = 10
    c.checkpoint.every = 50
    c.validation.every = 100
    c.validation.draws = 8
    c.sample.every = 100
    c.sample.prompts = ("a red circle at the top left", "a blue square at the bottom right")
    c.sample.seeds = 3
    c.sample.guidance = 2.5
    return apply_variants(c, arg, {"base": base, "lora": lora, "tiny": tiny("sdxl")})


def base(c: ConfigDict) -> None:
    choose_method(c, "sft")
    c.steps = 450  # stopped early, so that DPO has something to learn
    c.data.path = "runs/make_tiny/data"
    c.data.batch_size = 64
    c.optimizer.learning_rate = 7e-4
    c.optimizer.schedule = "constant_with_warmup"
    c.optimizer.warmup_steps = 50


def lora(c: ConfigDict) -> None:
    c.lora.rank = 8
    c.optimizer.learning_rate = 5e-4  # an adapter starts at zero and needs larger steps than the weights
