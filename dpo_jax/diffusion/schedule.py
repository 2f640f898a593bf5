"""Noise schedules as data: each model family fills the same few tables differently.

A noisy latent is `x_t = signal[t] x0 + noise[t] eps`, and the network is trained to predict
`target = target_x0[t] x0 + target_noise[t] eps`:

    epsilon prediction   (0, 1)
    v-prediction         (-noise, signal)     Salimans & Ho 2022, arXiv 2202.00512
    flow matching        (-1, 1)              with signal = 1 - t, noise = t

Axes: N images, H x W latent cells, C channels, T training timesteps.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
import pydantic
from jaxtyping import Array, Float, Int

from dpo_jax.errors import UserError
from dpo_jax.files import conform


class Schedule(NamedTuple):
    """Tables over the training timesteps, in float64 NumPy, so that they are constants inside jit."""

    signal_T: Float[np.ndarray, " T"]
    noise_T: Float[np.ndarray, " T"]
    target_x0_T: Float[np.ndarray, " T"]
    target_noise_T: Float[np.ndarray, " T"]
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


# Fields that only affect samplers that dpo_jax does not have, or none. Latents are never clipped: diffusers' pipelines
# of Stable Diffusion turn clip_sample off, and thresholding is for pixels.
_IGNORED_FIELDS = {
    *("clip_sample", "clip_sample_range", "thresholding", "sample_max_value", "dynamic_thresholding_ratio"),
    *("skip_prk_steps", "sigma_min", "sigma_max", "flow_shift", "time_shift_type", "shift_terminal", "predict_x0"),
    *("solver_p", "disable_corrector", "tau_func", "predictor_order", "corrector_order", "noise_sampler_seed"),
}
# Fields that affect some samplers and not the training tables.
_SAMPLER_FIELDS = {
    *("interpolation_type", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"),
    *("final_sigmas_type", "lambda_min_clipped", "algorithm_type", "solver_order", "solver_type", "variance_type"),
    *("lower_order_final", "euler_at_final", "original_inference_steps", "timestep_scaling"),
}
Beta = Annotated[float, pydantic.Field(gt=0, lt=1)]
MAX_TIMESTEPS = 100_000


class SchedulerConfig(pydantic.BaseModel):
    """The fields of a scheduler_config.json that affect results. The last three support only their defaults."""

    num_train_timesteps: Annotated[int, pydantic.Field(ge=2, le=MAX_TIMESTEPS)]
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
    beta_start: Beta
    beta_end: Beta
    trained_betas: Annotated[list[Beta], pydantic.Field(max_length=MAX_TIMESTEPS)] | None = None
    """The betas themselves, in place of the three fields before."""
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    timestep_spacing: Literal["", "leading", "trailing", "linspace"] | None = ""
    steps_offset: Annotated[int, pydantic.Field(ge=0, le=MAX_TIMESTEPS)] = 0
    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool | None = False
    lower_order_final: bool = True
    euler_at_final: bool = False
    original_inference_steps: Annotated[int, pydantic.Field(ge=1, le=MAX_TIMESTEPS)] = 50
    timestep_scaling: Annotated[float, pydantic.Field(gt=0, lt=1e9)] = 10.0
    timestep_type: Literal["discrete"] = "discrete"
    use_flow_sigmas: Literal[False] | None = False
    use_dynamic_shifting: Literal[False] | None = False


# Scheduler classes of diffusers that sample the same variance-preserving forward process, so one function makes the
# tables for all of them. Another process (flow matching, EDM) would be another function that fills the same tables.
VARIANCE_PRESERVING = {
    *("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverMultistepScheduler"),
    *("DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler"),
    *("LCMScheduler", "TCDScheduler", "SASolverScheduler"),
}


def make_schedule(
    scheduler_config: dict[str, Any],
    *,
    training_timesteps: Sequence[int] | None = None,
    zero_terminal_snr: bool = False,
    where: str = "scheduler_config.json",
) -> Schedule:
    """Return the schedule of a diffusers `scheduler_config.json` of any supported scheduler class.

    All classes share the training fields. Fields that only affect samplers that dpo_jax does not have are ignored, and
    so are those that begin with an underscore. Betas and their cumulative products are rounded to float32 where PyTorch
    rounds them, so the tables match those of diffusers bit for bit.

    Args:
        scheduler_config: the parsed JSON.
        training_timesteps: the timesteps to train on (SDXL-Turbo: 249, 499, 749, 999); all of them by default.
        zero_terminal_snr: rescale the betas so that the last timestep is pure noise (arXiv 2305.08891, algorithm 1),
            as `rescale_betas_zero_snr` in the file does.
        where: the file's path, for error messages.

    Raises:
        UserError: a field is missing, unknown, or has a value that is not supported.
    """
    class_name = scheduler_config.get("_class_name", "DDIMScheduler")
    class_name = class_name.removeprefix("Flax") if isinstance(class_name, str) else repr(class_name)
    if class_name not in VARIANCE_PRESERVING:
        known = ", ".join(sorted(VARIANCE_PRESERVING))
        raise UserError(f"{where}: the scheduler {class_name} is not supported; supported are {known}")
    fields = {name: value for name, value in scheduler_config.items() if not name.startswith("_")}
    unknown = sorted(fields.keys() - _IGNORED_FIELDS - _SAMPLER_FIELDS - SchedulerConfig.model_fields.keys())
    if unknown:
        raise UserError(
            f"{where}: unknown fields {', '.join(unknown[:10])}, which may affect training; remove those that only "
            "affect sampling"
        )
    config: SchedulerConfig = conform(fields, SchedulerConfig, where)

    betas_T = _betas(config, where)
    if zero_terminal_snr or config.rescale_betas_zero_snr:
        betas_T = _rescale_to_zero_terminal_snr(betas_T)
    alphas_bar_T = _cumulative_product(np.float32(1) - betas_T).astype(np.float64)
    signal_T, noise_T = np.sqrt(alphas_bar_T), np.sqrt(1 - alphas_bar_T)
    targets = {"epsilon": (np.zeros_like(signal_T), np.ones_like(signal_T)), "v_prediction": (-noise_T, signal_T)}

    num_timesteps = len(signal_T)
    chosen = np.arange(num_timesteps) if training_timesteps is None else np.asarray(training_timesteps)
    if chosen.size == 0 or chosen.min() < 0 or chosen.max() >= num_timesteps:
        raise UserError(
            f"training_timesteps={training_timesteps} must be one or more timesteps between 0 and {num_timesteps - 1}"
        )
    to_one = config.set_alpha_to_one
    return Schedule(
        signal_T=signal_T,
        noise_T=noise_T,
        target_x0_T=targets[config.prediction_type][0],
        target_noise_T=targets[config.prediction_type][1],
        training_timesteps=chosen.astype(np.int32),
        final_signal=1.0 if to_one else float(signal_T[0]),
        final_noise=0.0 if to_one else float(noise_T[0]),
        timestep_spacing=config.timestep_spacing or "",
        steps_offset=config.steps_offset,
        class_name=class_name,
        sampler_fields={field: fields[field] for field in sorted(_SAMPLER_FIELDS & fields.keys())},
    )


def log_snr(schedule: Schedule, t_N: Int[Array, " N"]) -> Float[Array, " N"]:
    """Return the logarithm of the signal-to-noise ratio, `log(signal^2 / noise^2)`; -inf for pure noise."""
    return jnp.asarray(_log_snr(schedule), float)[t_N]


def even_shares(schedule: Schedule, buckets: int) -> Float[np.ndarray, " _"]:
    """Return the probability of each training timestep for which all noise levels are drawn equally often.

    The range of log-SNR of the training timesteps is cut into buckets of equal width. Those that hold a timestep have
    equal probability, which their timesteps share equally. Pure noise counts to the bucket of the least signal.
    """
    log_snr_T = _log_snr(schedule)[schedule.training_timesteps]
    finite = log_snr_T[np.isfinite(log_snr_T)]
    lowest, highest = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    place_T = (np.clip(log_snr_T, lowest, highest) - lowest) / (highest - lowest or 1.0)
    bucket_T = np.minimum((place_T * buckets).astype(int), buckets - 1)
    _, found_T, count = np.unique(bucket_T, return_inverse=True, return_counts=True)
    return 1 / (len(count) * count[found_T])


def _log_snr(schedule: Schedule) -> Float[np.ndarray, " T"]:
    with np.errstate(divide="ignore"):
        return 2 * (np.log(schedule.signal_T) - np.log(schedule.noise_T))


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


def _betas(config: SchedulerConfig, where: str) -> Float[np.ndarray, " T"]:
    start, end, num_timesteps = config.beta_start, config.beta_end, config.num_train_timesteps
    if config.trained_betas is not None:
        if len(config.trained_betas) != num_timesteps:
            raise UserError(
                f"{where}: trained_betas has {len(config.trained_betas)} numbers, but num_train_timesteps is "
                f"{num_timesteps}; they must be equal"
            )
        return np.asarray(config.trained_betas, np.float32)
    if config.beta_schedule == "linear":
        return _torch_linspace(start, end, num_timesteps)
    if config.beta_schedule == "scaled_linear":
        return _torch_linspace(start**0.5, end**0.5, num_timesteps) ** 2
    # squaredcos_cap_v2: arXiv 2102.09672, equation 17
    alpha_bar = [math.cos((i / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(num_timesteps + 1)]
    betas = [min(1 - after / before, 0.999) for before, after in itertools.pairwise(alpha_bar)]
    return np.asarray(betas, np.float32)


def _torch_linspace(start: float, end: float, num: int) -> Float[np.ndarray, " {num}"]:
    """Return `torch.linspace` in float32: a float32 step from both ends, rounded once (fused multiply-add)."""
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(num - 1))
    index = np.arange(num)
    rising = np.float64(first) + step * index
    falling = np.float64(last) - step * (num - 1 - index)
    return np.where(index < num // 2, rising, falling).astype(np.float32)


def _cumulative_product(alphas_T: Float[np.ndarray, " T"]) -> Float[np.ndarray, " T"]:
    """Return `torch.cumprod` of a float32 tensor: accumulated in float64, each value rounded to float32."""
    return np.cumprod(alphas_T.astype(np.float64)).astype(np.float32)


def _rescale_to_zero_terminal_snr(betas_T: Float[np.ndarray, " T"]) -> Float[np.ndarray, " T"]:
    """Return betas with the same first signal and a last signal of 0 (arXiv 2305.08891, algorithm 1), in float32."""
    signal_T = np.sqrt(_cumulative_product(np.float32(1) - betas_T))
    signal_T = (signal_T - signal_T[-1]) * (signal_T[0] / (signal_T[0] - signal_T[-1]))
    alphas_bar_T = signal_T**2
    alphas_T = np.concatenate([alphas_bar_T[:1], alphas_bar_T[1:] / alphas_bar_T[:-1]])
    return np.float32(1) - alphas_T
