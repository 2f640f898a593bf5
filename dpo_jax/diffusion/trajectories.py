"""Sampling that records trajectories, so that training can make them more or less likely (arXiv 2305.13301).

A step of a sampler that adds noise draws `x' ~ N(mean, d^2)`, where only the mean depends on the network. A stored
transition x -> x' therefore has a probability with any weights. Its log-probability here is the MEAN of the log-density
over H, W and C, as in the released code of DDPO, DPOK and D3PO; the sum would be H * W * C times larger.

A step with d = 0 (the last step of DDIM, if it ends in the image itself) has no density. Its log-probability is 0 with
any weights, which gives a ratio of 1 and no gradient; `random_steps` returns the other steps.

Axes: N images, B prompts, K candidates of a prompt with N = B * K, H x W latent cells, C channels, S sampling steps,
V = S + 1 latents of a trajectory.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from dpo_jax.batch import Transitions
from dpo_jax.diffusion.steps import Denoiser, SamplerTable, Steps, adds_noise, step_mean, step_noise, walk
from dpo_jax.errors import UserError


class Trajectory(NamedTuple):
    """The latents and log-probabilities of sampled images, in float32 or wider."""

    latents_VNHWC: Float[Any, "V N H W C"]
    """Latents from the noise to the clean latents; step s leads from row s to row s + 1."""
    log_prob_SN: Float[Any, "S N"]
    """Log-probability of each step with the weights that sampled; 0 for a step without noise."""
    mean_SNHWC: Float[Any, "S N H W C"] | None = None
    """Mean of the latents after each step, which the noise is added to."""


def random_steps(table: SamplerTable) -> Int[np.ndarray, " _"]:
    """Return the steps whose transitions have a probability, int32 in order; UserError if there are none."""
    (random,) = np.nonzero(table.steps.d)
    if not len(random):
        raise UserError(
            "this sampler adds no noise, so its steps have no probability; choose ddim with eta above 0, or flow_sde "
            "or flow_cps for flow models"
        )
    assert not np.any(table.steps.c[random]), "a transition must depend on nothing before it"
    return random.astype(np.int32)


def candidate_keys(keys_B: Key[Array, " B"], num_candidates: int) -> Key[Array, " N"]:
    """Return the keys of each prompt's candidates: that of candidate k is `fold_in(key, k)`, whatever their number."""
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys_B, jnp.arange(num_candidates)).reshape(-1)


def branch(
    x_BHWC: Float[Array, "B H W C"], keys_B: Key[Array, " B"], num_candidates: int
) -> tuple[Float[Array, "N H W C"], Key[Array, " N"]]:
    """Return x_NHWC and keys_N of the candidates: those of a prompt begin with the same latents and have own keys."""
    return jnp.repeat(x_BHWC, num_candidates, axis=0), candidate_keys(keys_B, num_candidates)


def sample_trajectory(
    denoise: Denoiser, table: SamplerTable, x_NHWC: Float[Array, "N H W C"], keys_N: Key[Array, " N"]
) -> Trajectory:
    """Sample as `samplers.sample` does, with the same noise and result, and return every step.

    Args:
        denoise: the network with weights, conditioning and guidance already bound.
        table: table of a sampler that adds noise; DDPO and D3PO use DDIM with eta = 1.
        x_NHWC: the result of `starting_latents`.
        keys_N: one key per image; see `branch`.

    Raises:
        UserError: the sampler adds no noise.
    """
    if not adds_noise(table):
        random_steps(table)  # tells what to do

    def record(
        step: Steps,
        x_NHWC: Float[Array, "N H W C"],
        mean_NHWC: Float[Array, "N H W C"],
        next_x_NHWC: Float[Array, "N H W C"],
    ) -> tuple[Float[Array, "N H W C"], Float[Array, "N H W C"], Float[Array, " N"]]:
        return x_NHWC, mean_NHWC, log_prob(step, mean_NHWC, next_x_NHWC)

    x0_NHWC, (x_SNHWC, mean_SNHWC, log_prob_SN) = walk(denoise, table, x_NHWC, keys_N, record)
    return Trajectory(jnp.concatenate([x_SNHWC, x0_NHWC[None]]), log_prob_SN, mean_SNHWC)


class Exploration(NamedTuple):
    """The candidates that branched off at each step of a prompt's trajectory, [S, B, ...]."""

    x_SBHWC: Float[Any, "S B H W C"]
    """Latents before each step."""
    next_x_SBKHWC: Float[Any, "S B K H W C"]
    """Latents of the candidates after each step."""
    log_prob_SBK: Float[Any, "S B K"]
    """Log-probability of each candidate's step; 0 for a step without noise."""
    mean_SBHWC: Float[Any, "S B H W C"]
    """Mean of the latents after each step, which the candidates' noise is added to."""
    seen_SBK: Float[Any, "S B K ..."]
    """Results of `look` on the candidates."""
    x0_BHWC: Float[Any, "B H W C"]
    """Clean latents at the end of the trajectory."""


