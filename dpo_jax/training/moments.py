"""Optimizer states that are stored in fewer bits, and computed in float32.

The 8 bits are those of bitsandbytes (arXiv 2110.02861): dynamic exponents, and one scale for each block of numbers.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpo_jax.training.rounding import key_of, stochastic_round
from dpo_jax.weights.layout import Params, Specs

MOMENTS = ("float32", "bfloat16", "int8")
BLOCK = 256
"""Most numbers that share a scale."""
SMALLEST = 4096
"""Parameters with fewer numbers keep float32, as do vectors."""
DECADES = 7
"""The powers of ten that codes cover, down from the block's largest number."""


class Codes(NamedTuple):
    """Numbers in 8 bits."""

    codes: jax.Array
    """uint8, in the shape of the parameter."""
    scales: jax.Array
    """float32: the largest magnitude of each block. Blocks lie along PyTorch's second axis (input features); the axis
    has their number here, so that arrays which are split along the first axis are split alike."""


def with_stored_moments(
    inner: optax.GradientTransformation, specs: Specs, kind: str, seed: int
) -> optax.GradientTransformation:
    """Return an optimizer that computes as `inner`, and keeps its moments as `kind` between steps.

    Args:
        inner: its state has dicts of moments by parameter; what is called `nu`, a mean of squares, is not negative.
        specs: the trained parameters.
        kind: one of `MOMENTS`. "bfloat16" rounds stochastically, since a mean over a thousand steps moves by less than
            the last bit. "int8" rounds to the nearest, as bitsandbytes does.
        seed: of the rounding.
    """
    if kind == "float32":
        return inner

    def init(params: Params) -> tuple[jax.Array, optax.OptState]:
        return jnp.zeros((), jnp.int32), encode(inner.init(params), jnp.zeros((), jnp.int32))

    def update(grads: Params, state: Any, params: Params | None = None) -> tuple[Any, Any]:
        step, stored = state
        updates, new = inner.update(grads, decode(stored), params)
        return updates, (step + 1, encode(new, step + 1))

    def encode(state: Any, step: jax.Array) -> Any:
        key = jax.random.fold_in(jax.random.key(seed), step)

        def one(path: tuple[Any, ...], x: jax.Array) -> Any:
            name, signed = _name(path), "nu" not in map(_field, path)
            if name not in specs:
                return x
            if kind == "bfloat16":
                return stochastic_round(x, key_of(key, jax.tree_util.keystr(path)))
            axis = block_axis(specs[name].torch_axes, x.shape)
            return x if axis is None else to_codes(x, axis, signed=signed)

        return jax.tree_util.tree_map_with_path(one, state)

    def decode(state: Any) -> Any:
        def one(path: tuple[Any, ...], x: Any) -> jax.Array:
            if isinstance(x, Codes):
                axis = block_axis(specs[_name(path)].torch_axes, x.codes.shape)
                assert axis is not None
                return from_codes(x, axis, signed="nu" not in map(_field, path))
            return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x

        return jax.tree_util.tree_map_with_path(one, state, is_leaf=lambda x: isinstance(x, Codes))

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def block_axis(torch_axes: tuple[int, ...], shape: tuple[int, ...]) -> int | None:
    """Return the axis along which blocks of a parameter lie, or None if it is kept in float32."""
    return torch_axes[1] if len(shape) >= 2 and math.prod(shape) >= SMALLEST else None


def to_codes(x: jax.Array, axis: int, *, signed: bool) -> Codes:
    """Return the nearest codes. Without `signed` no number may be negative, and there are twice as many for each."""
    blocked = _blocked(x, axis)
    scales = jnp.max(jnp.abs(blocked), axis=axis + 1, keepdims=True)
    code = magnitude_code(jnp.abs(blocked) / jnp.where(scales > 0, scales, 1), signed=signed)
    if signed:
        code = jnp.where(blocked < 0, 127 - jnp.minimum(code, 127), 127 + code)  # there is no code for -1
    return Codes(code.reshape(x.shape).astype(jnp.uint8), scales.squeeze(axis + 1))


def from_codes(stored: Codes, axis: int, *, signed: bool) -> jax.Array:
    """Return float32 numbers."""
    code = stored.codes.astype(jnp.int32)
    if signed:
        value = jnp.sign(code - 127) * magnitude(jnp.abs(code - 127), signed=True)
    else:
        value = magnitude(code, signed=False)
    blocked = _blocked(value, axis, count=stored.scales.shape[axis])
    return (blocked * jnp.expand_dims(stored.scales, axis + 1)).reshape(value.shape)


def magnitude_code(x: jax.Array, *, signed: bool) -> jax.Array:
    """Return the number, as int32, of the magnitude nearest to `x` in [0, 1].

    0 is the number of 0, and the last one that of 1. Decades end at powers of ten, and each has twice as many numbers
    as the one below it, at the centres of as many equal parts: computed, because looking values up is slow on TPUs.
    """
    first, last = _ends(signed)
    decade = jnp.clip(jnp.ceil(jnp.log10(jnp.maximum(x, 1e-30))) + DECADES - 1, 0, DECADES - 1)
    scale, count = jnp.exp2((decade - DECADES + 1) * math.log2(10)), first * jnp.exp2(decade)
    part = jnp.clip(jnp.floor((x / scale - 0.1) / 0.9 * count), 0, count - 1)
    # The last magnitude of the decade below is nearer than the first of this one up to here.
    is_below = (x < scale / 10 * (1 + 1.8 / count)) & (decade > 0)
    code = (count - first + 1 + part - is_below).astype(jnp.int32)
    code = jnp.where(x > 1 - 0.225 / (first << (DECADES - 1)), last, code)
    return jnp.where(x < (0.1 + 0.45 / first) * 10.0 ** (1 - DECADES) / 2, 0, code)


def magnitude(code: jax.Array, *, signed: bool) -> jax.Array:
    """Return the float32 magnitude of each number; see `magnitude_code`."""
    first, last = _ends(signed)
    place = (code + (first - 1)).astype(jnp.float32)  # from `first` x 2^decade on
    bits = jax.lax.bitcast_convert_type(place / first, jnp.int32)
    decade = ((bits >> 23) - 127).astype(jnp.float32)
    count = first * jax.lax.bitcast_convert_type(bits & 0x7F800000, jnp.float32)
    value = (0.1 + 0.9 * (place - count + 0.5) / count) * jnp.exp2((decade - DECADES + 1) * math.log2(10))
    return jnp.where(code == 0, 0.0, jnp.where(code == last, 1.0, value))


def _ends(signed: bool) -> tuple[int, int]:
    """Return how many magnitudes the lowest decade has, and the number of 1."""
    first = 1 if signed else 2
    return first, first * (2**DECADES - 1) + 1


def _blocked(x: jax.Array, axis: int, count: int = 0) -> jax.Array:
    """Return `x` with `axis` cut into blocks of equal size: as large as `BLOCK` allows, or `count` of them."""
    size = x.shape[axis]
    block = size // count if count else next(n for n in range(min(BLOCK, size), 0, -1) if size % n == 0)
    return x.reshape(*x.shape[:axis], size // block, block, *x.shape[axis + 1 :])


def _name(path: tuple[Any, ...]) -> str:
    """Return the parameter that a number of the state belongs to, or ""."""
    return next((str(key.key) for key in reversed(path) if isinstance(key, jax.tree_util.DictKey)), "")


def _field(key: Any) -> str:
    return getattr(key, "name", "")
