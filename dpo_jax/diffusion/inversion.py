"""DDIM run backwards: the noise that a network itself would have made an image from.

Axes: N images, H x W latent cells, C channels, T training timesteps, S steps.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dpo_jax.diffusion.schedule import Schedule, at_timesteps, network_times
from dpo_jax.diffusion.steps import Denoiser


def invert(
    denoise: Denoiser, schedule: Schedule, x0_NHWC: Float[Array, "N H W C"], t_N: Int[Array, " N"], num_steps: int
) -> Float[Array, "N H W C"]:
    """Return the noise with which `add_noise` makes the inverted latents of each image at its own timestep.

    The timesteps are cut into `num_steps` equal parts, and an image takes a DDIM step (arXiv 2010.02502, equation 12,
    backwards) over each part below its t, the last one only as far as t. As in diffusers' `DDIMInverseScheduler`, with
    trailing spacing, the network gets the timestep that a step leads to. It is evaluated `num_steps` times, also for
    images whose t is reached before.

    A network that always predicts the true noise gives just this noise.

    Args:
        denoise: the network with weights and conditioning bound.
        schedule: the noise schedule.
        x0_NHWC: clean latents.
        t_N: timestep of each image.
        num_steps: number of parts.
    """
    x0_NHWC = x0_NHWC.astype(jnp.promote_types(x0_NHWC.dtype, jnp.float32))
    levels = _with_clean(schedule)
    T = len(schedule.signal_T)
    ends_S = np.round(np.arange(1, num_steps + 1) * T / num_steps).astype(np.int32) - 1

    def step(
        carry: tuple[Float[Array, "N H W C"], Int[Array, " N"]], end: Int[Array, ""]
    ) -> tuple[tuple[Float[Array, "N H W C"], Int[Array, " N"]], None]:
        x_NHWC, now_N = carry  # -1 is the clean image
        next_N = jnp.minimum(end, t_N)
        prediction_NHWC = denoise(x_NHWC, network_times(schedule, next_N)).astype(x_NHWC.dtype)
        signal, noise, a, b = (at_timesteps(level_T, now_N + 1, x_NHWC) for level_T in levels)
        next_signal, next_noise = (at_timesteps(level_T, next_N + 1, x_NHWC) for level_T in levels[:2])
        moves = (next_N > now_N).reshape(signal.shape)
        determinant = jnp.where(moves, signal * b - noise * a, 1.0)  # 0 at pure noise, from where nothing moves on
        image_NHWC = (b * x_NHWC - noise * prediction_NHWC) / determinant
        noise_NHWC = (signal * prediction_NHWC - a * x_NHWC) / determinant
        x_NHWC = jnp.where(moves, next_signal * image_NHWC + next_noise * noise_NHWC, x_NHWC)
        return (x_NHWC, jnp.maximum(now_N, next_N)), None

    (x_NHWC, _), _ = jax.lax.scan(step, (x0_NHWC, jnp.full_like(t_N, -1)), jnp.asarray(ends_S, t_N.dtype))
    signal, noise = (at_timesteps(level_T, t_N, x0_NHWC) for level_T in (schedule.signal_T, schedule.noise_T))
    return (x_NHWC - signal * x0_NHWC) / noise


def _with_clean(schedule: Schedule) -> list[Float[np.ndarray, " T+1"]]:
    """Return signal, noise and the two factors of the target, each with the value of a clean image in front."""
    signal_T, noise_T = schedule.signal_T, schedule.noise_T
    # One factor is linear in the noise (or constant) and the other in the signal, for each kind of prediction.
    a_T, b_T = schedule.target_x0_T, schedule.target_noise_T
    a = a_T[0] - (a_T[1] - a_T[0]) / (noise_T[1] - noise_T[0]) * noise_T[0]
    b = b_T[0] + (b_T[1] - b_T[0]) / (signal_T[1] - signal_T[0]) * (1 - signal_T[0])
    return [np.insert(level_T, 0, clean) for level_T, clean in ((signal_T, 1), (noise_T, 0), (a_T, a), (b_T, b))]
