"""What a config and a machine determine: models, frozen weights, data streams, objective and optimizer.

`build` makes an `Experiment` for the trainer; `open_run` opens a work directory to look at what it has trained.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dpo_jax.batch import PreferenceBatch
from dpo_jax.cli import flatten, unflatten
from dpo_jax.data.pipeline import BatchIterator, Pairs, make_iterator, open_pairs, validation_batches
from dpo_jax.data.tokenizers import Tokenizers, load_tokenizers
from dpo_jax.encode.images import encode_images
from dpo_jax.encode.text import encode_text
from dpo_jax.evaluation.generate import Generator
from dpo_jax.models.lora import LowRank, find_targets, init_lora
from dpo_jax.models.pipeline import Pipeline, files_of, find_component, load_pipeline
from dpo_jax.models.random_model import write_random_model
from dpo_jax.objectives.losses import dpo, sft
from dpo_jax.sharding import make_mesh, param_sharding, placement, replicated, state_sharding
from dpo_jax.training.checkpoint import read_config, restore_params
from dpo_jax.training.config import Derived, default_config
from dpo_jax.training.optim import learning_rate_schedule, make_optimizer
from dpo_jax.training.step import Frozen, Objective, Score, TrainState, make_score
from dpo_jax.weights.hub import find_lora
from dpo_jax.weights.io import fingerprint
from dpo_jax.weights.layout import Params
from dpo_jax.weights.lora_files import Adapter, lora_files_of, read_lora


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that a config and a machine determine and training does not change."""

    config: ConfigDict
    derived: Derived
    mesh: Mesh
    pipeline: Pipeline
    tokenizers: Tokenizers
    objective: Objective
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    frozen: Frozen
    score: Score
    adapter: Params | None
    """The LoRA that training begins with; None where the whole UNet is trained."""

    def abstract_state(self) -> Any:
        params = abstract_params(self.pipeline, self.mesh)
        state = TrainState(
            step=jax.ShapeDtypeStruct((), jnp.int32),
            params=params,
            opt_state=jax.eval_shape(self.optimizer.init, params),
            ema=params if self.config.ema.decay else {},
        )
        shardings = state_sharding(self.mesh, self.pipeline.trained_specs, state)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)

    def initial_state(self) -> TrainState:
        """The model's UNet in float32, or the LoRA to begin with; and fresh optimizer state."""
        place = jax.tree.map(lambda x: x.sharding, self.abstract_state())
        if self.adapter is not None:
            params = jax.device_put(self.adapter, place.params)
        else:
            params = self.pipeline.load("unet", dtype=jnp.float32, sharding=placement(self.mesh))
        return TrainState(
            step=jax.device_put(jnp.zeros((), jnp.int32), replicated(self.mesh)),
            params=params,
            opt_state=jax.jit(self.optimizer.init, out_shardings=place.opt_state)(params),
            ema=jax.tree.map(jnp.copy, params) if self.config.ema.decay else {},
        )


def build(config: ConfigDict, derived: Derived, pipeline: Pipeline) -> Experiment:
    """Reads the frozen weights and composes what is to be run; raises ValueError for what the config has wrong."""
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    objective = make_objective(config)
    frozen = load_frozen(config, pipeline, mesh)
    adapter = None
    if pipeline.adapted_unet is not None:
        adapter = initial_adapter(config, pipeline)
        frozen["base"] = load_unet(pipeline, mesh)
    if objective.needs_reference:
        frozen["reference"] = load_reference(config, pipeline, mesh, frozen, adapter)
    o = config.optimizer
    learning_rate = learning_rate_schedule(
        o.schedule, derived.learning_rate, warmup_steps=o.warmup_steps, total_steps=config.steps
    )
    optimizer = make_optimizer(
        o.name,
        learning_rate,
        pipeline.trained_specs,
        beta1=o.beta1,
        beta2=o.beta2,
        epsilon=o.epsilon,
        weight_decay=o.weight_decay,
        clip_norm=o.clip_norm,
    )

    def encode(frozen: Frozen, batch: PreferenceBatch, keys_B: jax.Array) -> Any:
        latents_BKHWC = encode_images(pipeline.vae, frozen["vae"], batch.images_BKHWC, keys_B)
        size_cond_N6 = batch.size_cond_BK6.reshape(-1, 6)
        return latents_BKHWC, encode_text(pipeline, frozen, batch.token_ids_BEL, size_cond_N6)

    return Experiment(
        config=config,
        derived=derived,
        mesh=mesh,
        pipeline=pipeline,
        tokenizers=load_tokenizers_of(pipeline),
        objective=objective,
        optimizer=optimizer,
        learning_rate=learning_rate,
        frozen=frozen,
        score=make_score(
            encode, pipeline.denoise, pipeline.schedule, objective, config.seed, dropout=config.lora.dropout > 0
        ),
        adapter=adapter,
    )


