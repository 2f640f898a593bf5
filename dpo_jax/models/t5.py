"""T5's text encoder, version 1.1 (Raffel et al., arXiv 1910.10683; Shazeer, arXiv 2002.05202), with the structure and
the parameter names of transformers.

float16 is too narrow for it: the feed-forward layers exceed its largest number. Compute in bfloat16 or float32.

Axes: N captions, L tokens, Q querying and S attended tokens (both L), D hidden width, h heads of d features.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from dpo_jax.errors import UserError
from dpo_jax.models.clip import METADATA
from dpo_jax.models.config_json import Depth, Positive, Vocabulary, Width, read_config
from dpo_jax.models.kernels import split_heads
from dpo_jax.models.layers import Embedding, Linear, RMSNorm
from dpo_jax.models.operations import accumulation_dtype, gelu_tanh

GATED_GELU = "gated-gelu"
"""The `feed_forward_proj` of version 1.1; transformers then uses the gelu in its approximation by tanh."""


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The fields of a transformers T5 config.json that change the encoder's output; the defaults are transformers'."""

    vocab_size: Vocabulary = 32128
    d_model: Width = 512
    d_kv: Width = 64
    d_ff: Width = 2048
    num_layers: Depth = 6
    num_heads: Width = 8
    relative_attention_num_buckets: Width = 32
    relative_attention_max_distance: Width = 128
    layer_norm_epsilon: Positive = 1e-6
    feed_forward_proj: str = "relu"

    tokenizer_kind: ClassVar[str] = "t5"
    max_position_embeddings: ClassVar[None] = None
    """Captions may have any length: positions are relative."""

    @property
    def hidden_size(self) -> int:
        """Width of the encoder's output."""
        return self.d_model

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str) -> "T5Config":
        """Read a config.json. Raises a UserError that names `where` and the field that is not supported."""
        supported = {
            "model_type": ("t5",),
            "dense_act_fn": ("gelu_new",),
            "is_gated_act": (True,),
            "is_decoder": (False,),
        }
        training = {"classifier_dropout", "dropout_rate", "initializer_factor", "scale_decoder_outputs"}
        decoding = {"is_encoder_decoder", "num_decoder_layers", "output_past", "use_cache", "n_positions"}
        result = read_config(
            cls, config, where, supported=supported, metadata={*METADATA, "eos_token_id", *training, *decoding}
        )
        if result.feed_forward_proj != GATED_GELU:
            raise UserError(
                f"{where}: feed_forward_proj = {result.feed_forward_proj!r} is not supported, only {GATED_GELU!r}, "
                "which T5 has since version 1.1"
            )
        buckets, distance = result.relative_attention_num_buckets, result.relative_attention_max_distance
        if buckets % 4 or distance <= buckets // 4:
            raise UserError(
                f"{where}: relative_attention_num_buckets = {buckets} and relative_attention_max_distance = "
                f"{distance} do not fit: the first must be a multiple of 4, and the second more than a quarter of it"
            )
        return result


class T5Output(NamedTuple):
    """The output that a diffusion model can be conditioned on."""

    last_hidden_NLD: jax.Array
    """Output of the last block, after the final norm (SD3, FLUX.1)."""


