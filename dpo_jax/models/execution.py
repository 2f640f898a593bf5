"""Execution of a denoiser's blocks: what is kept for the backward pass, and whether equal blocks share one program.

These choices change memory use and compile time, but not the result.

Each residual block and each transformer block is one unit of rematerialization (Chen et al., arXiv 1604.06174): its
input is kept, and of its intermediate values only those that the policy names.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

ATTENTION = "attention"
"""Checkpoint name of the output of attention, before its last projection."""
Values = TypeVar("Values")
"""An array, or a pytree of arrays."""


def _dots(primitive: Any, *args: Any, **params: Any) -> bool:
    """Keep products with weights. Attention's own products have the heads as batch axes and are the largest of all."""
    saved = jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENTION),
    )
    return primitive is jax.lax.conv_general_dilated_p or saved(primitive, *args, **params)


POLICIES: dict[str, Any] = {
    "none": None,
    "dots": _dots,
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION),
    "block": jax.checkpoint_policies.nothing_saveable,
}
"""Rematerialization policies, from most memory and least computation to the opposite. They keep, in order: everything;
the results of matrix products and convolutions; the results of attention; nothing."""


class Execution(NamedTuple):
    """Settings of the execution of a denoiser's blocks."""

    remat: str = "none"
    """Name of the rematerialization policy, a key of `POLICIES`."""
    scan: bool = False
    """True compiles consecutive transformer blocks once, as the body of a loop. Compilation is several times faster,
    but the compiler can precompute less and must keep more together."""
    attention: str = "xla"
    """Implementation of attention; see `attention.attention`."""

    def run(self, block: Callable[..., Values], *args: Any) -> Values:
        """Return `block(*args)`; the backward pass recomputes everything that the policy does not keep."""
        if self.remat == "none":
            return block(*args)
        # The wrapper is needed because jax.checkpoint identifies a computation by the identity of its function.
        return jax.checkpoint(lambda *args: block(*args), policy=POLICIES[self.remat])(*args)

    def run_chain(self, blocks: Sequence[Callable[..., Values]], x: Values, *args: Any) -> Values:
        """Run blocks one after the other: each gets the result of the one before it and the same `args`.

        `x` and `args` are arrays or pytrees of arrays, such as the two streams of a joint transformer.
        """
        if not self.scan:
            for block in blocks:
                x = self.run(block, x, *args)
            return x
        # Blocks differ if they have more parameters, or if only some have a LoRA.
        for graphdef, group in itertools.groupby(map(nnx.split, blocks), key=lambda split: split[0]):
            states = [state for _, state in group]

            def body(x: Values, state: nnx.State, graphdef: nnx.GraphDef = graphdef) -> tuple[Values, None]:
                return self.run(nnx.merge(graphdef, state), x, *args), None

            if len(states) == 1:
                x, _ = body(x, states[0])
            else:
                x, _ = jax.lax.scan(body, x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))
        return x


PLAIN = Execution()
FASTEST = Execution(attention="auto")
"""For `load_pipeline`, which chooses the kernel for the devices of the process; see `kernels.choose`."""


def attention_result(x: jax.Array) -> jax.Array:
    """Return `x` under the name by which a policy keeps the results of attention for the backward pass."""
    return checkpoint_name(x, ATTENTION)
