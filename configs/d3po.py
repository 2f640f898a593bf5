"""A LoRA for Stable Diffusion 1.5 with D3PO (arXiv 2311.13231), with the hyperparameters of its released code.

Tasks with a judge: `:compressibility` (the default, as in the released code), `:incompressibility`, `:aesthetic`, and
`:alignment` of prompt and image, by PickScore. Tasks for people: `:hands` (distortion) and `:safety`, with lists of
prompts that the released code does not have. Methods other than D3PO: `:ddpo`, `:dpok`, `:grpo`, `:nft`, `:dgpo`,
`:spo` and `:lpo`, each for any task with a judge, for example `configs/d3po.py:alignment,ddpo`. `:tiny` runs any of
them in seconds.
"""

import functools

from ml_collections import ConfigDict

from dpo_jax.rounds.config import online_config
from dpo_jax.training.config import Variant, apply_variants, choose_method


def get_config(arg: str | None = None) -> ConfigDict:
    c = online_config()
    c.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    c.online.judges = ("jpeg_compressibility",)
    c.online.prompts = "ddpo_animals"  # "simple_animals" in the released code
    c.online.prompts_per_round = 20  # x 2 candidates: 40 images, and one update per prompt
    c.online.rounds = 400
    variants: dict[str, Variant] = {
        "aesthetic": aesthetic,
        "compressibility": compressibility,
        "incompressibility": incompressibility,
        "alignment": alignment,
        "hands": hands,
        "safety": safety,
        "ddpo": functools.partial(alone, method="ddpo"),
        "dpok": functools.partial(alone, method="dpok"),
        "grpo": functools.partial(choose_method, name="grpo"),
        "nft": functools.partial(choose_method, name="nft"),
        "dgpo": functools.partial(choose_method, name="dgpo"),
        "spo": spo,
        "lpo": lpo,
        "tiny": tiny,
    }
    return apply_variants(c, arg, variants)


def aesthetic(c: ConfigDict) -> None:
    """It needs the file of the predictor: --config.online.judges="('aesthetic=FILE.safetensors',)"."""
    c.online.judges = ("aesthetic",)
    c.online.rounds = 1000
    c.online.prompts_per_round = 8  # x 2 candidates, as published for this reward
    c.online.prompts_at_a_time = 4


def compressibility(c: ConfigDict) -> None:
    c.online.judges = ("jpeg_compressibility",)


def incompressibility(c: ConfigDict) -> None:
    c.online.judges = ("jpeg_incompressibility",)


def alignment(c: ConfigDict) -> None:
    """PickScore judges here, people in the paper; `--config.online.judges="()"` asks people."""
    c.online.judges = ("pickscore",)
    c.online.prompts = "ddpo_animal_activities"  # the prompts of DDPO for this task


def people(c: ConfigDict) -> None:
    """7 images per prompt, one update per pair of images (21), and as reference the policy that sampled the round.

    The released code passes over the images of a vote hundreds of times, here `online.epochs` times, which is 1.
    """
    c.online.judges = ()
    c.online.candidates = 7
    c.online.update_by = "pair"
    c.online.reference = "round"
    c.online.rounds = 5


def hands(c: ConfigDict) -> None:
    """Vote with points, or only on distorted hands with --mode=tag --tags="distorted hand"."""
    people(c)
    c.online.prompts = "hands"


def safety(c: ConfigDict) -> None:
    """Vote with points, or with --mode=tag --tags=unsafe. Name your own prompts: --config.online.prompts=FILE."""
    people(c)
    c.online.prompts = "bundled"


def alone(c: ConfigDict, *, method: str) -> None:
    """One image per prompt and one update per image, as in D3PO's released code for the methods it compares with."""
    choose_method(c, method)
    c.online.candidates = 1


def spo(c: ConfigDict) -> None:
    choose_method(c, "spo")
    c.online.branch_after = 0.2
    c.optimizer.learning_rate = 6e-5


def lpo(c: ConfigDict) -> None:
    choose_method(c, "lpo")
    c.online.latent_judge = "mhdang/dpo-sd1.5-text2image-v1"


def tiny(c: ConfigDict) -> None:
    """The same experiment on a small random model: seconds on a laptop, to see that it runs."""
    c.model = "random:sd15"
    c.dtype = c.vae_dtype = "float32"
    c.data.resolution = 32
    c.data.micro_batch = 64  # all at once
    c.online.rounds = 2
    c.online.prompts_per_round = 2
    c.online.prompts_at_a_time = 2
    c.online.sampling_steps = 4
    c.online.candidates = min(c.online.candidates, 3)
    if not set(c.online.judges) <= {"jpeg_compressibility", "jpeg_incompressibility"}:
        c.online.judges = ("jpeg_compressibility",)  # other judges need weights
    if c.loss.name == "lpo":
        choose_method(c, "spo")  # there is no model trained from a random one to judge latents
        c.online.latent_judge = ""
    c.log_every = 1
    c.sample.every = 4
    c.sample.prompts = ("a cat", "a dog")
    c.sample.seeds = 1
    c.sample.steps = 2
