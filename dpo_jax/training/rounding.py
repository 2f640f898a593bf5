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
    """Return `x` in bfloat16: one of its two neighbours, the nearer with the larger probability; the mean is `x`."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    drawn = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type(((bits + drawn) >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))  # a carry would make infinity another number


def key_of(key: jax.Array, name: str) -> jax.Array:
    """Return the key of one parameter."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


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
