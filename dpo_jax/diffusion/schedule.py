"""Noise schedules as data: each model family fills the same few tables differently.

A noisy latent is `x_t = signal[t] x0 + noise[t] eps`, and the network is trained to predict
`target = target_x0[t] x0 + target_noise[t] eps`:

    epsilon prediction   (0, 1)
    v-prediction         (-noise, signal)     Salimans & Ho 2022, arXiv 2202.00512
    flow matching        (-1, 1)              with signal = 1 - sigma, noise = sigma

A timestep is an index of the tables, in which noise rises; diffusers' tables of flow matching fall.

Axes: N images, H x W latent cells, C channels, T training timesteps.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dpo_jax.diffusion import flow_matching
from dpo_jax.diffusion.flow_matching import FlowMatchingConfig
from dpo_jax.diffusion.variance_preserving import (
    IGNORED_FIELDS,
    SAMPLER_FIELDS,
    VARIANCE_PRESERVING,
    SchedulerConfig,
    levels,
)
from dpo_jax.errors import UserError
from dpo_jax.files import conform


class Schedule(NamedTuple):
    """Tables over the training timesteps, in float64 NumPy, so that they are constants inside jit."""

    signal_T: Float[np.ndarray, " T"]
    noise_T: Float[np.ndarray, " T"]
    target_x0_T: Float[np.ndarray, " T"]
    target_noise_T: Float[np.ndarray, " T"]
    t_T: Float[np.ndarray, " T"]
    """What the network gets as time: the timestep itself, or `num_train_timesteps * sigma` for flow matching."""
    training_timesteps: Int[np.ndarray, " _"]
    """int32: the timesteps that training draws from."""
    final_signal: float
    """Signal of the latents after the last sampling step: 1, or `signal_T[0]` if `set_alpha_to_one` is false."""
    final_noise: float
    timestep_spacing: str
    """Spacing of the timesteps of a sampler: leading, trailing or linspace (arXiv 2305.08891, table 2); "" if the file
    does not say, which leaves it to the sampler."""
    steps_offset: int
    """Added to the timesteps of the leading spacing."""
    class_name: str
    """The scheduler class of diffusers that the file names."""
    sampler_fields: Mapping[str, Any]
    """Further fields of the file that some samplers read, for example `final_sigmas_type`."""

    @property
    def is_flow(self) -> bool:
        """True for flow matching."""
        return self.class_name == flow_matching.CLASS_NAME


def make_schedule(
    scheduler_config: dict[str, Any],
    *,
    training_timesteps: Sequence[int] | None = None,
    zero_terminal_snr: bool = False,
    timestep_spacing: str = "",
    where: str = "scheduler_config.json",
) -> Schedule:
    """Return the schedule of a diffusers `scheduler_config.json` of any supported scheduler class.

    All classes of a process share the training fields. Fields that only affect samplers that dpo_jax does not have are
    ignored, and so are those that begin with an underscore. The tables match those of diffusers bit for bit.

    Args:
        scheduler_config: the parsed JSON.
        training_timesteps: the timesteps to train on (SDXL-Turbo: 249, 499, 749, 999); all of them by default.
        zero_terminal_snr: rescale the betas so that the last timestep is pure noise (arXiv 2305.08891, algorithm 1),
            as `rescale_betas_zero_snr` in the file does. Flow matching ends in pure noise anyway.
        timestep_spacing: for flow matching, whose file does not say it: "trailing" if the model's pipeline of diffusers
            computes the levels of the sampling steps itself (FLUX, Z-Image); see `flow_matching.sampling_sigmas`.
        where: the file's path, for error messages.

    Raises:
        UserError: a field is missing, unknown, or has a value that is not supported.
    """
    class_name = scheduler_config.get("_class_name", "DDIMScheduler")
    class_name = class_name.removeprefix("Flax") if isinstance(class_name, str) else repr(class_name)
    fields = {name: value for name, value in scheduler_config.items() if not name.startswith("_")}
    if class_name in VARIANCE_PRESERVING:
        schedule = _variance_preserving(fields, class_name, where, zero_terminal_snr)
    elif class_name == flow_matching.CLASS_NAME:
        schedule = _flow_matching(fields, where, timestep_spacing)
    else:
        known = ", ".join(sorted({*VARIANCE_PRESERVING, flow_matching.CLASS_NAME}))
        raise UserError(f"{where}: the scheduler {class_name} is not supported; supported are {known}")
    if training_timesteps is None:
        return schedule
    chosen, num_timesteps = np.asarray(training_timesteps), len(schedule.signal_T)
    if chosen.size == 0 or chosen.min() < 0 or chosen.max() >= num_timesteps:
        raise UserError(
            f"training_timesteps={training_timesteps} must be one or more timesteps between 0 and {num_timesteps - 1}"
        )
    return schedule._replace(training_timesteps=chosen.astype(np.int32))


def _variance_preserving(fields: dict[str, Any], class_name: str, where: str, zero_terminal_snr: bool) -> Schedule:
    _refuse_unknown(fields, IGNORED_FIELDS | SAMPLER_FIELDS | SchedulerConfig.model_fields.keys(), where)
    config: SchedulerConfig = conform(fields, SchedulerConfig, where)
    signal_T, noise_T = levels(config, where, zero_terminal_snr=zero_terminal_snr)
    targets = {"epsilon": (np.zeros_like(signal_T), np.ones_like(signal_T)), "v_prediction": (-noise_T, signal_T)}
    to_one = config.set_alpha_to_one
    return Schedule(
        signal_T=signal_T,
        noise_T=noise_T,
        target_x0_T=targets[config.prediction_type][0],
        target_noise_T=targets[config.prediction_type][1],
        t_T=np.arange(len(signal_T), dtype=np.float64),
        training_timesteps=np.arange(len(signal_T), dtype=np.int32),
        final_signal=1.0 if to_one else float(signal_T[0]),
        final_noise=0.0 if to_one else float(noise_T[0]),
        timestep_spacing=config.timestep_spacing or "",
        steps_offset=config.steps_offset,
        class_name=class_name,
        sampler_fields={field: fields[field] for field in sorted(SAMPLER_FIELDS & fields.keys())},
    )


def _flow_matching(fields: dict[str, Any], where: str, timestep_spacing: str) -> Schedule:
    _refuse_unknown(fields, FlowMatchingConfig.model_fields.keys(), where)
    config: FlowMatchingConfig = conform(fields, FlowMatchingConfig, where)
    sampler_fields = config.model_dump()
    sigma_T = flow_matching.training_sigmas(sampler_fields)
    return Schedule(
        signal_T=1 - sigma_T.astype(np.float64),
        noise_T=sigma_T.astype(np.float64),
        target_x0_T=-np.ones(len(sigma_T)),
        target_noise_T=np.ones(len(sigma_T)),
        t_T=(sigma_T * np.float32(len(sigma_T))).astype(np.float64),
        training_timesteps=np.arange(len(sigma_T), dtype=np.int32),
        final_signal=1.0,
        final_noise=0.0,
        timestep_spacing=timestep_spacing or "linspace",
        steps_offset=0,
        class_name=flow_matching.CLASS_NAME,
        sampler_fields=sampler_fields,
    )


def _refuse_unknown(fields: Collection[str], known: Collection[str], where: str) -> None:
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise UserError(
            f"{where}: unknown fields {', '.join(unknown[:10])}, which may affect training; remove those that only "
            "affect sampling"
        )


def add_noise(
    schedule: Schedule, x0_NHWC: Float[Array, "N H W C"], noise_NHWC: Float[Array, "N H W C"], t_N: Int[Array, " N"]
) -> Float[Array, "N H W C"]:
    """Return `x_t`, the noisy latents at timestep t (arXiv 2006.11239, equation 4)."""
    signal, noise = at_timesteps(schedule.signal_T, t_N, x0_NHWC), at_timesteps(schedule.noise_T, t_N, x0_NHWC)
    return signal * x0_NHWC + noise * noise_NHWC


def training_target(
    schedule: Schedule, x0_NHWC: Float[Array, "N H W C"], noise_NHWC: Float[Array, "N H W C"], t_N: Int[Array, " N"]
) -> Float[Array, "N H W C"]:
    """Return the target of the network's prediction at `x_t`, noise or velocity as the schedule says."""
    a, b = at_timesteps(schedule.target_x0_T, t_N, x0_NHWC), at_timesteps(schedule.target_noise_T, t_N, x0_NHWC)
    return a * x0_NHWC + b * noise_NHWC


