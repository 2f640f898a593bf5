"""Plans online learning: the memory of training on drawn images and of drawing them, and the work of a round."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dpo_jax.batch import DrawnImages, Sampled
from dpo_jax.cli import replaced
from dpo_jax.models.attention import ATTENTION
from dpo_jax.models.kernels import choose
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.planning.estimate import (
    Plan,
    abstract_mesh,
    holdings_of,
    make_plan,
    measure_works,
    planned_mesh,
    trace_gradient,
)
from dpo_jax.planning.model_shapes import open_structure
from dpo_jax.planning.program import Program, peak_bytes
from dpo_jax.planning.sizes import held_bytes
from dpo_jax.planning.topology import Topology
from dpo_jax.rounds.config import RoundSizes, round_sizes
from dpo_jax.rounds.method import abstract_rows, learned_steps, on_rounds, sampler_table
from dpo_jax.rounds.rollout import make_rollout
from dpo_jax.sharding import Placement, rules_of
from dpo_jax.training.experiment import Experiment, compose


@dataclasses.dataclass(frozen=True)
class RoundPlan:
    """The estimate for one online config on one machine. What judges need is not counted."""

    step: Plan
    """Of an update, whose examples are prompts x timesteps with all their candidates."""
    sampling: dict[str, float]
    """Bytes per device while images are drawn, by kind."""
    sizes: RoundSizes
    sampling_seconds: float
    """Seconds that drawing the images of a round takes, at the assumed share of the peak rate."""

    @property
    def hbm_bytes(self) -> float:
        return max(self.step.hbm_bytes, sum(self.sampling.values()))

    @property
    def fits(self) -> bool:
        return self.step.fits and self.step.leaves_spare(sum(self.sampling.values()))

    @property
    def training_seconds(self) -> float:
        return self.sizes.updates * self.step.step_seconds

    def to_json(self) -> dict[str, Any]:
        return self.step.to_json() | {
            "sampling_gib_by_kind": {kind: size / 2**30 for kind, size in self.sampling.items()},
            "hbm_gib": self.hbm_bytes / 2**30,
            "fits": self.fits,
            "images_per_round": self.sizes.images,
            "evaluations_per_round": self.sizes.evaluations,
            "updates_per_round": self.sizes.updates,
            "sampling_seconds_per_round": self.sampling_seconds,
            "training_seconds_per_round": self.training_seconds,
        }


def plan_rounds(config: ConfigDict, topology: Topology, utilisation: float | None = None) -> RoundPlan:
    """Return the plan of an online config, without weights or devices."""
    pipeline = open_structure(config)
    config, sizes = with_sizes(config, pipeline, topology.num_devices)
    shape = planned_mesh(config, topology.num_devices)
    experiment = compose_planned(config, sizes, pipeline, _placement(config, shape))
    rows = config.data.batch_size * sizes.timesteps
    batch = held_bytes(abstract_rows(config, pipeline, 1)) * rows / (shape[0] * shape[1])
    holdings = holdings_of(config, experiment, shape, batch)
    platform = topology.device.platform
    work = measure_works(config, [platform], trace=functools.partial(_trace_row, sizes=sizes))[platform]
    pairs = sizes.derived.micro_batch_per_device
    step = make_plan(holdings, work, topology, batch_size=rows, pairs=pairs, utilisation=utilisation)

    parts = shape[0] * shape[1]
    prompts = -(-config.online.prompts_at_a_time // parts)
    program, weights = _trace_rollout(replaced(config, {"attention": "xla"}), sizes, prompts)
    kernel = ATTENTION if choose(config.attention, config.dtype, platform) != "xla" else None
    sampling = {
        "training state": sum(holdings.state_bytes),
        "trained weights, rounded": holdings.rounded,
        "weights gathered": holdings.gathered,
        "VAE and text encoders": holdings.encoders,
        f"drawing {prompts * config.online.candidates} images": peak_bytes(
            program, weights, by_library=platform != "tpu", fused=kernel
        ),
    }
    batches = -(-config.online.prompts_per_round // (prompts * parts))
    seconds = batches * program.flops() / (topology.device.tflops * 1e12 * step.utilisation)
    return RoundPlan(step, sampling, sizes, seconds)


def with_sizes(config: ConfigDict, pipeline: Pipeline, num_devices: int) -> tuple[ConfigDict, RoundSizes]:
    """Return the config with the number of its steps, and the sizes of its rounds; raises as `round_sizes`."""
    steps_S = learned_steps(config, sampler_table(config, pipeline))
    sizes = round_sizes(config, steps_S, device_count=num_devices, process_count=1)
    return replaced(config, {"steps": config.online.rounds * sizes.updates}), sizes


def compose_planned(config: ConfigDict, sizes: RoundSizes, pipeline: Pipeline, placement: Placement) -> Experiment:
    """Return the experiment of an online config, whose model need not be there."""
    return compose(
        config, sizes.derived, pipeline, placement, functools.partial(on_rounds, empty_1L=_no_caption(pipeline))
    )


def _placement(config: ConfigDict, shape: tuple[int, int, int]) -> Placement:
    return Placement(abstract_mesh(shape), rules_of(config.mesh.rules))


def _no_caption(pipeline: Pipeline) -> np.ndarray:
    """Return stand-ins for the tokens of an empty caption: the structure of a published model has no tokenizers."""
    return np.zeros((1, sum(pipeline.text_lengths)), np.int32)


def _trace_row(config: ConfigDict, sizes: RoundSizes) -> tuple[Program, list[int]]:
    """Return the program of the gradient of one prompt at one timestep, and which of its inputs are weights."""
    pipeline = open_structure(config)
    experiment = compose_planned(config, sizes, pipeline, _placement(config, (1, 1, 1)))
    return trace_gradient(experiment, abstract_rows(config, pipeline, 1))


def _trace_rollout(config: ConfigDict, sizes: RoundSizes, prompts: int) -> tuple[Program, list[int]]:
    """Return the program that draws the images of so many prompts, and which of its inputs are weights."""
    pipeline = open_structure(config)
    experiment = compose_planned(config, sizes, pipeline, _placement(config, (1, 1, 1)))
    rollout = make_rollout(config, pipeline, experiment.placement, _no_caption(pipeline))
    state = experiment.abstract_state()
    rows = abstract_rows(config, pipeline, prompts).inputs
    assert isinstance(rows, Sampled | DrawnImages)
    text = jax.tree.map(lambda x_BM: jax.ShapeDtypeStruct((prompts, *x_BM.shape[2:]), x_BM.dtype), rows.text)
    number_B = jax.ShapeDtypeStruct((prompts,), jnp.int32)
    judge: dict[str, Any] = {}
    window_S = jax.ShapeDtypeStruct((config.online.window,), jnp.int32) if config.online.window else None
    traced = jax.make_jaxpr(rollout)(state.drawing, experiment.frozen, judge, text, number_B, window_S)
    program = Program(traced)
    return program, program.inputs[: len(jax.tree.leaves((state.drawing, experiment.frozen)))]
