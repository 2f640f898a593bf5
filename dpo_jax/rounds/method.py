"""The objective of an online experiment, and the log-ratios of the transitions of sampled images that it reads."""

import functools

import jax
import numpy as np
from ml_collections import ConfigDict

from dpo_jax.batch import LogRatios, PreferenceBatch, Sampled
from dpo_jax.diffusion.samplers import SamplerTable, make_table, with_guidance
from dpo_jax.diffusion.trajectories import random_steps
from dpo_jax.encode.text import make_conditionings
from dpo_jax.errors import UserError
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.objectives.losses import d3po, ddpo, dpok
from dpo_jax.objectives.transitions import (
    beyond_log_ratio,
    beyond_ratio_to_sampled,
    transition_log_ratios,
    transition_metrics,
)
from dpo_jax.rounds.config import first_branch, needs_reference
from dpo_jax.sharding import Placement, batch_constraint
from dpo_jax.training.model import load_tokenizers_of
from dpo_jax.training.step import ComputeLogRatios, Frozen, Objective
from dpo_jax.weights.layout import Params


def make_objective(config: ConfigDict) -> Objective:
    """Return the loss that the config names, with its hyperparameters."""
    loss = config.loss
    gradient = {"clip": loss.clip, "advantage_clip": loss.advantage_clip}
    losses = {
        "d3po": functools.partial(d3po, beta=loss.beta),
        "ddpo": functools.partial(ddpo, **gradient),
        "dpok": functools.partial(dpok, **gradient, kl_weight=loss.kl_weight),
    }
    is_clipped = functools.partial(beyond_ratio_to_sampled, clip=loss.clip)
    if loss.name == "d3po":
        is_clipped = functools.partial(beyond_log_ratio, clip=config.online.clip)
    metrics = functools.partial(transition_metrics, is_clipped=is_clipped)
    return Objective(losses[loss.name], needs_reference=needs_reference(config), metrics=metrics)


def sampler_table(config: ConfigDict, pipeline: Pipeline) -> SamplerTable:
    """Return the table of the sampler that draws a round's images; ValueError for a sampler without noise."""
    online = config.online
    eta = online.eta if online.sampler == "ddim" else 0.0
    table = make_table(online.sampler, pipeline.sampling_schedule, online.sampling_steps, eta=eta)
    random_steps(table)
    return table


def learned_steps(config: ConfigDict, table: SamplerTable) -> np.ndarray:
    """Return the rows of the table whose transitions can be trained on: random, and not before candidates part."""
    steps_S = random_steps(table)
    kept_S = steps_S[steps_S >= first_branch(config)]
    if not len(kept_S):
        raise UserError(
            f"config.online.branch_after={config.online.branch_after} with {config.online.sampling_steps} steps leaves "
            "no step to train on. Set a smaller share"
        )
    return kept_S


def on_trajectories(config: ConfigDict, pipeline: Pipeline, placement: Placement) -> tuple[Objective, ComputeLogRatios]:
    """Return a loss of log-probabilities, over images that the model drew itself; the counterpart of `on_pairs`."""
    objective = make_objective(config)
    guidance = config.online.guidance if config.online.train_guided else 1.0
    table = sampler_table(config, pipeline)
    conditionings = make_conditionings(pipeline, load_tokenizers_of(pipeline)([""]), guidance)
    denoise = with_guidance(pipeline.denoise, guidance)
    constrain, gather = batch_constraint(placement.mesh), functools.partial(pipeline.gather, placement)

    def score(
        params: Params, frozen: Frozen, batch: PreferenceBatch, step: jax.Array, training: bool = False
    ) -> LogRatios:
        sampled = batch.inputs
        assert isinstance(sampled, Sampled)
        encoders = {name: gather(name, weights) for name, weights in frozen.encoders.items() if name != "vae"}
        conditioning = conditionings(encoders, sampled.token_ids_BMEL[:, 0], batch.size_cond_BK6[:, 0])
        transitions, conditioning = constrain((sampled.transitions, conditioning))
        return transition_log_ratios(
            denoise,
            gather("unet", frozen.policy(params)),
            gather("unet", frozen.whole_reference()) if objective.needs_reference else None,
            table,
            transitions,
            conditioning,
            clip=config.online.clip,
            advantage_BK=sampled.advantage_BK,
        )

    return objective, score
