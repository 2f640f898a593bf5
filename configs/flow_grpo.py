"""A LoRA for Stable Diffusion 3.5 medium with Flow-GRPO (arXiv 2505.05470), with its released values for PickScore.

`:cps` samples by CPS (arXiv 2509.05952), which leaves no noise in the images; `:fast` adds noise in two steps alone and
trains on them; `:guard` is GRPO-Guard (arXiv 2510.22319); `:flux` trains FLUX.1-dev. `:tiny` runs any of them in
seconds. The released code draws from prompts of Pick-a-Pic; name a file of yours with
--config.online.prompts=FILE. T5 is needed before the first round and for image grids alone, and takes 8.9 GiB then.
"""

from ml_collections import ConfigDict

from dpo_jax.configs import d3po, sd35
from dpo_jax.rounds.config import online_config
from dpo_jax.training.config import apply_variants, choose_method


def get_config(arg: str | None = None) -> ConfigDict:
    c = online_config()
    choose_method(c, "flow_grpo")
    c.model = "stabilityai/stable-diffusion-3.5-medium"
    c.loss.kl_weight = 0.001  # the released 0.01 multiplies a divergence that is a tenth as large
    c.data.resolution = 512
    c.data.text_length = 128
    c.data.batch_size = 24  # prompts of 24 images, so 2 updates per round
    c.online.rounds = 1000
    c.online.prompts = "animal_activities"
    c.online.prompts_per_round = 48
    c.online.prompts_at_a_time = 1
    c.online.candidates = 24
    c.online.judges = ("pickscore",)
    c.lora.rank = 32
    c.lora.alpha = 64.0
    c.lora.targets = sd35.LORA_TARGETS
    c.optimizer.learning_rate = 3e-4
    c.ema.decay = 0.987  # 0.9 in 8 updates
    c.remat = "block"
    c.log_every = 1
    c.sample.sampler = ""  # flow_euler, the scheduler's own
    c.sample.steps = 28
    c.sample.guidance = 4.5
    return apply_variants(c, arg, {"cps": cps, "fast": fast, "guard": guard, "flux": flux, "tiny": tiny})


def cps(c: ConfigDict) -> None:
    c.online.sampler = "flow_cps"
    c.loss.clip = 1e-5
    c.loss.kl_weight = 0.0  # its last steps have so little noise that their divergence would outweigh all else


def fast(c: ConfigDict) -> None:
    """Flow-GRPO-Fast, without a reference, as in the released code."""
    c.online.window = 2
    c.loss.clip = 1e-5
    c.loss.kl_weight = 0.0
    if c.online.sampler == "flow_sde":
        c.online.noise_level = 0.8


def guard(c: ConfigDict) -> None:
    c.loss.ratio = "guard"
    c.loss.clip = 2e-6
    c.loss.kl_weight = 0.0
    c.optimizer.learning_rate = 1e-4


def flux(c: ConfigDict) -> None:
    """FLUX.1-dev, without a reference, as in the released code."""
    c.model = "black-forest-labs/FLUX.1-dev"
    c.data.text_length = 512
    c.loss.kl_weight = 0.0
    c.online.sampling_steps = 6
    c.online.guidance = 3.5
    if c.online.sampler == "flow_sde":
        c.online.noise_level = 0.9
    c.sample.guidance = 3.5


def tiny(c: ConfigDict) -> None:
    """The same experiment on a small random model: seconds on a laptop, to see that it runs."""
    model = "random:flux" if "FLUX" in c.model else "random:sd3"
    d3po.tiny(c)
    c.model = model
    c.data.text_length = 20
    c.data.batch_size = 1
    c.ema.decay = 0.0
    c.remat = "none"
