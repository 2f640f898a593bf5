"""Products and convolutions, where a program's arithmetic is: their kinds, operations and bytes."""

import functools
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax.models.operations import AGAIN, ATTENTION

KINDS = ("convolution", "linear", "attention", "done again")
"""Convolutions and linear layers with their derivatives; attention's products of queries, keys and values; and all that
is computed once more for the backward pass instead of being kept."""


class Product(NamedTuple):
    """All that is done by one instruction, with its repetitions."""

    kind: str
    flops: float
    """2 per multiplication with its addition, those with padding and with zeros between inputs left out."""
    bytes: float
    """Of operands and result, each once."""
    dtypes: frozenset[str]
    """Of the operands, as HLO names them."""


class Sums(NamedTuple):
    flops: float
    bytes: float


def kind_of(scope: str, is_convolution: bool) -> str:
    """The kind of what was traced under these names."""
    # In a derivative a scope reads transpose(jvp(name)).
    if re.search(rf"\b({AGAIN}|rematted_computation)\b", scope):
        return "done again"
    if re.search(rf"\b{ATTENTION}\b", scope):
        return "attention"
    return "convolution" if is_convolution else "linear"


def sums_by_kind(products: Iterable[Product]) -> dict[str, Sums]:
    found = dict.fromkeys(KINDS, Sums(0.0, 0.0))
    for product in products:
        flops, size = found[product.kind]
        found[product.kind] = Sums(flops + product.flops, size + product.bytes)
    return found


class Window(NamedTuple):
    """How a convolution goes along one axis."""

    stride: int = 1
    padding: int = 0
    """Before the first input."""
    input_dilation: int = 1
    kernel_dilation: int = 1


def convolution_flops(
    outputs: float, channels: int, inputs: Sequence[int], kernel: Sequence[int], out: Sequence[int], along: list[Window]
) -> float:
    """Operations of a convolution.

    Args:
        outputs: batch size times output channels.
        channels: input channels that an output reads.
        inputs: sizes along the axes of space, of the inputs; so `kernel` and `out`.
        along: how it goes along them.
    """
    taps = 1
    for size, width, length, window in zip(inputs, kernel, out, along, strict=True):
        taps *= _taps(size, width, length, window)
    return 2.0 * outputs * channels * taps


@functools.cache
def _taps(size: int, width: int, length: int, window: Window) -> int:
    """Pairs of a place of the output and of the kernel that meet an input."""
    places = np.arange(length)[:, None] * window.stride + np.arange(width) * window.kernel_dilation - window.padding
    inside = (places >= 0) & (places <= (size - 1) * window.input_dilation) & (places % window.input_dilation == 0)
    return int(inside.sum())
