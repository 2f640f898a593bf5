"""What a loss reads of images that the model itself drew: of the steps that drew them, or of the images alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from dpo_jax.batch import DrawnImages, EncodedText, LossInputs, PreferenceBatch, Sampled, Transitions
from dpo_jax.cli import flatten
from dpo_jax.diffusion.guidance import with_guidance
from dpo_jax.diffusion.samplers import FLOW_SAMPLERS, make_table
from dpo_jax.diffusion.steps import SamplerTable
from dpo_jax.diffusion.trajectories import random_steps
from dpo_jax.encode.text import make_conditionings
from dpo_jax.errors import UserError
from dpo_jax.methods import find_method
from dpo_jax.methods.method import Objective
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.objectives.denoising import keys_for
from dpo_jax.objectives.drawn import compare_predictions
from dpo_jax.objectives.transitions import compare_transitions
from dpo_jax.rounds.config import first_branch
from dpo_jax.rounds.window import PLAIN_SAMPLERS, window_steps
from dpo_jax.sampling.generate import latent_sizes
from dpo_jax.sharding import Placement, batch_constraint
from dpo_jax.training.model import load_tokenizers_of, reads_encoded_prompts
from dpo_jax.training.step import Compare, Frozen, with_batch
from dpo_jax.weights.layout import Params


def sampler_table(config: ConfigDict, pipeline: Pipeline) -> SamplerTable:
    """Return the table of the sampler that draws a round's images.

    Raises:
        UserError: the sampler is not one for this model, or adds no noise although the method learns from its steps.
    """
    online, is_flow = config.online, pipeline.sampling_schedule.is_flow
    reads_transitions = find_method(config.loss.name).reads_transitions
    if is_flow != (online.sampler in FLOW_SAMPLERS):
        of_flow = "flow_cps or flow_sde" if reads_transitions else "flow_euler"
        kind, choice = ("a flow model", of_flow) if is_flow else ("not a flow model", "ddim")
        raise UserError(
            f"config.online.sampler={online.sampler} cannot sample {config.model}, which is {kind}. Set online.sampler "
            f"to {choice}"
        )
    table = make_table(
        online.sampler,
        pipeline.sampling_schedule,
        online.sampling_steps,
        eta=online.eta if online.sampler == "ddim" else 0.0,
        noise_level=online.noise_level,
        image_tokens=latent_sizes(pipeline, config.data.resolution)[1],
    )
    if reads_transitions:
        random_steps(table)
    return table


def plain_table(config: ConfigDict, pipeline: Pipeline) -> SamplerTable:
    """Return the table of the steps outside of the window, which add no noise.

    Raises:
        UserError: the scheduler's file has them add noise.
    """
    online = config.online
    image_tokens = latent_sizes(pipeline, config.data.resolution)[1]
    sampler = PLAIN_SAMPLERS[online.sampler]
    table = make_table(sampler, pipeline.sampling_schedule, online.sampling_steps, image_tokens=image_tokens)
    if np.any(table.steps.d):
        raise UserError(
            f"config.online.window={online.window}, but the model's scheduler has stochastic_sampling=True, so all "
            "steps add noise. Set window to 0"
        )
    return table


def learned_steps(config: ConfigDict, table: SamplerTable) -> np.ndarray:
    """Return the rows of the table that can be trained on; with a window, those of the first round.

    These are the random ones, and not those before candidates part; or, for a method that adds noise to the drawn
    images, all with noise. The last step of flow_sde is not trained on, as in Flow-GRPO's released code: it has so
    little noise that its log-probability would outweigh those of all others.
    """
    if not find_method(config.loss.name).reads_transitions:
        return np.flatnonzero(table.steps.noise).astype(np.int32)
    if config.online.window:
        return window_steps(config, 0)
    steps_S = random_steps(table)
    kept_S = steps_S[steps_S >= first_branch(config)]
    if config.online.sampler == "flow_sde":
        kept_S = kept_S[kept_S < len(table.steps.t) - 1]
    if not len(kept_S):
        raise UserError(
            f"config.online.branch_after={config.online.branch_after} with {config.online.sampling_steps} steps leaves "
            "no step to train on. Set a smaller share, or more steps"
        )
    return kept_S


def on_rounds(
    config: ConfigDict,
    pipeline: Pipeline,
    placement: Placement,
    objective: Objective,
    *,
    empty_1L: np.ndarray | None = None,
) -> Compare:
    """Return what the config's method compares, over images that the model drew; the counterpart of `on_pairs`.

    `empty_1L` are the tokens of the empty caption, by default those of the model's tokenizers.
    """
    online, seed = config.online, config.seed
    method, guidance = find_method(config.loss.name), online.guidance if online.train_guided else 1.0
    table = sampler_table(config, pipeline)
    empty_1L = load_tokenizers_of(pipeline)([""]) if empty_1L is None else empty_1L
    conditionings = make_conditionings(pipeline, empty_1L, guidance)
    denoise = with_guidance(pipeline.denoise, pipeline.guidance_scale(guidance))
    constrain, gather = batch_constraint(placement.mesh), functools.partial(pipeline.gather, placement)

    def compare(
        params: Params, frozen: Frozen, batch: PreferenceBatch, step: jax.Array, training: bool = False
    ) -> LossInputs:
        drawn = batch.inputs
        assert isinstance(drawn, Sampled | DrawnImages)
        encoders = {name: gather(name, weights) for name, weights in frozen.encoders.items() if name != "vae"}
        text = jax.tree.map(lambda x_BM: x_BM[:, 0], drawn.text)
        conditioning = constrain(
            conditionings(encoders, text, batch.size_cond_BK6[:, 0], negative_text=frozen.negative_text)
        )
        policy = gather("denoiser", frozen.policy(params))
        reference = gather("denoiser", frozen.whole_reference()) if objective.needs_reference else None
        if isinstance(drawn, Sampled):
            transitions = constrain(drawn.transitions)
            inputs = compare_transitions(denoise, policy, reference, table, transitions, conditioning, clip=online.clip)
        else:
            keys_B = keys_for(jax.random.fold_in(jax.random.key(seed), step), batch.index_B)
            noise_BKhwC = draw_noise(keys_B, drawn.x0_BKhwC, is_shared=method.shares_noise)
            x0_BKhwC, noise_BKhwC = constrain((drawn.x0_BKhwC, noise_BKhwC))
            old = gather("denoiser", frozen.whole_old())
            inputs = compare_predictions(
                denoise, policy, old, reference, table, x0_BKhwC, noise_BKhwC, drawn.step_B, conditioning
            )
        return with_batch(inputs, batch)._replace(advantage_BK=drawn.advantage_BK)

    return compare


def draw_noise(keys_B: jax.Array, x0_BKhwC: jax.Array, *, is_shared: bool) -> jax.Array:
    """Return noise for each image, or the same for all candidates of a prompt, by the prompt's key alone."""
    _, K, *latent_shape = x0_BKhwC.shape
    shape = (1 if is_shared else K, *latent_shape)
    noise = jax.vmap(lambda key: jax.random.normal(key, shape, x0_BKhwC.dtype))(keys_B)
    return jnp.broadcast_to(noise, x0_BKhwC.shape)


