"""One rule between dpo_jax's parameter names and those of a checkpoint.

dpo_jax's names are the dotted PyTorch names of diffusers and transformers, except that the last part says what the
parameter is: `down_blocks.1.attentions.0.proj_in.kernel` is `down_blocks.1.attentions.0.proj_in.weight` in PyTorch. The
mapping always starts from dpo_jax's names. The other direction is ambiguous: a legacy Flax `linear_1` may be a layer
called `linear_1` or item 1 of a list called `linear`.
"""

import re
from typing import NamedTuple

import jax
import numpy as np

from dpo_jax.errors import UserError


class ParamSpec(NamedTuple):
    """Shape and layout of one parameter, known before any weight is read."""

    shape: tuple[int, ...]
    """Shape in dpo_jax's layout (linear: in, out; convolution: height, width, in, out)."""
    torch_axes: tuple[int, ...]
    """Order of the axes in PyTorch: `torch_array = array.transpose(torch_axes)`."""
    is_trainable: bool = True
    """False for a table that the checkpoint holds and that training never changes, such as fixed positions."""

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Shape in PyTorch's layout (linear: out, in; convolution: out, in, height, width)."""
        return tuple(self.shape[axis] for axis in self.torch_axes)


Specs = dict[str, ParamSpec]
Params = dict[str, jax.Array]

# diffusers once named the VAE's attention layers as on the right; published VAEs and every Flax VAE still do.
OLD_VAE_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def torch_name(name: str) -> str:
    """Return the name under which PyTorch stores the parameter `name`, and under which dpo_jax writes it."""
    return re.sub(r"\b(kernel|scale|embedding)$", "weight", name)


def torch_aliases(name: str) -> list[str]:
    """Return every name under which a PyTorch checkpoint may hold `name`, the usual one first."""
    return [torch_name(alias) for alias in _aliases(name)]


def flax_aliases(name: str) -> list[str]:
    """Return every dotted path under which a legacy Flax checkpoint may hold `name`.

    diffusers joined list indices to the list's name (`down_blocks_0`), transformers nested them (`layers/0`).
    """
    return [path for alias in _aliases(name) for path in (re.sub(r"\.(?=\d)", "_", alias), alias)]


def to_torch(array: np.ndarray, spec: ParamSpec) -> np.ndarray:
    """Return an array as a view in PyTorch's layout."""
    return array.transpose(spec.torch_axes)


def from_torch(array: np.ndarray, spec: ParamSpec) -> np.ndarray:
    """Return a PyTorch array as a view in dpo_jax's layout. Raises a UserError if the shape differs.

    A 1x1 convolution and a linear layer hold the same numbers, and old VAEs and SD1.x store one in place of the other:
    either is accepted.
    """
    return _squeezed(array, spec.torch_shape).transpose(np.argsort(spec.torch_axes))


def from_flax(array: np.ndarray, spec: ParamSpec) -> np.ndarray:
    """Return a legacy Flax array in dpo_jax's layout, which differs only in the two extra axes of a 1x1 convolution."""
    return _squeezed(array, spec.shape)


def _squeezed(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if [size for size in array.shape if size > 1] != [size for size in shape if size > 1]:
        raise UserError(f"stored as {array.shape}, the model needs {shape}")
    return array.reshape(shape)


def _aliases(name: str) -> list[str]:
    old_vae = name
    for ours, old in OLD_VAE_ATTENTION.items():
        old_vae = old_vae.replace(f".{ours}.", f".{old}.")
    # transformers 5 writes CLIPTextModel without the prefix that versions 2 to 4 wrote.
    # Qwen3's folder is of the language model, whose names of the text encoder have a prefix.
    of_language_model = [f"model.{name}"] if name.startswith(("embed_tokens.", "layers.", "norm.")) else []
    return list(dict.fromkeys([name, old_vae, name.removeprefix("text_model."), *of_language_model]))
