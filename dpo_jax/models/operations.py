"""Normalisation, modulation and gating with hand-written derivatives that keep less for the backward pass.

Plain autodiff keeps intermediate values, most of them in float32. These functions keep their inputs in the dtype they
came in and a few statistics, and recompute the rest: elementwise operations, which the compiler fuses into their
consumers.

Statistics and sums use `accumulation_dtype`. Only first derivatives in reverse mode are supported, which is what the
gradient of a loss needs.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Kept = TypeVar("Kept")


PART = 128
"""Numbers that are added before sums are kept; see `_sum_in_two`."""


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Return the dtype in which norms, softmax and errors are reduced: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def as_kept(tree: Kept) -> Kept:
    """Mark values that the forward pass keeps for the backward pass.

    Without this the compiler finds that both passes compute the same intermediate values from them, and keeps those,
    which are larger.
    """
    return jax.lax.optimization_barrier(tree)


def _by_device(*args: Any, others: Callable[..., Any], gpus: Callable[..., Any]) -> Any:
    """Return the same of either function, of which XLA for GPUs makes less traffic of the second."""
    return jax.lax.platform_dependent(*args, default=others, cuda=gpus, rocm=gpus)


def group_norm(
    x: jax.Array, scale_C: jax.Array, bias_C: jax.Array, num_groups: int, epsilon: float, *, silu: bool = False
) -> jax.Array:
    """Group normalisation (Wu and He, arXiv 1803.08494) over all axes but the first, channels last; SiLU if `silu`."""
    x_NLC = x.reshape(x.shape[0], -1, x.shape[-1])
    return _group_norm(x_NLC, scale_C, bias_C, num_groups, epsilon, silu).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _group_norm(
    x_NLC: jax.Array, scale_C: jax.Array, bias_C: jax.Array, num_groups: int, epsilon: float, silu: bool
) -> jax.Array:
    return _group_norm_forward(x_NLC, scale_C, bias_C, num_groups, epsilon, silu)[0]


def _group_norm_forward(
    x_NLC: jax.Array, scale_C: jax.Array, bias_C: jax.Array, num_groups: int, epsilon: float, silu: bool
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """One pass over x gives the statistics of each channel, and these small arrays [N, C] those of the groups."""
    high, channels = accumulation_dtype(x_NLC.dtype), x_NLC.shape[-1]
    mean_NC, variance_NC = _by_device(
        x_NLC,
        others=functools.partial(_moments, add=lambda x_NLC: x_NLC.sum(1)),
        gpus=functools.partial(_moments, add=_sum_in_two),
    )
    mean_NG = _mean_of_groups(mean_NC, num_groups)
    between_NC = mean_NC - _to_channels(mean_NG, channels)
    variance_NG = _mean_of_groups(variance_NC + jnp.square(between_NC), num_groups)
    inverse_std_NG = jax.lax.rsqrt(variance_NG + epsilon)
    mean_N1C, inverse_std_N1C = (_to_channels(x_NG, channels)[:, None] for x_NG in (mean_NG, inverse_std_NG))
    y_NLC = (x_NLC.astype(high) - mean_N1C) * inverse_std_N1C * scale_C.astype(high) + bias_C.astype(high)
    kept = x_NLC, mean_NG, inverse_std_NG, scale_C, bias_C
    return (jax.nn.silu(y_NLC) if silu else y_NLC).astype(x_NLC.dtype), kept


def _group_norm_backward(
    num_groups: int, epsilon: float, silu: bool, kept: tuple[jax.Array, ...], dy_NLC: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One pass over x and dy sums each channel, another gives dx; both compute the derivative of SiLU."""
    x_NLC, mean_NG, inverse_std_NG, scale_C, bias_C = kept
    high, channels = accumulation_dtype(x_NLC.dtype), x_NLC.shape[-1]
    mean_N1C, inverse_std_N1C = (_to_channels(x_NG, channels)[:, None] for x_NG in (mean_NG, inverse_std_NG))
    inputs = as_kept((x_NLC, dy_NLC, mean_N1C, inverse_std_N1C, scale_C, bias_C))
    # Kept apart from the sums over images, or the compiler would make four passes of these two.
    sums = _by_device(
        *inputs,
        others=functools.partial(sums_of_slopes, silu=silu),
        gpus=functools.partial(sums_of_slopes_at_once, silu=silu),
    )
    dbias_NC, dscale_NC = as_kept(sums)
    # The components of the gradient that would change the mean or the variance of a group are removed.
    factor_C = scale_C.astype(high)
    of_mean_NG, of_variance_NG = (
        _mean_of_groups(sum_NC * factor_C, num_groups) / x_NLC.shape[1] for sum_NC in (dbias_NC, dscale_NC)
    )
    # Once more from the inputs: kept for the second pass, slopes and normed values would be two arrays in float32.
    inputs, of_mean_NG, of_variance_NG = as_kept((inputs, of_mean_NG, of_variance_NG))
    slope_NLC, normed_NLC = _slopes(*inputs, silu=silu)
    of_mean_N1C, of_variance_N1C = (_to_channels(x_NG, channels)[:, None] for x_NG in (of_mean_NG, of_variance_NG))
    dx_NLC = (slope_NLC * factor_C - of_mean_N1C - normed_NLC * of_variance_N1C) * inputs[3]
    return (
        dx_NLC.astype(x_NLC.dtype),
        dscale_NC.sum(0).astype(scale_C.dtype),
        dbias_NC.sum(0).astype(bias_C.dtype),
    )


