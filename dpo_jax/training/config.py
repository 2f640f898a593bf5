"""The fields of an experiment, and what is derived from them, once.

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
from dpo_jax.training.fields import Values, are_devices, are_patterns, are_rules, check_fields

# A work directory may be continued with other values of these; any other difference is another experiment.
# Where models and data come from may change too: what they are is told by "fingerprints".
FREE_TO_CHANGE = (
    "model",
    "revision",
    "variant",
    "unet",
    "vae",
    "reference",
    "model_config",
    "lora.init",
    "lora.initializer",  # matters before the first step only, and what was begun before it existed began with "kaiming"
    "data.path",
    "remat",
    "scan",
    "attention",
    "log_every",
    "mesh.",
    "checkpoint.",
    "validation.",
    "sample.",
    "data.num_workers",
    "online.rounds",
    "online.prompts",
    "online.prompts_at_a_time",
    "online.evaluate_every",
    "online.evaluation_prompts",
    "online.latent_judge",
)

SHARE = Values(at_least=0, at_most=1)
NOT_ALL = Values(at_least=0, below=1)
POSITIVE = Values(above=0)
NOT_NEGATIVE = Values(at_least=0)
COUNT = Values(at_least=1)
DTYPE = Values(choices=("float32", "bfloat16"))

FALLING = ("linear", "cosine", "cosine_with_restarts", "polynomial")
"""The schedules whose learning rate depends on the number of steps."""

FIELDS = {
    "steps": COUNT,
    "seed": Values(at_least=0, at_most=2**32 - 1),
    "dtype": DTYPE,
    "vae_dtype": DTYPE,
    "remat": Values(choices=("none", "dots", "attention", "block", "auto")),
    "attention": Values(choices=("xla", "cudnn", "splash")),
    "log_every": COUNT,
    "lora.rank": Values(at_least=0, at_most=2**16),
    "lora.alpha": NOT_NEGATIVE,
    "lora.targets": Values(wrong=are_patterns),
    "lora.dropout": NOT_ALL,
    "lora.initializer": Values(choices=("kaiming", "gaussian")),
    "ema.decay": NOT_ALL,
    "loss.name": Values(choices=("dpo", "sft")),
    "loss.beta": POSITIVE,
    "loss.noise_offset": NOT_NEGATIVE,
    "loss.input_perturbation": NOT_NEGATIVE,
    "data.batch_size": Values(at_least=1, at_most=2**24),
    "data.accumulation": Values(at_least=1, at_most=2**24),
    "data.resolution": Values(at_least=1, at_most=2**14),
    "data.caption_dropout": SHARE,
    "data.size_conditioning": Values(choices=("constant", "real")),
    "data.ties": Values(choices=("drop", "zero_weight", "soft")),
    "data.labels": Values(choices=("hard", "soft")),
    "data.combine": Values(choices=("mean", "pareto")),
    "data.generators": Values(wrong=are_patterns),
    "data.min_agreement": SHARE,
    "data.min_side": NOT_NEGATIVE,
    "data.limit": NOT_NEGATIVE,
    "data.limit_seed": Values(at_least=-1),
    "data.relabel": Values(choices=("none", "swapped", "shuffled")),
    "data.encoded_views": Values(at_least=0, at_most=2**10),
    "data.num_workers": Values(at_least=0, at_most=2**10),
    "optimizer.name": Values(choices=("adamw", "adafactor")),
    "optimizer.learning_rate": POSITIVE,
    "optimizer.schedule": Values(choices=("constant", "constant_with_warmup", *FALLING)),
    "optimizer.cycles": COUNT,
    "optimizer.power": POSITIVE,
    "optimizer.warmup_steps": NOT_NEGATIVE,
    "optimizer.beta1": NOT_ALL,
    "optimizer.beta2": NOT_ALL,
    "optimizer.epsilon": POSITIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.clip_norm": Values(above=0, may_be_infinite=True),
    "mesh.data": Values(at_least=-1, wrong=are_devices),
    "mesh.fsdp": Values(at_least=-1, wrong=are_devices),
    "mesh.tensor": Values(at_least=-1, wrong=are_devices),
    "mesh.rules": Values(wrong=are_rules),
    "checkpoint.every": COUNT,
    "checkpoint.keep": COUNT,
    "validation.every": NOT_NEGATIVE,
    "validation.max_pairs": COUNT,
    "validation.draws": COUNT,
    "sample.every": NOT_NEGATIVE,
    "sample.seeds": Values(at_least=1, at_most=2**16),
    "sample.sampler": Values(choices=("", "ddim", "euler", "euler_ancestral", "dpmsolver++", "lcm")),
    "sample.steps": COUNT,
    "sample.guidance": NOT_NEGATIVE,
}
"""The values that the fields of `default_config` take; every number has an entry."""
MAX_RATE = 1e30
"""Far from what trains, and from what float32 can't hold."""
MAX_GRID = 1024
"""Images of a grid, which are drawn in one batch."""


