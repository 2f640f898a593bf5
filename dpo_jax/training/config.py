"""Checks of a config, and the values that follow from it.

A file in `configs/` starts from `default_config()` and changes what is particular to it. Nothing is computed inside a
config: a value derived there would go stale under `--config.field=value`. `resolve` derives and checks.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from dpo_jax.cli import flatten
from dpo_jax.errors import UserError
from dpo_jax.fields import check_fields
from dpo_jax.methods import find_method
from dpo_jax.rewards import find_judge
from dpo_jax.training.defaults import FALLING, fields_of, method_of
from dpo_jax.training.defaults import choose_method as choose_method  # config files take these from here
from dpo_jax.training.defaults import default_config as default_config
from dpo_jax.training.optim import WITH_MOMENTS, beta2_of
from dpo_jax.training.pair_scores import score_judge
from dpo_jax.training.watch import JUDGE

# A run may be continued with other values of these fields; other values of any other field are another experiment.
# The places of models and data may change: "fingerprints" tell whether their contents are the same.
FREE_TO_CHANGE = (
    "model",
    "revision",
    "variant",
    "unet",
    "transformer",
    "vae",
    "reference",
    "model_config",
    "lora.init",
    "lora.initializer",  # matters only before the first step, and runs older than the field began with "kaiming"
    "data.path",
    "data.micro_batch",
    "data.accumulation",  # the field of older runs, replaced by data.micro_batch
    "memory.auto",
    "remat",
    "scan",
    "attention",
    "log_every",
    "optimizer.max_skips",
    "mesh.",
    "checkpoint.",
    "monitor.",
    "early_stop.",
    "logging.",
    "validation.",
    "sample.",
    "data.num_workers",
    "online.rounds",
    "online.prompts",
    "online.encode_prompts",
    "online.prompts_at_a_time",
    "online.evaluate_every",
    "online.evaluation_prompts",
    "online.latent_judge",
    "online.watched_fall",
    "online.watched_stop",
    "online.diversity_fall",
    "online.diversity_stop",
    "dpo_jax_version",
)

DEFAULTS_BEFORE = {"loss.safeguard": "none"}
"""What runs did that are older than a field, where its default is something else now."""

MAX_RATE = 1e30
"""Largest learning rate: larger ones overflow float32 and none of them trains."""
MAX_GRID = 1024
"""Largest number of images in a grid, which are drawn in one batch."""


Variant = Callable[[ConfigDict], None]
"""Changes a config in place."""


def apply_variants(c: ConfigDict, argument: str | None, variants: Mapping[str, Variant]) -> ConfigDict:
    """Return the config with the variants that `argument` names, applied in order, for example `sdxl:lora,tiny`."""
    for name in argument.split(",") if argument else []:
        if name not in variants:
            known = " and ".join(f":{variant}" for variant in variants)
            raise UserError(f"this config has no variant {name!r}; it has {known}")
        variants[name](c)
    return c


def published(c: ConfigDict) -> None:
    """The variant with the loss exactly as published: nothing keeps the winner's error from rising."""
    c.loss.safeguard = "none"


def tiny(family: str) -> Variant:
    """Return the variant with a small random model and synthetic pairs, which runs in seconds on a laptop."""
    return functools.partial(_tiny, family=family)


def _tiny(c: ConfigDict, *, family: str) -> None:
    c.model, c.vae = f"random:{family}", ""
    c.steps = 4
    c.dtype = c.vae_dtype = "float32"
    c.log_every = 1
    c.data.path = "random:32"
    c.data.batch_size = 8  # one for each device of most hosts
    c.data.micro_batch = 64  # all at once
    c.data.resolution = 32
    c.data.text_length = min(c.data.text_length, 40)
    c.data.encoded_views = 0  # made pairs are not stored
    c.optimizer.warmup_steps = 2
    c.checkpoint.every = 2
    c.validation.every = 4
    c.validation.max_pairs = 8
    c.validation.draws = 1
    c.sample.every = 4 if c.sample.every else 0
    c.sample.prompts = ("a red square", "a blue square")
    c.sample.seeds = 1
    c.sample.steps = 2


@dataclasses.dataclass(frozen=True)
class Derived:
    """Values that follow from the config and the machine."""

    local_batch_size: int
    """Pairs that this process loads for one optimizer step."""
    micro_batch_per_device: int
    """Pairs on one device at a time."""
    accumulation: int
    """Micro-batches per optimizer step."""
    learning_rate: float
    """Peak learning rate after scaling."""


