"""The fields of an online experiment, and the values that are derived from them, once.

The fields are those of `training/config.py` without a data set, and those of `config.online`.
"""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from dpo_jax.errors import UserError
from dpo_jax.training.config import Derived, Variant, check_settings, divide_batch
from dpo_jax.training.defaults import COUNT, GROUPS, NOT_ALL, NOT_NEGATIVE, POSITIVE, SHARE
from dpo_jax.training.defaults import FIELDS as NETWORK_FIELDS
from dpo_jax.training.fields import Field, check_fields, config_of, fields_help, fields_text

FIELDS = {
    **{path: field for path, field in NETWORK_FIELDS.items() if not path.startswith(("validation.", "data.", "loss."))},
    "steps": Field(0, "Leave it at 0: the steps are the rounds x the updates in a round.", **NOT_NEGATIVE),
    "remat": dataclasses.replace(
        NETWORK_FIELDS["remat"],
        help="What to recompute in place of keeping it, from most memory to least.",
        choices=("none", "dots", "attention", "block"),
    ),
    "loss.name": Field("d3po", "Loss.", choices=("d3po", "ddpo", "dpok")),
    "loss.beta": Field(0.1, "Strength of the pull towards the reference (D3PO, SPO, LPO).", **POSITIVE),
    # In bfloat16 rounding alone can move a ratio further (1e-3, see objectives/transitions.py); in float32 it does not.
    "loss.clip": Field(1e-4, "How far the ratio to the sampling policy may be from 1 (DDPO, DPOK).", **POSITIVE),
    "loss.advantage_clip": Field(5.0, "Largest advantage (DDPO, DPOK).", **POSITIVE),
    "loss.kl_weight": Field(0.01, "Weight of the divergence from the reference (DPOK).", **NOT_NEGATIVE),
    "data.batch_size": Field(
        1,
        "Prompts per optimizer step, with all their candidates and timesteps.",
        at_least=1,
        at_most=2**24,
    ),
    "data.micro_batch": Field(
        1,
        "Most prompts per device at a time, each with all candidates at one timestep; gradients are accumulated.",
        at_least=1,
        at_most=2**24,
    ),
    "data.resolution": dataclasses.replace(NETWORK_FIELDS["data.resolution"], help="Height and width, in pixels."),
    "online.rounds": Field(400, "Rounds of sampling, judging and training.", **COUNT),
    "online.prompts": Field(
        "ddpo_animals", "Prompts to train on: a bundled list, or a file as sample --prompts takes."
    ),
    "online.prompts_per_round": Field(20, "Prompts per round.", at_least=1, at_most=2**20),
    "online.candidates": Field(2, "Images per prompt, from the same starting noise.", at_least=1, at_most=2**10),
    "online.judges": Field(("jpeg_compressibility",), "Judges, as evaluate --judges takes them; () asks people."),
    "online.combine": Field(
        "pareto",
        "How several judges combine: pareto (better for one, worse for none) or mean; advantages take the mean.",
        choices=("mean", "pareto"),
    ),
    "online.sampler": Field(
        "ddim", "Sampler; it must add noise: ddim or euler_ancestral.", choices=NETWORK_FIELDS["sample.sampler"].choices
    ),
    "online.sampling_steps": Field(20, "Denoising steps per image.", **COUNT),
    "online.eta": Field(1.0, "Share of fresh noise in each step of ddim; above 0, so that steps are random.", **SHARE),
    "online.guidance": Field(5.0, "Classifier-free guidance scale of sampling and training.", **NOT_NEGATIVE),
    "online.train_guided": Field(
        True, "Train with guidance; without it policy and reference need half of the evaluations."
    ),
    "online.prompts_at_a_time": Field(
        5, "Prompts sampled together, with all their candidates.", at_least=1, at_most=2**20
    ),
    "online.evaluate_every": Field(
        0, "Rounds between two evaluations, also after the last round; 0 turns them off.", **NOT_NEGATIVE
    ),
    "online.evaluation_prompts": Field("bundled", "Prompts to evaluate with; choose others than those trained on."),
    "online.branching": Field(False, "SPO: candidates part at every step and are judged there; a random one goes on."),
    "online.branch_after": Field(
        0.0, "Share of the steps before candidates part, which are not trained on.", **NOT_ALL
    ),
    "online.latent_judge": Field(
        "",
        "LPO: judge latents by the implicit reward of two UNets, TUNED:REFERENCE, or TUNED against the first policy.",
    ),
    "online.best_and_worst": Field(False, "SPO: compare only the best and the worst candidate."),
    "online.margin": Field(
        0.0, "SPO: compare them only if softmax([best, worst]) of the judge differs by more.", **NOT_ALL
    ),
    "online.timesteps": Field(1.0, "Share of the steps of a trajectory to train on.", above=0, at_most=1),
    "online.epochs": Field(1, "Passes over the images of a round.", **COUNT),
    "online.update_by": Field(
        "prompt",
        "One update for all pairs of a prompt, or one per pair, as D3PO does with people.",
        choices=("prompt", "pair"),
    ),
    "online.reference": Field(
        "initial",
        "Reference: the initial policy, or the one that sampled the round, which needs no extra evaluation.",
        choices=("initial", "round"),
    ),
    "online.clip": Field(0.1, "How far the ratio to the reference may be from 1 (D3PO, SPO, LPO).", above=0, below=1),
    "online.advantage": Field(
        "prompt",
        "Advantages from the last rewards of the prompt (DDPO) or from its group of candidates (GRPO).",
        choices=("prompt", "group"),
    ),
}
"""All fields by their dotted path, in the order in which --help lists them."""


