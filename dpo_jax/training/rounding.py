"""Stochastic rounding to bfloat16, which keeps weights that are stored so learning.

bfloat16 has 8 bits of precision, and an update is often smaller than half of a weight's last bit: rounding to the
nearest would lose every one of them. Rounding up with the probability of the part that is cut off keeps their mean
(arXiv 2010.06192). The draws follow from a key and the name of the parameter, so runs repeat bit by bit, on any mesh.
"""

import zlib

import jax
import jax.numpy as jnp

from dpo_jax.weights.layout import Params


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """Return `x` in bfloat16: one of its two neighbours, the nearer with the larger probability; the mean is `x`.

    `key` is of `key_of`.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    rounded = jax.lax.bitcast_convert_type(
        ((bits + (draws(key, x.shape) >> 16)) >> 16).astype(jnp.uint16), jnp.bfloat16
    )
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))  # a carry would make infinity another number


def draws(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return uniform uint32: hashes of the key and of each number's place.

    `jax.random.bits` has ten times as many operations, which for each of a UNet's arrays take long to compile.
    """
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(shape):  # not ravel, which would gather arrays that are split over devices
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return _hash(_hash(place ^ key[0]) + key[1])


def _hash(x: jax.Array) -> jax.Array:
    """Return a permutation of uint32 of which each bit of the input changes about half (lowbias32, C. Wellons)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def key_of(key: jax.Array, name: str) -> jax.Array:
    """Return two uint32 for one parameter, of a key as `jax.random.key` makes it."""
    return jax.random.key_data(jax.random.fold_in(key, zlib.crc32(name.encode())))


def store(values: Params, like: Params, key: jax.Array) -> Params:
    """Return values in the dtypes of `like`: bfloat16 is rounded to stochastically, all others to the nearest."""
    return {
        name: stochastic_round(x, key_of(key, name))
        if like[name].dtype == jnp.bfloat16 and x.dtype != jnp.bfloat16
        else x.astype(like[name].dtype)
        for name, x in values.items()
    }


def widened(params: Params) -> Params:
    """Return the arrays in float32, or in float64 where they are."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), params)
