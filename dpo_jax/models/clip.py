"""CLIP's text encoder (Radford et al., arXiv 2103.00020) with the structure and the parameter names of transformers.

The image encoder, which uses the same layers, is in `clip_vision.py`.

Axes: N captions, L tokens, D hidden width, P pooled width (D, or the width of the projection).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import pydantic
from flax import nnx
from jax.typing import DTypeLike

from dpo_jax.errors import UserError
from dpo_jax.files import conform
from dpo_jax.models.attention import attention
from dpo_jax.models.config_json import Depth, Positive, TokenId, Vocabulary, Width, read_config
from dpo_jax.models.layers import Embedding, LayerNorm, Linear


def quick_gelu(x: jax.Array) -> jax.Array:
    """Return GELU's sigmoid approximation (arXiv 1606.08415, section 2), which OpenAI's CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """Return GELU with the error function, not with its tanh approximation (arXiv 1606.08415); OpenCLIP uses it."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}

# Published files carry 2 here, which was never the token's id. transformers then takes the largest id instead.
LEGACY_EOS_TOKEN_ID = 2

# Fields that transformers 4 and 5 write but that change no output: training, generation, bookkeeping.
METADATA = frozenset(
    """
    architectures attention_dropout bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dropout dtype early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label initializer_factor initializer_range label2id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
    output_scores pad_token_id prefix problem_type remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript transformers_version
    typical_p use_bfloat16
    """.split()  # noqa: SIM905
)


class Parts(pydantic.BaseModel):
    """The parts of the config.json of a CLIP or of its text encoder."""

    architectures: list[str] | None = None
    text_config: dict[str, Any] | None = None
    text_config_dict: dict[str, Any] | None = None
    vision_config: dict[str, Any] | None = None
    vision_config_dict: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class LayersConfig:
    """The fields that the layers of both encoders share; the defaults are those of transformers for text."""

    hidden_size: Width = 512
    intermediate_size: Width = 2048
    num_hidden_layers: Depth = 12
    num_attention_heads: Width = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: Positive = 1e-5

    def check(self, where: str) -> None:
        """Raise a UserError that names `where` if the width is not divisible by the number of heads."""
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"{where}: hidden_size = {self.hidden_size} does not divide into num_attention_heads = "
                f"{self.num_attention_heads}"
            )


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(LayersConfig):
    """The fields of a transformers CLIP text config.json that change the output; the defaults are transformers'."""

    vocab_size: Vocabulary = 49408
    max_position_embeddings: Width = 77
    eos_token_id: TokenId = 49407
    projection_dim: Width = 512
    with_projection: bool = False
    """True for CLIPTextModelWithProjection of transformers: `pooled` goes through `text_projection`."""
    tokenizer_kind: ClassVar[str] = "clip"

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str) -> "CLIPTextConfig":
        """Read the config.json of a text model, or the text half of the config.json of a whole CLIP.

        Raises a UserError that names `where` and the field that is not supported.
        """
        parts: Parts = conform(config, Parts, where)
        with_projection = any(
            name.endswith(("CLIPTextModelWithProjection", "CLIPModel")) for name in parts.architectures or ()
        )
        if parts.text_config is not None:
            shared = {"projection_dim": config["projection_dim"]} if "projection_dim" in config else {}
            # Old files repeat the text half in `text_config_dict`, which wins in transformers.
            config = {**parts.text_config, **(parts.text_config_dict or {}), **shared}
        supported = {
            "model_type": ("clip_text_model",),
            "hidden_act": tuple(ACTIVATIONS),
            "add_cross_attention": (False,),
            "is_decoder": (False,),
            "is_encoder_decoder": (False,),
            "pruned_heads": ({}, None),
        }
        result = read_config(cls, config, where, supported=supported, metadata=METADATA)
        result.check(where)
        return dataclasses.replace(result, with_projection=with_projection)


class TextOutput(NamedTuple):
    """The outputs that a diffusion model can be conditioned on; each family reads one or two of them."""

    last_hidden_NLD: jax.Array
    """Output of the last layer, after the final norm (SD1.5, SD2)."""
    penultimate_NLD: jax.Array
    """Input of the last layer, without the final norm (SDXL)."""
    pooled_NP: jax.Array
    """`last_hidden_NLD` at the end-of-text token, projected if the model has a projection (SDXL)."""