def check(config: ConfigDict) -> None:
    """Raise UserError, with the remedy, for values that no machine can run."""
    check_values(config)
    for field in ("model", "data.path"):
        if not flatten(config)[field]:
            raise UserError(f"config.{field} is empty; set it in the config file or with --config.{field}=...")
    check_settings(config)
    check_views(config)
    check_buckets(config)
    if config.data.mask_floor and not config.data.masks:
        raise UserError(
            f"config.data.mask_floor={config.data.mask_floor} has no effect without masks; set data.masks=True, or "
            "mask_floor=0"
        )
    score_judge(config)
    every, keep_every = config.checkpoint.every, config.checkpoint.keep_every
    if keep_every % every:
        raise UserError(
            f"config.checkpoint.keep_every={keep_every} is not a multiple of config.checkpoint.every={every}, so most "
            f"of these steps have no checkpoint; set keep_every={max(keep_every // every, 1) * every}"
        )


def check_values(config: ConfigDict) -> None:
    """Raise UserError for fields with wrong values; a plan checks no more, since it needs neither model nor data."""
    method = method_of(config)
    if method.learns_from == "rollouts":
        raise UserError(
            f"{config.loss.name} learns from images that the model draws, with dpo_jax.online. Give a config for a "
            "data set, such as configs/sd15.py"
        )
    check_fields(config, fields_of(config))
    if not config.steps:
        raise UserError("config.steps=0 must be at least 1")
    if problem := method.problem(flatten(config)):
        raise UserError(problem)
    for field in ("early_stop.metric", "checkpoint.best"):
        figure = flatten(config)[field]
        if figure == JUDGE:
            if not config.sample.judge:
                raise UserError(
                    f"config.{field}=judge needs a judge of the image grids; set sample.judge, for example to pickscore"
                )
            if not config.sample.every:
                raise UserError(f"config.{field}=judge needs image grids; set sample.every above 0")
            continue
        if figure and not config.validation.every:
            raise UserError(f"config.{field}={figure} needs held-out data; set validation.every above 0")
        if figure and (method.learns_from == "votes") != (figure == "vote_accuracy"):
            what = "single images; set it to vote_accuracy" if method.learns_from == "votes" else "no single votes"
            raise UserError(f"config.{field}={figure}, but {config.loss.name} learns from {what}")
        if figure == "pair_accuracy" and method.num_candidates == 1:
            raise UserError(
                f"config.{field}=pair_accuracy, but {config.loss.name} compares no pairs; set {field}=winner_error"
            )
        if figure in ("pair_accuracy", "vote_accuracy") and config.moving_reference.every:
            raise UserError(
                f"config.{field}={figure} compares with the reference, which "
                f"config.moving_reference.every={config.moving_reference.every} moves, so it does not tell which step "
                f"is better; set {field} to winner_error for pairs, otherwise leave it empty"
            )


def check_settings(config: ConfigDict) -> None:
    """Raise UserError for settings of the network that contradict each other."""
    sizes = {f"mesh.{axis}": config.mesh[axis] for axis in ("data", "fsdp", "tensor")}
    if list(sizes.values()).count(-1) > 1:
        given = ", ".join(f"config.{field}={size}" for field, size in sizes.items())
        raise UserError(f"{given}: only one of them may be -1, which takes the devices that are left")
    if config.sample.every and not config.sample.prompts:
        raise UserError("config.sample.prompts is empty; name prompts for the image grids, or set sample.every=0")
    if config.sample.every and config.sample.seeds * len(config.sample.prompts) > MAX_GRID:
        raise UserError(
            f"config.sample.seeds={config.sample.seeds} of {len(config.sample.prompts)} prompts are more than the "
            f"{MAX_GRID} images of the largest grid; set fewer"
        )
    if config.sample.judge:
        try:
            find_judge(config.sample.judge)
        except UserError as error:
            raise UserError(f"config.sample.judge={config.sample.judge}: {error}") from error
    optimizer = config.optimizer
    if optimizer.moments != "float32" and optimizer.name not in WITH_MOMENTS:
        raise UserError(
            f"config.optimizer.moments={optimizer.moments} is for {', '.join(WITH_MOMENTS)}, not for "
            f"config.optimizer.name={optimizer.name}; set moments=float32"
        )
    rate = peak_learning_rate(config) * max([1.0, *(factor for _, factor in optimizer.rates)])
    if rate * optimizer.weight_decay >= 1:
        raise UserError(
            f"config.optimizer.weight_decay={optimizer.weight_decay} times the learning rate of {rate:.4g} removes "
            "whole weights at every step; lower either"
        )
    if rate > MAX_RATE:
        raise UserError(
            f"config.optimizer.learning_rate={optimizer.learning_rate} is {rate:.4g} after scale_by_batch and rates, "
            f"more than {MAX_RATE:g}; lower it"
        )
    if config.scan and config.lora.dropout:
        raise UserError(
            f"config.scan=True runs equal blocks as one, but config.lora.dropout={config.lora.dropout} needs draws for "
            "each of them; set scan=False or lora.dropout=0"
        )
    if config.memory.frozen and not (config.lora.rank or config.lora.init):
        raise UserError(
            f"config.memory.frozen={config.memory.frozen} stores in fewer bits what a LoRA is added to, but this run "
            "trains the whole denoiser; set lora.rank, for example to 16, or leave memory.frozen empty"
        )
    if config.attention == "cudnn" and config.dtype != "bfloat16":
        raise UserError(f'config.attention="cudnn" takes bfloat16, not config.dtype={config.dtype}; change one of them')
    if config.lora.init_reference and not config.lora.init:
        raise UserError(
            "config.lora.init_reference is set, but config.lora.init names no LoRA; set lora.init, or "
            "lora.init_reference=False"
        )
    for field in ("noise_offset", "input_perturbation"):
        if config.loss[field] and config.loss.inversion_steps:
            raise UserError(
                f"config.loss.{field}={config.loss[field]} changes how noise is drawn, but "
                f"config.loss.inversion_steps={config.loss.inversion_steps} draws none; set one of them to 0"
            )
    check_moving_reference(config)


