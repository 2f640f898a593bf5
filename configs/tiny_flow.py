"""A tiny flow model of a small captioned world, with the structure of Stable Diffusion 3.5.

Its pairs are its own images, labelled by the exact judge. `:lora` trains a LoRA. `:base` trained the base model itself,
by plain flow matching on captioned images.
"""

from ml_collections import ConfigDict

from dpo_jax.bundled import package_path
from dpo_jax.configs import sd35
from dpo_jax.configs import tiny as tiny_sdxl
from dpo_jax.training.config import apply_variants, choose_method, tiny


def get_config(arg: str | None = None) -> ConfigDict:
    c = tiny_sdxl.get_config()
    c.model = package_path("dpo_jax/tiny/flow_model")
    c.steps = 100  # 14 times through the 234 pairs that are not held out
    c.loss.beta = 500.0
    c.data.path = "runs/tiny_flow/data"
    c.optimizer.learning_rate = 2e-4  # a tenth of that of the base
    c.sample.sampler = ""  # flow_euler, the scheduler's own
    return apply_variants(c, arg, {"base": base, "lora": lora, "tiny": tiny("sd3")})


def base(c: ConfigDict) -> None:
    choose_method(c, "sft")
    c.steps = 230  # stopped early, so that DPO has something to learn
    c.data.path = "runs/make_tiny/flow_data"
    c.data.batch_size = 64
    c.data.encoded_views = 1
    c.optimizer.learning_rate = 2e-3
    c.optimizer.schedule = "constant_with_warmup"
    c.optimizer.warmup_steps = 100
    c.validation.every = c.sample.every = 0


def lora(c: ConfigDict) -> None:
    tiny_sdxl.lora(c)
    c.lora.targets = sd35.LORA_TARGETS
