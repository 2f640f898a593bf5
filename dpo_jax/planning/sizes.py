"""Bytes of arrays that are known by shape, dtype and sharding."""

import math
from typing import Any

import jax


def stored_bytes(aval: Any) -> int:
    """Return the bytes of an array of this shape and dtype; of 4-bit integers, a byte holds two."""
    is_key = jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended)
    bits = 8 * aval.dtype.itemsize if is_key else jax.dtypes.itemsize_bits(aval.dtype)
    return math.ceil(math.prod(aval.shape) * bits / 8)


def held_bytes(tree: Any) -> float:
    """Return the bytes that one device holds of a pytree of sharded shapes."""
    return sum(stored_bytes(jax.ShapeDtypeStruct(_local(x), x.dtype)) for x in jax.tree.leaves(tree))


def missing_bytes(tree: Any) -> float:
    """Return the bytes of a pytree of sharded shapes that only other devices hold."""
    return whole_bytes(tree) - held_bytes(tree)


def whole_bytes(tree: Any) -> float:
    """Return the bytes of a pytree of shapes on all devices together, without copies."""
    return sum(map(stored_bytes, jax.tree.leaves(tree)))


def _local(x: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    return x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