def check_moving_reference(config: ConfigDict) -> None:
    """Raise UserError where the fields of the moving reference contradict others."""
    every, decay = config.moving_reference.every, config.moving_reference.decay
    if decay and not every:
        raise UserError(
            f"config.moving_reference.decay={decay} has no effect with config.moving_reference.every=0, which keeps "
            "the reference fixed; set every=1 for a moving average"
        )
    if not every:
        return
    if not find_method(config.loss.name).keeps_reference(flatten(config)):
        raise UserError(
            f"config.moving_reference.every={every}, but this run compares with no reference network; set every=0"
        )
    if config.reference:
        raise UserError(
            f"config.moving_reference.every={every} makes the reference follow the policy, but "
            f"config.reference={config.reference} names another one; set every=0, or leave reference empty"
        )
    if config.lora.init and not config.lora.init_reference:
        raise UserError(
            f"config.moving_reference.every={every} makes the reference follow the LoRA, so it begins with that of "
            "config.lora.init, too; set lora.init_reference=True"
        )


def peak_learning_rate(config: ConfigDict) -> float:
    """Return the learning rate after `optimizer.scale_by_batch`."""
    return config.optimizer.learning_rate * (config.data.batch_size if config.optimizer.scale_by_batch else 1)


def resolve(config: ConfigDict, *, device_count: int, process_count: int) -> Derived:
    """Check the config and return the values that follow from it; UserError with the values and the remedy."""
    check(config)
    return divide_batch(config, config.data.batch_size, device_count=device_count, process_count=process_count)