def online_config() -> ConfigDict:
    """Return the config with the default of every field, those of D3PO's released code (arXiv 2311.13231)."""
    c = config_of(FIELDS)
    c.dtype = c.vae_dtype = "bfloat16"
    c.lora.rank = 4  # alpha = rank; queries, keys, values and outputs of every attention
    c.lora.initializer = "gaussian"
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 3e-5
    c.optimizer.scale_by_batch = False
    c.optimizer.schedule = "constant"
    c.optimizer.warmup_steps = 0
    c.optimizer.weight_decay = 1e-4
    c.log_every = 10
    c.checkpoint.every = 100
    c.sample.every = 100
    return c


def describe(config: ConfigDict | None) -> str:
    """Return the text of --help about the fields of a config, or about their defaults."""
    return fields_text(fields_help(FIELDS, GROUPS, config or online_config()))


def ddpo(c: ConfigDict) -> None:
    """Change the method to DDPO (arXiv 2305.13301), with which the authors of D3PO compare it."""
    c.loss.name = "ddpo"


def dpok(c: ConfigDict) -> None:
    """Change the method to DPOK (arXiv 2305.16381), also compared there; the divergence here is a true one."""
    c.loss.name = "dpok"
    c.online.reference = "initial"


def grpo(c: ConfigDict) -> None:
    """Change the method to GRPO (arXiv 2402.03300): DDPO with advantages over the candidates of a prompt."""
    c.loss.name = "ddpo"
    c.online.advantage = "group"
    c.online.candidates = 4
    c.online.best_and_worst = False


def spo(c: ConfigDict) -> None:
    """Step-aware preference optimization (arXiv 2406.04314): any judge, of the image that each candidate promises.

    The released code (https://github.com/RockeyCoss/SPO) judges by a PickScore that was trained on noisy images; trains
    at a rate of 6e-5 from the fifth of 20 steps on, as `configs/d3po.py:spo` does; drops nearly tied pairs, with a
    PickScore `online.margin=0.3`; and shuffles the steps of 10 prompts into updates of 10 pairs, where an update here
    has all steps of `data.batch_size` prompts.
    """
    c.loss.beta = 10.0
    c.online.branching = True
    c.online.best_and_worst = True
    c.online.candidates = 4


def lpo(c: ConfigDict, *, latent_judge: str) -> None:
    """Step-level preferences by a reward in latents (arXiv 2502.01051): here the implicit one of a DPO-tuned model.

    The paper trains a reward model for it; of that only the loss and the way to sample are here.

    Args:
        latent_judge: as `online.latent_judge`.
    """
    spo(c)
    c.loss.beta = 500.0
    c.online.latent_judge = latent_judge


METHODS: dict[str, Variant] = {"ddpo": ddpo, "dpok": dpok, "grpo": grpo, "spo": spo}
"""What makes another method of D3PO, as variants of a config."""


@dataclasses.dataclass(frozen=True)
class RoundSizes:
    """What a round consists of."""

    derived: Derived
    timesteps: int
    """Steps of a trajectory that an update trains on."""
    pairs: int
    """Updates per batch of prompts: one, or one for each pair of candidates."""
    updates: int
    """Optimizer steps per round."""
    images: int
    """Images that a judge sees per round."""
    evaluations: int
    """UNet evaluations per round: one image at one timestep each, guided or not; backward passes are not counted."""


