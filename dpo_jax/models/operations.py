"""Normalisation, modulation, gating and attention with hand-written derivatives that keep less for the backward pass.

Plain autodiff keeps intermediate values, most of them in float32. These functions keep their inputs in the dtype they
came in and a few statistics, and recompute the rest: elementwise operations, which the compiler fuses into their
consumers, and the product of queries and keys, so that no array of queries by keys lasts until the backward pass
(Rabe and Staats, arXiv 2112.05682; Dao et al., arXiv 2205.14135).

Statistics and sums use `accumulation_dtype`. Only first derivatives in reverse mode are supported, which is what the
gradient of a loss needs.
"""

import functools
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dpo_jax.models.execution import attention_result
from dpo_jax.models.kernels import KERNELS, split_heads

ATTENTION = "attention"
"""Name scope of attention's products and softmax."""
Kept = TypeVar("Kept")
AGAIN = "again"
"""Name scope of products that are computed a second time for the backward pass."""


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Return the dtype in which norms, softmax and errors are reduced: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def as_kept(tree: Kept) -> Kept:
    """Mark values that the forward pass keeps for the backward pass.

    Without this the compiler finds that both passes compute the same intermediate values from them, and keeps those,
    which are larger.
    """
    return jax.lax.optimization_barrier(tree)