_group_norm.defvjp(_group_norm_forward, _group_norm_backward)


def _moments(x_NLC: jax.Array, *, add: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Return mean and variance of each channel, [N, C], in one pass.

    The sums are of differences from the channel's first value: those of the values themselves would lose the variance
    of channels whose mean is large.
    """
    high, length = accumulation_dtype(x_NLC.dtype), x_NLC.shape[1]
    first_N1C = x_NLC[:, :1].astype(high)
    difference_NLC = x_NLC.astype(high) - first_N1C
    shift_NC, square_NC = add(difference_NLC) / length, add(jnp.square(difference_NLC)) / length
    return first_N1C[:, 0] + shift_NC, jnp.maximum(square_NC - jnp.square(shift_NC), 0)


def _slopes(
    x: jax.Array,
    dy: jax.Array,
    mean: jax.Array,
    inverse_std: jax.Array,
    scale_C: jax.Array,
    bias_C: jax.Array,
    *,
    silu: bool,
) -> tuple[jax.Array, jax.Array]:
    """Return the gradient before SiLU, and the normed values. All but the last two are [N, ..., C] or broadcast."""
    normed, dy = (x.astype(mean.dtype) - mean) * inverse_std, dy.astype(mean.dtype)
    if silu:
        y = normed * scale_C.astype(mean.dtype) + bias_C.astype(mean.dtype)
        sigmoid = jax.nn.sigmoid(y)
        dy = dy * sigmoid * (1 + y * (1 - sigmoid))
    return dy, normed


def sums_of_slopes(*inputs: jax.Array, silu: bool) -> tuple[jax.Array, jax.Array]:
    """Return the sums [N, C] over L of the gradient before SiLU, and of its product with the normed values."""
    slope_NLC, normed_NLC = _slopes(*inputs, silu=silu)
    return slope_NLC.sum(1), (slope_NLC * normed_NLC).sum(1)


def sums_of_slopes_at_once(*inputs: jax.Array, silu: bool) -> tuple[jax.Array, jax.Array]:
    """Return the same by one reduction over two copies.

    XLA's compiler for GPUs writes the slopes to memory, in float32, if two reductions read them.
    """
    of_pixels, of_channels = inputs[:4], inputs[4:]
    twice = (jnp.broadcast_to(x[:, :, None], (*x.shape[:2], 2, x.shape[2])) for x in of_pixels)
    slope_NL2C, normed_NL2C = _slopes(*twice, *of_channels, silu=silu)
    factor_NL2C = jnp.where(jnp.arange(2)[:, None] == 0, 1, normed_NL2C)
    sums_N2C = _sum_in_two(slope_NL2C * factor_NL2C)
    return sums_N2C[:, 0], sums_N2C[:, 1]


def _sum_in_two(x_NL: jax.Array) -> jax.Array:
    """Return the sum over L, first over parts of at most `PART` and then over these.

    XLA for GPUs writes what it adds to memory, in float32, where one sum over L would keep too few threads busy.
    """
    n, length = x_NL.shape[:2]
    part = max(size for size in range(1, PART + 1) if length % size == 0 and (2 * size <= length or size == 1))
    if part < 8:
        return x_NL.sum(1)
    return as_kept(x_NL.reshape(n, length // part, part, *x_NL.shape[2:]).sum(2)).sum(1)


def _mean_of_groups(x_NC: jax.Array, num_groups: int) -> jax.Array:
    return x_NC.reshape(x_NC.shape[0], num_groups, -1).mean(-1)


def _to_channels(x_NG: jax.Array, channels: int) -> jax.Array:
    return jnp.repeat(x_NG, channels // x_NG.shape[1], axis=1)


def layer_norm(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array, epsilon: float) -> jax.Array:
    """Layer normalisation (Ba et al., arXiv 1607.06450) over the last axis."""
    return _norm(x, scale_D, bias_D, epsilon)


def modulated_layer_norm(
    x_NLD: jax.Array, shift_N1D: jax.Array | None, scale_N1D: jax.Array, epsilon: float = 1e-6
) -> jax.Array:
    """Layer normalisation without parameters, times `1 + scale`, plus `shift` (Peebles and Xie, arXiv 2212.09748)."""
    scale_N1D = 1 + scale_N1D.astype(accumulation_dtype(x_NLD.dtype))
    shift_N1D = jnp.zeros_like(scale_N1D) if shift_N1D is None else shift_N1D
    return _norm(x_NLD, scale_N1D, shift_N1D, epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """Normalise to zero mean and unit variance over the last axis; `scale` and `bias` are broadcast to `x`."""
    return _norm_forward(x, scale, bias, epsilon)[0]


def _norm_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    high = accumulation_dtype(x.dtype)
    # Not in one pass as in `_moments`: XLA for GPUs knows this form and makes one kernel of the forward pass.
    mean = x.astype(high).mean(-1, keepdims=True)
    variance = jnp.square(x.astype(high) - mean).mean(-1, keepdims=True)
    inverse_std = jax.lax.rsqrt(variance + epsilon)
    y = (x.astype(high) - mean) * inverse_std * scale.astype(high) + bias.astype(high)
    return y.astype(x.dtype), (x, mean, inverse_std, scale, bias)


def _norm_backward(
    epsilon: float, kept: tuple[jax.Array, ...], dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, mean, inverse_std, scale, bias = as_kept(kept)
    high = accumulation_dtype(x.dtype)
    normed, dy = (x.astype(high) - mean) * inverse_std, dy.astype(high)
    dscale, dbias = _sum_to(dy * normed, scale.shape), _sum_to(dy, bias.shape)
    dnormed = dy * scale.astype(high)
    # Remove the components of the gradient that would change the mean or the variance.
    dx = dnormed - dnormed.mean(-1, keepdims=True) - normed * (dnormed * normed).mean(-1, keepdims=True)
    return (dx * inverse_std).astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(bias.dtype)


_norm.defvjp(_norm_forward, _norm_backward)


def _sum_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sum over the axes along which `shape` would be broadcast to `x`."""
    leading = x.ndim - len(shape)
    repeated = (leading + axis for axis, size in enumerate(shape) if size != x.shape[leading + axis])
    return x.sum((*range(leading), *repeated)).reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, scale_D: jax.Array | None, epsilon: float) -> jax.Array:
    """Root mean square normalisation (Zhang and Sennrich, arXiv 1910.07467) over the last axis, without a scale if it
    is None."""
    return _rms_norm_forward(x, scale_D, epsilon)[0]


