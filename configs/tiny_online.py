"""The tiny model learns online from the exact judge of its small captioned world, on two CPU cores in minutes.

Without a variant the method is D3PO; `:ddpo`, `:dpok`, `:grpo`, `:nft`, `:dgpo`, `:spo` and `:lpo` are others.
`:compressibility` rewards images that are small as a JPEG. `:guarded` does so while the exact judge watches, and ends
when the images no longer show what they should. `:flow` trains the tiny flow model instead, also by `:flow_grpo`.
`:tiny` runs any of them in seconds.
"""

import functools

from ml_collections import ConfigDict

from dpo_jax.bundled import package_path
from dpo_jax.rounds.config import online_config
from dpo_jax.training.config import Variant, apply_variants, choose_method

FLOW_MODEL = package_path("dpo_jax/tiny/flow_model")


def get_config(arg: str | None = None) -> ConfigDict:
    c = online_config()
    c.model = package_path("dpo_jax/tiny/model")
    c.dtype = c.vae_dtype = "float32"  # CPUs emulate bfloat16
    c.lora.rank = 0  # so small a model is trained in full
    c.data.resolution = 32
    c.data.batch_size = 8
    c.data.micro_batch = 64  # all at once
    c.online.rounds = 15
    c.online.prompts = "tiny_train"
    c.online.evaluation_prompts = "tiny_heldout"
    c.online.prompts_per_round = 32
    c.online.prompts_at_a_time = 16
    c.online.candidates = 4
    c.online.judges = ("shapes",)
    c.online.sampling_steps = 10
    c.online.guidance = 2.5
    c.online.timesteps = 0.5
    c.online.reference = "round"  # the policy is soon so far from the initial one that most ratios would be clamped
    c.optimizer.learning_rate = 5e-5
    c.optimizer.schedule = "linear"  # to 0, since the last steps of a constant rate leave noise in the weights
    c.log_every = 4
    c.checkpoint.every = 100
    c.sample.every = 0
    c.sample.prompts = ("a red circle at the top left", "a blue square at the bottom right")
    c.sample.guidance = 2.5
    variants: dict[str, Variant] = {
        **{name: functools.partial(policy_gradient, method=name) for name in ("ddpo", "dpok", "grpo", "flow_grpo")},
        **{name: functools.partial(of_images, method=name) for name in ("nft", "dgpo")},
        "spo": functools.partial(choose_method, name="spo"),
        "lpo": lpo,
        "compressibility": compressibility,
        "guarded": guarded,
        "flow": flow,
        "tiny": tiny,
    }
    return apply_variants(c, arg, variants)


def policy_gradient(c: ConfigDict, *, method: str) -> None:
    choose_method(c, method)
    if method == "flow_grpo":
        flow(c)
        c.online.candidates = 4
        c.online.guidance = 2.5
    c.loss.clip = 0.1  # this model takes large steps: two thirds of the ratios are beyond the released 1e-4


def of_images(c: ConfigDict, *, method: str) -> None:
    """Half of the evaluations: no step is kept, so few steps of a good sampler draw the images."""
    choose_method(c, method)
    c.loss.kl_weight = 0.0
    c.online.candidates = 4
    c.online.sampling_steps = 5
    without_kept_steps(c)
    c.online.timesteps = 0.2  # one noise level of each image
    if method == "dgpo":
        c.optimizer.learning_rate *= 2


def without_kept_steps(c: ConfigDict) -> None:
    """The flow model is drawn without guidance, as published: with it, it learns nothing in 15 rounds."""
    is_flow = c.model == FLOW_MODEL
    c.online.sampler = "flow_euler" if is_flow else "dpmsolver++"
    c.online.guidance = 1.0 if is_flow else 2.5


def lpo(c: ConfigDict) -> None:
    choose_method(c, "lpo")
    c.online.latent_judge = "runs/tiny/exported"  # made by the demo


def compressibility(c: ConfigDict) -> None:
    c.online.judges = ("jpeg_compressibility",)
    c.optimizer.learning_rate = 2e-4  # with 5e-5 the files hardly shrink within 15 rounds


def guarded(c: ConfigDict) -> None:
    compressibility(c)
    c.online.watched_judges = ("shapes",)
    c.online.prompts_per_round = 64  # or a fall by a twentieth could be chance
    c.online.prompts_at_a_time = 32
    c.online.candidates = 8
    c.online.timesteps = 0.2
    c.optimizer.learning_rate = 1.2e-5  # slowly, or the images are lost within one round
    c.optimizer.schedule = "constant"


def flow(c: ConfigDict) -> None:
    """Other methods than Flow-GRPO have no sampler for flow models of their own."""
    if c.model != FLOW_MODEL:
        c.optimizer.learning_rate *= 4  # as much larger as in the demos of the two models
    c.model = FLOW_MODEL
    if c.online.sampler == "ddim":
        c.online.sampler = "flow_sde"
    elif c.online.sampler == "dpmsolver++":
        without_kept_steps(c)


def tiny(c: ConfigDict) -> None:
    c.data.batch_size = 2
    c.online.rounds = 2
    c.online.prompts_per_round = 4
    c.online.prompts_at_a_time = 4
    c.online.candidates = 3
    c.online.sampling_steps = 4
    if c.loss.name == "lpo":
        choose_method(c, "spo")  # the demo would have to make the judge in latents first
        c.online.latent_judge = ""
    c.log_every = 1
