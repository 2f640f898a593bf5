"""An experiment: the models, frozen weights, objective and optimizer that a config describes."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from dpo_jax.batch import TOLD_GUIDANCE, Cached, Conditioning, PreferenceBatch, Raw
from dpo_jax.cli import flatten
from dpo_jax.encode.images import encode_images, sample_posterior
from dpo_jax.encode.text import condition, encode_text, stored_text
from dpo_jax.methods import Method, find_method
from dpo_jax.methods.method import Objective
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.sharding import Placement, batch_constraint, batch_sharding, on_mesh, replicated
from dpo_jax.training.buckets import largest_shape
from dpo_jax.training.config import Derived
from dpo_jax.training.joined import ELEMENTWISE, Joining
from dpo_jax.training.model import abstract_frozen, abstract_params, initial_adapter, load_frozen, make_placement
from dpo_jax.training.moving_reference import first_reference
from dpo_jax.training.optim import learning_rate_schedule, make_optimizer
from dpo_jax.training.rates import frozen_names, rate_factors, with_factors
from dpo_jax.training.step import (
    GRADIENT_NORM,
    Compare,
    Encode,
    Frozen,
    TrainState,
    make_compare,
    make_train_step,
)
from dpo_jax.training.timesteps import timestep_shares
from dpo_jax.weights.layout import Params


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that follows from a config and a machine and that training does not change."""

    config: ConfigDict
    derived: Derived
    placement: Placement
    pipeline: Pipeline
    objective: Objective
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    rate_factors: Mapping[str, float]
    """The factor of the learning rate of each trained parameter; those with 0 keep their values."""
    compare: Compare
    frozen: Frozen
    """The weights that are never trained; from `compose`, only their shapes and shardings."""
    adapter: Params | None = None
    """The LoRA that training begins with, on the host; None if the whole denoiser is trained."""

    @property
    def mesh(self) -> Mesh:
        return self.placement.mesh

    @property
    def method(self) -> Method:
        return find_method(self.config.loss.name)

    @property
    def joins(self) -> bool:
        """Whether the step updates all parameters as a few vectors: those of a LoRA that one device holds whole."""
        return (
            self.pipeline.adapted_denoiser is not None
            and self.mesh.size == 1
            and self.config.optimizer.name in ELEMENTWISE
            and self.config.optimizer.moments == self.config.memory.masters == "float32"  # rounding goes by parameter
            and all(factor == 1 for factor in self.rate_factors.values())
            and not self.config.moving_reference.every
        )

    def train_step(self) -> jax.stages.Wrapped:
        """Return `step(state, frozen, batch) -> (state, metrics)`, jitted; it donates the state's memory."""
        joining = Joining(self.pipeline.trained_specs) if self.joins else None
        step = make_train_step(
            joining.within(self.compare) if joining else self.compare,
            self.objective,
            self.optimizer,
            compute_dtype=self.pipeline.dtype,
            accumulation=self.derived.accumulation,
            ema_decay=self.config.ema.decay,
            skip_spikes=self.config.optimizer.skip_spikes,
            frozen_names=frozen_names(self.rate_factors),
            reference_every=self.config.moving_reference.every,
            reference_decay=self.config.moving_reference.decay,
            seed=self.config.seed,
            **self._old_policy(),
        )
        if joining:
            step = joining.around(step)
        place = jax.tree.map(lambda x: x.sharding, self.abstract_state())
        return jax.jit(step, donate_argnums=0, out_shardings=(place, replicated(self.mesh)))

    def _old_policy(self) -> dict[str, Any]:
        """The arguments of `make_train_step` about a policy that draws the images beside the trained one."""
        decay = self.method.old_decay
        if decay is None:
            return {}
        every = self.config.steps // self.config.online.rounds
        return {"old_every": every, "old_decay": functools.partial(decay, flatten(self.config))}

    def abstract_state(self) -> Any:
        """Return the shapes and shardings of the training state."""
        specs = self.pipeline.trained_specs
        params = abstract_params(specs, jnp.dtype(self.config.memory.masters), self.placement)
        averages = abstract_params(specs, jnp.float32, self.placement)  # moved by less than the last bit of bfloat16
        state = TrainState(
            step=jax.ShapeDtypeStruct((), jnp.int32),
            params=params,
            opt_state=jax.eval_shape(self.optimizer.init, params),
            ema=averages if self.config.ema.decay else {},
            running=jax.eval_shape(self._no_means),
            reference=jax.eval_shape(first_reference, averages) if self.config.moving_reference.every else None,
            old=averages if self.method.old_decay else None,
        )
        shardings = TrainState(
            step=replicated(self.mesh),
            params=self.placement.state(specs, state.params),
            opt_state=self.placement.state(specs, state.opt_state, over_data=True),
            ema=self.placement.state(specs, state.ema, over_data=True),
            running=jax.tree.map(lambda _: replicated(self.mesh), state.running),
            reference=self.placement.state(specs, state.reference),
            old=self.placement.state(specs, state.old),
        )
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)

    def abstract_batch(self) -> Any:
        """Return the shapes and shardings of a batch whose prompts have one caption each, with the largest images."""
        fields = flatten(self.config)
        B, K, M = self.config.data.batch_size, self.method.images_per_example(fields), 1
        shape = largest_shape(self.config, self.pipeline)
        cells = [side // self.pipeline.vae_factor for side in shape]
        split = batch_sharding(self.mesh)

        def array(dtype: DTypeLike, *shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((B, *shape), dtype, sharding=split)

        inputs: Raw | Cached = Raw(
            images_BKHWC=array(jnp.uint8, K, *shape, 3),
            mirrored_BK=array(jnp.bool_, K),
            token_ids_BML=array(jnp.int32, M, sum(self.pipeline.text_lengths)),
        )
        if self.config.data.encoded_views:
            channels = self.pipeline.denoiser.config.latent_channels
            context, pooled = self.pipeline.text_shapes
            inputs = Cached(
                array(jnp.bfloat16, K, *cells, 2 * channels),
                array(jnp.bfloat16, M, *context),
                array(jnp.bfloat16, M, *pooled),
            )
        return PreferenceBatch(
            inputs=inputs,
            size_cond_BK6=array(jnp.float32, K, 6),
            preference_BK=array(jnp.float32, K),
            valid_BK=array(jnp.bool_, K),
            weight_B=array(jnp.float32),
            index_B=array(jnp.int32),
            cell_weight_BKhw=array(jnp.float32, K, *cells) if self.config.data.masks else None,
        )

    def initial_state(self) -> TrainState:
        """Return the state before the first step: the denoiser or initial LoRA, and a new optimizer state."""
        place = jax.tree.map(lambda x: x.sharding, self.abstract_state())
        dtype = jnp.dtype(self.config.memory.masters)
        if self.adapter is not None:
            params = jax.device_put({name: x.astype(dtype) for name, x in self.adapter.items()}, place.params)
        else:
            params = self.pipeline.load(
                self.pipeline.denoiser_name, dtype=dtype, sharding=self.placement, only=place.params
            )
        return TrainState(
            step=jax.device_put(jnp.zeros((), jnp.int32), replicated(self.mesh)),
            params=params,
            opt_state=jax.jit(self.optimizer.init, out_shardings=place.opt_state)(params),
            ema=jax.device_put(_float32_copy(params), place.ema) if self.config.ema.decay else {},
            running=jax.device_put(self._no_means(), place.running),
            reference=jax.device_put(first_reference(_float32_copy(params)), place.reference)
            if self.config.moving_reference.every
            else None,
            old=jax.device_put(_float32_copy(params), place.old) if self.method.old_decay else None,
        )

    def _no_means(self) -> dict[str, tuple[jax.Array, jax.Array]]:
        names = [*self.objective.running, *([GRADIENT_NORM] if self.config.optimizer.skip_spikes else [])]
        return {name: (jnp.zeros(()), jnp.zeros(())) for name in names}


def _float32_copy(params: Params) -> Params:
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)  # a copy also where it is float32


MakeCompare = Callable[[ConfigDict, Pipeline, Placement, Objective], Compare]
"""Makes the function that computes, from a batch, what the loss reads."""


def on_pairs(config: ConfigDict, pipeline: Pipeline, placement: Placement, objective: Objective) -> Compare:
    """Return the comparison of denoising errors, over the images of a data set."""
    return make_compare(
        make_encode(pipeline, config.guidance),
        pipeline.denoise,
        pipeline.schedule,
        objective,
        config.seed,
        dropout=config.lora.dropout > 0,
        noise_offset=config.loss.noise_offset,
        input_perturbation=config.loss.input_perturbation,
        inversion_steps=config.loss.inversion_steps,
        shares=timestep_shares(config.loss, pipeline.schedule),
        constrain=batch_constraint(placement.mesh),
        gather=functools.partial(pipeline.gather, placement),
    )


def build(config: ConfigDict, derived: Derived, pipeline: Pipeline, make: MakeCompare = on_pairs) -> Experiment:
    """Return the experiment with its frozen weights loaded; UserError if the config names weights that do not fit."""
    composed = compose(config, derived, pipeline, make_placement(config), make)
    adapter = initial_adapter(config, pipeline) if pipeline.adapted_denoiser is not None else None
    frozen = load_frozen(config, pipeline, composed.placement, composed.frozen, adapter)
    return dataclasses.replace(composed, frozen=frozen, adapter=adapter)


def compose(
    config: ConfigDict, derived: Derived, pipeline: Pipeline, placement: Placement, make: MakeCompare = on_pairs
) -> Experiment:
    """Return the experiment without loading anything, as plans need it: its frozen weights are shapes and shardings."""
    objective = find_method(config.loss.name).objective(flatten(config))
    o = config.optimizer
    factors = rate_factors(o.rates, pipeline.trained_specs.keys())
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
        moments=o.moments,
        seed=config.seed,
    )
    return Experiment(
        config=config,
        derived=derived,
        placement=placement,
        pipeline=pipeline,
        objective=objective,
        optimizer=with_factors(optimizer, factors),
        learning_rate=learning_rate,
        rate_factors=factors,
        compare=on_mesh(placement.mesh, make(config, pipeline, placement, objective)),
        frozen=abstract_frozen(
            config,
            pipeline,
            placement,
            needs_reference=objective.needs_reference and not config.moving_reference.every,
        ),
    )