def check(config: ConfigDict) -> None:
    """Check the values that do not depend on the machine; raises UserError with the remedy."""
    check_fields(config, FIELDS)
    if not config.model:
        raise UserError("config.model is empty; set it in the config file or with --config.model=...")
    check_settings(config)
    online = config.online
    if config.steps:
        raise UserError(
            f"config.steps={config.steps}, but the steps of an online run follow from its rounds and updates. Leave "
            "steps at 0 and set online.rounds"
        )
    if online.candidates < (2 if config.loss.name == "d3po" or online.advantage == "group" else 1):
        raise UserError(f"config.online.candidates={online.candidates} leaves nothing to compare. Set it to 2 or more")
    if config.lora.dropout:
        raise UserError(
            f"config.lora.dropout={config.lora.dropout} would change the probabilities of the policy that sampled; "
            "set lora.dropout=0"
        )
    if online.prompts_per_round % config.data.batch_size:
        raise UserError(
            f"config.online.prompts_per_round={online.prompts_per_round} is not divisible by "
            f"data.batch_size={config.data.batch_size}, the prompts per update. Change one of them"
        )
    if config.loss.name == "dpok" and online.reference == "round":
        raise UserError('loss.name="dpok" needs a reference network. Set config.online.reference="initial"')
    if online.update_by == "pair" and (config.loss.name != "d3po" or online.branching):
        raise UserError(
            'config.online.update_by="pair" works only with D3PO on whole trajectories. Set it to "prompt" for '
            f"{'branching' if online.branching else config.loss.name}"
        )
    if online.update_by == "pair" and online.best_and_worst:
        raise UserError(
            'config.online.update_by="pair" makes an update per pair, but online.best_and_worst keeps only one pair. '
            'Set update_by="prompt"'
        )
    if not needs_reference(config):
        for field, value in (("reference", config.reference), ("lora.init_reference", config.lora.init_reference)):
            if value:
                why = config.loss.name if config.loss.name != "d3po" else 'online.reference="round"'
                raise UserError(
                    f"config.{field}={value} names a reference network, but {why} uses none. Remove the field, or "
                    'set loss.name="d3po" and online.reference="initial"'
                )
    if online.evaluate_every and not online.judges:
        raise UserError(
            f"config.online.evaluate_every={online.evaluate_every} needs judges, but online.judges is empty. Name "
            "judges, or set evaluate_every=0 if people judge"
        )
    if not online.train_guided and not needs_reference(config):
        raise UserError(
            "config.online.train_guided=False computes probabilities without guidance, but with "
            f'loss.name="{config.loss.name}" and online.reference="{online.reference}" they are compared with those of '
            'guided sampling. Set online.train_guided=True, or loss.name="d3po" and online.reference="initial"'
        )
    if online.latent_judge and not online.branching:
        raise UserError("config.online.latent_judge judges single steps, so it needs config.online.branching=True")
    if online.branching and config.loss.name != "d3po" and online.advantage == "prompt":
        raise UserError(
            f"config.online.branching compares the candidates of a step, but {config.loss.name} with "
            'online.advantage="prompt" compares a reward with earlier rewards of the prompt, whatever their step. Set '
            'config.online.advantage="group"'
        )
    if online.branching and not online.judges:
        raise UserError(
            "config.online.branching judges every step, which people cannot do. Name judges in online.judges"
        )
    if not online.branching and online.branch_after:
        raise UserError(
            f"config.online.branch_after={online.branch_after} says when candidates part, but they only part "
            "with online.branching=True"
        )
    if online.best_and_worst and config.loss.name != "d3po":
        raise UserError(
            f"config.online.best_and_worst keeps one pair of candidates, but {config.loss.name} learns from all. "
            "Set it to False"
        )
    if online.margin and not online.best_and_worst:
        raise UserError(
            f"config.online.margin={online.margin} applies to the best and the worst candidate, so it needs "
            "online.best_and_worst=True"
        )


def round_sizes(config: ConfigDict, learned_steps: np.ndarray, *, device_count: int, process_count: int) -> RoundSizes:
    """Derive the sizes of a round and check them; raises UserError with the values and the remedy.

    Args:
        config: the experiment's config.
        learned_steps: steps of a trajectory that can be trained on.
        device_count: devices of the run.
        process_count: processes of the run.
    """
    check(config)
    online, B, K = config.online, config.data.batch_size, config.online.candidates
    S, T = config.online.sampling_steps, max(1, round(online.timesteps * len(learned_steps)))
    derived = divide_batch(config, B * T, device_count=device_count, process_count=process_count)
    if B % process_count:
        raise UserError(
            f"config.data.batch_size={B} (prompts) is not divisible by {process_count} processes. Set it to "
            f"a multiple of {process_count}"
        )
    pairs = K * (K - 1) // 2 if online.update_by == "pair" else 1
    P = online.prompts_per_round
    networks = 1 + needs_reference(config)
    if online.branching:  # candidates of a step begin alike, but what becomes of each is looked at
        training = P * T * networks
        seen = S - first_branch(config)
        images, sampling = P * (K * len(learned_steps) + 1), P * (S + K * seen)
        if online.latent_judge:
            images, sampling = P, P * (S + 2 * seen)
    else:
        training = P * T * (2 * pairs if pairs > 1 else K) * networks
        images, sampling = P * K, P * K * S
    return RoundSizes(
        derived=derived,
        timesteps=T,
        pairs=pairs,
        updates=online.epochs * (P // B) * pairs,
        images=images,
        evaluations=sampling + online.epochs * training,
    )


def first_branch(config: ConfigDict) -> int:
    """Return the sampler's step at which candidates first part; meaningful only with branching."""
    return round(config.online.branch_after * config.online.sampling_steps)


def needs_reference(config: ConfigDict) -> bool:
    """Whether the policy is compared with a reference network, and not only with the stored log-probabilities."""
    return config.loss.name == "dpok" or (config.loss.name == "d3po" and config.online.reference == "initial")
