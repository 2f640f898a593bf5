"""The window: a few consecutive steps of a round, which alone add noise and are trained on.

It lies at a random place in the first half of the steps, another one in each round, as in Flow-GRPO-Fast
(https://github.com/yifan123/flow_grpo) and like MixGRPO's (arXiv 2507.21802). Images then have less noise, and updates
cost less. One compiled program draws all rounds: the place of the window is an argument of it.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dpo_jax.diffusion.steps import SamplerTable, Steps
from dpo_jax.methods import Method

PLAIN_SAMPLERS = {"ddim": "ddim", "flow_sde": "flow_euler", "flow_cps": "flow_euler"}
"""Samplers that may have a window, and those that take the steps outside of it."""
OF_WINDOWS = 2**20
"""Tells these random numbers from others of a seed and a round."""


def problems(config: ConfigDict, method: Method) -> Iterator[str]:
    """Yield what is wrong with `online.window`, as sentences with the remedy."""
    online = config.online
    if not online.window:
        return
    half = online.sampling_steps // 2
    if online.window > half:
        yield (
            f"config.online.window={online.window} must fit into the first half of the "
            f"online.sampling_steps={online.sampling_steps}. Set it to at most {half}"
        )
    if online.branching or not method.reads_transitions:
        other = "online.branching" if online.branching else f"{config.loss.name}, which learns from the images alone"
        yield f"config.online.window={online.window} does not go with {other}. Set it to 0"
    if online.sampler not in PLAIN_SAMPLERS:
        yield (
            f"config.online.window={online.window} is for the samplers {', '.join(PLAIN_SAMPLERS)}, but "
            f"online.sampler={online.sampler}. Change it, or set window to 0"
        )


def window_steps(config: ConfigDict, number: int) -> np.ndarray:
    """Return the rows of the sampler's table that are in the window of a round, int32."""
    last = config.online.sampling_steps // 2 - config.online.window
    first = np.random.default_rng([config.seed, number, OF_WINDOWS]).integers(last + 1)
    return np.arange(first, first + config.online.window, dtype=np.int32)


def with_window(table: SamplerTable, plain: SamplerTable, is_noisy_S: jax.Array) -> SamplerTable:
    """Return a table with the steps of `table` in the window, and those of `plain` elsewhere; for use inside jit."""
    numbers = zip(table.steps, plain.steps, strict=True)
    return SamplerTable(table.start, Steps(*(jnp.where(is_noisy_S, noisy_S, plain_S) for noisy_S, plain_S in numbers)))