def open_model(config: ConfigDict, workdir: epath.PathLike) -> Pipeline:
    """The structure of `config.model` and its LoRA; "random:FAMILY" is first written to `workdir/model`, once."""
    model, family = config.model, config.family or None
    if model.startswith("random:"):
        family = model.removeprefix("random:")
        model = epath.Path(workdir) / "model"
        if not model.exists() and jax.process_index() == 0:
            write_random_model(family, model)
        multihost_utils.sync_global_devices("random model written")
    pipeline = load_pipeline(
        model,
        dtype=jnp.dtype(config.dtype),
        vae_dtype=jnp.dtype(config.vae_dtype),
        family=family,
        unet=config.unet,
        vae=config.vae,
        model_config=config.model_config,
        revision=config.revision,
        variant=config.variant,
    )
    if config.data.resolution % pipeline.vae_factor:
        raise ValueError(f"data.resolution={config.data.resolution} is not a multiple of {pipeline.vae_factor}")
    lora = config.lora
    if lora.init:
        adapter = read_lora(find_lora(lora.init), pipeline.unet.specs)
        adapters = {layer: LowRank(adapter.rank(layer), alpha) for layer, alpha in adapter.alphas.items()}
        ranks = sorted({size.rank for size in adapters.values()})
        if lora.rank and ranks != [lora.rank]:
            raise ValueError(
                f"config.lora.rank={lora.rank}, but {lora.init} has rank {ranks}; set lora.rank=0 to take it"
            )
        return pipeline.with_lora(adapters, lora.dropout)
    if lora.rank:
        adapters = find_targets(pipeline.unet, lora.targets, rank=lora.rank, alpha=lora.alpha or lora.rank)
        return pipeline.with_lora(adapters, lora.dropout)
    return pipeline


def initial_adapter(config: ConfigDict, pipeline: Pipeline) -> Params:
    """The LoRA of `config.lora.init`, or one that changes nothing yet; float32, on the host."""
    specs = pipeline.trained_specs
    if not config.lora.init:
        return jax.device_get(init_lora(specs, config.seed))
    params = read_lora(find_lora(config.lora.init), pipeline.unet.specs).params
    return jax.tree.map(lambda x: np.asarray(x, np.float32), dict(params))


def load_unet(pipeline: Pipeline, mesh: Mesh, path: epath.Path | None = None) -> Params:
    """The model's own UNet (or the one at `path`) as frozen weights are kept: in the compute dtype."""
    return pipeline.load("unet", dtype=pipeline.dtype, sharding=placement(mesh), path=path)


def load_reference(
    config: ConfigDict, pipeline: Pipeline, mesh: Mesh, frozen: Frozen, adapter: Params | None
) -> Params:
    """What the policy is compared with: `config.reference`, or the UNet it starts from.

    With a LoRA that UNet is "base", already in memory: the same arrays, not copies.
    """
    if config.reference:
        reference = load_unet(pipeline, mesh, find_component(config.reference, "unet"))
    else:
        reference = frozen.get("base") or load_unet(pipeline, mesh)
    if not config.lora.init_reference:
        return reference
    assert adapter is not None  # `config.resolve` has checked it
    place = placement(mesh)
    return reference | {
        name: jax.device_put(np.asarray(value, pipeline.dtype), place(name, pipeline.trained_specs[name]))
        for name, value in adapter.items()
    }


def fingerprints(config: ConfigDict, pipeline: Pipeline) -> dict[str, str]:
    """Fields for config.json: digests of the files that a run begins with, by what they are for."""
    digests = {"fingerprints.model": pipeline.fingerprint()}
    if config.reference:
        reference = find_component(config.reference, "unet")
        digests["fingerprints.reference"] = fingerprint(files_of(reference, pipeline.variant))
    data = epath.Path(config.data.path)
    is_made = config.data.path.startswith("random:")
    tables = [data / "records.arrow", data / "images.arrow"]
    digests["fingerprints.data"] = config.data.path if is_made else fingerprint(tables)
    if config.lora.init:
        digests["fingerprints.lora"] = fingerprint(lora_files_of(find_lora(config.lora.init)))
    return digests