def default_config() -> ConfigDict:
    """Every field with its default. Published hyperparameters are in the files of `configs/`."""
    c = ConfigDict()
    c.model = ""  # diffusers folder, hub id or single .safetensors file; "random:FAMILY" makes a small random one
    c.family = ""  # only where the contents cannot tell: "sdxl_turbo"
    c.revision = ""  # branch, tag or commit of a hub id
    c.variant = ""  # which set of weights to fetch from the hub: "fp16"
    c.model_config = ""  # single file: folder or hub id of its configs and tokenizers; "" is the family's published one
    c.vae = ""  # another VAE than the model's: folder, file or hub id, such as "madebyollin/sdxl-vae-fp16-fix"
    c.unet = ""  # another UNet to start from, for policy and reference: folder, file, or hub id
    c.reference = ""  # another UNet as the reference alone; "" is what the policy starts from
    c.steps = 2000  # optimizer steps in all
    c.seed = 0  # of shuffling, augmentation, timesteps, noise and posterior samples
    c.dtype = "bfloat16"  # compute dtype and dtype of the frozen models; the trained weights are always float32
    c.vae_dtype = "bfloat16"  # the same for the VAE; "float32" for VAEs that lose detail in bfloat16
    c.remat = "none"  # from most memory to least: "none", "dots", "attention", "block"; "auto": the first that fits
    c.scan = False  # compile equal transformer blocks once, as a loop: for TPUs, where compilation is slow
    c.attention = "xla"  # or one kernel: "cudnn" on GPUs, in bfloat16 for heads of up to 128 features; "splash" on TPUs
    c.log_every = 10  # steps between two lines of metrics

    c.lora = ConfigDict()  # low-rank adapters: only they are trained, and the reference is the model without them
    c.lora.rank = 0  # 0 trains the whole UNet
    c.lora.alpha = 0.0  # the adapter's output is scaled by alpha / rank; 0 means alpha = rank
    c.lora.targets = r"attn[12]\.(to_q|to_k|to_v|to_out\.0)$"  # regular expression found in the names of its layers
    c.lora.dropout = 0.0  # share of an adapter's inputs zeroed in training
    c.lora.initializer = "kaiming"  # how A begins: peft's default; or "gaussian", std 1 / rank, as diffusers' scripts
    c.lora.init = ""  # a LoRA file or hub id to go on from; its rank, alpha and targets then hold
    c.lora.init_reference = False  # whether the reference has that LoRA too

    c.ema = ConfigDict()
    c.ema.decay = 0.0  # of the moving average of the trained weights that is then sampled and exported; 0 keeps none

    c.loss = ConfigDict()
    c.loss.name = "dpo"  # "dpo", or "sft": plain denoising of the preferred image, or of single ones
    c.loss.beta = 5000.0  # strength of the pull towards the reference; in the unit of the published code
    c.loss.noise_offset = 0.0  # size of a further draw of the noise, one number a channel; such as 0.05
    c.loss.input_perturbation = 0.0  # size of a draw that is added to the noise, but not to be predicted; such as 0.1

    c.data = ConfigDict()
    c.data.path = ""  # folder that `python -m dpo_jax.prepare` wrote; "random:N" makes N pairs
    c.data.batch_size = 2048  # pairs in one optimizer step, over all devices and micro-batches
    c.data.accumulation = 1  # micro-batches in one optimizer step: more of them, less memory
    c.data.resolution = 512  # pixels, height and width
    c.data.random_crop = False  # otherwise the centre; always the same for the images of a pair
    c.data.random_flip = True  # horizontal; always the same for the images of a pair
    c.data.caption_dropout = 0.2  # share of captions replaced by the empty one
    c.data.caption_lines = False  # each line of a caption is a caption of its own, one of them drawn every time
    c.data.size_conditioning = "constant"  # SDXL's size input: "constant" (resolution, no crop) or "real"
    c.data.ties = "drop"  # pairs without a winner: or "zero_weight" (no part in the loss) or "soft" (1/2 each)
    c.data.labels = "hard"  # the winner takes all, or "soft": the shares of the votes as the data set states them
    c.data.judges = ()  # order the images by scores that `python -m dpo_jax.score` stored, not by votes: ("pickscore",)
    c.data.combine = "mean"  # of several judges: "mean" of their scores, or "pareto": better for one, worse for none
    c.data.generators = ()  # regular expressions: the models of both images must match one; () takes all
    c.data.min_agreement = 0.0  # lowest share of the votes for the winner, 0.5 to 1
    c.data.min_side = 0  # fewest pixels on the shorter side of both images
    c.data.limit = 0  # train on this many of the pairs chosen; 0 takes all
    c.data.limit_seed = -1  # which ones: -1 takes the first; any other number draws them, always the same
    c.data.relabel = "none"  # control experiments: "swapped" or "shuffled" labels
    c.data.encoded_views = 0  # train from what `prepare --encode` stored: this many views of each image; 0 from images
    c.data.num_workers = 0  # threads on each host that read and decode; 0: two a core, at most 8

    c.optimizer = ConfigDict()
    c.optimizer.name = "adamw"  # or "adafactor": transformers' variant, without parameter scaling
    c.optimizer.learning_rate = 1e-8  # before scaling
    c.optimizer.scale_by_batch = True  # multiply the learning rate by data.batch_size, as the published runs do
    # Or "constant", or one that falls until the last step: "linear", "cosine", "cosine_with_restarts", "polynomial".
    c.optimizer.schedule = "constant_with_warmup"
    c.optimizer.cycles = 1  # "cosine_with_restarts": half cosines, one after the other
    c.optimizer.power = 1.0  # "polynomial": of the share of the steps that is left
    c.optimizer.warmup_steps = 500  # steps from 0 to the full learning rate
    c.optimizer.beta1 = 0.9  # AdamW
    c.optimizer.beta2 = 0.999  # AdamW
    c.optimizer.epsilon = 1e-8  # AdamW
    c.optimizer.weight_decay = 1e-2  # decoupled, times the learning rate
    c.optimizer.clip_norm = 1.0  # largest global norm of the gradient

    c.mesh = ConfigDict()
    c.mesh.data = -1  # copies of the model; -1 takes the devices that are left
    c.mesh.fsdp = 1  # devices that one copy is split over
    c.mesh.tensor = 1  # devices that share the work inside each layer of one copy
    c.mesh.rules = ()  # ((regular expression in a parameter's name, (mesh axis or None, for each of its axes)), ...)

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 200  # steps
    c.checkpoint.keep = 3  # the newest this many stay

    c.validation = ConfigDict()
    c.validation.every = 200  # steps; 0 turns it off
    c.validation.max_pairs = 1024  # at most this many held-out pairs
    c.validation.draws = 4  # timesteps and noises drawn for each

    c.sample = ConfigDict()
    c.sample.every = 200  # steps between two image grids, policy beside reference; 0 turns them off
    c.sample.prompts = ("a photo of an astronaut riding a horse", "a watercolour of a lighthouse at dusk")
    c.sample.seeds = 2  # images of each prompt
    c.sample.sampler = "ddim"  # or "euler", "euler_ancestral", "dpmsolver++", "lcm"; "" takes the model's own
    c.sample.steps = 20  # denoising steps
    c.sample.guidance = 7.5  # classifier-free guidance scale
    return c


