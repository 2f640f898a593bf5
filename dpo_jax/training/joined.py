"""Trains many small parameters as a few long vectors, inside the step.

A GPU starts a kernel for each array in every operation of the optimizer. For SD1.5's LoRA of 256 arrays these were
1,200 a step, as compiled for an H200, and most took longer to start than to run; joined they are 30. Outside the step
the training state has its arrays by name, as checkpoints do.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.methods.metrics import Metrics
from dpo_jax.training.step import Compare, group_of
from dpo_jax.weights.layout import Params, Specs

ELEMENTWISE = ("adamw", "lion", "prodigy")
"""The optimizers that treat every number alike, whichever parameter it belongs to."""


class Joining:
    """Joins dicts of parameters, and of what belongs to them, into one vector a group, and cuts these up again."""

    def __init__(self, specs: Specs):
        self.shapes = {name: spec.shape for name, spec in specs.items()}
        self.groups: dict[str, list[str]] = {}
        for name in specs:
            self.groups.setdefault(group_of(name), []).append(name)

    def join(self, tree: Any) -> Any:
        """Return the pytree with a dict of vectors, by group, in place of every dict with an array per parameter."""

        def vectors(params: Params) -> Params:
            return {
                group: jnp.concatenate([params[name].reshape(-1) for name in names])
                for group, names in self.groups.items()
            }

        return _replace_dicts(tree, self.shapes, vectors)

    def cut(self, tree: Any) -> Any:
        """Undo `join`. Gradients come back joined; those of plain slices would be as many padded vectors, summed."""

        def arrays(vectors: Params) -> Params:
            found: dict[str, jax.Array] = {}
            for group, names in self.groups.items():
                start = 0
                for name in names:
                    size = math.prod(self.shapes[name])
                    found[name] = vectors[group][start : start + size].reshape(self.shapes[name])
                    start += size
            return {name: found[name] for name in self.shapes}

        differentiable = jax.custom_vjp(arrays)
        differentiable.defvjp(lambda vectors: (arrays(vectors), None), lambda _, grads: (self.join(grads),))
        return _replace_dicts(tree, self.groups, differentiable)

    def within(self, compare: Compare) -> Compare:
        """Return the comparison with joined parameters, also where they are of the policy that drew."""
        return lambda params, frozen, *args, **kwargs: compare(self.cut(params), self.cut(frozen), *args, **kwargs)

    def around(self, step: Callable[..., tuple[Any, Metrics]]) -> Callable[..., tuple[Any, Metrics]]:
        """Return the step, which sees joined parameters, as a step whose state has its arrays by name."""

        def by_name(state: Any, *args: Any) -> tuple[Any, Metrics]:
            new, metrics = step(self.join(state), *args)
            return self.cut(new), metrics

        return by_name


def _replace_dicts(tree: Any, like: dict[str, Any], function: Callable[[Any], Any]) -> Any:
    """Apply `function` to every dict in a pytree that has the keys of `like`."""

    def matches(node: Any) -> bool:
        return isinstance(node, dict) and node.keys() == like.keys()

    return jax.tree.map(lambda node: function(node) if matches(node) else node, tree, is_leaf=matches)
