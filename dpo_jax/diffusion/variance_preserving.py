"""The variance-preserving process of Stable Diffusion 1, 2 and XL: its scheduler_config.json, betas and levels.

Axes: T training timesteps.
"""

import itertools
import math
from typing import Annotated, Literal

import numpy as np
import pydantic
from jaxtyping import Float

from dpo_jax.errors import UserError

# Fields that only affect samplers that dpo_jax does not have, or none. Latents are never clipped: diffusers' pipelines
# of Stable Diffusion turn clip_sample off, and thresholding is for pixels.
IGNORED_FIELDS = {
    *("clip_sample", "clip_sample_range", "thresholding", "sample_max_value", "dynamic_thresholding_ratio"),
    *("skip_prk_steps", "sigma_min", "sigma_max", "flow_shift", "time_shift_type", "shift_terminal", "predict_x0"),
    *("solver_p", "disable_corrector", "tau_func", "predictor_order", "corrector_order", "noise_sampler_seed"),
}
# Fields that affect some samplers and not the training tables.
SAMPLER_FIELDS = {
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
# tables for all of them.
VARIANCE_PRESERVING = {
    *("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverMultistepScheduler"),
    *("DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler"),
    *("LCMScheduler", "TCDScheduler", "SASolverScheduler"),
}


def levels(
    config: SchedulerConfig, where: str, *, zero_terminal_snr: bool = False
) -> tuple[Float[np.ndarray, " T"], Float[np.ndarray, " T"]]:
    """Return signal and noise of each timestep, float64; UserError if the betas of the file do not fit.

    Betas and their cumulative products are rounded to float32 where PyTorch rounds them, so the levels match those of
    diffusers bit for bit.
    """
    betas_T = _betas(config, where)
    if zero_terminal_snr or config.rescale_betas_zero_snr:
        betas_T = _rescale_to_zero_terminal_snr(betas_T)
    alphas_bar_T = _cumulative_product(np.float32(1) - betas_T).astype(np.float64)
    return np.sqrt(alphas_bar_T), np.sqrt(1 - alphas_bar_T)


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
