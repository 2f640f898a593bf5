"""The gradient of a batch that is cut into micro-batches.

Axes: B prompts of a batch, A micro-batches, K candidates.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.batch import LossInputs, PreferenceBatch
from dpo_jax.methods.metrics import Metrics
from dpo_jax.training.rounding import store, widened
from dpo_jax.training.side_gradients import squares_of_slopes
from dpo_jax.weights.layout import Params


def sum_over(
    gradient: Callable[[Any], tuple[Params, Metrics]], micro: Any, like: Params, key: jax.Array
) -> tuple[Params, Metrics]:
    """Return the sum over micro-batches, [A, ...], of their metrics and of their gradients, in the dtypes of `like`.

    Sums in bfloat16 are rounded stochastically by `key`: a sum of many loses none of them on average.
    """
    _, no_sums = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], micro))
    zeros = jax.tree.map(jnp.zeros_like, (like, no_sums))  # zeros_like keeps the sharding of the parameters

    def add(total: tuple[Params, Metrics], part: tuple[jax.Array, Any]) -> tuple[tuple[Params, Metrics], None]:
        number, batch = part
        (grads, sums), (grad, metrics) = total, gradient(batch)
        added = jax.tree.map(jnp.add, widened(grads), widened(grad))
        return (
            store(added, grads, jax.random.fold_in(key, number)),
            jax.tree.map(lambda total, one: total + one.astype(total.dtype), sums, metrics),
        ), None

    total, _ = jax.lax.scan(add, zeros, (jnp.arange(1, len(jax.tree.leaves(micro)[0]) + 1), micro))
    return total


def gradient_of_whole_batch(
    inputs_of: Callable[[Params, PreferenceBatch], LossInputs],
    summed: Callable[[LossInputs], tuple[jax.Array, Metrics]],
    params: Params,
    micro: PreferenceBatch,
    like: Params,
    key: jax.Array,
) -> tuple[Params, Metrics]:
    """Return gradient and metrics of a loss in which a prompt's share depends on prompts of other micro-batches.

    A first pass computes the errors of all micro-batches; the loss of the whole batch gives the slope along each error.
    A second pass sums the gradients of the errors, times their slopes, which is the gradient of the loss; it has the
    predictions, too, and so the squares of `side_gradients`.
    """

    def numbers(_: None, batch: PreferenceBatch) -> tuple[None, LossInputs]:
        inputs = jax.lax.stop_gradient(inputs_of(params, batch))
        inputs = inputs._replace(prediction_BKHWC=None, reference_prediction_BKHWC=None, target_BKHWC=None)
        return None, inputs._replace(cell_weight_BKHW=None)

    count = micro.weight_B.shape[0]
    _, parts = jax.lax.scan(numbers, None, micro)
    running = jax.tree.map(lambda x: x[0], parts.running)
    inputs = jax.tree.map(join_micro_batches, parts._replace(running={}))._replace(running=running)

    def loss_at(error_BK: jax.Array) -> tuple[jax.Array, Metrics]:
        log_ratio_BK = inputs.log_ratio_BK - (error_BK - inputs.error_BK) / 2
        return summed(inputs._replace(error_BK=error_BK, log_ratio_BK=log_ratio_BK))

    slope_BK, sums = jax.grad(loss_at, has_aux=True)(inputs.error_BK)

    def gradient(part: tuple[PreferenceBatch, jax.Array]) -> tuple[Params, Metrics]:
        batch, slope_bK = part

        def along_slopes(params: Params) -> tuple[jax.Array, Metrics]:
            inputs = inputs_of(params, batch)
            return jnp.sum(slope_bK * inputs.error_BK), squares_of_slopes(slope_bK, inputs)

        return jax.grad(along_slopes, has_aux=True)(params)

    grads, squares = sum_over(gradient, (micro, split_micro_batches(slope_BK, count)), like, key)
    return grads, sums | squares


def split_micro_batches(x: Any, count: int) -> Any:
    """Return x as [count, B / count, ...], divided by stride: each device keeps its examples and nothing is moved."""
    return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)


def join_micro_batches(x: jax.Array) -> jax.Array:
    """Undo `split_micro_batches`: [A, B / A, ...] -> [B, ...]."""
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])
