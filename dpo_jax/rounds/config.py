"""The fields of an online experiment, and what is derived from them, once.

They are those of `training/config.py` without a data set, and `config.online`.
"""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from dpo_jax.errors import UserError
from dpo_jax.training.config import (
    COUNT,
    NOT_ALL,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Derived,
    Variant,
    check_settings,
    default_config,
    divide_batch,
)
from dpo_jax.training.config import FIELDS as NETWORK_FIELDS
from dpo_jax.training.fields import Values, check_fields

FIELDS = NETWORK_FIELDS | {
    "steps": NOT_NEGATIVE,
    "remat": Values(choices=("none", "dots", "attention", "block")),
    "loss.name": Values(choices=("d3po", "ddpo", "dpok")),
    "loss.clip": POSITIVE,
    "loss.advantage_clip": POSITIVE,
    "loss.kl_weight": NOT_NEGATIVE,
    "online.rounds": COUNT,
    "online.prompts_per_round": Values(at_least=1, at_most=2**20),
    "online.candidates": Values(at_least=1, at_most=2**10),
    "online.combine": Values(choices=("mean", "pareto")),
    "online.sampler": NETWORK_FIELDS["sample.sampler"],
    "online.sampling_steps": COUNT,
    "online.eta": SHARE,
    "online.guidance": NOT_NEGATIVE,
    "online.prompts_at_a_time": Values(at_least=1, at_most=2**20),
    "online.branch_after": NOT_ALL,
    "online.margin": NOT_ALL,
    "online.timesteps": Values(above=0, at_most=1),
    "online.epochs": COUNT,
    "online.evaluate_every": NOT_NEGATIVE,
    "online.update_by": Values(choices=("prompt", "pair")),
    "online.reference": Values(choices=("initial", "round")),
    "online.clip": Values(above=0, below=1),
    "online.advantage": Values(choices=("prompt", "group")),
}
"""The values that the fields of `online_config` take; every number has an entry."""


def online_config() -> ConfigDict:
    """Every field with its default, those of D3PO's released code (arXiv 2311.13231)."""
    c = default_config()
    del c.validation
    c.data, c.loss = ConfigDict(), ConfigDict()
    c.data.batch_size = 1  # prompts in one optimizer step, with all their candidates and timesteps
    c.data.accumulation = 20  # micro-batches in one optimizer step: more of them, less memory
    c.data.resolution = 512  # pixels, height and width

    c.loss.name = "d3po"  # or "ddpo", "dpok"
    c.loss.beta = 0.1  # D3PO: strength of the pull towards the reference
    # DDPO and DPOK: how far the ratio to the sampling policy may be from 1. In bfloat16 rounding
    # alone can move it further (1e-3, see objectives/transitions.py), which float32 does not.
    c.loss.clip = 1e-4
    c.loss.advantage_clip = 5.0  # likewise: the largest advantage
    c.loss.kl_weight = 0.01  # DPOK: of the divergence from the reference

    c.online = ConfigDict()
    c.online.rounds = 400  # of sampling, judging and training
    c.online.prompts = "ddpo_animals"  # a list that comes with dpo_jax, or a file, as `dpo_jax.evaluate --prompts`
    c.online.prompts_per_round = 20
    c.online.candidates = 2  # images of a prompt, from the same starting noise
    c.online.judges = ("jpeg_compressibility",)  # as `dpo_jax.evaluate --judges` takes them; () asks people
    c.online.combine = "pareto"  # several judges: better for one, worse for none, or "mean"; advantages take the mean
    c.online.sampler = "ddim"  # or another one that adds noise: "euler_ancestral"
    c.online.sampling_steps = 20
    c.online.eta = 1.0  # DDIM: share of fresh noise; above 0, or steps would have no probability
    c.online.guidance = 5.0  # in sampling and, unless the next field says otherwise, in training
    c.online.train_guided = True  # False compares policy and reference without guidance, for half of the evaluations
    c.online.prompts_at_a_time = 5  # sampled together, with all their candidates
    c.online.evaluate_every = 0  # rounds between two evaluations, also after the last; 0 makes none
    c.online.evaluation_prompts = "bundled"  # prompts to evaluate by, as online.prompts: others than those trained on
    c.online.branching = False  # SPO: candidates part at every step and are judged there; a random one goes on
    c.online.branch_after = 0.0  # share of the steps before that, which are ordinary and not trained on
    # LPO: such candidates are judged as latents by the implicit reward of two UNets, TUNED:REFERENCE; TUNED alone is
    # compared with the one that the policy starts from.
    c.online.latent_judge = ""
    c.online.best_and_worst = False  # SPO: of the candidates only these two are compared
    c.online.margin = 0.0  # SPO: and these only where softmax([best, worst]), in the unit of the judge, differs by more
    c.online.timesteps = 1.0  # share of a trajectory's steps that is trained on
    c.online.epochs = 1  # times a round's images are gone through
    c.online.update_by = "prompt"  # all pairs of a prompt at once; or "pair": an update each, as D3PO's for people does
    c.online.reference = "initial"  # or "round": the policy that sampled, which costs no evaluation of its own
    c.online.clip = 0.1  # D3PO, SPO and LPO: how far the ratio to the reference may be from 1; loss.clip is DDPO's
    c.online.advantage = "prompt"  # by the last rewards of the prompt (DDPO); or "group": its candidates (GRPO)

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
    c.steps = 0  # derived: rounds x updates in a round
    return c


