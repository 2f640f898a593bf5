"""The text encoders of all families, and how each family composes their outputs to what its denoiser reads.

Axes: N captions, L tokens, D context width, P pooled width.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.models.clip import CLIPTextConfig, CLIPTextModel
from dpo_jax.models.qwen3 import Qwen3Config, Qwen3Model
from dpo_jax.models.t5 import T5Config, T5EncoderModel


class TextEmbedding(NamedTuple):
    """What a denoiser reads of captions."""

    context_NLD: jax.Array
    pooled_NP: jax.Array
    """P = 0 if the family has none."""
    is_token_NL: jax.Array | None = None
    """bool: False for padding, whose context is 0; None if padding is attended to."""


class Kind(NamedTuple):
    """An architecture of text encoders."""

    module: Any
    """The class, called with its config, `dtype` and `rngs`."""
    config: Any
    """Its config, with `from_dict(config_json, where)`, `hidden_size` and `vocab_size`."""
    classes: tuple[str, ...]
    """The classes of transformers that it computes."""
    tokenizers: tuple[str, ...]
    """The classes of transformers of its tokenizer."""


KINDS = {
    "clip": Kind(
        CLIPTextModel,
        CLIPTextConfig,
        ("CLIPTextModel", "CLIPTextModelWithProjection", "FlaxCLIPTextModel", "FlaxCLIPTextModelWithProjection"),
        ("CLIPTokenizer", "CLIPTokenizerFast"),
    ),
    "t5": Kind(T5EncoderModel, T5Config, ("T5EncoderModel",), ("T5Tokenizer", "T5TokenizerFast")),
    "qwen3": Kind(
        Qwen3Model, Qwen3Config, ("Qwen3Model", "Qwen3ForCausalLM"), ("Qwen2Tokenizer", "Qwen2TokenizerFast")
    ),
}


class Composition(NamedTuple):
    """How a family composes the outputs of its text encoders, which come in the family's order."""

    compose: Callable[[Sequence[Any]], TextEmbedding]
    features: Callable[[Sequence[Any]], tuple[int, int]]
    """Maps the encoders' configs to the widths (D, P)."""
    length: Callable[[Sequence[int]], int]
    """Maps the encoders' numbers of tokens to L."""
    masks_padding: bool = False
    """True if nothing attends to padding."""


def pooled_width(config: CLIPTextConfig) -> int:
    """Return the width of a CLIP's pooled output."""
    return config.projection_dim if config.with_projection else config.hidden_size


def _last_hidden(outputs: Sequence[Any]) -> TextEmbedding:
    context_NLD = outputs[0].last_hidden_NLD
    return TextEmbedding(context_NLD, jnp.zeros((len(context_NLD), 0), context_NLD.dtype))


def _penultimates(outputs: Sequence[Any]) -> TextEmbedding:
    return TextEmbedding(jnp.concatenate([o.penultimate_NLD for o in outputs], axis=-1), outputs[-1].pooled_NP)


def _sd3(outputs: Sequence[Any]) -> TextEmbedding:
    *clips, t5 = outputs
    clip_NLD = jnp.concatenate([clip.penultimate_NLD for clip in clips], axis=-1)
    missing = t5.last_hidden_NLD.shape[-1] - clip_NLD.shape[-1]
    clip_NLD = jnp.pad(clip_NLD, ((0, 0), (0, 0), (0, missing)))
    return TextEmbedding(
        jnp.concatenate([clip_NLD, t5.last_hidden_NLD], axis=1),
        jnp.concatenate([clip.pooled_NP for clip in clips], axis=-1),
    )


def _z_image(outputs: Sequence[Any]) -> TextEmbedding:
    (qwen,) = outputs
    pooled_NP = jnp.zeros((len(qwen.penultimate_NLD), 0), qwen.penultimate_NLD.dtype)
    return TextEmbedding(qwen.penultimate_NLD, pooled_NP, qwen.is_token_NL)


LAST_HIDDEN = Composition(_last_hidden, lambda configs: (configs[0].hidden_size, 0), lambda lengths: lengths[0])
"""Stable Diffusion 1 and 2: the last state of CLIP."""
PENULTIMATES = Composition(
    _penultimates,
    lambda configs: (sum(config.hidden_size for config in configs), pooled_width(configs[-1])),
    lambda lengths: lengths[0],
)
"""SDXL: the inputs of the last layers of all CLIPs, side by side, and the pooled output of the last CLIP (arXiv
2307.01952, section 2)."""
SD3 = Composition(
    _sd3,
    lambda configs: (configs[-1].hidden_size, sum(map(pooled_width, configs[:-1]))),
    lambda lengths: lengths[0] + lengths[-1],
)
"""Stable Diffusion 3: CLIP's tokens as in SDXL, filled up with zeros to the width of T5, whose tokens follow; and the
pooled outputs of both CLIPs (arXiv 2403.03206, section 4)."""
FLUX = Composition(
    lambda outputs: TextEmbedding(outputs[1].last_hidden_NLD, outputs[0].pooled_NP),
    lambda configs: (configs[1].hidden_size, pooled_width(configs[0])),
    lambda lengths: lengths[1],
)
"""FLUX.1: the tokens of T5 and the pooled output of CLIP."""
Z_IMAGE = Composition(
    _z_image, lambda configs: (configs[0].hidden_size, 0), lambda lengths: lengths[0], masks_padding=True
)
"""Z-Image: the input of Qwen3's last layer at the tokens of the chat that asks for the image."""
