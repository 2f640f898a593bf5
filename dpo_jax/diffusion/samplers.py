"""Samplers: functions of a denoiser, a schedule and the starting noise, one compiled step whatever their number.

Axes: N images, H x W latent cells, C channels, S sampling steps.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.diffusion.schedule import Schedule, predict_x0_and_noise

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]
"""`denoise(x_NHWC, t_N) -> prediction_NHWC`."""


def ddim(
    denoise: Denoiser,
    schedule: Schedule,
    x_T_NHWC: jax.Array,
    *,
    num_steps: int,
    eta: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """DDIM (arXiv 2010.02502, equations 12 and 16), as diffusers' `DDIMScheduler` computes it.

    Args:
        denoise: the network with weights, conditioning and guidance already bound.
        schedule: the model's schedule; it also says which timesteps are visited.
        x_T_NHWC: standard normal noise.
        num_steps: denoising steps.
        eta: 0 is deterministic, 1 adds as much noise as DDPM.
        key: for eta > 0; step i adds `jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)`.

    Returns:
        x0_NHWC, the clean latents.
    """
    if eta > 0 and key is None:
        raise ValueError(f"ddim with eta={eta} adds noise at each step and needs a key")
    t_S = sampling_timesteps(schedule, num_steps)
    signal_S, noise_S = schedule.signal_T[t_S], schedule.noise_T[t_S]
    if np.any(signal_S * schedule.target_noise_T[t_S] == noise_S * schedule.target_x0_T[t_S]):
        raise ValueError(
            "this schedule has zero signal at a sampled timestep, from which epsilon prediction cannot tell the image; "
            "sample with the model's own schedule, without zero_terminal_snr"
        )
    previous_S = t_S - len(schedule.signal_T) // num_steps
    is_last_S = previous_S < 0
    next_signal_S = np.where(is_last_S, schedule.final_signal, schedule.signal_T[previous_S])
    next_noise_S = np.where(is_last_S, schedule.final_noise, schedule.noise_T[previous_S])
    variance_S = (next_noise_S / noise_S) ** 2 * (1 - (signal_S / next_signal_S) ** 2)
    sigma_S = eta * np.sqrt(np.maximum(variance_S, 0))
    direction_S = np.sqrt(np.maximum(next_noise_S**2 - sigma_S**2, 0))

    def step(x_NHWC: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        i, t, signal, direction, sigma = inputs
        t_N = jnp.full(x_NHWC.shape[:1], t)
        x0_NHWC, noise_NHWC = predict_x0_and_noise(schedule, x_NHWC, t_N, denoise(x_NHWC, t_N))
        x_NHWC = signal * x0_NHWC + direction * noise_NHWC
        if key is not None and eta > 0:
            x_NHWC += sigma * jax.random.normal(jax.random.fold_in(key, i), x_NHWC.shape, x_NHWC.dtype)
        return x_NHWC, None

    # At least float32 between the steps, whatever the network computes in.
    x_NHWC = x_T_NHWC.astype(jnp.promote_types(x_T_NHWC.dtype, jnp.float32))
    coefficients = [jnp.asarray(c_S, x_NHWC.dtype) for c_S in (next_signal_S, direction_S, sigma_S)]
    steps = (jnp.arange(num_steps), jnp.asarray(t_S, jnp.int32), *coefficients)
    return jax.lax.scan(step, x_NHWC, steps)[0]


def sampling_timesteps(schedule: Schedule, num_steps: int) -> np.ndarray:
    """The timesteps visited, highest first, as diffusers spaces them (arXiv 2305.08891, table 2)."""
    t_S: np.ndarray
    num_timesteps = len(schedule.signal_T)
    if not 0 < num_steps <= num_timesteps:
        raise ValueError(f"num_steps={num_steps} must be in 1..{num_timesteps}")
    if schedule.timestep_spacing == "linspace":
        t_S = np.linspace(0, num_timesteps - 1, num_steps).round()[::-1]
    elif schedule.timestep_spacing == "trailing":
        t_S = np.round(np.arange(num_timesteps, 0, -num_timesteps / num_steps)) - 1
    else:
        t_S = np.arange(num_steps)[::-1] * (num_timesteps // num_steps) + schedule.steps_offset
    if t_S[0] >= num_timesteps:
        raise ValueError(
            f"num_steps={num_steps} with steps_offset={schedule.steps_offset} starts past the last timestep"
        )
    return t_S.astype(np.int32)


def classifier_free_guidance(
    denoise: Callable[[jax.Array, jax.Array, Any], jax.Array], conditioning: Any, unconditional: Any, scale: float
) -> Denoiser:
    """A denoiser that extrapolates from the unconditional to the conditional prediction (arXiv 2207.12598).

    Both predictions come from one batch of 2N, the two of an image side by side, so that a sharded batch stays where it
    is. As in diffusers, a scale of 1 or less means no guidance and half the work.

    Args:
        denoise: `denoise(x_NHWC, t_N, conditioning)` with the weights already bound.
        conditioning: N rows of conditioning.
        unconditional: the same for the empty (or negative) prompt.
        scale: guidance scale.
    """
    if scale <= 1:
        return lambda x_NHWC, t_N: denoise(x_NHWC, t_N, conditioning)

    def side_by_side(a_N: jax.Array, b_N: jax.Array) -> jax.Array:
        return jnp.stack([a_N, b_N], axis=1).reshape(-1, *a_N.shape[1:])

    both = jax.tree.map(side_by_side, unconditional, conditioning)

    def guided(x_NHWC: jax.Array, t_N: jax.Array) -> jax.Array:
        prediction = denoise(side_by_side(x_NHWC, x_NHWC), side_by_side(t_N, t_N), both)
        prediction = prediction.reshape(-1, 2, *x_NHWC.shape[1:])
        return prediction[:, 0] + scale * (prediction[:, 1] - prediction[:, 0])

    return guided