Variant = Callable[[ConfigDict], None]
"""Changes a config in place."""


def apply_variants(c: ConfigDict, argument: str | None, variants: Mapping[str, Variant]) -> ConfigDict:
    """The config with the variants that `argument` names, in the order given: `configs/sdxl.py:lora,tiny`."""
    for name in argument.split(",") if argument else []:
        if name not in variants:
            known = " and ".join(f":{variant}" for variant in variants)
            raise UserError(f"this config has no variant {name!r}; it has {known}")
        variants[name](c)
    return c


def tiny(family: str) -> Variant:
    """The same experiment on a small random model and made pairs: seconds on a laptop, to see that it runs."""
    return functools.partial(_tiny, family=family)


def _tiny(c: ConfigDict, *, family: str) -> None:
    c.model, c.vae = f"random:{family}", ""
    c.steps = 4
    c.dtype = c.vae_dtype = "float32"
    c.log_every = 1
    c.data.path = "random:32"
    c.data.batch_size = 8  # one for each device of most hosts
    c.data.accumulation = 1
    c.data.resolution = 32
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
    learning_rate: float
    """Peak learning rate after scaling."""


def check(config: ConfigDict) -> None:
    """Raises ValueError for values that no machine can run, with the remedy."""
    check_values(config)
    for field in ("model", "data.path"):
        if not flatten(config)[field]:
            raise UserError(f"config.{field} is empty; set it in the config file or with --config.{field}=...")
    check_settings(config)
    check_views(config)


