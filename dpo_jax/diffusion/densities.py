"""How often training draws each timestep: probabilities of `Schedule.training_timesteps`."""

import math

import numpy as np
from jaxtyping import Float

from dpo_jax.diffusion.schedule import Schedule, log_snr_table


def even_shares(schedule: Schedule, buckets: int) -> Float[np.ndarray, " _"]:
    """Return the probability of each training timestep for which all noise levels are drawn equally often.

    The range of log-SNR of the training timesteps is cut into buckets of equal width. Those that hold a timestep have
    equal probability, which their timesteps share equally. Pure noise counts to the bucket of the least signal.
    """
    log_snr_T = log_snr_table(schedule)[schedule.training_timesteps]
    finite = log_snr_T[np.isfinite(log_snr_T)]
    lowest, highest = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    place_T = (np.clip(log_snr_T, lowest, highest) - lowest) / (highest - lowest or 1.0)
    bucket_T = np.minimum((place_T * buckets).astype(int), buckets - 1)
    _, found_T, count = np.unique(bucket_T, return_inverse=True, return_counts=True)
    return 1 / (len(count) * count[found_T])


def density_shares(
    schedule: Schedule, density: str, *, mean: float = 0.0, std: float = 1.0, shift: float = 1.0
) -> Float[np.ndarray, " _"]:
    """Return the probability of each training timestep under a density of u, its place from pure noise 0 to image 1.

    A draw of u is the timestep `floor(count u)` of the training timesteps from most noise to least, as in diffusers'
    training scripts of Stable Diffusion 3 and FLUX. For flow matching, `1 - u` is sigma before the scheduler shifts it.

    Args:
        schedule: tells which timesteps are trained on.
        density: "uniform", or "logit_normal", the density of `sigmoid(mean + std N(0, 1))` (arXiv 2403.03206,
            equation 19, there of 1 - u).
        mean: above 0, less noise is drawn: `logit_mean` of diffusers' `compute_density_for_timestep_sampling`.
        std: its `logit_std`.
        shift: moves draws to more noise if above 1, as if the training table of a flow were shifted once more
            (`flow_matching.shifted`): shifts multiply.
    """
    import scipy.special  # a third of a second that most runs do not need

    order = np.argsort(-schedule.noise_T[schedule.training_timesteps], kind="stable")
    edges = np.arange(len(order) + 1) / len(order)
    with np.errstate(divide="ignore"):
        logit = np.log(edges) - np.log1p(-edges) + math.log(shift)
    below = scipy.special.expit(logit) if density == "uniform" else scipy.special.ndtr((logit - mean) / std)
    shares = np.empty(len(order))
    shares[order] = np.diff(below)
    return shares
