"""A layer with a quantised kernel computes what it computes with the same kernel multiplied out, and keeps nothing."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dpo_jax.models.execution import Execution
from dpo_jax.models.layers import Conv, Linear
from dpo_jax.models.lora import LowRank, add_lora
from dpo_jax.weights.quantised import QTYPES, dequantise, quantise

WIDTH = 64
INPUTS = {Linear: (6, WIDTH), Conv: (2, 7, 7, WIDTH)}


class Block(nnx.Module):
    """A layer with a LoRA, and a nonlinearity."""

    def __init__(self, make: Callable[..., Any], seed: int):
        options = {"stride": 1} if make is Conv else {}
        self.layer = make(WIDTH, WIDTH, dtype=jnp.float32, rngs=nnx.Rngs(seed), **options)
        add_lora(self, {"layer": LowRank(4, 4)}, 0.0, nnx.Rngs(seed + 1))
        self.layer.lora_B.kernel[...] += 0.1

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + jnp.tanh(self.layer(x))


def gradients(make: Any, execution: Execution, hold: Callable[[jax.Array], Any]) -> Any:
    """Return the gradients of LoRAs and input of two blocks whose kernels are held as `hold` says."""
    graph, state = nnx.split(nnx.List([Block(make, 0), Block(make, 2)]))
    params = {path: value.get_value() for path, value in nnx.to_flat_state(state)}
    adapters = {path: value for path, value in params.items() if "lora_A" in path or "lora_B" in path}
    frozen = {path: value for path, value in params.items() if path not in adapters}
    frozen |= {path: hold(value) for path, value in frozen.items() if path[-1] == "kernel"}

    def loss(adapters: Any, x: jax.Array) -> jax.Array:
        blocks = nnx.merge(graph, nnx.from_flat_state([*(frozen | adapters).items()]))
        return jnp.square(execution.run_chain(list(blocks), x)).sum()

    x = jax.random.normal(jax.random.key(0), INPUTS[make])
    return jax.jit(jax.value_and_grad(loss, (0, 1)))(adapters, x)


@pytest.mark.parametrize(
    ("make", "kind", "execution"),
    [
        (Linear, "int8", Execution()),
        (Conv, "float8", Execution("block")),
        (Linear, "nf4", Execution("dots", scan=True)),
        (Conv, "nf4", Execution()),
    ],
)
def test_gradients_are_those_of_the_kernel_multiplied_out(make: Any, kind: str, execution: Execution) -> None:
    quantised = gradients(make, execution, lambda kernel: quantise(kernel, QTYPES[kind]))
    plain = gradients(make, Execution(), lambda kernel: dequantise(quantise(kernel, QTYPES[kind]), jnp.float32))
    for found, expected in zip(jax.tree.leaves(quantised), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_a_convolution_with_a_stride_has_the_gradient_of_its_input() -> None:
    layer = Conv(WIDTH, WIDTH, stride=2, dtype=jnp.float32, rngs=nnx.Rngs(0))
    held = quantise(layer.kernel[...], "nf4")
    x_NHWC = jax.random.normal(jax.random.key(0), (1, 6, 6, WIDTH))
    graph, state = nnx.split(layer)

    def loss(kernel: Any, x_NHWC: jax.Array) -> jax.Array:
        params = [(("kernel",), kernel), (("bias",), state["bias"].get_value())]
        return jnp.square(nnx.merge(graph, nnx.from_flat_state(params))(x_NHWC)).sum()

    found, expected = (jax.grad(loss, 1)(kernel, x_NHWC) for kernel in (held, dequantise(held, jnp.float32)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "block"])
def test_the_backward_pass_is_left_no_kernel(remat: str) -> None:
    """Of a layer's values the input and the quantised kernel are kept."""
    layer = Linear(WIDTH, 4 * WIDTH, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    held = quantise(layer.kernel[...], "nf4")
    graph, state = nnx.split(layer)

    def output(x: jax.Array) -> jax.Array:
        params = [(("kernel",), held), (("bias",), state["bias"].get_value())]
        return Execution(remat).run(nnx.merge(graph, nnx.from_flat_state(params)), x)

    _, pullback = jax.eval_shape(lambda x: jax.vjp(output, x), jax.ShapeDtypeStruct((4, WIDTH), jnp.bfloat16))
    kept = [x for x in jax.tree.leaves(pullback) if x.size >= held.qvalue.size]
    assert {x.dtype for x in kept} <= {jnp.dtype(jnp.uint4)}