def check_values(config: ConfigDict) -> None:
    """Raises ValueError for fields with values that they don't take; what a plan needs, without a model or data."""
    if "online" in config:
        raise UserError("this config is for dpo_jax.online; give one for a data set, such as configs/sd15.py")
    check_fields(config, default_config(), FIELDS)


def check_settings(config: ConfigDict) -> None:
    """Raises ValueError for settings of the network that don't go together."""
    sizes = {f"mesh.{axis}": config.mesh[axis] for axis in ("data", "fsdp", "tensor")}
    if list(sizes.values()).count(-1) > 1:
        given = ", ".join(f"config.{field}={size}" for field, size in sizes.items())
        raise UserError(f"{given}: only one of them may be -1, which takes the devices that are left")
    if config.sample.every and not config.sample.prompts:
        raise UserError("config.sample.prompts is empty; name prompts for the image grids, or set sample.every=0")
    if config.sample.every and config.sample.seeds * len(config.sample.prompts) > MAX_GRID:
        raise UserError(
            f"config.sample.seeds={config.sample.seeds} of {len(config.sample.prompts)} prompts are more images than "
            f"the {MAX_GRID} that a grid takes; set fewer"
        )
    optimizer, rate = config.optimizer, peak_learning_rate(config)
    if rate * optimizer.weight_decay >= 1:
        raise UserError(
            f"config.optimizer.weight_decay={optimizer.weight_decay} times the learning rate of {rate:.4g} takes all "
            "of a weight, or more, off at every step; lower either"
        )
    if rate > MAX_RATE:
        raise UserError(
            f"config.optimizer.learning_rate={optimizer.learning_rate} is {rate:.4g} after scale_by_batch; lower it"
        )
    if config.scan and config.lora.dropout:
        raise UserError(
            f"config.scan=True runs equal blocks as one, but config.lora.dropout={config.lora.dropout} draws for each "
            "of them; set scan=False or lora.dropout=0"
        )
    if config.attention == "cudnn" and config.dtype != "bfloat16":
        raise UserError(f'config.attention="cudnn" takes bfloat16, not config.dtype={config.dtype}; change either')
    if config.lora.init_reference and not config.lora.init:
        raise UserError("config.lora.init_reference is set, but config.lora.init names no LoRA")


def peak_learning_rate(config: ConfigDict) -> float:
    """The learning rate after scaling."""
    return config.optimizer.learning_rate * (config.data.batch_size if config.optimizer.scale_by_batch else 1)


