"""A model split at the edge of jit: its static structure is a `Network`, its parameters a flat dict that the caller
holds.

The dict is keyed by diffusers' names (`"down_blocks.1.attentions.0.proj_in.kernel"`), so sharding rules, freezing and
LoRA targets are regular expressions over names, and a checkpoint has the names of the model.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from dpo_jax.weights.layout import Params, ParamSpec, Specs


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A pure function of parameters. `network(params, *args)` runs the module's `__call__` (or `method`)."""

    graphdef: nnx.GraphDef
    specs: Specs
    config: Any

    @classmethod
    def build(cls, make: Callable[[nnx.Rngs], nnx.Module], config: Any) -> "Network":
        """Return the network of the module that `make` builds; it is traced abstractly and takes no memory."""
        graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
        specs = {
            _name(path): ParamSpec(tuple(p.shape), p.torch_axes, p.is_trainable) for path, p in nnx.to_flat_state(state)
        }
        return cls(graphdef, specs, config)

    def __call__(self, params: Params, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        return getattr(self.bind(params), method)(*args, **kwargs)

    def bind(self, params: Params) -> Any:
        """Return the module itself with these parameters."""
        return nnx.merge(self.graphdef, nnx.from_flat_state([(_path(name), value) for name, value in params.items()]))


def network_of(module: Callable[..., nnx.Module], config: Any, **arguments: Any) -> Network:
    """Return the network of `module(config, **arguments)`. Tracing takes a second, so equal ones are traced once."""
    return _network_of(module, config, **arguments)


@functools.lru_cache(maxsize=128)
def _network_of(module: Callable[..., nnx.Module], config: Any, **arguments: Any) -> Network:
    return Network.build(lambda rngs: module(config, rngs=rngs, **arguments), config)


def init_params(make: Callable[[nnx.Rngs], nnx.Module], seed: int) -> Params:
    """Return random float32 parameters of the module that `make` builds, by their dotted names."""

    @jax.jit
    def init() -> Params:
        _, state = nnx.split(make(nnx.Rngs(seed)))
        return {_name(path): param[...] for path, param in nnx.to_flat_state(state)}

    return init()


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _path(name: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))
