"""What the backward pass keeps of the forward pass, and what it computes again (Chen et al., arXiv 1604.06174).

Each residual block and each transformer block of the UNet is one unit: its input is kept, and of what happens inside
only what the policy names.
"""

from collections.abc import Callable
from typing import Any

import jax
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


def rematerialize(block: Callable[..., jax.Array], policy: str) -> Callable[..., jax.Array]:
    """`block`, computed again in the backward pass but for what the policy keeps. Its values stay the same."""
    if policy == "none":
        return block
    # A wrapper, because jax.checkpoint takes the identity of what it is given for that of the computation.
    return jax.checkpoint(lambda *args: block(*args), policy=POLICIES[policy])


def attention_result(x: jax.Array) -> jax.Array:
    return checkpoint_name(x, ATTENTION)