def make_objective(config: ConfigDict) -> Objective:
    """The loss that the config names, with its hyperparameters bound."""
    objectives = {
        "dpo": Objective(functools.partial(dpo, beta=config.loss.beta)),
        "sft": Objective(sft, needs_reference=False, num_candidates=1),
    }
    if config.loss.name not in objectives:
        raise ValueError(f"loss.name={config.loss.name!r}; the losses are {', '.join(objectives)}")
    return objectives[config.loss.name]


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished or running experiment, opened to be looked at: the newest policy and the base it came from."""

    config: ConfigDict
    pipeline: Pipeline
    mesh: Mesh
    params: Params
    """Trained weights, float32: of the whole UNet or of a LoRA; their moving average where the config wants one."""
    step: int

    @functools.cached_property
    def base(self) -> Params:
        """The UNet that training began with, in the compute dtype; with the LoRA that it went on from, if any."""
        unet = load_unet(self.pipeline, self.mesh)
        return unet | initial_adapter(self.config, self.pipeline) if self.config.lora.init else unet

    @functools.cached_property
    def policy(self) -> Params:
        """The tuned UNet, in the compute dtype."""
        tuned = for_sampling(self.pipeline, self.params)
        return tuned if self.pipeline.adapted_unet is None else self.base | tuned

    @property
    def adapter(self) -> Adapter | None:
        """The trained LoRA, or None where the whole UNet was trained."""
        adapted = self.pipeline.adapted_unet
        if adapted is None:
            return None
        return Adapter(jax.device_get(self.params), {name: size.alpha for name, size in self.pipeline.adapters.items()})

    def generator(self, batch_size: int) -> Generator:
        return make_generator(
            self.config, self.pipeline, load_frozen(self.config, self.pipeline, self.mesh), self.mesh, batch_size
        )


def open_run(workdir: epath.PathLike) -> Run:
    """Reads the config and the newest checkpoint of a work directory, without its optimizer state."""
    saved = read_config(workdir)
    if saved is None:
        raise FileNotFoundError(f"no training run at {workdir}: it has no config.json; train first, see dpo_jax.train")
    config = unflatten(flatten(default_config()) | saved)
    pipeline = open_model(config, workdir)
    if pipeline.fingerprint() != saved["fingerprints.model"]:
        raise ValueError(f"the model in {pipeline.folder} has changed since {workdir} began; put the former one back")
    mesh = make_mesh(data=1, fsdp=-1)  # whatever devices are here, not those that trained
    item = "ema" if config.ema.decay else "params"
    params, step = restore_params(workdir, abstract_params(pipeline, mesh), item)
    return Run(config, pipeline, mesh, params, step)


def load_frozen(config: ConfigDict, pipeline: Pipeline, mesh: Mesh) -> Frozen:
    """VAE and text encoders."""
    return {
        name: pipeline.load(
            name, dtype=jnp.dtype(config.vae_dtype if name == "vae" else config.dtype), sharding=placement(mesh)
        )
        for name in pipeline.components
        if name != "unet"
    }


def load_tokenizers_of(pipeline: Pipeline) -> Tokenizers:
    return load_tokenizers(pipeline.folder, pipeline.tokenizer_names)


def make_generator(config: ConfigDict, pipeline: Pipeline, frozen: Frozen, mesh: Mesh, batch_size: int) -> Generator:
    """The sampler that `config.sample` describes."""
    return Generator(
        pipeline,
        frozen,
        load_tokenizers_of(pipeline),
        mesh,
        resolution=config.data.resolution,
        num_steps=config.sample.steps,
        guidance_scale=config.sample.guidance,
        batch_size=batch_size,
    )


def for_sampling(pipeline: Pipeline, params: Params) -> Params:
    """Trained weights as the frozen ones are kept, so that both run through one compiled sampler."""
    return {name: value.astype(pipeline.dtype) for name, value in params.items()}


def abstract_params(pipeline: Pipeline, mesh: Mesh) -> Any:
    """Shapes and places of the trained weights: float32 masters."""
    return {
        name: jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=param_sharding(mesh, spec))
        for name, spec in pipeline.trained_specs.items()
    }


def check_data(config: ConfigDict) -> None:
    """Opens the splits that the run will read and chooses from them, before anything else takes time."""
    _training_pairs(config)
    if config.validation.every:
        _validation_pairs(config)


def open_training_batches(experiment: Experiment) -> BatchIterator:
    """This process's share of the endless training stream; reads nothing but the data set's index yet."""
    data = experiment.config.data
    return make_iterator(
        _training_pairs(experiment.config),
        tokenizers=experiment.tokenizers,
        batch_size=experiment.derived.local_batch_size,
        seed=experiment.config.seed,
        caption_dropout=data.caption_dropout,
        random_crop=data.random_crop,
        random_flip=data.random_flip,
        relabel=data.relabel,
        num_workers=data.num_workers,
        **_data_options(experiment),
    )


def open_validation_batches(experiment: Experiment) -> BatchIterator:
    """This process's share of the held-out pairs, once, in order; the last batches may hold rows of weight 0."""
    config = experiment.config
    return validation_batches(
        _validation_pairs(config),
        tokenizers=experiment.tokenizers,
        batch_size=experiment.derived.local_batch_size // config.data.accumulation,
        **_data_options(experiment),
    )


def _training_pairs(config: ConfigDict) -> Pairs:
    data = config.data
    return open_pairs(data.path, "train", ties=data.ties, labels=data.labels, limit=data.limit, **_data_filters(config))


def _validation_pairs(config: ConfigDict) -> Pairs:
    """Without ties, which no model can order rightly or wrongly."""
    return open_pairs(config.data.path, "validation", **_data_filters(config))


def _data_filters(config: ConfigDict) -> dict[str, Any]:
    """What training and validation pairs have in common."""
    data = config.data
    return {"generators": data.generators, "min_agreement": data.min_agreement, "min_side": data.min_side}


def _data_options(experiment: Experiment) -> dict[str, Any]:
    """What training and validation batches have in common."""
    data = experiment.config.data
    return {
        "resolution": data.resolution,
        "size_conditioning": data.size_conditioning,
        "shard_index": jax.process_index(),
        "shard_count": jax.process_count(),
    }
