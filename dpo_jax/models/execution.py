"""How a UNet's blocks are run, which changes memory and compilation and not a number: what the backward pass keeps, and
whether equal blocks share a program.

Each residual block and each transformer block is one unit of rematerialization (Chen et al., arXiv 1604.06174): its
input is kept, and of what happens inside only what the policy names.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

ATTENTION = "attention"
"""The name of what attention returns, before its last projection."""


def _dots(primitive: Any, *args: Any, **params: Any) -> bool:
    """Products with weights. Attention's own products have heads as batch axes and are larger than all else."""
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
"""From most memory and least computation to the opposite: everything is kept; the results of matrix products and
convolutions are; those of attention are; nothing is."""


class Execution(NamedTuple):
    """How the blocks of a UNet are run."""

    remat: str = "none"
    """One of `POLICIES`."""
    scan: bool = False
    """Whether the transformer blocks that follow one another are compiled once, as the body of a loop. The compiler is
    done several times sooner, and less can be computed ahead or kept apart."""
    attention: str = "xla"
    """Who computes it: see `operations.attention`."""

    def run(self, block: Callable[..., jax.Array], *args: jax.Array) -> jax.Array:
        """`block(*args)`, computed again in the backward pass but for what the policy keeps."""
        if self.remat == "none":
            return block(*args)
        # A wrapper, because jax.checkpoint takes the identity of what it is given for that of the computation.
        return jax.checkpoint(lambda *args: block(*args), policy=POLICIES[self.remat])(*args)

    def run_chain(self, blocks: Sequence[nnx.Module], x: jax.Array, *args: jax.Array) -> jax.Array:
        """One block after the other, each on the result of the one before and the same `args`."""
        graphdefs, states = zip(*map(nnx.split, blocks), strict=True) if self.scan else ((), ())
        if len(set(graphdefs)) != 1:  # where a LoRA is in some blocks only, they differ
            for block in blocks:
                x = self.run(block, x, *args)
            return x

        def body(x: jax.Array, state: nnx.State) -> tuple[jax.Array, None]:
            return self.run(nnx.merge(graphdefs[0], state), x, *args), None

        return jax.lax.scan(body, x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))[0]


PLAIN = Execution()


def attention_result(x: jax.Array) -> jax.Array:
    return checkpoint_name(x, ATTENTION)
