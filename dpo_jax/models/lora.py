"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685), named and computed as in PyTorch's peft.

A layer `M` computes `y + alpha / rank * B(A(x))`. Its adapter's parameters are ordinary entries of the flat dict,
`M.lora_A.kernel` and `M.lora_B.kernel`, and only they are trained. Without them, the same weights are the untrained
model, so a reference needs no second copy.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from dpo_jax.errors import UserError
from dpo_jax.models.layers import Adaptable, Initializer, torch_default_init
from dpo_jax.models.network import Network
from dpo_jax.weights.layout import Params, Specs


class LowRank(NamedTuple):
    """The size of one layer's adapter."""

    rank: int
    alpha: float


Adapters = dict[str, LowRank]
"""Adapter sizes by the name of the layer, for example `down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q`."""


ATTENTION = "(to_[qkv]|to_out.0|add_[qkv]_proj|to_add_out)$"
"""A pattern that finds the attention layers of every family."""


def find_targets(denoiser: Network, pattern: str, *, rank: int, alpha: float) -> Adapters:
    """Return an adapter for every linear and convolution layer whose name contains a match of `pattern`.

    Raises a UserError if the pattern is not a regular expression or matches nothing.
    """
    if rank < 1:
        raise UserError(f"a LoRA of rank {rank} has no weights; give a rank of at least 1")
    layers = [name.removesuffix(".kernel") for name in denoiser.specs if name.endswith(".kernel")]
    try:
        adapters = {layer: LowRank(rank, alpha) for layer in layers if re.search(pattern, layer)}
    except re.error as error:
        raise UserError(f"the LoRA targets {pattern!r} are not a regular expression: {error}") from error
    if not adapters:
        example = next((layer for layer in layers if layer.endswith(".to_q")), layers[-2])
        raise UserError(
            f"the LoRA targets {pattern!r} match no layer of the model, whose layers have names such as {example}. Set "
            f"lora.targets to a pattern that they contain, such as {ATTENTION!r}"
        )
    return adapters


def add_lora(module: nnx.Module, adapters: Adapters, dropout: float, rngs: nnx.Rngs) -> None:
    """Add low-rank paths to the named layers, in place."""
    layers = _layers(module)
    for name, (rank, alpha) in adapters.items():
        layer = layers[name]
        layer.lora_A, layer.lora_B = layer.make_low_rank(rank, rngs)
        layer.lora_scale, layer.lora_dropout = alpha / rank, dropout
        layer.sums_wide = layer.lora_B.sums_wide = True


def round_as_adapted(module: nnx.Module, adapters: Adapters) -> None:
    """Make the named layers round, in place, as they do with a low-rank path whose output is zero."""
    layers = _layers(module)
    for name in adapters:
        layers[name].sums_wide = True


def set_dropout_keys(module: nnx.Module, keys_N: jax.Array) -> None:
    """Give every adapter in the module its own keys, derived from `keys_N`, one per image."""
    layers = {name: layer for name, layer in _layers(module).items() if layer.lora_A is not None}
    for number, name in enumerate(sorted(layers)):
        layers[name].lora_keys_N = jax.vmap(jax.random.fold_in, (0, None))(keys_N, number)


def lora_specs(adapted: Network) -> Specs:
    """Return the shapes of the adapter's own parameters."""
    return {name: spec for name, spec in adapted.specs.items() if is_lora(name)}


def is_lora(name: str) -> bool:
    """Return whether a parameter of this name belongs to a low-rank path."""
    return ".lora_A." in name or ".lora_B." in name


def init_lora(specs: Specs, seed: int, initializer: str) -> Params:
    """Return a new adapter in float32: A is drawn and B is zero, so the adapter changes nothing at first.

    Args:
        specs: shapes of the adapter's parameters.
        seed: seed of the draw.
        initializer: distribution of A, a name in `INITIALIZERS`.
    """
    draw_A, params = INITIALIZERS[initializer], {}
    for number, (name, spec) in enumerate(specs.items()):
        key = jax.random.fold_in(jax.random.key(seed), number)
        is_A = ".lora_A." in name
        params[name] = draw_A(key, spec.shape, jnp.float32) if is_A else jnp.zeros(spec.shape, jnp.float32)
    return params


def _gaussian(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Normal with a standard deviation of 1 / rank, as in peft's `init_lora_weights="gaussian"` and old diffusers."""
    return jax.random.normal(key, shape, dtype) / shape[-1]


INITIALIZERS: Mapping[str, Initializer] = {"kaiming": torch_default_init, "gaussian": _gaussian}
"""Distributions of A. "kaiming" is uniform with a standard deviation of 1 / sqrt(3 fan_in), peft's default."""


def _layers(module: nnx.Module) -> Mapping[str, Adaptable]:
    return {".".join(map(str, path)): layer for path, layer in nnx.iter_modules(module) if isinstance(layer, Adaptable)}