def make_encode(pipeline: Pipeline, guidance: float = TOLD_GUIDANCE) -> Encode:
    """Return the function that makes latents and conditioning of a batch: of images and captions, or of stored ones.

    A model that was distilled from guidance is told the scale `guidance`.
    """

    def encode(
        encoders: Mapping[str, Params], batch: PreferenceBatch, keys_B: jax.Array
    ) -> tuple[jax.Array, Conditioning]:
        inputs, size_cond_N6 = batch.inputs, fold(batch.size_cond_BK6)
        if isinstance(inputs, Cached):
            latents_BKhwC = sample_posterior(pipeline.vae, inputs.moments_BKhwC, keys_B)
            text = stored_text(pipeline, fold(inputs.context_BMLD), fold(inputs.pooled_BMP))
        else:
            assert isinstance(inputs, Raw), "batches of trajectories have a method of their own"
            latents_BKhwC = encode_images(
                pipeline.vae, encoders["vae"], inputs.images_BKHWC, inputs.mirrored_BK, keys_B
            )
            text = encode_text(pipeline, encoders, fold(inputs.token_ids_BML))
        return latents_BKhwC, condition(pipeline, text, size_cond_N6, guidance=guidance)

    def fold(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])  # not -1, which fails where a width is 0

    return encode
