"""Samplers as tables: the numbers of each step, for a schedule and a number of steps, in float64 NumPy.

`steps.py` says what the numbers mean, and has the one loop that runs all samplers.

Axes: S sampling steps, T training timesteps.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Real

from dpo_jax.diffusion import flow_matching
from dpo_jax.diffusion.schedule import Schedule
from dpo_jax.diffusion.steps import SamplerTable, Steps
from dpo_jax.errors import UserError


def make_table(
    sampler: str,
    schedule: Schedule,
    num_steps: int,
    *,
    eta: float = 0.0,
    noise_level: float = 0.0,
    strength: float = 1.0,
    image_tokens: int | None = None,
) -> SamplerTable:
    """Return the table of a sampler.

    Args:
        sampler: one of `SAMPLERS`, or "" for the sampler that the scheduler's file names.
        schedule: schedule of the model.
        num_steps: number of denoising steps.
        eta: for DDIM: 0 is deterministic, 1 adds as much noise as DDPM.
        noise_level: for flow_sde and flow_cps: how much noise their steps add; 0 takes the published level.
        strength: share of the steps to run, the last ones, for latents that start as a noisy image (SDEdit, arXiv
            2108.01073). As in diffusers, the number of steps is rounded down, and for flow models that of the skipped
            ones.
        image_tokens: number of tokens that the network makes of an image, for flow models whose scheduler shifts its
            noise levels by it.

    Raises:
        UserError: there is no such sampler, or it cannot sample this schedule with these settings.
    """
    name = sampler or own_sampler(schedule)
    if name not in SAMPLERS:
        raise UserError(f"there is no sampler {sampler!r}; choose one of {', '.join(SAMPLERS)}")
    if schedule.is_flow and name not in FLOW_SAMPLERS:
        raise UserError(f"the sampler {name} does not sample flow models; choose one of {', '.join(FLOW_SAMPLERS)}")
    if name in FLOW_SAMPLERS and not schedule.is_flow:
        raise UserError(
            f"the sampler {name} is for flow models, but the model's scheduler is {schedule.class_name}; choose "
            f"another one, for example {own_sampler(schedule)}"
        )
    if not 0 < num_steps <= len(schedule.signal_T):
        raise UserError(f"num_steps={num_steps} must be between 1 and {len(schedule.signal_T)}")
    if eta and name != "ddim":
        raise UserError(f"eta={eta} goes with the sampler ddim, but the sampler is {name}; set eta to 0")
    if noise_level and name not in NOISY_FLOW_SAMPLERS:
        raise UserError(
            f"noise_level={noise_level} goes with the samplers {' and '.join(NOISY_FLOW_SAMPLERS)}, but the sampler is "
            f"{name}; set noise_level to 0"
        )
    if not 0 < strength <= 1:
        raise UserError(f"strength={strength} is a share of the steps; it must be above 0 and at most 1")
    taken = num_steps - int(num_steps - num_steps * strength) if schedule.is_flow else int(num_steps * strength)
    if not taken:
        raise UserError(f"strength={strength} of num_steps={num_steps} is less than one step; raise either")
    amount = {"eta": eta, "noise_level": noise_level}
    options: dict[str, Any] = {option: value for option, value in amount.items() if value}
    if schedule.is_flow:
        options["image_tokens"] = image_tokens
    return _last(SAMPLERS[name](schedule, num_steps, **options), taken)


def ddim(schedule: Schedule, num_steps: int, eta: float = 0.0) -> SamplerTable:
    """Return the table of DDIM (arXiv 2010.02502, equations 12 and 16), as diffusers' `DDIMScheduler` computes it.

    As for all samplers here, it is a UserError if the schedule does not suit the sampler or the number of steps.
    """
    t_S = _timesteps(schedule, num_steps, "leading").round().astype(int)
    before_S = t_S - len(schedule.signal_T) // num_steps
    next_signal_S = np.where(before_S < 0, schedule.final_signal, schedule.signal_T[before_S])
    next_noise_S = np.where(before_S < 0, schedule.final_noise, schedule.noise_T[before_S])
    steps = _begin(schedule, t_S, schedule.signal_T[t_S], schedule.noise_T[t_S])
    return SamplerTable(1.0, _towards(steps, next_signal_S, next_noise_S, eta))


def euler(schedule: Schedule, num_steps: int, eta: float = 0.0) -> SamplerTable:
    """Return the table of Euler's method for the probability flow (arXiv 2206.00364, algorithm 1).

    It is that of diffusers' `EulerDiscreteScheduler`. In these latents it is DDIM with other levels: each step leads to
    the level at which the next one begins.
    """
    _check_fields("euler", schedule)
    t_S = _timesteps(schedule, num_steps, "linspace").astype(np.float32)
    steps = _begin(schedule, t_S, *_levels(schedule, t_S))
    next_signal_S, next_noise_S = _following(schedule, steps)
    # diffusers divides these latents by their signal, and the final ones stay divided.
    next_signal_S[-1], next_noise_S[-1] = 1.0, next_noise_S[-1] / next_signal_S[-1]
    start = 1.0 if _spacing(schedule, "linspace") == "leading" else float(steps.noise[0])  # as `init_noise_sigma`
    return SamplerTable(start, _towards(steps, next_signal_S, next_noise_S, eta))


def euler_ancestral(schedule: Schedule, num_steps: int) -> SamplerTable:
    """Return the table of diffusers' `EulerAncestralDiscreteScheduler`, `euler` with the noise of DDPM (SDXL-Turbo)."""
    return euler(schedule._replace(sampler_fields={}), num_steps, eta=1.0)  # that class has no such fields