class CLIPTextModel(nnx.Module):
    """CLIPTextModel of transformers, or CLIPTextModelWithProjection if `config.with_projection`."""

    def __init__(self, config: CLIPTextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.text_model = CLIPTextTransformer(config, dtype=dtype, rngs=rngs)
        self.text_projection = (
            Linear(config.hidden_size, config.projection_dim, use_bias=False, dtype=dtype, rngs=rngs)
            if config.with_projection
            else None
        )

    def __call__(self, token_ids_NL: jax.Array) -> TextOutput:
        output = self.text_model(token_ids_NL)
        if self.text_projection is None:
            return output
        return output._replace(pooled_NP=self.text_projection(output.pooled_NP))


class CLIPTextTransformer(nnx.Module):
    """Embeddings, layers, final norm, and pooling at the end-of-text token."""

    def __init__(self, config: CLIPTextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.embeddings = CLIPTextEmbeddings(config, dtype=dtype, rngs=rngs)
        self.encoder = CLIPEncoder(config, dtype=dtype, rngs=rngs)
        self.final_layer_norm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs)
        self.eos_token_id = config.eos_token_id

    def __call__(self, token_ids_NL: jax.Array) -> TextOutput:
        hidden_NLD, penultimate_NLD = self.encoder(self.embeddings(token_ids_NL))
        last_hidden_NLD = self.final_layer_norm(hidden_NLD)
        end_N = end_of_text(token_ids_NL, self.eos_token_id)
        pooled_ND = jnp.take_along_axis(last_hidden_NLD, end_N[:, None, None], axis=1)[:, 0]
        return TextOutput(last_hidden_NLD, penultimate_NLD, pooled_ND)


def end_of_text(token_ids_NL: jax.Array, eos_token_id: int) -> jax.Array:
    """Return the position of the first end-of-text token of each caption, as transformers finds it."""
    if eos_token_id == LEGACY_EOS_TOKEN_ID:
        return token_ids_NL.argmax(axis=-1)
    return (token_ids_NL == eos_token_id).argmax(axis=-1)


class CLIPTextEmbeddings(nnx.Module):
    """Token embeddings plus learned position embeddings."""

    def __init__(self, config: CLIPTextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width = config.hidden_size
        self.token_embedding = Embedding(config.vocab_size, width, dtype=dtype, rngs=rngs)
        self.position_embedding = Embedding(config.max_position_embeddings, width, dtype=dtype, rngs=rngs)

    def __call__(self, token_ids_NL: jax.Array) -> jax.Array:
        length, longest = token_ids_NL.shape[1], self.position_embedding.embedding.shape[0]
        if length > longest:  # JAX would silently repeat the last position
            raise UserError(f"captions of {length} tokens do not fit a text model of {longest} positions")
        return self.token_embedding(token_ids_NL) + self.position_embedding(jnp.arange(length))


class CLIPEncoder(nnx.Module):
    """All layers; returns the last layer's output and its input, which SDXL is conditioned on."""

    def __init__(self, config: LayersConfig, *, is_causal: bool = True, dtype: DTypeLike, rngs: nnx.Rngs):
        self.layers = nnx.List(
            [
                CLIPEncoderLayer(config, is_causal=is_causal, dtype=dtype, rngs=rngs)
                for _ in range(config.num_hidden_layers)
            ]
        )

    def __call__(self, hidden_NLD: jax.Array) -> tuple[jax.Array, jax.Array]:
        for layer in self.layers:
            penultimate_NLD, hidden_NLD = hidden_NLD, layer(hidden_NLD)
        return hidden_NLD, penultimate_NLD


class CLIPEncoderLayer(nnx.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: LayersConfig, *, is_causal: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        width, epsilon = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = LayerNorm(width, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.self_attn = CLIPAttention(width, config.num_attention_heads, is_causal=is_causal, dtype=dtype, rngs=rngs)
        self.layer_norm2 = LayerNorm(width, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.mlp = CLIPMLP(width, config.intermediate_size, config.hidden_act, dtype=dtype, rngs=rngs)

    def __call__(self, x_NLD: jax.Array) -> jax.Array:
        x_NLD = x_NLD + self.self_attn(self.layer_norm1(x_NLD))
        return x_NLD + self.mlp(self.layer_norm2(x_NLD))


class CLIPAttention(nnx.Module):
    """Multi-head self-attention: a text token attends to itself and earlier tokens, an image patch to all patches."""

    def __init__(self, width: int, num_heads: int, *, is_causal: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        self.q_proj = Linear(width, width, dtype=dtype, rngs=rngs)
        self.k_proj = Linear(width, width, dtype=dtype, rngs=rngs)
        self.v_proj = Linear(width, width, dtype=dtype, rngs=rngs)
        self.out_proj = Linear(width, width, dtype=dtype, rngs=rngs)
        self.num_heads, self.is_causal = num_heads, is_causal

    def __call__(self, x_NLD: jax.Array) -> jax.Array:
        query, key, value = self.q_proj(x_NLD), self.k_proj(x_NLD), self.v_proj(x_NLD)
        return self.out_proj(attention(query, key, value, self.num_heads, is_causal=self.is_causal))


class CLIPMLP(nnx.Module):
    """Two linear layers with the config's activation between them."""

    def __init__(self, width: int, inner_width: int, activation: str, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.fc1 = Linear(width, inner_width, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(inner_width, width, dtype=dtype, rngs=rngs)
        self.activation = ACTIVATIONS[activation]

    def __call__(self, x_NLD: jax.Array) -> jax.Array:
        return self.fc2(self.activation(self.fc1(x_NLD)))
