"""How a config says to draw timesteps."""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dpo_jax.diffusion.densities import density_shares, even_shares
from dpo_jax.diffusion.schedule import Schedule
from dpo_jax.errors import UserError
from dpo_jax.training.defaults import FIELDS


def timestep_shares(loss: ConfigDict, schedule: Schedule) -> np.ndarray | None:
    """Return the probability of each training timestep, or None if all are equal.

    Args:
        loss: `config.loss`.
        schedule: schedule of the model.

    Raises:
        UserError: fields contradict each other or have no effect.
    """

    def is_set(name: str) -> bool:
        return bool(loss[name] != FIELDS[f"loss.{name}"].default)

    def first_set(*names: str) -> str | None:
        return next((f"config.loss.{name}={loss[name]!r}" for name in names if is_set(name)), None)

    if loss.log_snr_buckets:
        if other := first_set("timestep_density", "timestep_mean", "timestep_std", "timestep_shift"):
            raise UserError(
                f"config.loss.log_snr_buckets={loss.log_snr_buckets} and {other} both say how timesteps are drawn; "
                "leave one of them at its default"
            )
        return even_shares(schedule, loss.log_snr_buckets)
    density = loss.timestep_density or ("logit_normal" if schedule.is_flow else "uniform")
    if density == "uniform" and (other := first_set("timestep_mean", "timestep_std")):
        raise UserError(
            f"{other} has no effect, since timesteps are drawn uniformly; set "
            'config.loss.timestep_density="logit_normal" or remove it'
        )
    if density == "uniform" and not is_set("timestep_shift"):
        return None
    options: dict[str, Any] = {"mean": loss.timestep_mean, "std": loss.timestep_std, "shift": loss.timestep_shift}
    return density_shares(schedule, density, **options)
