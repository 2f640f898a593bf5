"""The default config of an online experiment, its checks, and the sizes of its rounds, derived once."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from ml_collections import ConfigDict

from dpo_jax.cli import flatten
from dpo_jax.errors import UserError
from dpo_jax.fields import check_fields
from dpo_jax.methods import Method, find_method
from dpo_jax.rewards import find_judge
from dpo_jax.rounds import window
from dpo_jax.training.config import Derived, check_settings, divide_batch
from dpo_jax.training.defaults import FIELDS, choose_method, default_config, fields_of, method_of

OF_DATA = (
    *("data.", "validation.", "early_stop.", "checkpoint.best", "loss.log_snr_buckets", "loss.inversion_steps"),
    *("loss.timestep_density", "loss.timestep_mean", "loss.timestep_std", "loss.timestep_shift"),
)
"""Beginnings of fields about a data set and its held-out pairs, and about noise that is added to its images."""
READ_OF_DATA = ("data.batch_size", "data.micro_batch", "data.resolution", "data.text_length")
"""The fields of `config.data` that rounds read: they have no data set."""


def online_config() -> ConfigDict:
    """Return the config with the default of every field, those of D3PO's released code (arXiv 2311.13231)."""
    c = default_config()
    choose_method(c, "d3po")
    c.steps = 0  # they follow from the rounds
    c.validation.every = 0
    c.data.batch_size = c.data.micro_batch = 1
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
    method = method_of(config)
    if method.learns_from != "rollouts":
        raise UserError(
            f"{config.loss.name} learns from a data set, with dpo_jax.train. Choose a method for online learning with "
            "config.loss.name, for example d3po"
        )
    check_fields(config, fields_of(config))
    if not config.model:
        raise UserError("config.model is empty; set it in the config file or with --config.model=...")
    check_settings(config)
    problems = (
        *_problems_of_training(config, method),
        *_problems_of_rounds(config, method),
        *_problems_of_guard(config),
    )
    for problem in problems:
        raise UserError(problem)


def _problems_of_training(config: ConfigDict, method: Method) -> Iterator[str]:
    """Yield what is wrong with fields that all experiments have, as sentences with the remedy."""
    fields, name = flatten(config), config.loss.name
    for path, value in fields.items():
        is_unread = path.startswith(OF_DATA) and path not in (*READ_OF_DATA, "validation.every")
        if is_unread and value != FIELDS[path].default:
            yield f"config.{path}={value} has no effect: {name} learns from images that the model draws. Remove it"
    if config.validation.every:
        yield f"config.validation.every={config.validation.every}, but there are no held-out pairs. Set it to 0"
    if config.remat == "auto" or not config.data.micro_batch or config.memory.auto:
        field = "remat" if config.remat == "auto" else "memory.auto" if config.memory.auto else "data.micro_batch"
        yield f"config.{field}={fields[field]} lets a plan choose, which only dpo_jax.train can. Choose a value"
    if problem := method.problem(fields):
        yield problem
    if config.steps:
        yield (
            f"config.steps={config.steps}, but the steps of an online run follow from its rounds and updates. Leave "
            "steps at 0 and set online.rounds"
        )
    if config.lora.dropout:
        yield (
            f"config.lora.dropout={config.lora.dropout} would change the probabilities of the policy that sampled; "
            "set lora.dropout=0"
        )