def at_timesteps(
    table_T: Float[np.ndarray, " T"], t_N: Int[Array, " N"], like_NHWC: Float[Array, "N H W C"]
) -> Float[Array, "N 1 1 1"]:
    """Return the table's values at t, float32 or wider, shaped to multiply an image."""
    values_N = jnp.asarray(table_T, jnp.promote_types(like_NHWC.dtype, jnp.float32))[t_N]
    return values_N.reshape(-1, *[1] * (like_NHWC.ndim - 1))


def network_times(schedule: Schedule, t_N: Int[Array, " N"]) -> Float[Array, " N"]:
    """Return what the network gets as the time of each timestep: `schedule.t_T` at t, in float32 or wider."""
    return jnp.asarray(schedule.t_T, float)[t_N]


def log_snr(schedule: Schedule, t_N: Int[Array, " N"]) -> Float[Array, " N"]:
    """Return the logarithm of the signal-to-noise ratio, `log(signal^2 / noise^2)`; -inf for pure noise."""
    return jnp.asarray(log_snr_table(schedule), float)[t_N]


def log_snr_table(schedule: Schedule) -> Float[np.ndarray, " T"]:
    """Return `log_snr` of all timesteps, float64."""
    with np.errstate(divide="ignore"):
        return 2 * (np.log(schedule.signal_T) - np.log(schedule.noise_T))
