"""Steps of a sampler, and the loop that takes them: each step of every sampler is one linear update.

With latents `x = signal x0 + noise eps`, each sampler computes an image from the network's prediction and updates by

    x0 = p x + q prediction
    x' = a x + b x0 + c x0_before + d z,    z standard normal

with numbers that depend on the step alone; `samplers.py` makes them. The distribution of a step is
`x' ~ N(a x + b x0 + c x0_before, d^2)`. diffusers scales the latents of some samplers by 1 / signal; here they are not
scaled.

Axes: N images, H x W latent cells, C channels, S sampling steps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Real

from dpo_jax.errors import UserError

Denoiser = Callable[[Float[Array, "N H W C"], Real[Array, " N"]], Float[Array, "N H W C"]]
"""`denoise(x_NHWC, t_N) -> prediction_NHWC`."""


class Steps(NamedTuple):
    """The numbers of each step: arrays over S, or scalars of one step inside the loop."""

    t: Float[Any, "..."]
    """Timestep that the network gets, float32; some samplers use values between two training timesteps."""
    signal: Float[Any, "..."]
    noise: Float[Any, "..."]
    """Signal and noise level of the latents before the step."""
    p: Float[Any, "..."]
    q: Float[Any, "..."]
    """x0 = p x + q prediction."""
    a: Float[Any, "..."]
    b: Float[Any, "..."]
    c: Float[Any, "..."]
    d: Float[Any, "..."]
    """x' = a x + b x0 + c x0_before + d z."""
    w: Float[Any, "..."]
    """Factor of the step's log-probability in training, 1 for most samplers."""


class SamplerTable(NamedTuple):
    """A sampler for a schedule and a number of steps."""

    start: float
    """Factor of the standard normal noise that sampling starts from."""
    steps: Steps


def sample(
    denoise: Denoiser, table: SamplerTable, x_NHWC: Float[Array, "N H W C"], keys_N: Key[Array, " N"] | None = None
) -> Float[Array, "N H W C"]:
    """Return clean latents x0_NHWC sampled from noise, in float32 or wider; the network is compiled once.

    Args:
        denoise: the network with weights, conditioning and guidance already bound.
        table: table of the sampler.
        x_NHWC: the result of `starting_latents`.
        keys_N: one key per image, for samplers that add noise; step i adds `step_noise(keys_N, i, ...)`.

    Raises:
        UserError: the sampler adds noise, but there are no keys.
    """
    return walk(denoise, table, x_NHWC, keys_N)[0]


def walk(
    denoise: Denoiser,
    table: SamplerTable,
    x_NHWC: Float[Array, "N H W C"],
    keys_N: Key[Array, " N"] | None = None,
    record: Callable[[Steps, Array, Array, Array], Any] = lambda step, x, mean, next_x: None,
) -> tuple[Float[Array, "N H W C"], Any]:
    """Return the result of `sample`, and those of `record(step, x_NHWC, mean_NHWC, next_x_NHWC)` stacked over S.

    Raises a UserError as `sample` does.
    """
    steps = table.steps
    is_random = adds_noise(table)
    if is_random and keys_N is None:
        raise UserError("this sampler adds noise at each step, so it needs keys_N, one key per image")
    # Latents stay float32 or wider between the steps, whatever the dtype of the network.
    x_NHWC = x_NHWC.astype(jnp.promote_types(x_NHWC.dtype, jnp.float32))

    def take(
        carry: tuple[Float[Array, "N H W C"], Float[Array, "N H W C"]], inputs: tuple[Array, Steps]
    ) -> tuple[Any, Any]:
        (x_NHWC, x0_before_NHWC), (i, step) = carry, inputs
        prediction_NHWC = denoise(x_NHWC, jnp.full(x_NHWC.shape[:1], step.t))
        x0_NHWC = step.p * x_NHWC + step.q * prediction_NHWC
        next_x_NHWC = mean_NHWC = step_mean(step, x_NHWC, x0_NHWC, x0_before_NHWC)
        if is_random and keys_N is not None:
            next_x_NHWC = mean_NHWC + step.d * step_noise(keys_N, i, mean_NHWC)
        return (next_x_NHWC, x0_NHWC), record(step, x_NHWC, mean_NHWC, next_x_NHWC)

    on_device = Steps(jnp.asarray(steps.t), *(jnp.asarray(values_S, x_NHWC.dtype) for values_S in steps[1:]))
    inputs = jnp.arange(len(steps.t)), on_device
    (x0_NHWC, _), records = jax.lax.scan(take, (x_NHWC, jnp.zeros_like(x_NHWC)), inputs)
    return x0_NHWC, records


def adds_noise(table: SamplerTable) -> bool:
    """Whether a step adds noise; numbers that are computed inside jit are not known, and may."""
    return isinstance(table.steps.d, jax.Array) or bool(np.any(table.steps.d))


def starting_latents(
    table: SamplerTable, noise_NHWC: Float[Array, "N H W C"], x0_NHWC: Float[Array, "N H W C"] | None = None
) -> Float[Array, "N H W C"]:
    """Return the latents before the first step: noise, or an image's latents with the noise of that level.

    Args:
        table: table of the sampler.
        noise_NHWC: standard normal noise.
        x0_NHWC: latents of an image to begin with (SDEdit, arXiv 2108.01073), with a table of `strength` below 1.
    """
    if x0_NHWC is None:
        return table.start * noise_NHWC
    return table.steps.signal[0] * x0_NHWC + table.steps.noise[0] * noise_NHWC


def step_mean(
    step: Steps,
    x_NHWC: Float[Array, "*N H W C"],
    x0_NHWC: Float[Array, "*N H W C"],
    x0_before_NHWC: Float[Array, "*N H W C"],
) -> Float[Array, "*N H W C"]:
    """Return the mean of the latents after a step; the standard deviation of each element is `step.d`.

    Args:
        step: one row of the table.
        x_NHWC: the latents before the step.
        x0_NHWC: the image (as latents) that the network predicts from them.
        x0_before_NHWC: the image predicted in the step before; the first step ignores it.
    """
    return step.a * x_NHWC + step.b * x0_NHWC + step.c * x0_before_NHWC


def step_noise(
    keys_N: Key[Array, " N"], i: Int[Array, ""] | int, like_NHWC: Float[Array, "N H W C"]
) -> Float[Array, "N H W C"]:
    """Return standard normal noise for step i like `like_NHWC`; that of an image depends on its own key alone."""

    def draw(key: Key[Array, ""]) -> Float[Array, "H W C"]:
        return jax.random.normal(jax.random.fold_in(key, i), like_NHWC.shape[1:], like_NHWC.dtype)

    return jax.vmap(draw)(keys_N)
