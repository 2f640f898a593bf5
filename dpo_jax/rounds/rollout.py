"""Sampling: trajectories with their log-probabilities and the images that they lead to, in one jitted function.

Axes: B prompts, K candidates of a prompt, S random steps of the sampler, J shared or own beginnings of a step (1 or K),
E text encoders, L tokens, H x W pixels, h x w latent cells, C channels.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dpo_jax.batch import Conditioning, Transitions
from dpo_jax.diffusion.samplers import classifier_free_guidance, starting_latents
from dpo_jax.diffusion.trajectories import branch, explore, random_steps, sample_trajectory, transitions_at
from dpo_jax.encode.images import decode_latents
from dpo_jax.encode.text import make_conditionings
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.objectives.denoising import per_candidate
from dpo_jax.rounds.method import sampler_table
from dpo_jax.sharding import Placement, batch_constraint, batch_parts, batch_sharding, on_mesh, replicated
from dpo_jax.training.model import load_tokenizers_of
from dpo_jax.training.step import Frozen
from dpo_jax.weights.layout import Params


class Way(NamedTuple):
    """How one prompt was sampled, on the host."""

    x_SJhwC: np.ndarray
    next_x_SKhwC: np.ndarray
    log_prob_SK: np.ndarray


class Drawn(NamedTuple):
    """What one call sampled."""

    ways: dict[int, Way]
    """By position in the call: those of the prompts whose rows are on this process."""
    images_BKHWC: np.ndarray
    """uint8, on every process; of branching one a prompt."""
    steps_BSKHWC: np.ndarray | None
    """uint8: of branching what each candidate of each step was about to become."""


class Rollout:
    """Samples prompts. What becomes of a prompt depends on its number, the weights and nothing else, but for rounding.

    Args:
        config: of the experiment.
        pipeline: the model's structure.
        placement: where weights lie; every batch is split over its mesh.
    """

    def __init__(self, config: ConfigDict, pipeline: Pipeline, placement: Placement):
        online, resolution, mesh = config.online, config.data.resolution, placement.mesh
        self._mesh, self._tokenizers = mesh, load_tokenizers_of(pipeline)
        self.batch_size = -(-online.prompts_at_a_time // batch_parts(mesh)) * batch_parts(mesh)
        """Prompts sampled at a time."""
        table, K = sampler_table(config, pipeline), online.candidates
        steps_S = random_steps(table)
        cells = resolution // pipeline.vae_factor
        latent_shape = (cells, cells, pipeline.unet.config.in_channels)
        conditionings = make_conditionings(pipeline, self._tokenizers([""]), online.guidance)
        size_cond_16 = jnp.array([[resolution, resolution, 0, 0, resolution, resolution]], jnp.float32)
        split, gather = batch_constraint(mesh), functools.partial(pipeline.gather, placement)

        def denoiser(unet: Params, both: tuple[Conditioning, Conditioning | None]) -> Callable[..., jax.Array]:
            return classifier_free_guidance(lambda x, t, c: pipeline.denoise(unet, x, t, c), *both, online.guidance)

        def rollout(
            params: Params, frozen: Frozen, token_ids_BEL: jax.Array, number_B: jax.Array
        ) -> tuple[Transitions, jax.Array, jax.Array | None]:
            B = len(number_B)
            unet = gather("unet", frozen.get("base", {}) | params)
            encoders = {name: gather(name, frozen[name]) for name in frozen if name not in ("base", "reference")}
            both = split(conditionings(encoders, token_ids_BEL, jnp.tile(size_cond_16, (B, 1))))
            each = split(per_candidate(both, B, K))
            keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(config.seed), number_B)
            noise_keys_B, step_keys_B = (jax.vmap(jax.random.fold_in, (0, None))(keys_B, i) for i in range(2))
            noise_BhwC = jax.vmap(lambda key: jax.random.normal(key, latent_shape))(noise_keys_B)
            x_BhwC = starting_latents(table, noise_BhwC)
            if online.branching:
                found = explore(denoiser(unet, both), denoiser(unet, each), table, x_BhwC, step_keys_B, K)
                step_SB = jnp.broadcast_to(jnp.asarray(steps_S)[:, None], (len(steps_S), B))
                x_SB1hwC = found.x_SBHWC[steps_S][:, :, None]
                transitions = Transitions(x_SB1hwC, found.next_x_SBKHWC[steps_S], step_SB, found.log_prob_SBK[steps_S])
                x0_BKhwC = found.x0_BHWC[:, None]
                seen_SBKHWC = jax.lax.map(
                    lambda x_BKhwC: decoded(encoders["vae"], x_BKhwC), found.predicted_x0_SBKHWC[steps_S]
                )
                steps_BSKHWC = jnp.swapaxes(seen_SBKHWC, 0, 1)
            else:
                start = branch(x_BhwC, step_keys_B, K)
                trajectory = sample_trajectory(denoiser(unet, each), table, *start)
                transitions = jax.vmap(lambda step: transitions_at(trajectory, jnp.full(B, step)))(jnp.asarray(steps_S))
                x0_BKhwC = trajectory.latents_VNHWC[-1].reshape(B, K, *latent_shape)
                steps_BSKHWC = None
            of_prompts = jax.tree.map(lambda x_SB: jnp.swapaxes(x_SB, 0, 1), transitions)
            return of_prompts, decoded(encoders["vae"], x0_BKhwC), steps_BSKHWC

        def decoded(vae: Params, latents_BKhwC: jax.Array) -> jax.Array:
            B, K = latents_BKhwC.shape[:2]
            images_NHWC = decode_latents(pipeline.vae, vae, latents_BKhwC.reshape(B * K, *latents_BKhwC.shape[2:]))
            return images_NHWC.reshape(B, K, *images_NHWC.shape[1:])

        places = batch_sharding(mesh), replicated(mesh), replicated(mesh)
        self._rollout = jax.jit(on_mesh(mesh, rollout), out_shardings=places)

    def __call__(self, params: Params, frozen: Frozen, captions: Sequence[str], numbers: Sequence[int]) -> Drawn:
        """Up to `batch_size` prompts, each with a number of its own that all randomness follows from."""
        padded = [i % len(captions) for i in range(self.batch_size)]
        rows = self._tokenizers([captions[i] for i in padded]), np.array([numbers[i] for i in padded], np.int32)
        given = jax.device_put(rows, batch_sharding(self._mesh))
        transitions, images_BKHWC, steps_BSKHWC = self._rollout(params, frozen, *given)
        local = zip(*(_rows(x) for x in (transitions[0], transitions[1], transitions[3])), strict=True)
        ways = {row: Way(x, next_x, log_prob) for (row, x), (_, next_x), (_, log_prob) in local if row < len(captions)}
        images_BKHWC, steps_BSKHWC = jax.device_get((images_BKHWC, steps_BSKHWC))
        seen = None if steps_BSKHWC is None else steps_BSKHWC[: len(captions)]
        return Drawn(ways, images_BKHWC[: len(captions)], seen)


def _rows(x_B: jax.Array) -> list[tuple[int, np.ndarray]]:
    """The rows of a batch that this process is to keep: of copies on several devices one, wherever it is."""
    rows: dict[int, Any] = {}
    for shard in x_B.addressable_shards:
        if shard.replica_id == 0:
            start = shard.index[0].start or 0
            rows |= {start + i: row for i, row in enumerate(np.asarray(shard.data))}
    return sorted(rows.items())
