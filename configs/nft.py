"""A LoRA for Stable Diffusion 3.5 medium with DiffusionNFT (arXiv 2509.16117), with the settings of its released code.

PickScore judges here, several rewards in the paper. Images are drawn with 10 of flow matching's Euler steps; the
released code takes as many of DPM-Solver++ of second order. A prompt's 24 images are trained on together, so blocks
are rematerialized. `:sd15` trains Stable Diffusion 1.5, with 8 images of a prompt. `:tiny` runs either in seconds.
"""

from ml_collections import ConfigDict

from dpo_jax.rounds.config import online_config
from dpo_jax.training.config import Variant, apply_variants, choose_method


def get_config(arg: str | None = None) -> ConfigDict:
    c = online_config()
    choose_method(c, "nft")
    c.model = "stabilityai/stable-diffusion-3.5-medium"
    c.data.resolution = 512
    c.data.text_length = 128
    c.data.batch_size = 48  # all prompts of a round: one update
    c.data.micro_batch = 1
    c.remat = "block"
    c.lora.rank = 32
    c.lora.alpha = 64.0
    c.lora.targets = r"\battn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$"
    c.online.judges = ("pickscore",)
    c.online.prompts = "bundled"
    c.online.prompts_per_round = 48
    c.online.prompts_at_a_time = 1
    c.online.candidates = 24
    c.online.sampler = "flow_euler"
    c.online.sampling_steps = 10
    c.online.rounds = 1000
    c.optimizer.learning_rate = 3e-4
    c.ema.decay = 0.9
    c.sample.sampler = ""  # flow_euler, the scheduler's own
    c.sample.steps = 28
    c.sample.guidance = 1.0  # the model learns to need none
    variants: dict[str, Variant] = {"sd15": sd15, "tiny": tiny}
    return apply_variants(c, arg, variants)


def sd15(c: ConfigDict) -> None:
    c.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    c.data.text_length = 0
    c.remat = "none"
    c.lora.targets = online_config().lora.targets
    c.online.candidates = 8
    c.online.sampler = "dpmsolver++"
    c.sample.sampler = "ddim"


def tiny(c: ConfigDict) -> None:
    """The same experiment on a small random model: seconds on a laptop, to see that it runs."""
    c.model = "random:sd3" if c.online.sampler == "flow_euler" else "random:sd15"
    c.dtype = c.vae_dtype = "float32"
    c.remat = "none"
    c.data.resolution = 32
    c.data.text_length = 0
    c.data.batch_size = 1
    c.data.micro_batch = 64  # all at once
    c.online.judges = ("jpeg_compressibility",)  # other judges need weights
    c.online.rounds = 2
    c.online.prompts_per_round = 2
    c.online.prompts_at_a_time = 2
    c.online.candidates = 3
    c.online.sampling_steps = 4
    c.log_every = 1
    c.sample.every = 4
    c.sample.prompts = ("a cat", "a dog")
    c.sample.seeds = 1
    c.sample.steps = 2