def resolve(config: ConfigDict, *, device_count: int, process_count: int) -> Derived:
    """Derives and checks; raises ValueError with the values and the remedy."""
    check(config)
    return divide_batch(config, config.data.batch_size, device_count=device_count, process_count=process_count)


def divide_batch(config: ConfigDict, rows: int, *, device_count: int, process_count: int) -> Derived:
    """How the rows of an optimizer step are divided; raises ValueError with the values and the remedy."""
    assert config.remat != "auto", "planning.search.settle_remat comes first"
    batch, accumulation, mesh = config.data.batch_size, config.data.accumulation, config.mesh
    parts = mesh.data * mesh.fsdp if mesh.tensor == -1 else max(device_count // max(mesh.tensor, 1), 1)
    unit = accumulation * parts
    if rows % unit:
        each = rows // batch  # timesteps of a prompt; 1 where there are pairs
        even, takes = parts // math.gcd(parts, each), unit // math.gcd(unit, each)
        fits = -(-batch // even) * even  # the fewest that all devices share
        most = max(n for n in range(1, accumulation + 1) if fits * each // parts % n == 0)
        changes = [f"data.batch_size={fits}"] if fits != batch else []
        changes += [f"data.accumulation={most}"] if most != accumulation else []
        raise UserError(
            f"data.batch_size={batch}{f' x {each} timesteps' if each != 1 else ''} does not divide over {parts} "
            f"devices x {accumulation} micro-batches; set {' and '.join(changes)}, or data.batch_size to a multiple of "
            f"{takes}"
        )
    return Derived(
        local_batch_size=rows // process_count,
        micro_batch_per_device=rows // (accumulation * parts),
        learning_rate=peak_learning_rate(config),
    )


def check_views(config: ConfigDict) -> None:
    """Refuses views of images that can't be stored as the config wants them; ValueError."""
    data = config.data
    augmented = [name for name in ("random_crop", "random_flip") if data[name]]
    if data.encoded_views == 1 and augmented:
        raise UserError(
            f"config.data.encoded_views=1 stores one view of each image, but config.data.{augmented[0]} asks for more; "
            f"set encoded_views=2 or more, or {augmented[0]}=False"
        )
    if data.encoded_views > 1 and not augmented:
        raise UserError(
            f"config.data.encoded_views={data.encoded_views}, but all views would be alike: set encoded_views=1, "
            "or random_flip=True or random_crop=True"
        )
    if data.encoded_views > 2 and not data.random_crop:
        raise UserError(
            f"config.data.encoded_views={data.encoded_views}, but without random_crop an image has two views: itself "
            "and mirrored; set encoded_views=2"
        )
    if data.encoded_views and data.path.startswith("random:"):
        raise UserError(f"config.data.encoded_views needs a prepared data set; {data.path} is made anew in every run")


def check_same_experiment(fields: dict[str, Any], saved: dict[str, Any], workdir: Any, defaults: ConfigDict) -> None:
    """Refuses to continue a work directory that another config or another model began; names the fields that differ."""
    now = json.loads(json.dumps(fields))
    # The learning rates of schedules that fall follow from the number of steps.
    steps_are_free = now["optimizer.schedule"] not in FALLING
    free = (*FREE_TO_CHANGE, "steps") if steps_are_free else FREE_TO_CHANGE
    # A field that did not exist when the run began had its default.
    saved = json.loads(json.dumps(flatten(defaults))) | saved
    names = [f for f in sorted(now.keys() | saved.keys()) if not _is_free(f, free)]
    differing = [f"{f} was {saved.get(f)!r}, now {now.get(f)!r}" for f in names if now.get(f) != saved.get(f)]
    if differing:
        raise UserError(
            f"{workdir} was begun with another config ({'; '.join(differing)}); "
            "choose another --workdir, or the former values to continue it"
        )


def _is_free(field: str, free: tuple[str, ...]) -> bool:
    return any(field.startswith(name) if name.endswith(".") else field == name for name in free)