Look = Callable[[Steps, Steps, Float[Array, "B H W C"], Float[Array, "B K H W C"]], Float[Array, "B K ..."]]
"""Maps (step, following step, x_BHWC, next_x_BKHWC) to what a judge reads about the candidates, [B, K, ...]."""


def explore(
    denoise: Denoiser,
    table: SamplerTable,
    x_BHWC: Float[Array, "B H W C"],
    keys_B: Key[Array, " B"],
    num_candidates: int,
    look: Look,
    first: int = 0,
) -> Exploration:
    """Sample with K candidates at every step, one of which, chosen at random, continues (arXiv 2406.04314).

    The choice does not depend on a judge, so trajectories have the same distribution as those of `sample`.

    Args:
        denoise: the network with weights, conditioning and guidance already bound.
        table: table of a sampler that adds noise.
        x_BHWC: the result of `starting_latents`.
        keys_B: one key per prompt.
        num_candidates: K.
        look: computes what a judge reads about the candidates of each step, for example `see_images`.
        first: first step that `look` is called for; `seen_SBK` is 0 before it.

    Raises:
        UserError: the sampler adds no noise.
    """
    random_steps(table)
    B, K, S = len(x_BHWC), num_candidates, len(table.steps.t)
    # The image of a candidate is predicted with the following step; after the last step, the candidate is the image.
    following = Steps(*(np.append(values_S[1:], 0) for values_S in table.steps))
    following.p[-1], following.q[-1] = 1, 0
    dtype = jnp.promote_types(x_BHWC.dtype, jnp.float32)

    def take(
        x_BHWC: Float[Array, "B H W C"], inputs: tuple[Array, Steps, Steps]
    ) -> tuple[Float[Array, "B H W C"], Any]:
        i, step, after = inputs
        mean_BHWC = transition_mean(step, x_BHWC, denoise(x_BHWC, jnp.full(B, step.t)))
        step_keys_B, choice_keys_B = (jax.vmap(jax.random.fold_in, (0, None))(keys_B, 2 * i + j) for j in range(2))
        next_x_NHWC, keys_N = branch(mean_BHWC, step_keys_B, K)
        next_x_NHWC = next_x_NHWC + step.d * step_noise(keys_N, 0, next_x_NHWC)
        next_x_BKHWC = next_x_NHWC.reshape(B, K, *next_x_NHWC.shape[1:])
        log_prob_BK = log_prob(step, mean_BHWC[:, None], next_x_BKHWC)
        chosen_B = jax.vmap(lambda key: jax.random.randint(key, (), 0, K))(choice_keys_B)
        given = step, after, x_BHWC, next_x_BKHWC
        if first:
            nothing = jax.eval_shape(look, *given)
            seen_BK = jax.lax.cond(i >= first, look, lambda *_: jnp.zeros(nothing.shape, nothing.dtype), *given)
        else:
            seen_BK = look(*given)
        return next_x_BKHWC[jnp.arange(B), chosen_B], (x_BHWC, next_x_BKHWC, log_prob_BK, mean_BHWC, seen_BK)

    def on_device(steps: Steps) -> Steps:
        return Steps(jnp.asarray(steps.t, jnp.float32), *(jnp.asarray(values_S, dtype) for values_S in steps[1:]))

    inputs = jnp.arange(S), on_device(table.steps), on_device(following)
    x0_BHWC, records = jax.lax.scan(take, x_BHWC.astype(dtype), inputs)
    x_SBHWC, next_x_SBKHWC, log_prob_SBK, mean_SBHWC, seen_SBK = records
    return Exploration(x_SBHWC, next_x_SBKHWC, log_prob_SBK, mean_SBHWC, seen_SBK, x0_BHWC)


def see_images(denoise: Denoiser) -> Look:
    """Return a `Look` that predicts the image of each candidate, as latents; `denoise` is bound for B * K rows."""

    def look(
        step: Steps, after: Steps, x_BHWC: Float[Array, "B H W C"], next_x_BKHWC: Float[Array, "B K H W C"]
    ) -> Float[Array, "B K H W C"]:
        next_x_NHWC = next_x_BKHWC.reshape(-1, *next_x_BKHWC.shape[2:])
        x0_NHWC = after.p * next_x_NHWC + after.q * denoise(next_x_NHWC, jnp.full(len(next_x_NHWC), after.t))
        return x0_NHWC.reshape(next_x_BKHWC.shape)

    return look