def _rms_norm_forward(
    x: jax.Array, scale_D: jax.Array | None, epsilon: float
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array | None]]:
    high = accumulation_dtype(x.dtype)
    inverse_rms = jax.lax.rsqrt(jnp.square(x.astype(high)).mean(-1, keepdims=True) + epsilon)
    y = x.astype(high) * inverse_rms
    return (y if scale_D is None else y * scale_D.astype(high)).astype(x.dtype), (x, inverse_rms, scale_D)


def _rms_norm_backward(
    epsilon: float, kept: tuple[jax.Array, jax.Array, jax.Array | None], dy: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    x, inverse_rms, scale_D = as_kept(kept)
    high = accumulation_dtype(x.dtype)
    normed, dnormed, dscale_D = x.astype(high) * inverse_rms, dy.astype(high), None
    if scale_D is not None:
        dscale_D = _sum_to(dnormed * normed, scale_D.shape).astype(scale_D.dtype)
        dnormed = dnormed * scale_D.astype(high)
    # Remove the component of the gradient that would change the root mean square.
    dx = dnormed - normed * (dnormed * normed).mean(-1, keepdims=True)
    return (dx * inverse_rms).astype(x.dtype), dscale_D


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


@jax.custom_vjp
def gated_add(x_NLD: jax.Array, gate_N1D: jax.Array, y_NLD: jax.Array) -> jax.Array:
    """Return `x + gate * y`, rounded once."""
    return _gated_add_forward(x_NLD, gate_N1D, y_NLD)[0]


def _gated_add_forward(
    x_NLD: jax.Array, gate_N1D: jax.Array, y_NLD: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    high = accumulation_dtype(x_NLD.dtype)
    result_NLD = x_NLD.astype(high) + gate_N1D.astype(high) * y_NLD.astype(high)
    return result_NLD.astype(x_NLD.dtype), (gate_N1D, y_NLD)


def _gated_add_backward(
    kept: tuple[jax.Array, jax.Array], dresult_NLD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    gate_N1D, y_NLD = as_kept(kept)
    high = accumulation_dtype(dresult_NLD.dtype)
    dhigh_NLD = dresult_NLD.astype(high)
    dgate_N1D = _sum_to(dhigh_NLD * y_NLD.astype(high), gate_N1D.shape).astype(gate_N1D.dtype)
    return dresult_NLD, dgate_N1D, (dhigh_NLD * gate_N1D.astype(high)).astype(y_NLD.dtype)


gated_add.defvjp(_gated_add_forward, _gated_add_backward)


@jax.custom_vjp
def gelu_tanh(x: jax.Array) -> jax.Array:
    """Return the gelu in its approximation by tanh (Hendrycks and Gimpel, arXiv 1606.08415)."""
    return _gelu_tanh_forward(x)[0]


def _gelu_tanh_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.nn.gelu(x.astype(accumulation_dtype(x.dtype)), approximate=True).astype(x.dtype), x


def _gelu_tanh_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    x, high = as_kept(x), accumulation_dtype(x.dtype)
    _, pull = jax.vjp(jax.nn.gelu, x.astype(high))
    return (pull(dy.astype(high))[0].astype(x.dtype),)


gelu_tanh.defvjp(_gelu_tanh_forward, _gelu_tanh_backward)


@jax.custom_vjp
def geglu(x: jax.Array) -> jax.Array:
    """Return `a * gelu(b)` for the halves a and b of the last axis (Shazeer, arXiv 2002.05202), with the exact gelu."""
    return _geglu_forward(x)[0]


def _geglu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    value, gate = jnp.split(x.astype(accumulation_dtype(x.dtype)), 2, axis=-1)
    return (value * gate * _normal_cdf(gate)).astype(x.dtype), x


def _geglu_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    return (_by_device(as_kept(x), dy, others=geglu_slopes, gpus=geglu_slopes_at_once),)


def geglu_slopes(x: jax.Array, dy: jax.Array) -> jax.Array:
    high = accumulation_dtype(x.dtype)
    value, gate = jnp.split(x.astype(high), 2, axis=-1)
    below, density, dy = _normal_cdf(gate), _normal_density(gate), dy.astype(high)
    return jnp.concatenate([dy * gate * below, dy * value * (below + gate * density)], axis=-1).astype(x.dtype)


def geglu_slopes_at_once(x: jax.Array, dy: jax.Array) -> jax.Array:
    """One elementwise pass, in which each number of dx is computed from both halves of x.

    XLA for GPUs writes halves that are joined to memory first; XLA for TPUs, whose tiles hold no axis of 2, this.
    """
    high = accumulation_dtype(x.dtype)
    halves = x.reshape(*dy.shape[:-1], 2, dy.shape[-1]).astype(high)
    value, gate, dy = halves[..., :1, :], halves[..., 1:, :], dy[..., None, :].astype(high)
    below = _normal_cdf(gate)
    is_value = jnp.arange(2)[:, None] == 0
    dhalves = dy * jnp.where(is_value, gate * below, value * (below + gate * _normal_density(gate)))
    return dhalves.astype(x.dtype).reshape(x.shape)


geglu.defvjp(_geglu_forward, _geglu_backward)


def _normal_cdf(x: jax.Array) -> jax.Array:
    """Return P(X <= x) as PyTorch's gelu computes it; that of JAX is exact far below 0, and several times as long."""
    return (1 + jax.lax.erf(x * math.sqrt(0.5))) / 2


def _normal_density(x: jax.Array) -> jax.Array:
    return jnp.exp(-jnp.square(x) / 2) / math.sqrt(2 * math.pi)


@jax.custom_vjp
def swiglu(gate: jax.Array, value: jax.Array) -> jax.Array:
    """Return `silu(gate) * value` (Shazeer, arXiv 2002.05202)."""
    return _swiglu_forward(gate, value)[0]


def _swiglu_forward(gate: jax.Array, value: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    high = accumulation_dtype(gate.dtype)
    return (jax.nn.silu(gate.astype(high)) * value.astype(high)).astype(gate.dtype), (gate, value)


def _swiglu_backward(kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate, value = as_kept(kept)
    high = accumulation_dtype(gate.dtype)
    wide, dy = gate.astype(high), dy.astype(high)
    sigmoid = jax.nn.sigmoid(wide)
    dgate = dy * value.astype(high) * sigmoid * (1 + wide * (1 - sigmoid))
    return dgate.astype(gate.dtype), (dy * wide * sigmoid).astype(value.dtype)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)