def dpmsolver_multistep(schedule: Schedule, num_steps: int) -> SamplerTable:
    """Return the table of DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2): diffusers' `DPMSolverMultistepScheduler`."""
    _check_fields("dpmsolver++", schedule)
    # If the spacing includes timestep 0, it is the end of sampling and not a step.
    count = num_steps if _spacing(schedule, "linspace") == "trailing" else num_steps + 1
    t_S = _timesteps(schedule, count, "linspace").round()[:num_steps]
    if len(np.unique(t_S)) < num_steps:
        raise UserError(
            f"num_steps={num_steps} is too many for dpmsolver++ with {len(schedule.signal_T)} timesteps; take fewer"
        )
    steps = _begin(schedule, t_S, *_levels(schedule, t_S))
    next_signal_S, next_noise_S = _following(schedule, steps)
    steps = _towards(steps, next_signal_S, next_noise_S)

    fields = schedule.sampler_fields
    is_second_order_S = np.arange(num_steps) > 0
    ends_early = fields.get("lower_order_final", True) and num_steps < 15
    if ends_early or fields.get("euler_at_final", False) or next_noise_S[-1] == 0:
        is_second_order_S[-1] = False
    with np.errstate(divide="ignore"):  # no noise is left at the end
        width_S = np.log(next_signal_S / next_noise_S) - np.log(steps.signal / steps.noise)
    # Over the width of a step in log(signal / noise), x0 is extrapolated to the middle from its last change.
    changes_S = np.zeros(num_steps)
    changes_S[1:] = width_S[1:] / width_S[:-1] / 2
    extrapolated_S = steps.b * np.where(is_second_order_S, changes_S, 0)
    return SamplerTable(1.0, steps._replace(b=steps.b + extrapolated_S, c=-extrapolated_S))


