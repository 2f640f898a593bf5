"""Qwen3's language model as a text encoder (Yang et al., arXiv 2505.09388), with the structure and the parameter names
of transformers. Z-Image is conditioned on its penultimate hidden state.

Axes: N captions, L tokens, D hidden width, h heads of d features, p = d / 2 pairs of them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from flax import nnx
from jax.typing import DTypeLike

from dpo_jax.errors import UserError
from dpo_jax.files import conform
from dpo_jax.models.attention import attention
from dpo_jax.models.clip import METADATA
from dpo_jax.models.config_json import Depth, Positive, Vocabulary, Width, read_config
from dpo_jax.models.kernels import split_heads
from dpo_jax.models.layers import Embedding, Linear, RMSNorm
from dpo_jax.models.operations import accumulation_dtype

Positions = Annotated[int, pydantic.Field(ge=1, le=2**24)]


class RopeParameters(pydantic.BaseModel):
    """`rope_parameters` of transformers 5, which hold what `rope_theta` and `rope_scaling` held before."""

    model_config = pydantic.ConfigDict(extra="forbid")

    rope_theta: Positive
    rope_type: str = "default"


class Rotation(pydantic.BaseModel):
    """The part of a config.json about rotary embeddings, as transformers 5 writes it."""

    rope_parameters: RopeParameters | None = None


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """The fields of a transformers Qwen3 config.json that change the output; the defaults are transformers'."""

    vocab_size: Vocabulary = 151936
    hidden_size: Width = 4096
    intermediate_size: Width = 22016
    num_hidden_layers: Depth = 32
    num_attention_heads: Width = 32
    num_key_value_heads: Width | None = 32
    head_dim: Width = 128
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive = 10000.0
    max_position_embeddings: Positions = 32768
    layer_types: tuple[str, ...] | None = None

    tokenizer_kind: ClassVar[str] = "qwen"

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str) -> "Qwen3Config":
        """Read a config.json. Raises a UserError that names `where` and the field that is not supported."""
        rotation: Rotation = conform(config, Rotation, where)
        if rotation.rope_parameters is not None:
            config = {name: value for name, value in config.items() if name != "rope_parameters"}
            config |= {"rope_theta": rotation.rope_parameters.rope_theta}
            if rotation.rope_parameters.rope_type != "default":
                raise UserError(
                    f"{where}: rope_type = {rotation.rope_parameters.rope_type!r} is not supported, only 'default'"
                )
        supported = {
            "model_type": ("qwen3",),
            "hidden_act": ("silu",),
            "attention_bias": (False,),
            "rope_parameters": (None,),
            "rope_scaling": (None,),
            "use_sliding_window": (False,),
        }
        decoding = {"eos_token_id", "is_encoder_decoder", "max_window_layers", "sliding_window", "use_cache"}
        result = read_config(cls, config, where, supported=supported, metadata={*METADATA, *decoding})
        others = sorted({*(result.layer_types or ())} - {"full_attention"})
        if others or len(result.layer_types or ()) not in (0, result.num_hidden_layers):
            raise UserError(
                f"{where}: layer_types = {result.layer_types} is not supported, only 'full_attention' for each of the "
                f"{result.num_hidden_layers} layers"
            )
        result = dataclasses.replace(
            result, layer_types=None, num_key_value_heads=result.num_key_value_heads or result.num_attention_heads
        )
        if result.num_attention_heads % result.key_value_heads:
            raise UserError(
                f"{where}: num_attention_heads = {result.num_attention_heads} is not a multiple of "
                f"num_key_value_heads = {result.num_key_value_heads}"
            )
        if result.head_dim % 2:
            raise UserError(f"{where}: head_dim = {result.head_dim} is not even, so its features cannot be paired")
        if result.num_hidden_layers < 2:
            raise UserError(f"{where}: num_hidden_layers = 1 is not supported: the input of the last layer is read")
        return result

    @property
    def key_value_heads(self) -> int:
        """Number of heads of keys and values, each of which several heads of queries share."""
        return self.num_key_value_heads or self.num_attention_heads


class Qwen3Output(NamedTuple):
    """The outputs that a diffusion model can be conditioned on."""

    penultimate_NLD: jax.Array
    """Input of the last layer, without the final norm (Z-Image); 0 at padding."""
    is_token_NL: jax.Array
    """bool: False for padding, which is not a part of the caption."""