def _problems_of_rounds(config: ConfigDict, method: Method) -> Iterator[str]:
    """Yield what is wrong with the combination of the fields of rounds, as sentences with the remedy."""
    online, name = config.online, config.loss.name
    takes_advantages, has_reference = method.reads_advantages, needs_reference(config)
    if online.candidates < (1 if takes_advantages and online.advantage == "prompt" else 2):
        yield f"config.online.candidates={online.candidates} leaves nothing to compare. Set it to 2 or more"
    if online.prompts_per_round % config.data.batch_size:
        yield (
            f"config.online.prompts_per_round={online.prompts_per_round} is not divisible by "
            f"data.batch_size={config.data.batch_size}, the prompts per update. Change one of them"
        )
    if online.update_by == "pair" and (takes_advantages or online.branching):
        yield (
            'config.online.update_by="pair" works only with D3PO on whole trajectories. Set it to "prompt" for '
            f"{'branching' if online.branching else name}"
        )
    if online.update_by == "pair" and online.best_and_worst:
        yield (
            'config.online.update_by="pair" makes an update per pair, but online.best_and_worst keeps only one pair. '
            'Set update_by="prompt"'
        )
    if not has_reference:
        for field, value in (("reference", config.reference), ("lora.init_reference", config.lora.init_reference)):
            if value:
                why = name if takes_advantages else 'online.reference="round"'
                yield (
                    f"config.{field}={value} names a reference network, but {why} uses none. Remove the field, or "
                    'set loss.name="d3po" and online.reference="initial"'
                )
    if online.evaluate_every and not online.judges:
        yield (
            f"config.online.evaluate_every={online.evaluate_every} needs judges, but online.judges is empty. Name "
            "judges, or set evaluate_every=0 if people judge"
        )
    if online.branching and not method.reads_transitions:
        yield f"config.online.branching makes candidates of single steps, which {name} does not read. Set it to False"
    compares_with_sampled = method.reads_transitions and (takes_advantages or not has_reference)
    if not online.train_guided and compares_with_sampled:
        yield (
            "config.online.train_guided=False computes probabilities without guidance, but with "
            f'loss.name="{name}" and online.reference="{online.reference}" they are compared with those of '
            'guided sampling. Set online.train_guided=True, or loss.name="d3po" and online.reference="initial"'
        )
    if online.latent_judge and not online.branching:
        yield "config.online.latent_judge judges single steps, so it needs config.online.branching=True"
    if online.branching and takes_advantages and online.advantage == "prompt":
        yield (
            f"config.online.branching compares the candidates of a step, but {name} with "
            'online.advantage="prompt" compares a reward with earlier rewards of the prompt, whatever their step. Set '
            'config.online.advantage="group"'
        )
    if online.branching and not online.judges:
        yield "config.online.branching judges every step, which people cannot do. Name judges in online.judges"
    if not online.branching and online.branch_after:
        yield (
            f"config.online.branch_after={online.branch_after} says when candidates part, but they only part "
            "with online.branching=True"
        )
    if online.best_and_worst and takes_advantages:
        yield (
            f"config.online.best_and_worst keeps one pair of candidates, but {name} learns from all. Set it to False"
        )
    yield from window.problems(config, method)
    if online.margin and not online.best_and_worst:
        yield (
            f"config.online.margin={online.margin} applies to the best and the worst candidate, so it needs "
            "online.best_and_worst=True"
        )


def _problems_of_guard(config: ConfigDict) -> Iterator[str]:
    """Yield what is wrong with the fields of the guard against exploited judges, as sentences with the remedy."""
    online = config.online
    if online.watched_judges and not online.judges:
        yield (
            f"config.online.watched_judges={online.watched_judges} are compared with the judges that the run trains "
            "on, but online.judges is empty. Name judges there, or leave watched_judges out if people judge"
        )
    trained = [_source_of(spec) for spec in online.judges]
    for spec in online.watched_judges:
        if _source_of(spec) in trained:
            yield (
                f"config.online.watched_judges has {spec}, which online.judges trains on, so watching it tells "
                "nothing. Remove it from one of them"
            )
    for kind in ("watched", "diversity"):
        fall, stop = online[f"{kind}_fall"], online[f"{kind}_stop"]
        if stop and stop < fall:
            yield (
                f"config.online.{kind}_stop={stop:g} would end the run before it warns at "
                f"online.{kind}_fall={fall:g}. Set {kind}_stop to {fall:g} or more, or to 0 to never end it"
            )


def _source_of(spec: str) -> tuple[str, str]:
    """Return a judge's name and source; the spec itself where there is no such judge, which opening it tells."""
    try:
        return find_judge(spec)
    except UserError:
        return spec, ""


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
    networks = 1 + needs_reference(config) + (find_method(config.loss.name).old_decay is not None)
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


def images_per_prompt(config: ConfigDict) -> int:
    """Return the number of images of a prompt that a round shows and stores."""
    return 1 if config.online.branching else int(config.online.candidates)


def first_branch(config: ConfigDict) -> int:
    """Return the sampler's step at which candidates first part; meaningful only with branching."""
    return round(config.online.branch_after * config.online.sampling_steps)


def needs_reference(config: ConfigDict) -> bool:
    """Whether the policy is compared with a reference network, and not only with the stored log-probabilities."""
    return find_method(config.loss.name).keeps_reference(flatten(config))
