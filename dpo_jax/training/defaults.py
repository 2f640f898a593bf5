"""Every field of an experiment: its default, what it may be, and one line of help. Declared here and nowhere else.

Published hyperparameters are in the files of `configs/`, which start from `default_config()`.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dpo_jax.batch import TOLD_GUIDANCE
from dpo_jax.cli import check_fields_exist, flatten, replaced, unflatten
from dpo_jax.data import buckets
from dpo_jax.data.load.pair_weights import WEIGHTS
from dpo_jax.errors import UserError
from dpo_jax.fields import (
    COUNT,
    NOT_ALL,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Field,
    are_devices,
    are_patterns,
    are_rates,
    are_rules,
    config_of,
    fields_help,
    fields_text,
)
from dpo_jax.methods import METHODS, Method, find_method
from dpo_jax.methods.kto import VOTE_FIELDS
from dpo_jax.methods.plackett_luce import LIST_FIELDS
from dpo_jax.methods.rollouts import ROLLOUT_FIELDS, SAMPLERS
from dpo_jax.methods.stability import PAIR_FIELDS
from dpo_jax.training.loggers import LOGGERS
from dpo_jax.training.moments import MOMENTS
from dpo_jax.training.optim import OPTIMIZERS
from dpo_jax.training.watch import FIGURES, JUDGE
from dpo_jax.weights.quantised import QTYPES

DTYPE: dict[str, Any] = {"choices": ("float32", "bfloat16")}
DEVICES: dict[str, Any] = {"at_least": -1, "wrong": are_devices}

FALLING = ("linear", "cosine", "cosine_with_restarts", "polynomial")
"""The schedules whose learning rate depends on the number of steps."""

GROUPS = {
    "": "The run and its model",
    "lora": "Low-rank adapters; with lora.rank=0 the whole denoiser is trained",
    "ema": "Moving average of the trained weights",
    "moving_reference": "A reference that follows the policy; held-out pairs are then compared with it, too",
    "loss": "Method",
    "data": "Data",
    "optimizer": "Optimizer",
    "memory": "Memory: what is stored how, and where",
    "mesh": "Division of the model and of the batch over devices",
    "checkpoint": "Checkpoints",
    "monitor": "Warnings",
    "early_stop": "Early stopping",
    "logging": "Logging",
    "validation": "Accuracy on held-out data",
    "sample": "Image grids drawn while training, the trained model beside the reference",
    "online": "Rounds of sampling, judging and training",
}
"""The groups of fields, by what stands before the dot."""

FIELDS = {
    "model": Field(
        "", "Model to train: diffusers folder, hub id or .safetensors file; random:FAMILY makes a tiny one."
    ),
    "family": Field("", "Model family, where the files cannot tell it: sdxl_turbo."),
    "revision": Field("", "Branch, tag or commit of a hub id."),
    "variant": Field("", "Set of weights to fetch from the hub, for example fp16."),
    "model_config": Field(
        "",
        "For a single file: the model of its configs and of networks that it lacks; empty takes the published one.",
    ),
    "vae": Field("", "Another VAE: folder, file or hub id, for example madebyollin/sdxl-vae-fp16-fix."),
    "unet": Field("", "Another UNet to start from, for policy and reference: folder, file or hub id."),
    "transformer": Field("", "The same for models whose denoiser is a transformer."),
    "reference": Field("", "Another one for the reference alone; empty takes what the policy starts from."),
    "guidance": Field(
        TOLD_GUIDANCE,
        "Guidance scale that a model distilled from guidance (FLUX.1-dev) is told in training.",
        at_least=0.0,
    ),
    "steps": Field(2000, "Number of optimizer steps; online 0, since they follow from the rounds.", **NOT_NEGATIVE),
    "seed": Field(
        0, "Seed of shuffling, augmentation, timesteps, noise and posterior samples.", at_least=0, at_most=2**32 - 1
    ),
    "dtype": Field(
        "bfloat16", "Dtype of computing and of frozen models; see memory.masters for trained weights.", **DTYPE
    ),
    "vae_dtype": Field("bfloat16", "Dtype of the VAE; float32 for VAEs that lose detail in bfloat16.", **DTYPE),
    "remat": Field(
        "none",
        "What to recompute in place of keeping it, from most memory to least; auto takes the first that fits.",
        choices=("none", "dots", "attention", "block", "auto"),
    ),
    "scan": Field(False, "Compile equal transformer blocks once, as a loop: for TPUs, where compilation is slow."),
    "attention": Field(
        "auto",
        "Attention kernel; auto takes cudnn on NVIDIA GPUs in bfloat16, splash on TPUs, and xla elsewhere.",
        choices=("auto", "xla", "cudnn", "splash"),
    ),
    "log_every": Field(10, "Steps between two lines of metrics.", **COUNT),
    "lora.rank": Field(0, "Rank of the adapters; 0 trains the whole denoiser.", at_least=0, at_most=2**16),
    "lora.alpha": Field(
        0.0, "The output of an adapter is scaled by alpha / rank; 0 means alpha = rank.", **NOT_NEGATIVE
    ),
    "lora.targets": Field(
        r"attn[12]\.(to_q|to_k|to_v|to_out\.0)$",
        "Regular expression found in the names of the layers that get an adapter.",
        wrong=are_patterns,
    ),
    "lora.dropout": Field(0.0, "Share of the inputs of an adapter that are zeroed in training.", **NOT_ALL),
    "lora.initializer": Field(
        "kaiming",
        "Initial A: kaiming as in peft, or gaussian (std 1 / rank) as in the scripts of diffusers.",
        choices=("kaiming", "gaussian"),
    ),
    "lora.init": Field("", "LoRA file or hub id to continue from; its rank, alpha and targets then hold."),
    "lora.init_reference": Field(False, "Give the reference that LoRA too."),
    "ema.decay": Field(
        0.0, "Decay of a moving average of the trained weights, then sampled and exported; 0 keeps none.", **NOT_ALL
    ),
    "moving_reference.every": Field(
        0, "Updates of the policy between two moves of the reference towards it; 0 keeps it fixed.", **NOT_NEGATIVE
    ),
    "moving_reference.decay": Field(
        0.0,
        "Share of the reference that stays when it moves: 0 makes it a copy (SPIN); Linear-DPO has 0.99, every=1.",
        **NOT_ALL,
    ),
    "loss.name": Field(
        "dpo", "Method, with fields of its own, such as sft or kto: one of docs/methods.md, or python=MODULE:NAME."
    ),
    "loss.noise_offset": Field(
        0.0, "Size of an extra draw of noise, one number per channel, for example 0.05.", **NOT_NEGATIVE
    ),
    "loss.input_perturbation": Field(
        0.0, "Size of a draw that is added to the noise but not predicted, for example 0.1.", **NOT_NEGATIVE
    ),
    "loss.inversion_steps": Field(
        0,
        "Find the noise of an image by this many steps of inverted DDIM with the policy (InPO: 10); 0 draws it.",
        at_least=0,
        at_most=1000,
    ),
    "loss.log_snr_buckets": Field(
        0,
        "Draw timesteps evenly over this many ranges of log-SNR; the loss is not corrected for it. 0 draws uniformly.",
        at_least=0,
        at_most=1000,
    ),
    "loss.timestep_density": Field(
        "",
        "Density of timesteps; empty takes logit_normal for flow models and uniform for all others.",
        choices=("", "uniform", "logit_normal"),
    ),
    "loss.timestep_mean": Field(
        0.0,
        "Mean of logit_normal; above 0 draws less noise, as logit_mean of diffusers' training scripts.",
        at_least=-10,
        at_most=10,
    ),
    "loss.timestep_std": Field(1.0, "Standard deviation of logit_normal.", **POSITIVE),
    "loss.timestep_shift": Field(
        1.0,
        "Shift drawn timesteps to more noise (above 1) or less, besides the scheduler's shift; FLUX at 1024 px: 3.16.",
        **POSITIVE,
    ),
    "data.path": Field("", "Folder that dpo_jax.prepare wrote; random:N makes N pairs."),
    "data.batch_size": Field(2048, "Pairs per optimizer step, over all devices.", at_least=1, at_most=2**24),
    "data.micro_batch": Field(
        0,
        "Most pairs per device at a time; gradients are accumulated. 0: what its memory holds (on CPUs all).",
        at_least=0,
        at_most=2**24,
    ),
    "data.resolution": Field(512, "Height and width of training images, in pixels.", at_least=1, at_most=2**14),
    "data.buckets": Field(
        "",
        "Shapes to crop to in place of a square, of about the same area: sdxl or flux (published lists), or data.",
        choices=("", *buckets.NAMES),
    ),
    "data.random_crop": Field(
        False, "Crop at a random place, the same for all images of a pair; otherwise the centre."
    ),
    "data.random_flip": Field(True, "Mirror horizontally at random, all images of a pair alike."),
    "data.masks": Field(
        False, "Let each image count where the mask beside it is white; images without a mask count everywhere."
    ),
    "data.mask_floor": Field(0.0, "Weight of what is black in a mask, where white has 1.", **SHARE),
    "data.caption_dropout": Field(0.2, "Share of captions replaced by the empty one.", **SHARE),
    "data.text_length": Field(
        0,
        "Tokens of a caption for T5 or Qwen3; 0 takes the family's: SD3 256, FLUX.1-dev and Z-Image 512.",
        **NOT_NEGATIVE,
    ),
    "data.caption_lines": Field(False, "Take each line of a caption as a caption of its own and draw one each time."),
    "data.size_conditioning": Field(
        "constant",
        "Size input of SDXL: constant (the size of the crop, as if nothing were cut) or real sizes and crops.",
        choices=("constant", "real"),
    ),
    "data.ties": Field(
        "drop",
        "Pairs without a winner: drop them, keep them without a part in the loss, or count 1/2 for each (soft).",
        choices=("drop", "zero_weight", "soft"),
    ),
    "data.labels": Field(
        "hard",
        "Labels: hard (the winner takes all) or soft (shares of the votes as the data set states them).",
        choices=("hard", "soft"),
    ),
    "data.judges": Field((), "Order images by these stored scores of dpo_jax.score instead of votes: ('pickscore',)."),
    "data.combine": Field(
        "mean",
        "How several judges combine: mean of their scores, or pareto (better for one, worse for none).",
        choices=("mean", "pareto"),
    ),
    "data.score_judge": Field(
        "", "Judge whose stored scores data.pair_weights and data.order read; empty takes the one of data.judges."
    ),
    "data.pair_weights": Field(
        "none",
        "Weight of pairs: gap (a larger gap of scores counts more) or rarity (rare scores count more, as in VideoDPO).",
        choices=("none", *WEIGHTS),
    ),
    "data.order": Field(
        "shuffled",
        "Order of pairs: shuffled, or curriculum (from large gaps of scores to small ones, as in Curriculum-DPO).",
        choices=("shuffled", "curriculum"),
    ),
    "data.curriculum_blocks": Field(
        6, "Stages of data.order=curriculum; each adds pairs with smaller gaps to those before.", **COUNT
    ),
    "data.generators": Field(
        (), "Regular expressions; the models of both images must match one. Empty takes all.", wrong=are_patterns
    ),
    "data.min_agreement": Field(0.0, "Lowest share of votes for the winner, 0.5 to 1.", **SHARE),
    "data.min_side": Field(0, "Fewest pixels on the shorter side of both images.", **NOT_NEGATIVE),
    "data.limit": Field(0, "Number of the selected pairs to train on; 0 takes all.", **NOT_NEGATIVE),
    "data.limit_seed": Field(
        -1, "Which pairs data.limit takes: -1 the first, any other number a fixed random draw.", at_least=-1
    ),
    "data.relabel": Field(
        "none", "Control experiments: swapped or shuffled labels.", choices=("none", "swapped", "shuffled")
    ),
    "data.encoded_views": Field(
        0,
        "Train from this many stored views of each image (prepare --encode); 0 reads images.",
        at_least=0,
        at_most=2**10,
    ),
    "data.num_workers": Field(
        0, "Threads per host that read and decode; 0 takes two per core, at most 8.", at_least=0, at_most=2**10
    ),
    "optimizer.name": Field(
        "adamw",
        "Optimizer; lion wants a rate 3 to 10 times below that of adamw, prodigy a rate of 1.",
        choices=tuple(OPTIMIZERS),
    ),
    "optimizer.learning_rate": Field(1e-8, "Peak learning rate, before scaling by the batch.", **POSITIVE),
    "optimizer.scale_by_batch": Field(True, "Multiply the learning rate by data.batch_size, as the published runs do."),
    "optimizer.schedule": Field(
        "constant_with_warmup",
        "Schedule of the learning rate; all but the constant ones fall until the last step.",
        choices=("constant", "constant_with_warmup", *FALLING),
    ),
    "optimizer.cycles": Field(1, "Half cosines in a row, for cosine_with_restarts.", **COUNT),
    "optimizer.power": Field(1.0, "Power of the share of steps that is left, for polynomial.", **POSITIVE),
    "optimizer.warmup_steps": Field(500, "Steps from 0 to the full learning rate.", **NOT_NEGATIVE),
    "optimizer.rates": Field(
        (),
        "Factors of the learning rate by parameter: ((regular expression found in names, factor), ...); 0 freezes.",
        wrong=are_rates,
    ),
    "optimizer.beta1": Field(
        0.9, "Decay of the first moment (AdamW, Lion, Prodigy, and Muon except for matrices: 0.95).", **NOT_ALL
    ),
    "optimizer.beta2": Field(
        -1.0,
        "Decay of the second moment (AdamW, Muon, Prodigy; -1: 0.999) or of Lion's momentum (-1: 0.99).",
        at_least=-1,
        below=1,
        wrong=lambda v: None if v == -1 or v >= 0 else "must be -1, or at least 0 and below 1",
    ),
    "optimizer.moments": Field(
        "float32",
        "Dtype of the moments between steps (AdamW, Lion, Muon): int8 has a scale for each 256 numbers or fewer.",
        choices=MOMENTS,
    ),
    "optimizer.epsilon": Field(
        1e-8, "Term added to the denominator (AdamW, Prodigy, and Muon except for matrices).", **POSITIVE
    ),
    "optimizer.weight_decay": Field(1e-2, "Decoupled weight decay, times the learning rate.", **NOT_NEGATIVE),
    "optimizer.clip_norm": Field(1.0, "Largest global norm of the gradient.", above=0, may_be_infinite=True),
    "optimizer.skip_spikes": Field(
        0.0,
        "Skip steps whose gradient has a norm of more than this many times its running mean; 0 skips none.",
        at_least=0,
        wrong=lambda v: None if v == 0 or v > 1 else "must be 0, or above 1",
    ),
    "optimizer.max_skips": Field(
        3, "Steps in a row that may be skipped as spikes or not finite; one more ends the run.", **NOT_NEGATIVE
    ),
    "memory.auto": Field(
        False,
        "Choose by memory: remat, data.micro_batch=0 and, where these do not suffice, how weights are stored.",
    ),
    "memory.masters": Field(
        "float32",
        "Dtype of the trained weights between steps; bfloat16 rounds updates and sums of gradients stochastically.",
        **DTYPE,
    ),
    "mesh.data": Field(-1, "Copies of the model; -1 takes the devices that are left.", **DEVICES),
    "mesh.fsdp": Field(1, "Devices that one copy of the model is split over.", **DEVICES),
    "mesh.tensor": Field(1, "Devices that share the work inside each layer of one copy.", **DEVICES),
    "mesh.rules": Field(
        (), "Sharding of parameters: ((regular expression, (mesh axis or None per dimension)), ...).", wrong=are_rules
    ),
    "memory.frozen": Field(
        "",
        "What a LoRA is added to in fewer bits: int8, float8 or nf4 (4 bits, as QLoRA); empty keeps it in dtype.",
        choices=("", *QTYPES),
    ),
    "checkpoint.every": Field(200, "Steps between two checkpoints.", **COUNT),
    "checkpoint.keep": Field(3, "Number of newest checkpoints that stay; 0 keeps all.", **NOT_NEGATIVE),
    "checkpoint.keep_every": Field(
        0, "Checkpoints of multiples of this many steps stay, too; 0 keeps none of them.", **NOT_NEGATIVE
    ),
    "checkpoint.best": Field(
        "",
        "Keep the checkpoint that is best by this figure of held-out data, or by sample.judge, too: see --step=best.",
        choices=("", *FIGURES, JUDGE),
    ),
    "monitor.winner_rise": Field(
        0.05, "Warn when the winner's error rises by more than this share; 0 never warns.", **NOT_NEGATIVE
    ),
    "early_stop.metric": Field(
        "",
        "Stop when this figure of held-out data, or the score of sample.judge, gets no better; empty never stops.",
        choices=("", *FIGURES, JUDGE),
    ),
    "early_stop.patience": Field(
        3, "Validations, or for judge image grids, without a better figure after which to stop.", **COUNT
    ),
    "logging.to": Field(
        ("tensorboard",),
        "Where figures and image grids go, besides metrics.jsonl: any of the choices, such as ('wandb', 'csv').",
        choices=tuple(LOGGERS),
    ),
    "logging.name": Field("", "Name of the run in wandb and trackio; empty takes the name of the work directory."),
    "logging.project": Field(
        "dpo_jax",
        "Project of the run in wandb and trackio.",
        wrong=lambda v: None if v.strip() else "must not be empty",
    ),
    "validation.every": Field(200, "Steps between two validations; 0 turns them off.", **NOT_NEGATIVE),
    "validation.max_pairs": Field(1024, "Largest number of held-out examples to validate on.", **COUNT),
    "validation.draws": Field(4, "Timesteps and noises drawn for each held-out pair.", **COUNT),
    "sample.every": Field(200, "Steps between two image grids; 0 turns them off.", **NOT_NEGATIVE),
    "sample.prompts": Field(
        ("a photo of an astronaut riding a horse", "a watercolour of a lighthouse at dusk"), "Prompts of the grids."
    ),
    "sample.seeds": Field(2, "Images per prompt.", at_least=1, at_most=2**16),
    "sample.judge": Field(
        "", "Judge that scores the images of the grids, as evaluate --judges takes it; empty scores none."
    ),
    "sample.sampler": Field("ddim", "Sampler; empty takes the one of the model.", choices=("", *SAMPLERS)),
    "sample.steps": Field(20, "Denoising steps.", **COUNT),
    "sample.guidance": Field(7.5, "Classifier-free guidance scale.", **NOT_NEGATIVE),
}
"""All fields by their dotted path, in the order in which --help lists them."""


def default_config() -> ConfigDict:
    """Return the config with the default of every field; the method is DPO."""
    return config_of(FIELDS | own_fields(METHODS["dpo"]))


def own_fields(method: Method) -> dict[str, Field]:
    """Return the fields that a config has because of its method, by dotted path."""
    return {f"loss.{name}": field for name, field in method.fields.items()} | shared_fields(method)


def shared_fields(method: Method) -> dict[str, Field]:
    """Return the fields that methods of this kind share; their values stay when another of them is chosen."""
    if method.learns_from == "rollouts":
        return ROLLOUT_FIELDS
    if method.learns_from == "votes":
        return dict(VOTE_FIELDS)
    if method.learns_from == "lists":
        return dict(LIST_FIELDS)
    return {f"loss.{name}": field for name, field in PAIR_FIELDS.items()} if method.takes_pair_fields else {}


def method_of(config: ConfigDict) -> Method:
    """Return the method of a config.

    Raises:
        UserError: there is no such method, or the config has the fields of another one.
    """
    name = config.loss.name
    method = find_method(name)
    given = {f"loss.{field}" for field in config.loss} - FIELDS.keys()
    own = {f"loss.{field}" for field in method.fields}
    of_others = {f"loss.{field}" for other in METHODS.values() for field in other.fields}
    if others := sorted((given - own) & of_others):
        raise UserError(
            f'config.loss.name="{name}", but the config has the fields of another method ({", ".join(others)}). In a '
            f'config file, choose the method with choose_method(c, "{name}")'
        )
    return method


def fields_of(config: ConfigDict) -> dict[str, Field]:
    """Return all fields that a config of this method has."""
    return FIELDS | own_fields(method_of(config))


def choose_method(config: ConfigDict, name: str) -> None:
    """Make `name` the method of a config: its fields, with their defaults, replace those of the former method.

    Raises:
        UserError: there is no such method.
    """
    former, method = find_method(config.loss.name), find_method(name)
    new = own_fields(method)
    with config.unlocked():
        for path in own_fields(former):
            if path not in new:
                _remove(config, path)
        kept = shared_fields(former).keys() & shared_fields(method).keys() - former.sets.keys()
        values = {path: field.default for path, field in new.items() if path not in kept}
        values |= {path: FIELDS[path].default for path in former.sets if path in FIELDS}
        config.update(unflatten(values | {"loss.name": name} | dict(method.sets)))


def with_fields(config: ConfigDict, fields: Mapping[str, Any]) -> ConfigDict:
    """Return a copy with other values of some fields, by dotted path; `loss.name` chooses the method before the rest.

    Raises:
        UserError: there is no such field or method.
    """
    config = config.copy_and_resolve_references()
    if "loss.name" in fields and fields["loss.name"] != config.loss.name:
        choose_method(config, fields["loss.name"])
    known = flatten(config)
    check_fields_exist(fields, known, known | dict(fields))
    return replaced(config, dict(fields))


def _remove(config: ConfigDict, path: str) -> None:
    group, _, leaf = path.rpartition(".")
    if group in config:
        del config[group][leaf]
        if not config[group]:
            del config[group]


def describe(config: ConfigDict | None) -> str:
    """Return the text of --help about the fields of a config, or about their defaults."""
    config = config or default_config()
    return fields_text(fields_help(fields_of(config), GROUPS, config))