class Qwen3Model(nnx.Module):
    """Qwen3Model of transformers. Its last layer and final norm are read and written, but never run.

    Token ids below 0 are padding, which follows the caption and which nothing attends to.
    """

    def __init__(self, config: Qwen3Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [Qwen3DecoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype, rngs=rngs)
        self.head_dim, self.theta, self.dtype = config.head_dim, config.rope_theta, dtype

    def __call__(self, token_ids_NL: jax.Array) -> Qwen3Output:
        is_token_NL = token_ids_NL >= 0
        x_NLD = self.embed_tokens(jnp.maximum(token_ids_NL, 0))
        rotary = rotary_tables(x_NLD.shape[1], self.head_dim, self.theta, accumulation_dtype(self.dtype))
        for layer in self.layers[:-1]:
            x_NLD = layer(x_NLD, rotary, is_token_NL.sum(-1))
        return Qwen3Output(jnp.where(is_token_NL[..., None], x_NLD, 0), is_token_NL)


class Qwen3DecoderLayer(nnx.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: Qwen3Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, epsilon = config.hidden_size, config.rms_norm_eps
        self.self_attn = Qwen3Attention(config, dtype=dtype, rngs=rngs)
        self.mlp = Qwen3MLP(config, dtype=dtype, rngs=rngs)
        self.input_layernorm = RMSNorm(width, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(width, epsilon=epsilon, dtype=dtype, rngs=rngs)

    def __call__(self, x_NLD: jax.Array, rotary: tuple[jax.Array, jax.Array], num_tokens_N: jax.Array) -> jax.Array:
        x_NLD = x_NLD + self.self_attn(self.input_layernorm(x_NLD), rotary, num_tokens_N)
        return x_NLD + self.mlp(self.post_attention_layernorm(x_NLD))


class Qwen3Attention(nnx.Module):
    """Causal attention with fewer heads of keys and values than of queries (Ainslie et al., arXiv 2305.13245).

    The features of each query and key are normalised, then rotated by their position.
    """

    def __init__(self, config: Qwen3Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, queries = config.hidden_size, config.num_attention_heads * config.head_dim
        keys = config.key_value_heads * config.head_dim
        self.q_proj = Linear(width, queries, use_bias=False, dtype=dtype, rngs=rngs)
        self.k_proj, self.v_proj = (Linear(width, keys, use_bias=False, dtype=dtype, rngs=rngs) for _ in range(2))
        self.o_proj = Linear(queries, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.q_norm, self.k_norm = (
            RMSNorm(config.head_dim, epsilon=config.rms_norm_eps, dtype=dtype, rngs=rngs) for _ in range(2)
        )
        self.num_heads, self.key_value_heads = config.num_attention_heads, config.key_value_heads

    def __call__(self, x_NLD: jax.Array, rotary: tuple[jax.Array, jax.Array], num_tokens_N: jax.Array) -> jax.Array:
        query_NLhd = self.q_norm(split_heads(self.q_proj(x_NLD), self.num_heads))
        key_NLhd = self.k_norm(split_heads(self.k_proj(x_NLD), self.key_value_heads))
        value_NLhd = split_heads(self.v_proj(x_NLD), self.key_value_heads)
        shared_by = self.num_heads // self.key_value_heads
        query_NLD, key_NLD, value_NLD = (
            heads_NLhd.reshape(*x_NLD.shape[:2], -1)
            for heads_NLhd in (
                rotate_halves(query_NLhd, rotary),
                jnp.repeat(rotate_halves(key_NLhd, rotary), shared_by, axis=2),
                jnp.repeat(value_NLhd, shared_by, axis=2),
            )
        )
        y_NLD = attention(query_NLD, key_NLD, value_NLD, self.num_heads, num_keys_N=num_tokens_N, is_causal=True)
        return self.o_proj(y_NLD)


class Qwen3MLP(nnx.Module):
    """Feed-forward layer whose activated half gates the other (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: Qwen3Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, inner_width = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = (
            Linear(width, inner_width, use_bias=False, dtype=dtype, rngs=rngs) for _ in range(2)
        )
        self.down_proj = Linear(inner_width, width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x_NLD: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x_NLD)) * self.up_proj(x_NLD))


def rotary_tables(length: int, features: int, theta: float, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Return cosines and sines [L, p] of the angles by which a position's features are rotated (arXiv 2104.09864)."""
    frequencies_p = theta ** -(np.arange(0, features, 2) / features)
    angles_Lp = np.arange(length)[:, None] * frequencies_p
    return jnp.asarray(np.cos(angles_Lp), dtype), jnp.asarray(np.sin(angles_Lp), dtype)


def rotate_halves(x_NLhd: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate pairs of features, of which one is in the first half of a head and one in the second."""
    cos, sin = (table_Lp[:, None, :] for table_Lp in rotary)
    first, second = jnp.split(x_NLhd.astype(cos.dtype), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_NLhd.dtype)