def ddpo(c: ConfigDict) -> None:
    """arXiv 2305.13301, as D3PO's authors compare with it."""
    c.loss.name = "ddpo"


def dpok(c: ConfigDict) -> None:
    """arXiv 2305.16381, likewise, with a divergence that is one."""
    c.loss.name = "dpok"
    c.online.reference = "initial"


def grpo(c: ConfigDict) -> None:
    """DDPO's gradient with advantages over the candidates of a prompt (arXiv 2402.03300)."""
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
    """Updates that a batch of prompts gets: one, or one for each pair of candidates."""
    updates: int
    """Optimizer steps in a round."""
    images: int
    """Images that a judge sees in a round."""
    evaluations: int
    """UNet evaluations in a round: one image at one timestep, guided or not, without what backward passes cost."""


def check(config: ConfigDict) -> None:
    """Raises ValueError for values that no machine can run, with the remedy."""
    check_fields(config, online_config(), FIELDS)
    if not config.model:
        raise UserError("config.model is empty; set it in the config file or with --config.model=...")
    check_settings(config)
    online = config.online
    if config.steps:
        raise UserError(
            f"config.steps={config.steps}, but the steps of an online run are its rounds x the updates in one; leave "
            "it at 0 and set online.rounds"
        )
    if online.candidates < (2 if config.loss.name == "d3po" or online.advantage == "group" else 1):
        raise UserError(f"config.online.candidates={online.candidates}; there is nothing to compare: take 2 or more")
    if config.lora.dropout:
        raise UserError(
            f"config.lora.dropout={config.lora.dropout} would change the probabilities of the policy that sampled; "
            "set lora.dropout=0"
        )
    if online.prompts_per_round % config.data.batch_size:
        raise UserError(
            f"config.online.prompts_per_round={online.prompts_per_round} is no multiple of "
            f"data.batch_size={config.data.batch_size}, the prompts in an update; change either"
        )
    if config.loss.name == "dpok" and online.reference == "round":
        raise UserError('dpok needs a reference of its own: set config.online.reference="initial"')
    if online.update_by == "pair" and (config.loss.name != "d3po" or online.branching):
        raise UserError(
            'config.online.update_by="pair" is D3PO\'s on whole trajectories; set it to "prompt" for '
            f"{'branching' if online.branching else config.loss.name}"
        )
    if online.update_by == "pair" and online.best_and_worst:
        raise UserError(
            'config.online.update_by="pair" updates by every pair, of which best_and_worst leaves one; set update_by='
            '"prompt"'
        )
    if not needs_reference(config):
        for field, value in (("reference", config.reference), ("lora.init_reference", config.lora.init_reference)):
            if value:
                why = config.loss.name if config.loss.name != "d3po" else 'online.reference="round"'
                raise UserError(
                    f"config.{field}={value} names a reference, and with {why} no network is one; leave it out, or "
                    'take loss.name="d3po" with online.reference="initial"'
                )
    if online.evaluate_every and not online.judges:
        raise UserError(
            f"config.online.evaluate_every={online.evaluate_every} asks judges, and online.judges names none; set "
            "evaluate_every=0 where people judge"
        )
    if not online.train_guided and not needs_reference(config):
        raise UserError(
            "config.online.train_guided=False compares with the probabilities that guided sampling stored, and with "
            f'online.reference="{online.reference}" or loss.name="{config.loss.name}" nothing else; set '
            'online.train_guided=True, or loss.name="d3po" with online.reference="initial"'
        )
    if online.latent_judge and not online.branching:
        raise UserError("config.online.latent_judge judges single steps; set config.online.branching=True")
    if online.branching and config.loss.name != "d3po" and online.advantage == "prompt":
        raise UserError(
            f"config.online.branching compares the candidates of a step, and {config.loss.name} the last rewards of a "
            'prompt, whatever their step; set config.online.advantage="group"'
        )
    if online.branching and not online.judges:
        raise UserError("config.online.branching judges at every step, which people can't; name judges")
    if not online.branching and online.branch_after:
        raise UserError(
            f"config.online.branch_after={online.branch_after} is when candidates part, and they don't; set "
            "online.branching=True"
        )
    if online.best_and_worst and config.loss.name != "d3po":
        raise UserError(
            f"config.online.best_and_worst chooses a pair, and {config.loss.name} learns from all candidates; set it "
            "to False"
        )
    if online.margin and not online.best_and_worst:
        raise UserError(
            f"config.online.margin={online.margin} is between the best and the worst; set online.best_and_worst=True"
        )


def round_sizes(config: ConfigDict, learned_steps: np.ndarray, *, device_count: int, process_count: int) -> RoundSizes:
    """Derives and checks; raises ValueError with the values and the remedy.

    Args:
        config: of the experiment.
        learned_steps: the steps of a trajectory that may be trained on.
        device_count, process_count: of the run.
    """
    check(config)
    online, B, K = config.online, config.data.batch_size, config.online.candidates
    S, T = config.online.sampling_steps, max(1, round(online.timesteps * len(learned_steps)))
    derived = divide_batch(config, B * T, device_count=device_count, process_count=process_count)
    if B % process_count:
        raise UserError(
            f"data.batch_size={B} prompts don't divide over {process_count} processes; take a multiple of it"
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
    """The step of the sampler at which candidates first part, where they do at all."""
    return round(config.online.branch_after * config.online.sampling_steps)


def needs_reference(config: ConfigDict) -> bool:
    """Whether weights are compared with that don't come from the trajectories."""
    return config.loss.name == "dpok" or (config.loss.name == "d3po" and config.online.reference == "initial")
