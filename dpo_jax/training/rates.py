"""Learning rates of single parameters: factors by regular expressions over their names. A factor of 0 freezes."""

import difflib
import re
from collections.abc import Collection, Mapping, Sequence

import jax
import optax

from dpo_jax.errors import UserError
from dpo_jax.weights.layout import Params

Rates = Sequence[tuple[str, float]]
"""(regular expression found in a parameter's name, factor of the learning rate); the first match counts."""


def rate_factors(rates: Rates, names: Collection[str]) -> dict[str, float]:
    """Return the factor of the learning rate of each parameter: 1 where no pattern matches.

    Raises:
        UserError: a pattern is without effect, or nothing is left to train.
    """
    factors: dict[str, float] = {}
    for pattern, factor in rates:
        found = [name for name in names if re.search(pattern, name)]
        if not found:
            raise UserError(
                f"the pattern {pattern!r} of config.optimizer.rates matches none of the {len(names)} trained "
                f"parameters. Change it; the names nearest to it are {', '.join(_nearest(pattern, names))}"
            )
        new = [name for name in found if name not in factors]
        if not new:
            raise UserError(
                f"the pattern {pattern!r} of config.optimizer.rates has no effect: earlier patterns match all of its "
                f"{len(found)} parameters, and the first match counts. Move it to the front or remove it"
            )
        factors |= dict.fromkeys(new, float(factor))
    factors = {name: factors.get(name, 1.0) for name in names}
    if names and not any(factors.values()):
        raise UserError(
            f"config.optimizer.rates freezes all {len(names)} parameters, so nothing is trained. Give some of them a "
            "factor above 0"
        )
    return factors


def frozen_names(factors: Mapping[str, float]) -> frozenset[str]:
    """Return the names of the parameters that keep their values."""
    return frozenset(name for name, factor in factors.items() if not factor)


def with_factors(optimizer: optax.GradientTransformation, factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Return an optimizer whose updates are multiplied by the factor of their parameter.

    Frozen parameters have no state and no update; their gradients may be missing, and are not in the norm that clips.
    """
    if all(factor == 1 for factor in factors.values()):
        return optimizer
    left_out = frozen_names(factors)

    def changing(params: Params) -> Params:
        return {name: x for name, x in params.items() if name not in left_out}

    def init(params: Params) -> optax.OptState:
        return optimizer.init(changing(params))

    def update(grads: Params, state: optax.OptState, params: Params) -> tuple[Params, optax.OptState]:
        updates, state = optimizer.update(changing(grads), state, changing(params))
        scaled: dict[str, jax.Array] = {name: factors[name] * x for name, x in updates.items()}  # type: ignore[union-attr]
        return scaled, state

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def _nearest(pattern: str, names: Collection[str], count: int = 3) -> list[str]:
    """Return the names that share the longest text with a pattern."""
    text = re.sub(r"\\[a-zA-Z]|[^\w.]", "", pattern)

    def shared(name: str) -> int:
        return difflib.SequenceMatcher(None, text, name, autojunk=False).find_longest_match().size

    return sorted(names, key=lambda name: -shared(name))[:count]
