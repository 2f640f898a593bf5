"""The layers that every model here is built of.

Arrays are channels-last: images `x_NHWC`, sequences `x_NLD`. Parameters are stored in the dtype that the module's owner
chose (float32 masters for the policy, bfloat16 for a frozen reference) and cast to the compute `dtype` where they are
used. Normalisation accumulates in float32, or in float64 if that is the compute dtype: the parity tests run everything
in double precision.

A parameter's `torch_axes` gives the order of its axes in a PyTorch checkpoint; see `weights/layout.py`.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from qwix import QArray

from dpo_jax.errors import UserError
from dpo_jax.models.operations import as_kept, group_norm, layer_norm, rms_norm
from dpo_jax.weights.quantised import dequantise

Initializer = Callable[..., jax.Array]

LINEAR_AXES = (1, 0)  # here (in, out), in torch (out, in)
CONV_AXES = (3, 2, 0, 1)  # here (height, width, in, out), in torch (out, in, height, width)

# PyTorch's default for linear and convolution layers: uniform with variance 1 / (3 fan_in).
torch_default_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def make_param(
    init: Initializer,
    rngs: nnx.Rngs,
    shape: Sequence[int],
    torch_axes: Sequence[int] | None = None,
    *,
    is_trainable: bool = True,
) -> nnx.Param:
    """Return a float32 parameter that records its PyTorch layout (the same as here unless `torch_axes` differs).

    With `is_trainable=False` it is a table that checkpoints hold and that training never changes.
    """
    axes = tuple(torch_axes) if torch_axes is not None else tuple(range(len(shape)))
    # This equals `rngs.params()`, whose update walks over everything traced so far: that takes minutes for SDXL.
    stream = rngs.params
    key = jax.random.fold_in(stream.key[...], stream.count[...])
    stream.count.set_value(stream.count[...] + 1)
    return nnx.Param(init(key, tuple(shape), jnp.float32), torch_axes=axes, is_trainable=is_trainable)


def summed_in(dtype: DTypeLike, product: Callable[..., jax.Array], x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return `product(x, kernel)`, a matrix product or convolution, in a `dtype` as wide as theirs or wider.

    The products of the derivative are computed in the dtype of the kernel, where its gradient is needed: products of
    float32 would take several times as long, and devices would exchange float32.
    """
    if x.dtype == kernel.dtype == dtype:
        return product(x, kernel)
    return _summed_wide(jnp.dtype(dtype), product, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed_wide(dtype: jnp.dtype, product: Callable[..., jax.Array], x: jax.Array, kernel: jax.Array) -> jax.Array:
    return product(x, kernel, preferred_element_type=dtype)


def _summed_wide_forward(
    dtype: jnp.dtype, product: Callable[..., jax.Array], x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _summed_wide(dtype, product, x, kernel), (x, kernel)


def _summed_wide_backward(
    dtype: jnp.dtype, product: Callable[..., jax.Array], kept: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    _, pull = jax.vjp(product, x.astype(kernel.dtype), kernel)
    dx, dkernel = pull(dy.astype(kernel.dtype))
    return dx.astype(x.dtype), dkernel


_summed_wide.defvjp(_summed_wide_forward, _summed_wide_backward)


def product_with(
    kernel: nnx.Param, rounded: DTypeLike, dtype: DTypeLike, product: Callable[..., jax.Array], x: jax.Array
) -> jax.Array:
    """Return `product(x, kernel)` in `dtype`, as `summed_in`, with a kernel that is first rounded or multiplied out."""
    held = kernel.get_value()
    if isinstance(held, QArray):
        return _product_with_quantised(rounded, dtype, product, x, held)
    return summed_in(dtype, product, x, held.astype(rounded))


def _product_with_quantised(
    rounded: DTypeLike, dtype: DTypeLike, product: Callable[..., jax.Array], x: jax.Array, kernel: QArray
) -> jax.Array:
    """Return the product with a frozen kernel, which forward and backward pass each multiply out and do not keep.

    The barriers tie that to the product's other factor. Otherwise the compiler would multiply out once for policy,
    reference and backward pass, or before a loop, and keep the result, which is the whole model.
    """
    given = jax.ShapeDtypeStruct(x.shape, rounded)

    @jax.custom_vjp
    def multiply(x: jax.Array, kernel: QArray) -> jax.Array:
        x, kernel = as_kept((x, kernel))
        return product(x, dequantise(kernel, rounded), preferred_element_type=dtype)

    def forward(x: jax.Array, kernel: QArray) -> tuple[jax.Array, QArray]:
        return multiply(x, kernel), kernel

    def backward(kernel: QArray, dy: jax.Array) -> tuple[jax.Array, None]:
        dy, kernel = as_kept((dy.astype(rounded), kernel))
        (dx,) = jax.linear_transpose(lambda x: product(x, dequantise(kernel, rounded)), given)(dy)
        return dx, None

    multiply.defvjp(forward, backward)
    return multiply(x.astype(rounded), kernel)


class Adaptable(nnx.Module):
    """A layer to which `models/lora.py` can add a low-rank path (LoRA, arXiv 2106.09685)."""

    dtype: DTypeLike
    sums_wide: bool = False
    """True if all terms of the output are summed in at least float32 and rounded once at the end.

    It is set for a layer with a low-rank path, and for the same layer without it. A new adapter adds less than half of
    the last bit that bfloat16 keeps of an output, so most of what is added after rounding would be lost.
    """
    lora_A: "Adaptable | None" = None
    """Projection to `rank` features."""
    lora_B: "Adaptable | None" = None
    """Projection back to the layer's own output features."""
    lora_scale: float = 1.0
    """Scale of the low-rank path, alpha / rank."""
    lora_dropout: float = 0.0
    """Share of the low-rank path's inputs that are zeroed in training."""
    lora_keys_N: jax.Array | None = None
    """One dropout key per example of the input; None outside training."""

    @property
    def sum_dtype(self) -> DTypeLike:
        """Dtype in which the terms of the output are summed."""
        return jnp.promote_types(self.dtype, jnp.float32) if self.sums_wide else self.dtype

    def __call__(self, x_N: jax.Array) -> jax.Array:
        return self.plus_lora(x_N, self.own_output(x_N)).astype(self.dtype)

    def own_output(self, x_N: jax.Array) -> jax.Array:
        """Return the output without the low-rank path, in `sum_dtype`."""
        raise NotImplementedError

    def make_low_rank(self, rank: int, rngs: nnx.Rngs) -> tuple["Adaptable", "Adaptable"]:
        """Return the layers that become `lora_A` and `lora_B`."""
        raise NotImplementedError

    def plus_lora(self, x_N: jax.Array, y_N: jax.Array) -> jax.Array:
        """Return the layer's own output `y_N` plus that of the low-rank path if there is one."""
        if self.lora_A is None or self.lora_B is None:
            return y_N
        if self.lora_keys_N is not None and self.lora_dropout > 0:
            keep = 1 - self.lora_dropout
            kept_N = jax.vmap(lambda key: jax.random.bernoulli(key, keep, x_N.shape[1:]))(self.lora_keys_N)
            x_N = jnp.where(kept_N, x_N / keep, 0)
        return y_N + self.lora_B.own_output(self.lora_A(x_N)) * self.lora_scale


class Linear(Adaptable):
    """`y = x @ kernel + bias` over the last axis.

    The parameters are rounded to the dtype `rounded`, in which their gradients are computed, and multiplied in the
    compute `dtype`; None rounds to `dtype`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: DTypeLike,
        rounded: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        self.kernel = make_param(torch_default_init, rngs, (in_features, out_features), LINEAR_AXES)
        self.bias = make_param(nnx.initializers.zeros, rngs, (out_features,)) if use_bias else None
        self.dtype, self.rounded = dtype, rounded or dtype

    def own_output(self, x: jax.Array) -> jax.Array:
        y = product_with(self.kernel, self.rounded, self.sum_dtype, jnp.matmul, x.astype(self.dtype))
        return y if self.bias is None else y + self.bias[...].astype(self.rounded).astype(self.sum_dtype)

    def make_low_rank(self, rank: int, rngs: nnx.Rngs) -> tuple[Adaptable, Adaptable]:
        in_features, out_features = self.kernel.shape
        return (
            Linear(in_features, rank, use_bias=False, dtype=self.dtype, rngs=rngs),
            Linear(rank, out_features, use_bias=False, dtype=self.dtype, rngs=rngs),
        )


class Conv(Adaptable):
    """2D convolution of `x_NHWC`; `padding` is symmetric, or ((top, bottom), (left, right))."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        padding: int | tuple[tuple[int, int], tuple[int, int]] = 1,
        use_bias: bool = True,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        self.kernel = make_param(torch_default_init, rngs, shape, CONV_AXES)
        self.bias = make_param(nnx.initializers.zeros, rngs, (out_channels,)) if use_bias else None
        self.stride = stride
        self.padding = ((padding, padding), (padding, padding)) if isinstance(padding, int) else padding
        self.dtype = dtype

    def own_output(self, x_NHWC: jax.Array) -> jax.Array:
        convolve = functools.partial(
            jax.lax.conv_general_dilated,
            window_strides=(self.stride, self.stride),
            padding=self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        y_NHWC = product_with(self.kernel, self.dtype, self.sum_dtype, convolve, x_NHWC.astype(self.dtype))
        if self.bias is None:
            return y_NHWC
        return y_NHWC + self.bias[...].astype(self.dtype).astype(self.sum_dtype)

    def make_low_rank(self, rank: int, rngs: nnx.Rngs) -> tuple[Adaptable, Adaptable]:
        kernel_size, _, in_channels, out_channels = self.kernel.shape
        to_rank = Conv(
            in_channels,
            rank,
            kernel_size,
            stride=self.stride,
            padding=self.padding,
            use_bias=False,
            dtype=self.dtype,
            rngs=rngs,
        )
        return to_rank, Conv(rank, out_channels, 1, padding=0, use_bias=False, dtype=self.dtype, rngs=rngs)


class GroupNorm(nnx.Module):
    """Group normalisation over all axes but the first, channels last."""

    def __init__(self, num_groups: int, channels: int, *, epsilon: float, dtype: DTypeLike, rngs: nnx.Rngs):
        if channels % num_groups:
            raise UserError(f"GroupNorm: {channels} channels do not divide into {num_groups} groups")
        self.scale = make_param(nnx.initializers.ones, rngs, (channels,))
        self.bias = make_param(nnx.initializers.zeros, rngs, (channels,))
        self.num_groups, self.epsilon, self.dtype = num_groups, epsilon, dtype

    def __call__(self, x: jax.Array, *, silu: bool = False) -> jax.Array:
        """Normalise `x`; `silu` applies SiLU to the result."""
        scale_C, bias_C = (x[...].astype(self.dtype) for x in (self.scale, self.bias))
        return group_norm(x.astype(self.dtype), scale_C, bias_C, self.num_groups, self.epsilon, silu=silu)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis."""

    def __init__(self, features: int, *, epsilon: float = 1e-5, dtype: DTypeLike, rngs: nnx.Rngs):
        self.scale = make_param(nnx.initializers.ones, rngs, (features,))
        self.bias = make_param(nnx.initializers.zeros, rngs, (features,))
        self.epsilon, self.dtype = epsilon, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        scale_D, bias_D = (x[...].astype(self.dtype) for x in (self.scale, self.bias))
        return layer_norm(x.astype(self.dtype), scale_D, bias_D, self.epsilon)


class RMSNorm(nnx.Module):
    """Root mean square normalisation over the last axis."""

    def __init__(self, features: int, *, epsilon: float = 1e-6, dtype: DTypeLike, rngs: nnx.Rngs):
        self.scale = make_param(nnx.initializers.ones, rngs, (features,))
        self.epsilon, self.dtype = epsilon, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x.astype(self.dtype), self.scale[...].astype(self.dtype), self.epsilon)


class Embedding(nnx.Module):
    """A table of vectors looked up by integer ids."""

    def __init__(self, num_embeddings: int, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.embedding = make_param(nnx.initializers.normal(0.02), rngs, (num_embeddings, features))
        self.dtype = dtype

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.embedding[...].astype(self.dtype)[ids]
