"""IPO: the squared distance of the margin from a target (arXiv 2310.12036), as a user would add it."""

import jax
import jax.numpy as jnp

from dpo_jax.batch import LossInputs
from dpo_jax.fields import Field
from dpo_jax.methods import Method
from dpo_jax.objectives.preferences import margin


def ipo(inputs: LossInputs, *, beta: float) -> jax.Array:
    """Return `(margin - 1 / (2 beta))^2` (arXiv 2310.12036, equation 17)."""
    return jnp.square(margin(inputs.log_ratio_BK) - 1 / (2 * beta))


IPO = Method(
    name="my_ipo",
    title="IPO",
    paper="2310.12036",
    loss=ipo,
    fields={"beta": Field(5000.0, "Strength of the pull towards the reference.", above=0)},
    reads_log_ratios_alone=True,
)
