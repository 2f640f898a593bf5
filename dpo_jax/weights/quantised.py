"""Frozen weights in 8 or 4 bits, which layers multiply out where they use them.

They are arrays of qwix (`QArray`): numbers of one byte or less, and a scale in float32 for each output or block. XLA
keeps two numbers of 4 bits in a byte. Only the table of nf4 is looked up here: qwix gathers from it, which TPUs do one
number at a time.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import qwix
from jax.typing import DTypeLike
from qwix import QArray

from dpo_jax.weights.layout import ParamSpec

Held: TypeAlias = jax.Array | QArray
"""A weight in memory: plain, or quantised."""

QTYPES: dict[str, Any] = {"int8": jnp.int8, "nf4": "nf4", "float8": jnp.float8_e4m3fn}
"""qwix's types by the values of `memory.frozen`."""
BLOCK = 64
"""Numbers of an output that share a scale in nf4, as in QLoRA and bitsandbytes; fewer where 64 does not divide them."""
SMALL = 2**12
"""Weights with fewer numbers are not quantised."""
BLOCKS = re.compile(r"^(\w*block|\w*blocks|layers|\w+_refiner)\.")
"""The names of what is within a denoiser's blocks. The layers around them, the first, the last and those of time and
captions, are not quantised: they are small, and all that the blocks compute goes through them."""

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The values of nf4 (Dettmers et al., arXiv 2305.14314, appendix E), times the largest of a block."""


def is_quantised(name: str, spec: ParamSpec) -> bool:
    """Return whether a weight of the denoiser is quantised where `memory.frozen` asks for it."""
    return bool(name.endswith(".kernel") and math.prod(spec.shape) >= SMALL and BLOCKS.match(name))


def quantise(kernel: jax.Array, qtype: Any) -> QArray:
    """Return a kernel of shape [..., in, out] in one of the `QTYPES`.

    int8 and float8 have a scale for each output, and nf4 one for each block of `BLOCK` inputs of an output.
    """
    *_, inputs, output = range(kernel.ndim)
    if qtype != "nf4":
        return qwix.quantize(kernel.astype(jnp.float32), qtype, channelwise_axes=(output,))
    return qwix.quantize(
        kernel.astype(jnp.float32),
        "nf4",
        channelwise_axes=[axis for axis in range(kernel.ndim) if axis != inputs],
        tiled_axes={inputs: math.gcd(kernel.shape[inputs], BLOCK)},
    )


@functools.lru_cache(maxsize=1024)
def quantiser(places: QArray) -> Callable[[jax.Array], QArray]:
    """Return `quantise`, compiled, with a result of these shardings."""
    return jax.jit(functools.partial(quantise, qtype=places.qtype), out_shardings=places)


@functools.lru_cache(maxsize=1024)
def quantised_shape(shape: tuple[int, ...], qtype: Any) -> QArray:
    """Return the shapes and dtypes of a quantised kernel."""
    return jax.eval_shape(functools.partial(quantise, qtype=qtype), jax.ShapeDtypeStruct(shape, jnp.float32))


def dequantise(held: QArray, dtype: DTypeLike) -> jax.Array:
    """Return the kernel, multiplied by its scales in float32 and rounded once to `dtype`."""
    if held.qtype != "nf4":
        return qwix.dequantize(held).astype(dtype)
    *outer, blocks, outputs = held.scale.shape
    table = [jax.lax.full(held.shape, value, jnp.float32) for value in NF4]
    values = jax.lax.select_n(held.qvalue.astype(jnp.int32), *table).reshape(*outer, blocks, -1, outputs)
    return (values * held.scale[..., None, :]).reshape(held.shape).astype(dtype)


def rounded(held: Held, dtype: DTypeLike) -> Held:
    """Return a weight in `dtype`; what is quantised stays as it is, and is rounded where it is multiplied out."""
    return held if isinstance(held, QArray) else held.astype(dtype)
