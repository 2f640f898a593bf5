"""Sampling: trajectories with their log-probabilities and the images that they lead to, in one jitted function.

Axes: B prompts, K candidates of a prompt, S learned steps of the sampler, J shared or own beginnings of a step (1 or
K), L tokens, H x W pixels, h x w latent cells, C channels.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dpo_jax.batch import EncodedText, Transitions
from dpo_jax.cli import flatten
from dpo_jax.diffusion.guidance import classifier_free_guidance
from dpo_jax.diffusion.steps import Denoiser, sample, starting_latents
from dpo_jax.diffusion.trajectories import (
    branch,
    candidate_keys,
    explore,
    sample_trajectory,
    see_images,
    see_log_ratios,
    transitions_at,
)
from dpo_jax.encode.images import decode_latents
from dpo_jax.encode.text import make_conditionings
from dpo_jax.errors import UserError
from dpo_jax.methods import find_method
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.objectives.denoising import per_candidate
from dpo_jax.rounds.config import first_branch
from dpo_jax.rounds.judges import load_latent_judge
from dpo_jax.rounds.method import learned_steps, plain_table, sampler_table
from dpo_jax.rounds.prompt_text import TextOf
from dpo_jax.rounds.window import window_steps, with_window
from dpo_jax.sharding import Placement, batch_constraint, batch_parts, batch_sharding, on_mesh, replicated
from dpo_jax.training.model import load_tokenizers_of
from dpo_jax.training.step import Frozen
from dpo_jax.weights.layout import Params


class StoredTrajectory(NamedTuple):
    """How one prompt was sampled; on the host, or inside jit of a batch, [B, ...]."""

    x_SJhwC: Any
    next_x_SKhwC: Any
    log_prob_SK: Any
    mean_SJhwC: Any = None
    """None if the method does not read it."""


class StoredImages(NamedTuple):
    """The images of one prompt, as clean latents, for a method that does not read how they were sampled."""

    x0_KhwC: Any


class Drawn(NamedTuple):
    """What one call sampled."""

    trajectories: dict[int, StoredTrajectory | StoredImages]
    """By position in the call: those of the prompts whose rows are on this process."""
    images_BKHWC: np.ndarray
    """uint8, on every process; of branching one a prompt."""
    seen_BSK: np.ndarray | None
    """With branching, what each candidate of each step predicts: uint8 images [H, W, C], or its reward in latents,
    float32."""


class Rollout:
    """Samples prompts. The images of a prompt depend only on its number and the weights, up to rounding.

    Args:
        config: of the experiment.
        pipeline: the model's structure.
        placement: where weights lie; every batch is split over its mesh.
        text_of: what the rollout reads of captions.

    Raises ValueError or FileNotFoundError where the config names a judge in latents that is none.
    """

    def __init__(self, config: ConfigDict, pipeline: Pipeline, placement: Placement, text_of: TextOf):
        self._config, self._mesh, self._text_of = config, placement.mesh, text_of
        parts = batch_parts(placement.mesh)
        self.batch_size = -(-config.online.prompts_at_a_time // parts) * parts
        """Number of prompts that are sampled at a time."""
        self._latent_judge = load_latent_judge(config, pipeline, placement)
        self._rollout = make_rollout(config, pipeline, placement, load_tokenizers_of(pipeline)([""]))

    def __call__(
        self,
        params: Params,
        frozen: Frozen,
        captions: Sequence[str],
        numbers: Sequence[int],
        round_number: int | None = None,
    ) -> Callable[[], Drawn]:
        """Begin to sample up to `batch_size` prompts; all randomness of a prompt follows from its number.

        With `online.window`, only the steps of the round's window add noise; none does without a `round_number`.

        Returns:
            A function that waits for the images; UserError there if they are not finite.
        """
        count = len(captions)
        padded = [i % count for i in range(self.batch_size)]
        rows = self._text_of([captions[i] for i in padded]), np.array([numbers[i] for i in padded], np.int32)
        given = jax.device_put(rows, batch_sharding(self._mesh))
        window_S = None
        if self._config.online.window:
            outside_S = np.full(self._config.online.window, self._config.online.sampling_steps, np.int32)
            steps_S = outside_S if round_number is None else window_steps(self._config, round_number)
            window_S = jax.device_put(steps_S, replicated(self._mesh))
        results = self._rollout(params, frozen, self._latent_judge, *given, window_S)
        return functools.partial(self._fetch, captions, *results)

    def _fetch(
        self,
        captions: Sequence[str],
        stored: StoredTrajectory | StoredImages,
        images_BKHWC: jax.Array,
        seen_BSK: jax.Array | None,
        finite_B: jax.Array,
    ) -> Drawn:
        count = len(captions)
        black = np.flatnonzero(~jax.device_get(finite_B)[:count])
        if black.size:
            raise UserError(
                f"images of {black.size} prompts, the first {captions[black[0]]!r}, came out black: their numbers are "
                "not finite (NaN or infinity); try dtype and vae_dtype float32, or a lower optimizer.learning_rate"
            )
        local = zip(*(_rows(x) for x in stored if x is not None), strict=True)
        trajectories = {rows[0][0]: type(stored)(*(x for _, x in rows)) for rows in local if rows[0][0] < count}
        images, seen = jax.device_get((images_BKHWC, seen_BSK))
        return Drawn(trajectories, images[:count], None if seen is None else seen[:count])


def make_rollout(
    config: ConfigDict, pipeline: Pipeline, placement: Placement, negative_1L: np.ndarray
) -> jax.stages.Wrapped:
    """`(params, frozen, latent_judge, text, number_B, window_S) -> (stored, images, seen, finite_B)`, jitted.

    `text` are token ids [B, L] or features [B, ...]. `stored` has the arrays of a `StoredTrajectory` or `StoredImages`
    for each prompt, [B, ...]; the rest is as in `Drawn`; `finite_B` tells whether all numbers of a prompt's images are
    finite. `window_S` are the steps that add noise; None for those of the sampler.
    """
    online, resolution, mesh = config.online, config.data.resolution, placement.mesh
    table, K = sampler_table(config, pipeline), online.candidates
    method = find_method(config.loss.name)
    reads_transitions, reads_old_means = method.reads_transitions, method.reads_old_means(flatten(config))
    outside = plain_table(config, pipeline) if online.window else table
    steps_S = learned_steps(config, table)
    cells = resolution // pipeline.vae_factor
    latent_shape = (cells, cells, pipeline.denoiser.config.latent_channels)
    conditionings = make_conditionings(pipeline, negative_1L, online.guidance)
    size_cond_16 = jnp.array([[resolution, resolution, 0, 0, resolution, resolution]], jnp.float32)
    split, gather = batch_constraint(mesh), functools.partial(pipeline.gather, placement)

    def rollout(
        params: Params,
        frozen: Frozen,
        latent_judge: dict[str, Params],
        text: jax.Array | EncodedText,
        number_B: jax.Array,
        window_S: jax.Array | None,
    ) -> tuple[StoredTrajectory | StoredImages, jax.Array, jax.Array | None, jax.Array]:
        B = len(number_B)
        denoiser = gather("denoiser", frozen.policy(params))
        encoders = {name: gather(name, weights) for name, weights in frozen.encoders.items()}
        both = split(conditionings(encoders, text, jnp.tile(size_cond_16, (B, 1)), negative_text=frozen.negative_text))
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(config.seed), number_B)
        noise_keys_B, step_keys_B = (jax.vmap(jax.random.fold_in, (0, None))(keys_B, i) for i in range(2))
        x_BhwC = starting_latents(table, jax.vmap(lambda key: jax.random.normal(key, latent_shape))(noise_keys_B))

        def guided(rows: int) -> Denoiser:
            conditioning, unconditional = split(per_candidate(both, B, rows // B))
            bound = functools.partial(pipeline.denoise, denoiser)
            scale = pipeline.guidance_scale(online.guidance)
            return classifier_free_guidance(bound, conditioning, unconditional, scale)

        def plain(weights: Params) -> Denoiser:
            whole = gather("denoiser", weights)
            return lambda x_BhwC, t_B: pipeline.denoise(whole, x_BhwC, t_B, both[0])

        def decoded(latents_BKhwC: jax.Array) -> tuple[jax.Array, jax.Array]:
            latents_NHWC = latents_BKhwC.reshape(-1, *latent_shape)
            images_NHWC, finite_N = decode_latents(pipeline.vae, encoders["vae"], latents_NHWC)
            shape_BK = latents_BKhwC.shape[:2]
            return images_NHWC.reshape(*shape_BK, *images_NHWC.shape[1:]), finite_N.reshape(shape_BK).all(axis=1)

        if not reads_transitions:
            # Without noise in the steps, candidates differ by the noise that they begin with.
            noise_keys_N, step_keys_N = candidate_keys(noise_keys_B, K), candidate_keys(step_keys_B, K)
            noise_NhwC = jax.vmap(lambda key: jax.random.normal(key, latent_shape))(noise_keys_N)
            x0_NhwC = sample(guided(B * K), table, starting_latents(table, noise_NhwC), step_keys_N)
            x0_BKhwC = x0_NhwC.reshape(B, K, *latent_shape)
            images_BKHWC, finite_B = decoded(x0_BKhwC)
            return StoredImages(x0_BKhwC), images_BKHWC, None, finite_B

        if not online.branching:
            taken, kept_S = table, jnp.asarray(steps_S)
            if window_S is not None:
                is_noisy_S = jnp.isin(jnp.arange(online.sampling_steps), window_S)
                taken, kept_S = with_window(table, outside, is_noisy_S), window_S
            trajectory = sample_trajectory(guided(B * K), taken, *branch(x_BhwC, step_keys_B, K))
            transitions = jax.vmap(lambda step: transitions_at(trajectory, jnp.full(B, step)))(kept_S)
            x0_BKhwC = trajectory.latents_VNHWC[-1].reshape(B, K, *latent_shape)
            images_BKHWC, finite_B = decoded(x0_BKhwC)
            return stored(transitions), images_BKHWC, None, finite_B

        look = see_images(guided(B * K))
        if latent_judge:
            look = see_log_ratios(plain(latent_judge["tuned"]), plain(latent_judge["reference"]))
        found = explore(guided(B), table, x_BhwC, step_keys_B, K, look, first_branch(config))
        kept = jax.tree.map(lambda x_SB: x_SB[steps_S], found._replace(x0_BHWC=None))
        step_SB = jnp.broadcast_to(jnp.asarray(steps_S)[:, None], (len(steps_S), B))
        x_SB1hwC, mean_SB1hwC = kept.x_SBHWC[:, :, None], kept.mean_SBHWC[:, :, None]
        transitions = Transitions(x_SB1hwC, kept.next_x_SBKHWC, step_SB, kept.log_prob_SBK, mean_SB1hwC)
        images_BKHWC, finite_B = decoded(found.x0_BHWC[:, None])
        seen_SBK = kept.seen_SBK
        if not latent_judge:
            seen_SBK, finite_SB = jax.lax.map(decoded, seen_SBK)
            finite_B &= finite_SB.all(axis=0)
        return stored(transitions), images_BKHWC, prompts_first(seen_SBK), finite_B

    def stored(transitions_S: Transitions) -> StoredTrajectory:
        first = prompts_first(transitions_S)
        mean = first.old_mean_BKHWC if reads_old_means else None
        return StoredTrajectory(first.x_BKHWC, first.next_x_BKHWC, first.log_prob_BK, mean)

    def prompts_first(tree: Any) -> Any:
        return jax.tree.map(lambda x_SB: jnp.swapaxes(x_SB, 0, 1), tree)

    places = batch_sharding(mesh), replicated(mesh), replicated(mesh), replicated(mesh)
    return jax.jit(on_mesh(mesh, rollout), out_shardings=places)


def _rows(x_B: jax.Array) -> list[tuple[int, np.ndarray]]:
    """The rows of a batch that this process is to keep: of copies on several devices one, wherever it is."""
    rows: dict[int, Any] = {}
    for shard in x_B.addressable_shards:
        if shard.replica_id == 0:
            start = shard.index[0].start or 0
            rows |= {start + i: row for i, row in enumerate(np.asarray(shard.data))}
    return sorted(rows.items())