def divide_batch(config: ConfigDict, samples: int, *, device_count: int, process_count: int) -> Derived:
    """Divide the samples of an optimizer step over the devices, and each device's share into micro-batches.

    The micro-batch is `data.micro_batch`, or the largest smaller one that divides the share; the whole share where the
    field is 0. `planning.search.settle` replaces 0 where the memory of the devices is known.

    Raises:
        UserError: the devices do not divide the samples. It names the nearest batch sizes.
    """
    assert config.remat != "auto", "planning.search.settle comes first"
    batch, mesh = config.data.batch_size, config.mesh
    parts = mesh.data * mesh.fsdp if mesh.tensor == -1 else max(device_count // max(mesh.tensor, 1), 1)
    if samples % parts:
        timesteps = samples // batch  # 1 where there are pairs
        unit = parts // math.gcd(parts, timesteps)
        nearest = [size for size in (batch // unit * unit, (batch // unit + 1) * unit) if size]
        product = f" x {timesteps} timesteps" if timesteps != 1 else ""
        devices = f"{parts} devices" if mesh.tensor == 1 else f"{parts} groups of devices (mesh.tensor={mesh.tensor})"
        raise UserError(
            f"config.data.batch_size={batch}{product} is not divisible by {devices}. "
            f"Set data.batch_size to {' or '.join(map(str, nearest))}"
        )
    share = samples // parts
    most = min(config.data.micro_batch or share, share)
    micro_batch = next(size for size in range(most, 0, -1) if share % size == 0)
    return Derived(
        local_batch_size=samples // process_count,
        micro_batch_per_device=micro_batch,
        accumulation=share // micro_batch,
        learning_rate=peak_learning_rate(config),
    )


def describe_batch(config: ConfigDict, derived: Derived, process_count: int) -> str:
    """Return one line that says how an optimizer step is divided, and why it differs from what the config asks for."""
    samples, share = derived.local_batch_size * process_count, derived.micro_batch_per_device * derived.accumulation
    asked, unit = config.data.micro_batch, find_method(config.loss.name).unit
    if "online" in config:
        unit += " x timesteps"
    devices = "devices" if config.mesh.tensor == 1 else "groups of devices"
    text = (
        f"{samples} {unit} per step = {samples // share} {devices} x {derived.accumulation} micro-batches "
        f"x {derived.micro_batch_per_device}"
    )
    if asked > derived.micro_batch_per_device and derived.accumulation > 1:
        text += f" (data.micro_batch={asked} does not divide the {share} of a device)"
    return text


def check_views(config: ConfigDict) -> None:
    """Raise UserError where `data.encoded_views` contradicts the augmentation."""
    data = config.data
    augmented = [name for name in ("random_crop", "random_flip") if data[name]]
    if data.encoded_views == 1 and augmented:
        raise UserError(
            f"config.data.encoded_views=1 stores one view of each image, but config.data.{augmented[0]} needs more; "
            f"set encoded_views=2 or more, or {augmented[0]}=False"
        )
    if data.encoded_views > 1 and not augmented:
        raise UserError(
            f"config.data.encoded_views={data.encoded_views}, but all views would be equal: set encoded_views=1, "
            "or random_flip=True or random_crop=True"
        )
    if data.encoded_views > 2 and not data.random_crop:
        raise UserError(
            f"config.data.encoded_views={data.encoded_views}, but without random_crop an image has two views: itself "
            "and mirrored; set encoded_views=2"
        )
    if data.encoded_views and data.path.startswith("random:"):
        raise UserError(
            f"config.data.encoded_views needs a prepared data set, not {data.path}, which each run makes anew; "
            "set encoded_views=0"
        )


def check_buckets(config: ConfigDict) -> None:
    """Raise UserError where `data.buckets` meets an order of examples that batches of one shape would break."""
    named = f'config.data.buckets="{config.data.buckets}" makes batches of images of one shape'
    if config.data.buckets and config.data.order == "curriculum":
        raise UserError(
            f"{named}, which breaks the order of config.data.order=curriculum; set data.order=shuffled, or leave "
            "data.buckets empty"
        )
    if config.data.buckets and find_method(config.loss.name).learns_from == "votes":
        raise UserError(
            f"{named}, but {config.loss.name} takes liked and disliked images in turn; leave data.buckets empty"
        )


def check_same_experiment(fields: dict[str, Any], saved: dict[str, Any], workdir: Any, defaults: ConfigDict) -> None:
    """Raise UserError, naming the fields that differ, where the run of a work directory has another config or model."""
    now = json.loads(json.dumps(fields))
    # Falling schedules derive their learning rates from the number of steps, and a curriculum its order of pairs.
    steps_are_free = now["optimizer.schedule"] not in FALLING and now["data.order"] != "curriculum"
    free = (*FREE_TO_CHANGE, "steps") if steps_are_free else FREE_TO_CHANGE
    # A field that did not exist when the run began had its default; older runs have the fields of other methods, too.
    saved = json.loads(json.dumps(flatten(defaults))) | DEFAULTS_BEFORE | saved
    if now["loss.name"] == saved["loss.name"]:
        saved = {name: value for name, value in saved.items() if name in now or not name.startswith("loss.")}
    for each in (now, saved):  # older runs have the number that -1 stands for
        each["optimizer.beta2"] = beta2_of(each["optimizer.name"], each["optimizer.beta2"])
    if now.get("loss.safeguard") == "none":
        free = (*free, "loss.safeguard_margin")  # without effect
    names = [f for f in sorted(now.keys() | saved.keys()) if not is_free(f, free)]
    differing = [f"{f} was {saved.get(f)!r}, now {now.get(f)!r}" for f in names if now.get(f) != saved.get(f)]
    if differing:
        raise UserError(
            f"{workdir} holds a run with another config ({'; '.join(differing)}); "
            "choose another --workdir, or continue with the old values"
        )


def is_free(field: str, free: tuple[str, ...] = FREE_TO_CHANGE) -> bool:
    """Return whether a run may be continued with another value of a field."""
    return any(field.startswith(name) if name.endswith(".") else field == name for name in free)