def lcm(schedule: Schedule, num_steps: int) -> SamplerTable:
    """Return the table of latent consistency sampling (arXiv 2310.04378, algorithm 3): diffusers' `LCMScheduler`."""
    original = schedule.sampler_fields.get("original_inference_steps", 50)
    if num_steps > original:
        raise UserError(
            f"num_steps={num_steps} is too many: the consistency model was made for at most {original} steps"
        )
    learned = np.arange(original, 0, -1) * (len(schedule.signal_T) // original) - 1
    t_S = learned[np.linspace(0, original, num_steps, endpoint=False).astype(int)]
    steps = _begin(schedule, t_S, schedule.signal_T[t_S], schedule.noise_T[t_S])
    # The image mixes the prediction with a little of the latents: arXiv 2303.01469, equation 5, with sigma_data = 0.5.
    scaled_S = t_S * schedule.sampler_fields.get("timestep_scaling", 10.0)
    skip_S, out_S = 0.25 / (scaled_S**2 + 0.25), scaled_S / np.sqrt(scaled_S**2 + 0.25)
    # Every step but the last then draws all of its noise again.
    next_signal_S, fresh_S = np.append(steps.signal[1:], 1.0), np.append(steps.noise[1:], 0.0)
    return SamplerTable(1.0, steps._replace(a=next_signal_S * skip_S, b=next_signal_S * out_S, d=fresh_S))


def flow_euler(schedule: Schedule, num_steps: int, *, image_tokens: int | None = None) -> SamplerTable:
    """Return the table of Euler's method for flow matching: diffusers' `FlowMatchEulerDiscreteScheduler`.

    A step is `x' = x + (sigma' - sigma) v`, or with `stochastic_sampling` in the scheduler's file
    `x' = (1 - sigma') x0 + sigma' z`. See `flow_matching.sampling_sigmas` for the levels.
    """
    steps, next_noise_S = _begin_flow(schedule, num_steps, image_tokens)
    if schedule.sampler_fields["stochastic_sampling"]:
        return SamplerTable(1.0, steps._replace(b=1 - next_noise_S, d=next_noise_S))
    return SamplerTable(1.0, _towards(steps, 1 - next_noise_S, next_noise_S))


def flow_sde(
    schedule: Schedule, num_steps: int, *, image_tokens: int | None = None, noise_level: float = 0.7
) -> SamplerTable:
    """Return the table of Flow-GRPO's SDE steps (arXiv 2505.05470), at the levels of `flow_euler`.

    With `dt = sigma' - sigma` below 0 and `g = noise_level sqrt(sigma / (1 - sigma))`, a step is
    `x' = x (1 + g^2 dt / (2 sigma)) + v dt (1 + g^2 (1 - sigma) / (2 sigma)) + g sqrt(-dt) z`. At sigma = 1, where g
    has no value, 1 - sigma is taken from the second level, as in the released code
    (https://github.com/yifan123/flow_grpo). As there, the last step adds noise too, which nothing removes from the
    image; the last step of `flow_cps` adds none.
    """
    steps, next_noise_S = _begin_flow(schedule, num_steps, image_tokens)
    sigma_S, dt_S = steps.noise, next_noise_S - steps.noise
    variance_S = noise_level**2 * sigma_S / (1 - np.where(sigma_S == 1, next_noise_S[0], sigma_S))  # g^2
    # v = (x - x0) / sigma
    velocity_S = dt_S * (1 + variance_S * (1 - sigma_S) / (2 * sigma_S)) / sigma_S
    a_S = 1 + variance_S * dt_S / (2 * sigma_S) + velocity_S
    return SamplerTable(1.0, steps._replace(a=a_S, b=-velocity_S, d=np.sqrt(-variance_S * dt_S)))


def flow_cps(
    schedule: Schedule, num_steps: int, *, image_tokens: int | None = None, noise_level: float = 0.8
) -> SamplerTable:
    """Return the table of coefficients-preserving sampling (CPS, arXiv 2509.05952), at the levels of `flow_euler`.

    With `g = sigma' sin(noise_level pi / 2)` and `x1 = x + (1 - sigma) v`, the noise that the network predicts, a step
    is `x' = (1 - sigma') x0 + sqrt(sigma'^2 - g^2) x1 + g z`: the latents have signal and noise of level sigma', as the
    network expects. The last step, to sigma' = 0, adds no noise.

    As in released code, log-probabilities are `-(x' - mean)^2`, up to a constant: 2 g^2 times those of the normal
    distribution, by which the steps with the least noise would outweigh all others.
    """
    if noise_level > 1:
        raise UserError(
            f"noise_level={noise_level} of the sampler flow_cps is a share of the noise; set it to at most 1"
        )
    steps, next_noise_S = _begin_flow(schedule, num_steps, image_tokens)
    fresh_S = next_noise_S * np.sin(noise_level * np.pi / 2)
    a_S = np.sqrt(np.maximum(next_noise_S**2 - fresh_S**2, 0)) / steps.noise
    b_S = 1 - next_noise_S - a_S * steps.signal
    return SamplerTable(1.0, steps._replace(a=a_S, b=b_S, d=fresh_S, w=2 * fresh_S**2))


SAMPLERS: dict[str, Callable[..., SamplerTable]] = {
    "ddim": ddim,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "dpmsolver++": dpmsolver_multistep,
    "lcm": lcm,
    "flow_euler": flow_euler,
    "flow_sde": flow_sde,
    "flow_cps": flow_cps,
}
FLOW_SAMPLERS = ("flow_euler", "flow_sde", "flow_cps")
"""The samplers of flow models, which sample no other models."""
NOISY_FLOW_SAMPLERS = ("flow_sde", "flow_cps")
"""Those that add noise, by `noise_level`; its defaults are the published ones."""
SAMPLER_OF_CLASS = {
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "DPMSolverMultistepScheduler": "dpmsolver++",
    "LCMScheduler": "lcm",
    flow_matching.CLASS_NAME: "flow_euler",
}


# The fields of a scheduler's file of which a sampler supports only one value.
ANY_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
ONLY_VALUES: dict[str, dict[str, Any]] = {
    "euler": ANY_SIGMAS | {"interpolation_type": "linear"},
    "dpmsolver++": ANY_SIGMAS
    | {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "variance_type": None}
    | {"use_lu_lambdas": False, "lambda_min_clipped": -np.inf},
}


def own_sampler(schedule: Schedule) -> str:
    """Return the sampler that the scheduler's file names; "ddim" for classes and settings that are not supported."""
    name = SAMPLER_OF_CLASS.get(schedule.class_name, "ddim")
    return "ddim" if other_fields(name, schedule) else name


def other_fields(sampler: str, schedule: Schedule) -> list[str]:
    """Return the fields of the scheduler's file whose values this sampler does not support."""
    given, only = schedule.sampler_fields, ONLY_VALUES.get(sampler, {})
    return [name for name, value in only.items() if given.get(name) is not None and given[name] != value]


def _spacing(schedule: Schedule, default: str) -> str:
    return schedule.timestep_spacing or default


def _timesteps(schedule: Schedule, num_steps: int, default_spacing: str) -> Float[np.ndarray, " {num_steps}"]:
    """Return the timesteps to visit, highest first, as diffusers spaces them (arXiv 2305.08891, table 2).

    The linspace spacing falls between training timesteps; some samplers keep these values and others round them.
    """
    t_S: np.ndarray
    num_timesteps = len(schedule.signal_T)
    spacing = _spacing(schedule, default_spacing)
    if spacing == "linspace":
        t_S = np.linspace(0, num_timesteps - 1, num_steps)[::-1]
    elif spacing == "trailing":
        t_S = np.round(np.arange(num_timesteps, 0, -num_timesteps / num_steps)[:num_steps]) - 1
    else:
        t_S = np.arange(num_steps)[::-1] * (num_timesteps // num_steps) + schedule.steps_offset
    if t_S[0] >= num_timesteps:
        raise UserError(
            f"num_steps={num_steps} with steps_offset={schedule.steps_offset} of the scheduler begins after the last "
            "timestep; take fewer steps"
        )
    return t_S.astype(float)


def _levels(
    schedule: Schedule, t_S: Float[np.ndarray, " S"]
) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"]]:
    """Return signal and noise at timesteps that may lie between two; diffusers interpolates noise / signal.

    The schedule must be variance-preserving.
    If the ratio is infinite, it takes 2^12 instead, so that such schedules have a beginning.
    """
    signal_T = np.where(schedule.signal_T == 0, 2.0**-12, schedule.signal_T)
    sigma_S = np.interp(t_S, np.arange(len(signal_T)), np.sqrt(1 / signal_T**2 - 1))
    signal_S = 1 / np.sqrt(sigma_S**2 + 1)
    return signal_S, sigma_S * signal_S


def _following(schedule: Schedule, steps: Steps) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"]]:
    """Return signal and noise at which the next step begins; after the last step, those of the image."""
    final = schedule.sampler_fields.get("final_sigmas_type", "zero")
    if final not in ("zero", "sigma_min"):
        raise UserError(
            f"the model's scheduler has final_sigmas_type={final!r}; only 'zero' and 'sigma_min' are supported"
        )
    signal, noise = (1.0, 0.0) if final == "zero" else (schedule.signal_T[0], schedule.noise_T[0])
    return np.append(steps.signal[1:], signal), np.append(steps.noise[1:], noise)


def _begin_flow(schedule: Schedule, num_steps: int, image_tokens: int | None) -> tuple[Steps, Float[np.ndarray, " S"]]:
    """Return the beginnings of a flow model's steps, and the noise levels that they lead to."""
    fields = schedule.sampler_fields
    sigma_V = flow_matching.sampling_sigmas(fields, schedule.timestep_spacing, num_steps, image_tokens)
    t_S = sigma_V[:-1] * np.float32(len(schedule.signal_T))
    noise_V = sigma_V.astype(np.float64)
    return _begin(schedule, t_S, 1 - noise_V[:-1], noise_V[:-1]), noise_V[1:]


def _begin(
    schedule: Schedule, t_S: Real[np.ndarray, " S"], signal_S: Float[np.ndarray, " S"], noise_S: Float[np.ndarray, " S"]
) -> Steps:
    """Return steps that begin at these levels; `_towards` completes them."""
    # Each target is linear in signal or noise (epsilon, velocity) or constant, so this also holds between timesteps.
    target_x0_S = np.interp(noise_S, schedule.noise_T, schedule.target_x0_T)
    target_noise_S = np.interp(signal_S, schedule.signal_T[::-1], schedule.target_noise_T[::-1])
    determinant_S = signal_S * target_noise_S - noise_S * target_x0_S
    if np.any(determinant_S == 0):
        raise UserError(
            "this schedule has zero signal at a sampled timestep, from which epsilon prediction cannot tell the image; "
            "sample with the model's own schedule, without zero_terminal_snr"
        )
    p_S, q_S = target_noise_S / determinant_S, -noise_S / determinant_S
    a_S = b_S = c_S = d_S = np.zeros(len(t_S))
    return Steps(t_S.astype(np.float32), signal_S, noise_S, p_S, q_S, a_S, b_S, c_S, d_S, np.ones(len(t_S)))


def _towards(
    steps: Steps, signal_S: Float[np.ndarray, " S"], noise_S: Float[np.ndarray, " S"], eta: float = 0.0
) -> Steps:
    """Return the steps leading to these levels: `x' = signal' x0 + kept eps + fresh z`, `kept^2 + fresh^2 = noise'^2`.

    With eta = 0 no noise is fresh; with eta = 1 as much is as in DDPM. An eta above 0 is for variance-preserving
    schedules, all else for any.
    """
    variance_S = (noise_S / steps.noise) ** 2 * (1 - (steps.signal / signal_S) ** 2)
    fresh_S = eta * np.sqrt(np.maximum(variance_S, 0))
    a_S = np.sqrt(np.maximum(noise_S**2 - fresh_S**2, 0)) / steps.noise
    return steps._replace(a=a_S, b=signal_S - a_S * steps.signal, d=fresh_S)


def _last(table: SamplerTable, count: int) -> SamplerTable:
    """Return the last `count` steps; the first of them has no image of a step before and uses its own instead."""
    steps = Steps(*(values_S[-count:].copy() for values_S in table.steps))
    steps.b[0] += steps.c[0]
    steps.c[0] = 0
    return table._replace(steps=steps)


def _check_fields(sampler: str, schedule: Schedule) -> None:
    """Raise a UserError if the scheduler's file has a value that this sampler does not support."""
    other = other_fields(sampler, schedule)
    if other:
        raise UserError(
            f"the model's scheduler has {other[0]}={schedule.sampler_fields[other[0]]!r}, but the sampler {sampler} "
            f"supports only {ONLY_VALUES[sampler][other[0]]!r}; choose another sampler, for example ddim"
        )
