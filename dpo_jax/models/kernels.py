"""Attention as one fused kernel that writes no product of queries and keys to memory. The kernels come from libraries
and are used for the inputs that they support.

Axes: N images, Q queries, S keys, h heads of d features, D = h * d.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from dpo_jax.models.execution import ATTENTION, attention_result
from dpo_jax.sharding import DATA_AXES

SPLASH_BLOCKS = (512, 256, 128)
"""Numbers of queries or keys that splash attention works on at a time; see `_block`."""


def choose(attention: str, dtype: DTypeLike, platform: str | None = None) -> str:
    """Return the implementation of attention: `attention`, or for "auto" the fastest of the platform.

    Args:
        attention: "auto", "xla" or a name in `KERNELS`.
        dtype: compute dtype.
        platform: "gpu" for NVIDIA GPUs that cuDNN's kernel supports, "tpu" or another; by default that of this process.
    """
    if attention != "auto":
        return attention
    platform = platform or _platform()
    if platform == "gpu" and jnp.dtype(dtype).itemsize == 2:
        return "cudnn"
    return "splash" if platform == "tpu" else "xla"


def _platform() -> str:
    """Return the platform of this process; "other gpu" for those of AMD and NVIDIA's before Ampere (2020)."""
    if jax.default_backend() != "gpu":
        return jax.default_backend()
    device = jax.local_devices()[0]
    is_amd = "rocm" in device.client.platform_version.lower()
    return "other gpu" if is_amd or float(device.compute_capability) < 8.0 else "gpu"


class Kernel(NamedTuple):
    """One library's implementation of attention."""

    takes: Callable[[jax.Array, jax.Array, int], bool]
    """Return whether it supports these queries [N, Q, D] and keys [N, S, D] with this number of heads."""
    attend: Callable[[jax.Array, jax.Array, jax.Array, int, jax.Array | None], jax.Array]
    """Map (queries, keys, values, number of heads, number of keys of each image or None for all) to [N, Q, D]."""


def cudnn_takes(query_NQD: jax.Array, key_NSD: jax.Array, num_heads: int) -> bool:
    """Return whether the dtype has 16 bits and the features of a head are a multiple of 8, at most 128."""
    features = query_NQD.shape[-1] // num_heads
    return features % 8 == 0 and features <= 128 and query_NQD.dtype.itemsize == 2


def cudnn(
    query_NQD: jax.Array,
    key_NSD: jax.Array,
    value_NSD: jax.Array,
    num_heads: int,
    num_keys_N: jax.Array | None = None,
) -> jax.Array:
    """Return multi-head attention [N, Q, D] computed by NVIDIA's kernel for GPUs."""
    # cuDNN does not support odd numbers of tokens, such as a caption's 77.
    rows, keys = key_NSD.shape[:2]
    if num_keys_N is None and keys % 8:
        num_keys_N = jnp.full(rows, keys, jnp.int32)
    padded = (_padded(x_NLD, 8) for x_NLD in (query_NQD, key_NSD, value_NSD))
    query_NQhd, key_NShd, value_NShd = (split_heads(x_NLD, num_heads) for x_NLD in padded)
    result_NQhd = jax.nn.dot_product_attention(
        query_NQhd, key_NShd, value_NShd, key_value_seq_lengths=num_keys_N, implementation="cudnn"
    )
    return attention_result(result_NQhd.reshape(rows, -1, query_NQD.shape[-1])[:, : query_NQD.shape[1]])


def splash_takes(query_NQD: jax.Array, key_NSD: jax.Array, num_heads: int) -> bool:
    """Return whether queries and keys fill the smallest blocks but for an eighth. A caption's 77 keys do not, but
    attention to them is only a twentieth of the total, and short rows are multiplied quickly."""
    return all(-x_NLD.shape[1] % SPLASH_BLOCKS[-1] <= x_NLD.shape[1] / 8 for x_NLD in (query_NQD, key_NSD))


def splash(
    query_NQD: jax.Array,
    key_NSD: jax.Array,
    value_NSD: jax.Array,
    num_heads: int,
    num_keys_N: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Return multi-head attention [N, Q, D] computed by JAX's own kernel for TPUs, written in Pallas.

    jit cannot split a Pallas kernel over devices, so this function does it, over the mesh that `sharding.on_mesh` has
    set: images over copies and parts of the model, heads over `tensor`. `interpret` runs it on any device, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention  # 1/6 s that only TPUs need

    features, queries, keys = query_NQD.shape[-1] // num_heads, query_NQD.shape[1], key_NSD.shape[1]
    block_q, block_kv = _block(queries), _block(keys)
    if num_keys_N is None and keys % block_kv:
        num_keys_N = jnp.full(len(key_NSD), keys, jnp.int32)
    query_NQD, key_NSD, value_NSD = (
        _padded(x_NLD, block) for x_NLD, block in ((query_NQD, block_q), (key_NSD, block_kv), (value_NSD, block_kv))
    )
    blocks = splash_attention.BlockSizes(block_q, block_kv, block_kv, block_q, block_kv, block_kv, block_q, block_kv)

    def of_device(num_keys_N: jax.Array | None, *arguments: jax.Array) -> jax.Array:
        query_NhQd, key_NhSd, value_NhSd = (split_heads(x, x.shape[-1] // features).swapaxes(1, 2) for x in arguments)
        segments = None
        if num_keys_N is not None:  # tokens attend to those of their own segment; padding is of another one
            queries, keys = query_NhQd.shape[2], key_NhSd.shape[2]
            is_key_NS = jnp.arange(keys) < num_keys_N[:, None]
            segments = splash_attention.SegmentIds(
                jnp.ones((len(is_key_NS), queries), jnp.int32), is_key_NS.astype(jnp.int32)
            )
        mask = splash_attention.FullMask((query_NhQd.shape[2], key_NhSd.shape[2]))
        kernel = splash_attention.make_splash_mha_single_device(
            splash_attention.MultiHeadMask([mask] * query_NhQd.shape[1]),
            block_sizes=blocks,
            residual_checkpoint_name=ATTENTION,
            interpret=interpret,
        )
        scaled_NhQd = query_NhQd * jnp.asarray(features**-0.5, query_NhQd.dtype)
        result_NhQd = jax.vmap(kernel)(scaled_NhQd, key_NhSd, value_NhSd, segments)
        return result_NhQd.swapaxes(1, 2).reshape(arguments[0].shape)

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        split = PartitionSpec(DATA_AXES, None, "tensor")
        specs = (PartitionSpec(DATA_AXES), split, split, split)
        of_device = jax.shard_map(of_device, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
    return of_device(num_keys_N, query_NQD, key_NSD, value_NSD)[:, :queries]


def split_heads(x_NLD: jax.Array, num_heads: int) -> jax.Array:
    """Reshape [N, L, h * d] to [N, L, h, d]."""
    return x_NLD.reshape(*x_NLD.shape[:2], num_heads, -1)


def _block(length: int) -> int:
    """Return the largest block that pads the tokens by at most a sixteenth, or the smallest one."""
    return next((block for block in SPLASH_BLOCKS if -length % block <= length / 16), SPLASH_BLOCKS[-1])


def _padded(x_NLD: jax.Array, multiple: int) -> jax.Array:
    """Append zeros until the number of tokens is a multiple of `multiple`."""
    return jnp.pad(x_NLD, ((0, 0), (0, -x_NLD.shape[1] % multiple), (0, 0)))


KERNELS = {"cudnn": Kernel(cudnn_takes, cudnn), "splash": Kernel(splash_takes, splash)}