def see_log_ratios(tuned: Denoiser, reference: Denoiser) -> Look:
    """Return a `Look` that computes `log(p_tuned / p_reference)` of each candidate's step: an implicit reward.

    This is the implicit reward of a model tuned by Diffusion-DPO (arXiv 2311.12908, section 4), for one step. The
    networks run on the latents that the candidates share, so more candidates cost nothing.
    """

    def look(
        step: Steps, after: Steps, x_BHWC: Float[Array, "B H W C"], next_x_BKHWC: Float[Array, "B K H W C"]
    ) -> Float[Array, "B K"]:
        t_B = jnp.full(len(x_BHWC), step.t)
        means = (transition_mean(step, x_BHWC, denoise(x_BHWC, t_B))[:, None] for denoise in (tuned, reference))
        tuned_BK, reference_BK = (log_prob(step, mean_B1HWC, next_x_BKHWC) for mean_B1HWC in means)
        return tuned_BK - reference_BK

    return look


def transitions_at(trajectory: Trajectory, step_B: Int[Array, " B"]) -> Transitions:
    """Return the transitions of step `step_B` of each prompt's candidates.

    The images of the trajectory are B prompts times K candidates, the candidates of a prompt next to each other.
    """
    B = len(step_B)
    of_prompts = jax.tree.map(lambda x: x.reshape(len(x), B, -1, *x.shape[2:]), trajectory)
    prompt_B = jnp.arange(B)
    return Transitions(
        of_prompts.latents_VNHWC[step_B, prompt_B],
        of_prompts.latents_VNHWC[step_B + 1, prompt_B],
        step_B,
        of_prompts.log_prob_SN[step_B, prompt_B],
        None if trajectory.mean_SNHWC is None else of_prompts.mean_SNHWC[step_B, prompt_B],
    )


def steps_at(table: SamplerTable, step_B: Int[Array, " B"], like_BKHWC: Float[Array, "B ... H W C"]) -> Steps:
    """Return the numbers of these steps, shaped to multiply latents `[B, ..., H, W, C]`; `t` stays [B]."""

    def rows(values_S: Float[np.ndarray, " S"]) -> Float[Array, "B ..."]:
        return jnp.asarray(values_S, like_BKHWC.dtype)[step_B].reshape(-1, *[1] * (like_BKHWC.ndim - 1))

    return Steps(jnp.asarray(table.steps.t)[step_B], *(rows(values_S) for values_S in table.steps[1:]))


def transition_mean(
    step: Steps, x: Float[Array, "*N H W C"], prediction: Float[Array, "*N H W C"]
) -> Float[Array, "*N H W C"]:
    """Return the mean of the latents after a step with noise, given the network's prediction."""
    x0 = step.p * x + step.q * prediction
    return step_mean(step, x, x0, x0)  # c is 0: see `random_steps`


def log_prob(step: Steps, mean: Float[Array, "*#N H W C"], next_x: Float[Array, "*#N H W C"]) -> Float[Array, "*N"]:
    """Return `w log N(next_x; mean, d^2)`, the mean over the last three axes; 0 without gradient if d is 0.

    It matches `ddim_step_with_logprob` of https://github.com/kvablack/ddpo-pytorch except for d = 0, which gives NaN
    there.
    """
    deviation = jnp.where(step.d > 0, step.d, 1)
    distance = jnp.square((next_x - mean) / deviation).mean(axis=(-3, -2, -1)) / 2
    log_density = -distance - _per_image(jnp.log(deviation)) - math.log(2 * math.pi) / 2
    return jnp.where(_per_image(step.d) > 0, _per_image(step.w) * log_density, 0)


def kl_divergence(
    step: Steps, mean: Float[Array, "*#N H W C"], other_mean: Float[Array, "*#N H W C"]
) -> Float[Array, "*N"]:
    """Return the KL divergence of Gaussians with equal d, `(mean - other)^2 / (2 d^2)`, reduced as in `log_prob`."""
    deviation = jnp.where(step.d > 0, step.d, 1)
    divergence = jnp.square((mean - other_mean) / deviation).mean(axis=(-3, -2, -1)) / 2
    return jnp.where(_per_image(step.d) > 0, divergence, 0)


def _per_image(value: Float[Array, "*N 1 1 1"] | Float[Array, ""]) -> Float[Array, "*N"] | Float[Array, ""]:
    """Return the value without its axes of length 1 over H, W and C; a scalar stays a scalar."""
    return value.reshape(value.shape[:-3])