def group_norm(
    x: jax.Array, scale_C: jax.Array, bias_C: jax.Array, num_groups: int, epsilon: float, *, silu: bool = False
) -> jax.Array:
    """Group normalisation (Wu and He, arXiv 1803.08494) over all axes but the first, channels last; SiLU if `silu`."""
    groups = (num_groups, x.shape[-1] // num_groups)
    grouped = x.reshape(x.shape[0], -1, *groups)
    return _norm(grouped, scale_C.reshape(groups), bias_C.reshape(groups), (1, 3), epsilon, silu).reshape(x.shape)


def layer_norm(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array, epsilon: float) -> jax.Array:
    """Layer normalisation (Ba et al., arXiv 1607.06450) over the last axis."""
    return _norm(x, scale_D, bias_D, (-1,), epsilon, False)


def modulated_layer_norm(
    x_NLD: jax.Array, shift_N1D: jax.Array | None, scale_N1D: jax.Array, epsilon: float = 1e-6
) -> jax.Array:
    """Layer normalisation without parameters, times `1 + scale`, plus `shift` (Peebles and Xie, arXiv 2212.09748)."""
    scale_N1D = 1 + scale_N1D.astype(accumulation_dtype(x_NLD.dtype))
    shift_N1D = jnp.zeros_like(scale_N1D) if shift_N1D is None else shift_N1D
    return _norm(x_NLD, scale_N1D, shift_N1D, (-1,), epsilon, False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, axes: tuple[int, ...], epsilon: float, silu: bool
) -> jax.Array:
    """Normalise to zero mean and unit variance over `axes`; `scale` and `bias` are broadcast to `x`."""
    return _norm_forward(x, scale, bias, axes, epsilon, silu)[0]


def _norm_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, axes: tuple[int, ...], epsilon: float, silu: bool
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    high = accumulation_dtype(x.dtype)
    mean = x.astype(high).mean(axes, keepdims=True)
    variance = jnp.square(x.astype(high) - mean).mean(axes, keepdims=True)
    inverse_std = jax.lax.rsqrt(variance + epsilon)
    y = (x.astype(high) - mean) * inverse_std * scale.astype(high) + bias.astype(high)
    return (jax.nn.silu(y) if silu else y).astype(x.dtype), (x, mean, inverse_std, scale, bias)


def _norm_backward(
    axes: tuple[int, ...], epsilon: float, silu: bool, kept: tuple[jax.Array, ...], dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, mean, inverse_std, scale, bias = as_kept(kept)
    high = accumulation_dtype(x.dtype)
    normed, dy = (x.astype(high) - mean) * inverse_std, dy.astype(high)
    if silu:
        y = normed * scale.astype(high) + bias.astype(high)
        sigmoid = jax.nn.sigmoid(y)
        dy = dy * sigmoid * (1 + y * (1 - sigmoid))
    dscale, dbias = _sum_to(dy * normed, scale.shape), _sum_to(dy, bias.shape)
    dnormed = dy * scale.astype(high)
    # Remove the components of the gradient that would change the mean or the variance.
    dx = dnormed - dnormed.mean(axes, keepdims=True) - normed * (dnormed * normed).mean(axes, keepdims=True)
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
    return (value * jax.nn.gelu(gate, approximate=False)).astype(x.dtype), x


def _geglu_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    x, high = as_kept(x), accumulation_dtype(x.dtype)
    value, gate = jnp.split(x.astype(high), 2, axis=-1)
    dy = dy.astype(high)
    below = jax.scipy.stats.norm.cdf(gate)
    density = jnp.exp(-jnp.square(gate) / 2) / math.sqrt(2 * math.pi)
    dvalue, dgate = dy * gate * below, dy * value * (below + gate * density)
    return (jnp.concatenate([dvalue, dgate], axis=-1).astype(x.dtype),)


geglu.defvjp(_geglu_forward, _geglu_backward)


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


def attention(
    query_NQD: jax.Array,
    key_NSD: jax.Array,
    value_NSD: jax.Array,
    num_heads: int,
    *,
    num_keys_N: jax.Array | None = None,
    is_causal: bool = False,
    implementation: str = "xla",
) -> jax.Array:
    """Return multi-head scaled dot-product attention [N, Q, D] (Vaswani et al., arXiv 1706.03762, section 3.2).

    If `num_keys_N` (int32) is given, an image's keys after its first `num_keys_N` are padding, which nothing attends
    to. The first key always counts, so that no result is NaN.

    "xla" is written out because `jax.nn.dot_product_attention` computes the softmax in float32 even for float64 inputs.
    A name in `kernels.KERNELS` uses that kernel for the inputs that it supports; other inputs and the causal attention
    of captions use "xla".
    """
    if num_keys_N is not None:
        num_keys_N = jnp.maximum(num_keys_N, 1)
    if implementation != "xla" and not is_causal:
        kernel = KERNELS[implementation]
        if kernel.takes(query_NQD, key_NSD, num_heads):
            return kernel.attend(query_NQD, key_NSD, value_NSD, num_heads, num_keys_N)
    return _attention(query_NQD, key_NSD, value_NSD, num_keys_N, num_heads, is_causal)


LOGITS_BYTES = 2**27
"""Memory limit for one image's products of queries and keys; above it, the queries are processed in blocks."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(
    query_NQD: jax.Array,
    key_NSD: jax.Array,
    value_NSD: jax.Array,
    num_keys_N: jax.Array | None,
    num_heads: int,
    is_causal: bool,
) -> jax.Array:
    return _attention_forward(query_NQD, key_NSD, value_NSD, num_keys_N, num_heads, is_causal)[0]


@jax.named_scope(ATTENTION)
def _attention_forward(
    query_NQD: jax.Array,
    key_NSD: jax.Array,
    value_NSD: jax.Array,
    num_keys_N: jax.Array | None,
    num_heads: int,
    is_causal: bool,
) -> tuple[jax.Array, tuple[Any, ...]]:
    query_NQhd, key_NShd, value_NShd = (split_heads(x, num_heads) for x in (query_NQD, key_NSD, value_NSD))

    def of_block(query_NQhd: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_NhQS = _logits(query_NQhd, key_NShd, num_keys_N, is_causal)
        highest_NhQ1 = logits_NhQS.max(axis=-1, keepdims=True)
        weights_NhQS = jnp.exp(logits_NhQS - highest_NhQ1)
        sum_NhQ1 = weights_NhQS.sum(axis=-1, keepdims=True)
        weights_NhQS = (weights_NhQS / sum_NhQ1).astype(value_NShd.dtype)
        result_NQhd = jnp.einsum("NhQS,NShd->NQhd", weights_NhQS, value_NShd)
        return result_NQhd, (highest_NhQ1 + jnp.log(sum_NhQ1))[..., 0].swapaxes(1, 2)

    blocks = _num_blocks(query_NQhd, key_NShd, is_causal)
    if blocks == 1:
        result_NQhd, log_sum_NQh = of_block(query_NQhd)
    else:
        of_blocks = jax.lax.map(of_block, _split(query_NQhd, blocks))
        result_NQhd, log_sum_NQh = (_join(x_BNQ, query_NQD.shape[1]) for x_BNQ in of_blocks)
    # Both get one name: rematerialization that keeps the result needs the sums too, or it would recompute both.
    result_NQD = attention_result(result_NQhd.reshape(query_NQD.shape))
    log_sum_NQh = attention_result(log_sum_NQh)
    # Kept with the heads side by side because a TPU pads the last axis to 128.
    return result_NQD, (query_NQD, key_NSD, value_NSD, result_NQD, log_sum_NQh, num_keys_N)


@jax.named_scope(ATTENTION)
def _attention_backward(
    num_heads: int, is_causal: bool, kept: tuple[Any, ...], dresult_NQD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    *flat, log_sum_NQh, num_keys_N = as_kept(kept)
    query_NQhd, key_NShd, value_NShd, result_NQhd, dresult_NQhd = (
        split_heads(x, num_heads) for x in (*flat, dresult_NQD)
    )
    high, low = log_sum_NQh.dtype, query_NQhd.dtype
    # The derivative of the softmax: the weights sum to 1, so their common change is subtracted.
    together_NQh = jnp.einsum("NQhd,NQhd->NQh", dresult_NQhd, result_NQhd, preferred_element_type=high)

    def of_block(
        sums: tuple[jax.Array, jax.Array], block: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        query_NQhd, log_sum_NQh, dresult_NQhd, together_NQh = block
        with jax.named_scope(AGAIN):
            logits_NhQS = _logits(query_NQhd, key_NShd, num_keys_N, is_causal)
        weights_NhQS = jnp.exp(logits_NhQS - log_sum_NQh.swapaxes(1, 2)[..., None])
        dvalue_NShd = jnp.einsum("NhQS,NQhd->NShd", weights_NhQS.astype(low), dresult_NQhd, preferred_element_type=high)
        dweights_NhQS = jnp.einsum("NQhd,NShd->NhQS", dresult_NQhd, value_NShd, preferred_element_type=high)
        dlogits_NhQS = weights_NhQS * (dweights_NhQS - together_NQh.swapaxes(1, 2)[..., None])
        dlogits_NhQS = (dlogits_NhQS * query_NQhd.shape[-1] ** -0.5).astype(low)
        dkey_NShd = jnp.einsum("NhQS,NQhd->NShd", dlogits_NhQS, query_NQhd, preferred_element_type=high)
        dquery_NQhd = jnp.einsum("NhQS,NShd->NQhd", dlogits_NhQS, key_NShd)
        return (sums[0] + dkey_NShd, sums[1] + dvalue_NShd), dquery_NQhd

    blocks = _num_blocks(query_NQhd, key_NShd, is_causal)
    of_queries = query_NQhd, log_sum_NQh, dresult_NQhd, together_NQh
    zeros = jnp.zeros(key_NShd.shape, high), jnp.zeros(value_NShd.shape, high)
    if blocks == 1:
        (dkey_NShd, dvalue_NShd), dquery_NQhd = of_block(zeros, of_queries)
    else:
        split = tuple(_split(x, blocks) for x in of_queries)
        (dkey_NShd, dvalue_NShd), dquery_BNQhd = jax.lax.scan(of_block, zeros, split)
        dquery_NQhd = _join(dquery_BNQhd, query_NQhd.shape[1])
    dquery_NQD, dkey_NSD, dvalue_NSD = (x.reshape(*x.shape[:2], -1) for x in (dquery_NQhd, dkey_NShd, dvalue_NShd))
    return dquery_NQD, dkey_NSD.astype(low), dvalue_NSD.astype(low), None


_attention.defvjp(_attention_forward, _attention_backward)


def _logits(query_NQhd: jax.Array, key_NShd: jax.Array, num_keys_N: jax.Array | None, is_causal: bool) -> jax.Array:
    high = accumulation_dtype(query_NQhd.dtype)
    logits_NhQS = jnp.einsum("NQhd,NShd->NhQS", query_NQhd, key_NShd, preferred_element_type=high)
    logits_NhQS *= query_NQhd.shape[-1] ** -0.5
    if num_keys_N is not None:
        is_key_NS = jnp.arange(key_NShd.shape[1]) < num_keys_N[:, None]
        logits_NhQS = jnp.where(is_key_NS[:, None, None, :], logits_NhQS, -jnp.inf)
    if not is_causal:
        return logits_NhQS
    queries, keys = logits_NhQS.shape[-2:]
    sees_QS = jnp.tri(queries, keys, dtype=bool)
    return jnp.where(sees_QS, logits_NhQS, -jnp.inf)


def _num_blocks(query_NQhd: jax.Array, key_NShd: jax.Array, is_causal: bool) -> int:
    """Return a number of blocks of queries whose products fit into LOGITS_BYTES: a divisor if one is near."""
    _, queries, heads, _ = query_NQhd.shape
    size = heads * queries * key_NShd.shape[1] * accumulation_dtype(query_NQhd.dtype).itemsize
    if is_causal:  # a block would need its offset, and captions are short
        return 1
    needed = min(-(-size // LOGITS_BYTES), queries)
    return next((n for n in range(needed, 2 * needed) if queries % n == 0), needed)


def _split(x_NQ: jax.Array, blocks: int) -> jax.Array:
    """Reshape [N, Q, ...] to [blocks, N, Q / blocks, ...]; zeros fill the last block."""
    n, queries, *rest = x_NQ.shape
    x_NQ = jnp.pad(x_NQ, ((0, 0), (0, -queries % blocks), *[(0, 0)] * len(rest)))
    return jnp.moveaxis(x_NQ.reshape(n, blocks, -1, *rest), 1, 0)


def _join(x_BNQ: jax.Array, queries: int) -> jax.Array:
    """Undo `_split`."""
    return jnp.moveaxis(x_BNQ, 0, 1).reshape(x_BNQ.shape[1], -1, *x_BNQ.shape[3:])[:, :queries]
