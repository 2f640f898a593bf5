"""Layers that are wider than their parameters take derivatives in the parameters' dtype."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dpo_jax.models.layers import Linear


def test_a_wide_layer_with_rounded_parameters_multiplies_gradients_in_their_dtype() -> None:
    """As in a timestep's embedding: float32 from weights in bfloat16, whose gradients devices exchange."""
    layer = Linear(32, 16, dtype=jnp.float32, rounded=jnp.bfloat16, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    x = jax.random.normal(jax.random.key(1), (64, 32))

    def loss(params, x):
        return jnp.square(nnx.merge(graph, params)(x)).sum()

    kernel = rounded["kernel"][...].astype(jnp.float32)
    y = nnx.merge(graph, rounded)(x)
    np.testing.assert_array_equal(y, x @ kernel)
    grads, dx = jax.grad(loss, (0, 1))(rounded, x)
    assert (grads["kernel"][...].dtype, dx.dtype) == (jnp.bfloat16, jnp.float32)
    for found, exact in ((grads["kernel"][...], 2 * x.T @ y), (dx, 2 * y @ kernel.T)):
        np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=0.02 * np.abs(exact).max())
    equations = jax.make_jaxpr(jax.grad(loss, (0, 1)))(rounded, x).eqns
    products = [equation.invars for equation in equations if equation.primitive.name == "dot_general"]
    assert {operand.aval.dtype.name for operands in products for operand in operands} == {"bfloat16"}
