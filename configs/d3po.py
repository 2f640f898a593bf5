"""Stable Diffusion 1.5 by D3PO (arXiv 2311.13231), a LoRA, by the hyperparameters of its released code.

Tasks: `:aesthetic` (the default), `:compressibility`, `:incompressibility` (exact rewards), `:alignment` (prompt and
image, by PickScore), and by people `:hands` (distortion) and `:safety`. Methods: `:ddpo`, `:dpok`, `:grpo`, `:spo` and
`:lpo`; without one D3PO. Several are named with commas, `configs/d3po.py:compressibility,ddpo`; `:tiny` runs any of
them in seconds.
"""

import functools

from ml_collections import ConfigDict

from dpo_jax.rounds.config import METHODS, lpo, online_config
from dpo_jax.training.config import apply_variants


def get_config(arg: str | None = None) -> ConfigDict:
    c = online_config()
    c.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    c.online.judges = ("aesthetic",)
    c.online.prompts_per_round = 10  # x 2 candidates: 20 images
    c.online.rounds = 400
    variants = {
        "aesthetic": aesthetic,
        "compressibility": compressibility,
        "incompressibility": incompressibility,
        "alignment": alignment,
        "hands": hands,
        "safety": safety,
        **METHODS,
        "lpo": functools.partial(lpo, latent_judge=f"mhdang/dpo-sd1.5-text2image-v1:{c.model}"),
        "tiny": tiny,
    }
    return apply_variants(c, arg, variants)


def aesthetic(c: ConfigDict) -> None:
    c.online.judges = ("aesthetic",)
    c.online.rounds = 1000
    c.online.prompts_per_round = 4  # x 2: 8 images, as published for this reward


def compressibility(c: ConfigDict) -> None:
    c.online.judges = ("jpeg_compressibility",)


def incompressibility(c: ConfigDict) -> None:
    c.online.judges = ("jpeg_incompressibility",)


def alignment(c: ConfigDict) -> None:
    """Judged by PickScore here, by people in the paper; `--config.online.judges="()"` asks them."""
    c.online.judges = ("pickscore",)
    c.online.prompts = "bundled"


def people(c: ConfigDict) -> None:
    """7 images of a prompt, an update for each of the 21 pairs, and each round's policy the next one's reference."""
    c.online.judges = ()
    c.online.candidates = 7
    c.online.update_by = "pair"
    c.online.reference = "round"
    c.online.rounds = 5


def hands(c: ConfigDict) -> None:
    """Vote with --mode=tag --tags="distorted hands", or by points."""
    people(c)
    c.online.prompts = "animals"


def safety(c: ConfigDict) -> None:
    """Vote with --mode=tag --tags=unsafe. Prompts are one's own: --config.online.prompts=FILE."""
    people(c)
    c.online.prompts = "bundled"


def tiny(c: ConfigDict) -> None:
    """The same experiment on a small random model: seconds on a laptop, to see that it runs."""
    c.model = "random:sd15"
    c.dtype = c.vae_dtype = "float32"
    c.data.resolution = 32
    c.data.accumulation = 1
    c.online.rounds = 2
    c.online.prompts = "animals"
    c.online.prompts_per_round = 2
    c.online.prompts_at_a_time = 2
    c.online.sampling_steps = 4
    c.online.candidates = min(c.online.candidates, 3)
    c.online.judges = ("jpeg_compressibility",) if c.online.judges else ()
    c.online.latent_judge = ""  # no model is tuned from a random one
    c.log_every = 1
    c.sample.every = 4
    c.sample.prompts = ("a cat", "a dog")
    c.sample.seeds = 1
    c.sample.steps = 2
