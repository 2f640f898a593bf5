"""The flow-matching process of Stable Diffusion 3, FLUX and Z-Image: its scheduler_config.json and noise levels.

The process is a straight line from image to noise (arXiv 2210.02747): at level sigma, signal is `1 - sigma` and noise
is `sigma`. All levels are rounded where diffusers' `FlowMatchEulerDiscreteScheduler` rounds them, so they match its
`sigmas` bit for bit.

Axes: T training timesteps, S sampling steps, V = S + 1.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
from jaxtyping import Float

from dpo_jax.diffusion.variance_preserving import MAX_TIMESTEPS
from dpo_jax.errors import UserError

CLASS_NAME = "FlowMatchEulerDiscreteScheduler"
"""The scheduler class of diffusers whose files this module reads."""

Shift = Annotated[float, pydantic.Field(gt=0, lt=1e9)]
Tokens = Annotated[int, pydantic.Field(ge=1, le=2**30)]


class FlowMatchingConfig(pydantic.BaseModel):
    """The fields of a scheduler_config.json of `CLASS_NAME`, all of which affect results."""

    num_train_timesteps: Annotated[int, pydantic.Field(ge=2, le=MAX_TIMESTEPS)]
    shift: Shift = 1.0
    use_dynamic_shifting: bool = False
    """Shift by the number of image tokens, and only when sampling."""
    base_shift: Annotated[float, pydantic.Field(ge=-100, le=100)] = 0.5
    max_shift: Annotated[float, pydantic.Field(ge=-100, le=100)] = 1.15
    base_image_seq_len: Tokens = 256
    max_image_seq_len: Tokens = 4096
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    shift_terminal: Annotated[float, pydantic.Field(ge=0, lt=1)] | None = None
    """Last level of the sampling steps, to which all are stretched; 0 and None do nothing."""
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    stochastic_sampling: bool = False
    """Draw all noise again in each step."""
    invert_sigmas: Literal[False] = False
    """True is only for Mochi, a video model, whose network takes 1 - sigma."""

    @pydantic.model_validator(mode="after")
    def _fields_fit(self) -> "FlowMatchingConfig":
        if self.base_image_seq_len >= self.max_image_seq_len:
            raise ValueError(
                f"base_image_seq_len={self.base_image_seq_len} must be below max_image_seq_len={self.max_image_seq_len}"
            )
        if bool(self.use_karras_sigmas) + bool(self.use_exponential_sigmas) + bool(self.use_beta_sigmas) > 1:
            raise ValueError("only one of use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas can be true")
        return self


def training_sigmas(fields: Mapping[str, Any]) -> Float[np.ndarray, " T"]:
    """Return the levels of the training timesteps, ascending, in float32.

    Args:
        fields: values of all fields of `FlowMatchingConfig`.
    """
    T = fields["num_train_timesteps"]
    sigma_T = np.arange(1, T + 1, dtype=np.float32) / np.float32(T)
    return sigma_T if fields["use_dynamic_shifting"] else shifted(sigma_T, fields["shift"])


def shifted(sigma: Float[np.ndarray, "..."], shift: float) -> Float[np.ndarray, "..."]:
    """Return levels with more noise for a shift above 1 (arXiv 2403.03206, equation 23); 0 and 1 do not move."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sampling_sigmas(
    fields: Mapping[str, Any], spacing: str, num_steps: int, image_tokens: int | None = None
) -> Float[np.ndarray, " V"]:
    """Return the levels before each step and the one after the last, which is 0, descending, in float32.

    Args:
        fields: values of all fields of `FlowMatchingConfig`.
        spacing: levels before they are shifted. "linspace": evenly from the highest to the lowest training level, as
            diffusers' scheduler does by itself. For a `shift` other than 1 they are then shifted a second time, so 10
            steps of SD3 end in a step from 0.0089 to 0. "trailing": evenly from 1 to 1 / num_steps, which diffusers'
            pipelines of FLUX and Z-Image hand to the scheduler. (Z-Image's computes them in float32, which changes the
            last bit of some.)
        num_steps: S.
        image_tokens: number of tokens of the image, for dynamic shifting.

    Raises:
        UserError: the number of tokens is missing, or there are no such levels for this number of steps.
    """
    sigma_S: Any
    if spacing == "trailing":
        sigma_S = np.linspace(1.0, 1 / num_steps, num_steps).astype(np.float32)
    else:
        T, table_T = fields["num_train_timesteps"], training_sigmas(fields)
        sigma_S = np.linspace(float(table_T[-1]) * T, float(table_T[0]) * T, num_steps) / T
    with np.errstate(divide="ignore", invalid="ignore"):
        if fields["use_dynamic_shifting"]:
            if image_tokens is None:
                raise UserError("the model's scheduler has use_dynamic_shifting=True; it needs the number of tokens")
            sigma_S = _dynamically_shifted(sigma_S, fields, image_tokens)
        else:
            sigma_S = shifted(sigma_S, fields["shift"])
        if fields["shift_terminal"]:
            left_S = 1 - sigma_S
            sigma_S = 1 - left_S / (left_S[-1] / (1 - fields["shift_terminal"]))
        sigma_S = _respaced(sigma_S, fields).astype(np.float32)
    if not (np.all(np.isfinite(sigma_S)) and np.all(np.diff(sigma_S) < 0) and 0 < sigma_S[-1] <= sigma_S[0] <= 1):
        raise UserError(
            f"num_steps={num_steps} with the settings of the model's scheduler gives noise levels from "
            f"{sigma_S[0]:.4g} to {sigma_S[-1]:.4g}, which must fall from at most 1 to above 0; take another number of "
            "steps"
        )
    return np.append(sigma_S, np.float32(0))


