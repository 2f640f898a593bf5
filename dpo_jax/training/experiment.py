"""What a config and a machine determine: models, frozen weights, inputs, objective and optimizer."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from dpo_jax.batch import Cached, Conditioning, PreferenceBatch, Raw
from dpo_jax.encode.images import encode_images, sample_posterior
from dpo_jax.encode.text import condition, encode_text
from dpo_jax.errors import UserError
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.objectives.losses import dpo, sft
from dpo_jax.sharding import Placement, batch_constraint, batch_sharding, on_mesh, replicated
from dpo_jax.training.config import Derived
from dpo_jax.training.model import abstract_frozen, abstract_params, initial_adapter, load_frozen, make_placement
from dpo_jax.training.optim import learning_rate_schedule, make_optimizer
from dpo_jax.training.step import (
    ComputeLogRatios,
    Encode,
    Frozen,
    Objective,
    TrainState,
    make_log_ratios,
    make_train_step,
)
from dpo_jax.weights.layout import Params


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that a config and a machine determine and training does not change."""

    config: ConfigDict
    derived: Derived
    placement: Placement
    pipeline: Pipeline
    objective: Objective
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    score: ComputeLogRatios
    frozen: Frozen
    """The weights that stay as they are; of a plan only their shapes and places."""
    adapter: Params | None = None
    """The LoRA that training begins with; None where the whole UNet is trained."""

    @property
    def mesh(self) -> Mesh:
        return self.placement.mesh

    def train_step(self) -> jax.stages.Wrapped:
        """`step(state, frozen, batch) -> (state, metrics)`, jitted; the state given is used up."""
        step = make_train_step(
            self.score,
            self.objective,
            self.optimizer,
            accumulation=self.derived.accumulation,
            ema_decay=self.config.ema.decay,
        )
        place = jax.tree.map(lambda x: x.sharding, self.abstract_state())
        return jax.jit(step, donate_argnums=0, out_shardings=(place, replicated(self.mesh)))

    def abstract_state(self) -> Any:
        """Shapes and places of the training state."""
        specs = self.pipeline.trained_specs
        params = abstract_params(specs, jnp.float32, self.placement)
        state = TrainState(
            step=jax.ShapeDtypeStruct((), jnp.int32),
            params=params,
            opt_state=jax.eval_shape(self.optimizer.init, params),
            ema=params if self.config.ema.decay else {},
        )
        shardings = TrainState(
            step=replicated(self.mesh),
            params=self.placement.state(specs, state.params),
            opt_state=self.placement.state(specs, state.opt_state, over_data=True),
            ema=self.placement.state(specs, state.ema, over_data=True),
        )
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)

    def abstract_batch(self) -> Any:
        """Shapes and places of a batch of pairs with one caption each."""
        B, K, M = self.config.data.batch_size, 2, 1
        size, unet, encoders = self.config.data.resolution, self.pipeline.unet.config, self.pipeline.text_encoders
        L = encoders[0].config.max_position_embeddings
        split = batch_sharding(self.mesh)

        def array(dtype: DTypeLike, *shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((B, *shape), dtype, sharding=split)

        inputs: Raw | Cached = Raw(
            images_BKHWC=array(jnp.uint8, K, size, size, 3),
            mirrored_BK=array(jnp.bool_, K),
            token_ids_BMEL=array(jnp.int32, M, len(encoders), L),
        )
        if self.config.data.encoded_views:
            cells, time_ids = size // self.pipeline.vae_factor, self.pipeline.family.num_time_ids
            pooled = (unet.projection_class_embeddings_input_dim or 0) - time_ids * (unet.addition_time_embed_dim or 0)
            inputs = Cached(
                array(jnp.bfloat16, K, cells, cells, 2 * unet.in_channels),
                array(jnp.bfloat16, M, L, unet.cross_attention_dim[0]),
                array(jnp.bfloat16, M, pooled),
            )
        return PreferenceBatch(
            inputs=inputs,
            size_cond_BK6=array(jnp.float32, K, 6),
            preference_BK=array(jnp.float32, K),
            valid_BK=array(jnp.bool_, K),
            weight_B=array(jnp.float32),
            index_B=array(jnp.int32),
        )

    def initial_state(self) -> TrainState:
        """The model's UNet in float32, or the LoRA to begin with; and fresh optimizer state."""
        place = jax.tree.map(lambda x: x.sharding, self.abstract_state())
        if self.adapter is not None:
            params = jax.device_put(self.adapter, place.params)
        else:
            params = self.pipeline.load("unet", dtype=jnp.float32, sharding=self.placement)
        return TrainState(
            step=jax.device_put(jnp.zeros((), jnp.int32), replicated(self.mesh)),
            params=params,
            opt_state=jax.jit(self.optimizer.init, out_shardings=place.opt_state)(params),
            ema=jax.device_put(jax.tree.map(jnp.copy, params), place.ema) if self.config.ema.decay else {},
        )


Method = Callable[[ConfigDict, Pipeline, Placement], tuple[Objective, ComputeLogRatios]]
"""What a config minimises, and how a batch is scored for it."""


def on_pairs(config: ConfigDict, pipeline: Pipeline, placement: Placement) -> tuple[Objective, ComputeLogRatios]:
    """Losses of denoising errors, over images that a data set orders."""
    objective = make_objective(config)
    score = make_log_ratios(
        make_encode(pipeline),
        pipeline.denoise,
        pipeline.schedule,
        objective,
        config.seed,
        dropout=config.lora.dropout > 0,
        noise_offset=config.loss.noise_offset,
        input_perturbation=config.loss.input_perturbation,
        constrain=batch_constraint(placement.mesh),
        gather=functools.partial(pipeline.gather, placement),
    )
    return objective, score


def build(config: ConfigDict, derived: Derived, pipeline: Pipeline, method: Method = on_pairs) -> Experiment:
    """The experiment with its frozen weights read; raises ValueError for what the config has wrong."""
    composed = compose(config, derived, pipeline, make_placement(config), method)
    adapter = initial_adapter(config, pipeline) if pipeline.adapted_unet is not None else None
    frozen = load_frozen(config, pipeline, composed.placement, composed.frozen, adapter)
    return dataclasses.replace(composed, frozen=frozen, adapter=adapter)


def compose(
    config: ConfigDict, derived: Derived, pipeline: Pipeline, placement: Placement, method: Method = on_pairs
) -> Experiment:
    """The experiment with nothing in memory: its frozen weights are shapes and places. A plan asks no more of it."""
    objective, score = method(config, pipeline, placement)
    o = config.optimizer
    learning_rate = learning_rate_schedule(
        o.schedule,
        derived.learning_rate,
        warmup_steps=o.warmup_steps,
        total_steps=config.steps,
        cycles=o.cycles,
        power=o.power,
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
    return Experiment(
        config=config,
        derived=derived,
        placement=placement,
        pipeline=pipeline,
        objective=objective,
        optimizer=optimizer,
        learning_rate=learning_rate,
        score=on_mesh(placement.mesh, score),
        frozen=abstract_frozen(config, pipeline, placement, needs_reference=objective.needs_reference),
    )


def make_encode(pipeline: Pipeline) -> Encode:
    """Latents and conditioning of a batch, from its images and captions or from what was stored of them."""

    def encode(frozen: Frozen, batch: PreferenceBatch, keys_B: jax.Array) -> tuple[jax.Array, Conditioning]:
        inputs, size_cond_N6 = batch.inputs, one_a_row(batch.size_cond_BK6)
        if isinstance(inputs, Cached):
            latents_BKhwC = sample_posterior(pipeline.vae, inputs.moments_BKhwC, keys_B)
            context_NLD = one_a_row(inputs.context_BMLD).astype(pipeline.dtype)
            pooled_NP = one_a_row(inputs.pooled_BMP).astype(pipeline.dtype)
        else:
            assert isinstance(inputs, Raw), "sampled images are scored by their transitions"
            latents_BKhwC = encode_images(pipeline.vae, frozen["vae"], inputs.images_BKHWC, inputs.mirrored_BK, keys_B)
            context_NLD, pooled_NP = encode_text(pipeline, frozen, one_a_row(inputs.token_ids_BMEL))
        return latents_BKhwC, condition(pipeline.family, context_NLD, pooled_NP, size_cond_N6)

    def one_a_row(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])  # -1 is unknown where a width is 0

    return encode


def make_objective(config: ConfigDict) -> Objective:
    """The loss that the config names, with its hyperparameters bound."""
    objectives = {
        "dpo": Objective(functools.partial(dpo, beta=config.loss.beta)),
        "sft": Objective(sft, needs_reference=False, num_candidates=1),
    }
    if config.loss.name not in objectives:
        raise UserError(f"loss.name={config.loss.name!r}; the losses are {', '.join(objectives)}")
    return objectives[config.loss.name]