def abstract_rows(config: ConfigDict, pipeline: Pipeline, rows: int) -> PreferenceBatch:
    """Return the shapes of a batch of this many rows, one timestep of a prompt each."""
    K, cells = config.online.candidates, config.data.resolution // pipeline.vae_factor
    latent_shape = (cells, cells, pipeline.denoiser.config.latent_channels)

    def array(dtype: DTypeLike, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    advantage_BK = array(jnp.float32, K)
    text: Any = array(jnp.int32, 1, sum(pipeline.text_lengths))
    if reads_encoded_prompts(config):
        text = EncodedText(*(array(pipeline.dtype, 1, *shape) for shape in pipeline.text_shapes))
    x_BKhwC, step_B = array(jnp.float32, K, *latent_shape), array(jnp.int32)
    inputs: Sampled | DrawnImages = DrawnImages(x_BKhwC, step_B, text, advantage_BK)
    method = find_method(config.loss.name)
    if method.reads_transitions:
        before_BJhwC = array(jnp.float32, 1 if config.online.branching else K, *latent_shape)
        mean_BJhwC = before_BJhwC if method.reads_old_means(flatten(config)) else None
        transitions = Transitions(before_BJhwC, x_BKhwC, step_B, array(jnp.float32, K), mean_BJhwC)
        inputs = Sampled(transitions, text, advantage_BK)
    return PreferenceBatch(
        inputs=inputs,
        size_cond_BK6=array(jnp.float32, K, 6),
        preference_BK=array(jnp.float32, K, max(1, len(config.online.judges))),
        valid_BK=array(jnp.bool_, K),
        weight_B=array(jnp.float32),
        index_B=array(jnp.int32),
    )
