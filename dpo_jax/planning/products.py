"""Counts products and convolutions, which are nearly all of a program's arithmetic: kinds, operations and bytes."""

import functools
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax.models.attention import AGAIN, ATTENTION

KINDS = ("convolution", "linear", "attention", "done again")
"""Convolutions and linear layers with their derivatives; attention's products of queries, keys and values; and whatever
the backward pass computes again."""


class Product(NamedTuple):
    """One instruction, counted with its repetitions."""

    kind: str
    flops: float
    """2 per multiplication and addition, without those with padding or with zeros between inputs."""
    bytes: float
    """Bytes of operands and result, each counted once."""
    dtypes: frozenset[str]
    """Types of the operands, as HLO names them."""


class Sums(NamedTuple):
    """Operations and bytes of several products."""

    flops: float
    bytes: float


def kind_of(scope: str, is_convolution: bool) -> str:
    """Return the kind, one of KINDS, of a product that was traced in this scope."""
    # The scope of a derivative reads transpose(jvp(name)).
    if re.search(rf"\b({AGAIN}|rematted_computation)\b", scope):
        return "done again"
    if re.search(rf"\b{ATTENTION}\b", scope):
        return "attention"
    return "convolution" if is_convolution else "linear"


def sums_by_kind(products: Iterable[Product]) -> dict[str, Sums]:
    """Return the sums of each kind."""
    found = dict.fromkeys(KINDS, Sums(0.0, 0.0))
    for product in products:
        flops, size = found[product.kind]
        found[product.kind] = Sums(flops + product.flops, size + product.bytes)
    return found


class Window(NamedTuple):
    """The settings of a convolution along one axis."""

    stride: int = 1
    padding: int = 0
    """Zeros before the first input."""
    input_dilation: int = 1
    kernel_dilation: int = 1


def convolution_flops(
    outputs: float, channels: int, inputs: Sequence[int], kernel: Sequence[int], out: Sequence[int], along: list[Window]
) -> float:
    """Return the operations of a convolution.

    Args:
        outputs: batch size x output channels.
        channels: input channels that each output reads.
        inputs, kernel, out: sizes along the spatial axes.
        along: settings along these axes.
    """
    taps = 1
    for size, width, length, window in zip(inputs, kernel, out, along, strict=True):
        taps *= _taps(size, width, length, window)
    return 2.0 * outputs * channels * taps


@functools.cache
def _taps(size: int, width: int, length: int, window: Window) -> int:
    """Return the number of pairs of an output and a kernel position that read an input."""
    places = np.arange(length)[:, None] * window.stride + np.arange(width) * window.kernel_dilation - window.padding
    inside = (places >= 0) & (places <= (size - 1) * window.input_dilation) & (places % window.input_dilation == 0)
    return int(inside.sum())