def dynamic_shift(fields: Mapping[str, Any], image_tokens: int) -> float:
    """Return diffusers' mu, which is linear in the number of image tokens; the shift itself is exp(mu) by default."""
    few, many = fields["base_image_seq_len"], fields["max_image_seq_len"]
    slope = (fields["max_shift"] - fields["base_shift"]) / (many - few)
    return float(image_tokens * slope + (fields["base_shift"] - slope * few))


def _dynamically_shifted(
    sigma_S: Float[np.ndarray, " S"], fields: Mapping[str, Any], image_tokens: int
) -> Float[np.ndarray, " S"]:
    mu = dynamic_shift(fields, image_tokens)
    shift = math.exp(min(mu, 700.0)) if fields["time_shift_type"] == "exponential" else mu
    return shift / (shift + (1 / sigma_S - 1) ** 1.0)  # the power, which changes nothing, is diffusers' sigma


def _respaced(sigma_S: Float[np.ndarray, " S"], fields: Mapping[str, Any]) -> Float[np.ndarray, " S"]:
    """Return as many levels between the same ends, spaced as one of the three fields says, if it is set."""
    first, last, num_steps = sigma_S[0].item(), sigma_S[-1].item(), len(sigma_S)
    if not (first > 0 and last > 0):  # `sampling_sigmas` refuses these
        return sigma_S
    if fields["use_karras_sigmas"]:  # arXiv 2206.00364, equation 5
        ends = [sigma ** (1 / 7.0) for sigma in (first, last)]
        return (ends[0] + np.linspace(0, 1, num_steps) * (ends[1] - ends[0])) ** 7.0
    if fields["use_exponential_sigmas"]:
        return np.exp(np.linspace(math.log(first), math.log(last), num_steps))
    if fields["use_beta_sigmas"]:  # arXiv 2407.12173
        import scipy.stats  # it takes a second, and hardly any scheduler asks for it

        return last + scipy.stats.beta.ppf(1 - np.linspace(0, 1, num_steps), 0.6, 0.6) * (first - last)
    return sigma_S
