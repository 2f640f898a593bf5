"""How often training draws each timestep: probabilities of `Schedule.training_timesteps`."""

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