class T5EncoderModel(nnx.Module):
    """T5EncoderModel of transformers, called without an attention mask: padding is attended to like any token."""

    def __init__(self, config: T5Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.shared = Embedding(config.vocab_size, config.d_model, dtype=dtype, rngs=rngs)
        self.encoder = T5Stack(config, dtype=dtype, rngs=rngs)

    def __call__(self, token_ids_NL: jax.Array) -> T5Output:
        return T5Output(self.encoder(self.shared(token_ids_NL)))


class T5Stack(nnx.Module):
    """All blocks and the final norm. The first block holds the bias by relative position, which all blocks add."""

    def __init__(self, config: T5Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.block = nnx.List([T5Block(config, i == 0, dtype=dtype, rngs=rngs) for i in range(config.num_layers)])
        self.final_layer_norm = RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon, dtype=dtype, rngs=rngs)

    def __call__(self, x_NLD: jax.Array) -> jax.Array:
        bias_hQS = self.block[0].layer[0].SelfAttention.bias(x_NLD.shape[1])
        for block in self.block:
            x_NLD = block(x_NLD, bias_hQS)
        return self.final_layer_norm(x_NLD)


class T5Block(nnx.Module):
    """Self-attention, then the feed-forward layer, each after a norm and with a residual."""

    def __init__(self, config: T5Config, has_bias: bool, *, dtype: DTypeLike, rngs: nnx.Rngs):
        attention = T5LayerSelfAttention(config, has_bias, dtype=dtype, rngs=rngs)
        self.layer: nnx.List = nnx.List([attention, T5LayerFF(config, dtype=dtype, rngs=rngs)])

    def __call__(self, x_NLD: jax.Array, bias_hQS: jax.Array) -> jax.Array:
        return self.layer[1](self.layer[0](x_NLD, bias_hQS))


class T5LayerSelfAttention(nnx.Module):
    """Norm, attention and residual."""

    def __init__(self, config: T5Config, has_bias: bool, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.SelfAttention = T5Attention(config, has_bias, dtype=dtype, rngs=rngs)
        self.layer_norm = RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon, dtype=dtype, rngs=rngs)

    def __call__(self, x_NLD: jax.Array, bias_hQS: jax.Array) -> jax.Array:
        return x_NLD + self.SelfAttention(self.layer_norm(x_NLD), bias_hQS)


class T5Attention(nnx.Module):
    """Multi-head attention of all tokens to all, with a bias and without a scale."""

    def __init__(self, config: T5Config, has_bias: bool, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, inner_width = config.d_model, config.num_heads * config.d_kv
        self.q, self.k, self.v = (Linear(width, inner_width, use_bias=False, dtype=dtype, rngs=rngs) for _ in range(3))
        self.o = Linear(inner_width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.relative_attention_bias = (
            Embedding(config.relative_attention_num_buckets, config.num_heads, dtype=dtype, rngs=rngs)
            if has_bias
            else None
        )
        self.num_heads, self.dtype = config.num_heads, dtype
        self.max_distance = config.relative_attention_max_distance

    def bias(self, length: int) -> jax.Array:
        """Return what is added to the scores of `length` tokens, [h, Q, S], in at least float32."""
        assert self.relative_attention_bias is not None, "only the first block has it"
        num_buckets = self.relative_attention_bias.embedding.shape[0]
        buckets_QS = jnp.asarray(relative_buckets(length, num_buckets, self.max_distance))
        bias_QSh = self.relative_attention_bias(buckets_QS)
        return bias_QSh.transpose(2, 0, 1).astype(accumulation_dtype(self.dtype))

    def __call__(self, x_NLD: jax.Array, bias_hQS: jax.Array) -> jax.Array:
        query_NQhd, key_NShd, value_NShd = (
            split_heads(project(x_NLD), self.num_heads) for project in (self.q, self.k, self.v)
        )
        scores_NhQS = jnp.einsum("NQhd,NShd->NhQS", query_NQhd, key_NShd, preferred_element_type=bias_hQS.dtype)
        weights_NhQS = jax.nn.softmax(scores_NhQS + bias_hQS, axis=-1).astype(value_NShd.dtype)
        result_NQhd = jnp.einsum("NhQS,NShd->NQhd", weights_NhQS, value_NShd)
        return self.o(result_NQhd.reshape(*x_NLD.shape[:2], -1))


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Return the bucket of the distance from each token to each, [Q, S].

    The first half of the buckets is for tokens before, the second for tokens after. In each half, the first half is for
    one distance each, and the rest grows logarithmically up to `max_distance`.
    """
    distance_QS = np.arange(length)[None, :] - np.arange(length)[:, None]
    half, exact = num_buckets // 2, num_buckets // 4
    size_QS = np.abs(distance_QS)
    # In float32 as in transformers, since a bucket's first distance is decided by rounding.
    ratio_QS = np.log(np.maximum(size_QS, 1).astype(np.float32) / np.float32(exact))
    scaled_QS = ratio_QS / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far_QS = np.minimum(exact + scaled_QS.astype(int), half - 1)
    return np.where(distance_QS > 0, half, 0) + np.where(size_QS < exact, size_QS, far_QS)


class T5LayerFF(nnx.Module):
    """Norm, feed-forward layer and residual."""

    def __init__(self, config: T5Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.DenseReluDense = T5DenseGatedActDense(config, dtype=dtype, rngs=rngs)
        self.layer_norm = RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon, dtype=dtype, rngs=rngs)

    def __call__(self, x_NLD: jax.Array) -> jax.Array:
        return x_NLD + self.DenseReluDense(self.layer_norm(x_NLD))


class T5DenseGatedActDense(nnx.Module):
    """Feed-forward layer whose activated half gates the other."""

    def __init__(self, config: T5Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.wi_0, self.wi_1 = (
            Linear(config.d_model, config.d_ff, use_bias=False, dtype=dtype, rngs=rngs) for _ in range(2)
        )
        self.wo = Linear(config.d_ff, config.d_model, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x_NLD: jax.Array) -> jax.Array:
        return self.wo(gelu_tanh(self.wi_0(x_NLD)) * self.wi_1(x_NLD))
