"""Attention written out, with a derivative that computes the product of queries and keys again.

No array of queries by keys lasts until the backward pass (Rabe and Staats, arXiv 2112.05682; Dao et al., arXiv
2205.14135). `kernels.py` has libraries' fused kernels, which `attention` uses where it may.

Axes: N images, Q queries, S keys, h heads of d features, D = h * d.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.models.execution import attention_result
from dpo_jax.models.kernels import KERNELS, split_heads
from dpo_jax.models.operations import accumulation_dtype, as_kept

ATTENTION = "attention"
"""Name scope of attention's products and softmax."""
AGAIN = "again"
"""Name scope of products that are computed a second time for the backward pass."""


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
