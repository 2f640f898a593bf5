"""ImageReward's network (Xu et al., arXiv 2304.05977). A BLIP (Li et al., arXiv 2201.12086) reads a caption together
with the image, and an MLP turns its output into a reward.

The structure and the parameter names are those of transformers' BlipVisionModel and BlipTextModel.

Axes: N images with one caption each, H x W pixels, C channels, D hidden width, S image tokens (the patches and the
class token), L caption tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from dpo_jax.models.attention import attention
from dpo_jax.models.clip import CLIPMLP, LayersConfig, gelu
from dpo_jax.models.layers import Conv, Embedding, LayerNorm, Linear, make_param
from dpo_jax.models.score_head import ScoreMLP


@dataclasses.dataclass(frozen=True)
class BLIPVisionConfig(LayersConfig):
    """A ViT; the defaults are ViT-L/16 at 224 pixels."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    image_size: int = 224
    patch_size: int = 16


@dataclasses.dataclass(frozen=True)
class BLIPTextConfig(LayersConfig):
    """A BERT; the defaults are BERT base with BLIP's two extra tokens."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    vocab_size: int = 30524
    max_position_embeddings: int = 512


@dataclasses.dataclass(frozen=True)
class ImageRewardConfig:
    """The configs of both halves and of the reward's scale; the defaults are those of ImageReward-v1.0."""

    vision: BLIPVisionConfig = BLIPVisionConfig()
    text: BLIPTextConfig = BLIPTextConfig()
    mean: float = 0.16717362830052426
    std: float = 1.0333394966054072
    """Mean and standard deviation of the MLP's output, by which the reward is normalised."""


class ImageReward(nnx.Module):
    """Map (normalised pixels, token ids, number of tokens without padding) to rewards_N in float32."""

    def __init__(self, config: ImageRewardConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.vision_model = BLIPVisionModel(config.vision, dtype=dtype, rngs=rngs)
        self.text_encoder = BLIPTextModel(config.text, config.vision.hidden_size, dtype=dtype, rngs=rngs)
        self.mlp = ScoreMLP(config.text.hidden_size, dtype="float32", rngs=rngs)
        self.mean, self.std = config.mean, config.std

    def __call__(self, pixels_NHWC: jax.Array, token_ids_NL: jax.Array, lengths_N: jax.Array) -> jax.Array:
        hidden_NLD = self.text_encoder(token_ids_NL, lengths_N, self.vision_model(pixels_NHWC))
        return (self.mlp(hidden_NLD[:, 0]) - self.mean) / self.std


class BLIPVisionModel(nnx.Module):
    """A pre-norm ViT; it returns all of its tokens, normalised."""

    def __init__(self, config: BLIPVisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.embeddings = BLIPVisionEmbeddings(config, dtype=dtype, rngs=rngs)
        self.encoder = BLIPVisionEncoder(config, dtype=dtype, rngs=rngs)
        self.post_layernorm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs)

    def __call__(self, pixels_NHWC: jax.Array) -> jax.Array:
        return self.post_layernorm(self.encoder(self.embeddings(pixels_NHWC)))


class BLIPVisionEmbeddings(nnx.Module):
    """Projected patches after a class token, plus learned position embeddings."""

    def __init__(self, config: BLIPVisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, patch, init = config.hidden_size, config.patch_size, nnx.initializers.normal(0.02)
        positions = (config.image_size // patch) ** 2 + 1
        self.class_embedding = make_param(init, rngs, (1, 1, width))
        self.patch_embedding = Conv(3, width, patch, stride=patch, padding=0, dtype=dtype, rngs=rngs)
        self.position_embedding = make_param(init, rngs, (1, positions, width))
        self.dtype = dtype

    def __call__(self, pixels_NHWC: jax.Array) -> jax.Array:
        patches_NhwD = self.patch_embedding(pixels_NHWC)
        N, h, w, D = patches_NhwD.shape
        class_N1D = jnp.broadcast_to(self.class_embedding[...].astype(self.dtype), (N, 1, D))
        tokens_NSD = jnp.concatenate([class_N1D, patches_NhwD.reshape(N, h * w, D)], axis=1)
        return tokens_NSD + self.position_embedding[...].astype(self.dtype)


class BLIPVisionEncoder(nnx.Module):
    """All layers of the image encoder, one after the other."""

    def __init__(self, config: BLIPVisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        layers = [BLIPVisionLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)]
        self.layers = nnx.List(layers)

    def __call__(self, x_NSD: jax.Array) -> jax.Array:
        for layer in self.layers:
            x_NSD = layer(x_NSD)
        return x_NSD


class BLIPVisionLayer(nnx.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: BLIPVisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, epsilon = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = LayerNorm(width, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.self_attn = BLIPVisionAttention(width, config.num_attention_heads, dtype=dtype, rngs=rngs)
        self.layer_norm2 = LayerNorm(width, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.mlp = CLIPMLP(width, config.intermediate_size, config.hidden_act, dtype=dtype, rngs=rngs)

    def __call__(self, x_NSD: jax.Array) -> jax.Array:
        x_NSD = x_NSD + self.self_attn(self.layer_norm1(x_NSD))
        return x_NSD + self.mlp(self.layer_norm2(x_NSD))


class BLIPVisionAttention(nnx.Module):
    """Multi-head self-attention; one linear layer makes the queries, keys and values."""

    def __init__(self, width: int, num_heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.qkv = Linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.projection = Linear(width, width, dtype=dtype, rngs=rngs)
        self.num_heads = num_heads

    def __call__(self, x_NSD: jax.Array) -> jax.Array:
        query, key, value = jnp.split(self.qkv(x_NSD), 3, axis=-1)
        return self.projection(attention(query, key, value, self.num_heads))


class BLIPTextModel(nnx.Module):
    """A BERT in which every layer attends to the image between its self-attention and its MLP; padding is masked."""

    def __init__(self, config: BLIPTextConfig, image_width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.embeddings = BLIPTextEmbeddings(config, dtype=dtype, rngs=rngs)
        self.encoder = BLIPTextEncoder(config, image_width, dtype=dtype, rngs=rngs)

    def __call__(self, token_ids_NL: jax.Array, lengths_N: jax.Array, image_NSD: jax.Array) -> jax.Array:
        return self.encoder(self.embeddings(token_ids_NL), lengths_N, image_NSD)


class BLIPTextEmbeddings(nnx.Module):
    """Token embeddings plus learned position embeddings, normalised."""

    def __init__(self, config: BLIPTextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width = config.hidden_size
        self.word_embeddings = Embedding(config.vocab_size, width, dtype=dtype, rngs=rngs)
        self.position_embeddings = Embedding(config.max_position_embeddings, width, dtype=dtype, rngs=rngs)
        self.LayerNorm = LayerNorm(width, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs)

    def __call__(self, token_ids_NL: jax.Array) -> jax.Array:
        positions_L = jnp.arange(token_ids_NL.shape[1])
        return self.LayerNorm(self.word_embeddings(token_ids_NL) + self.position_embeddings(positions_L))


class BLIPTextEncoder(nnx.Module):
    """All layers of the text encoder, one after the other."""

    def __init__(self, config: BLIPTextConfig, image_width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        layers = [BLIPTextLayer(config, image_width, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)]
        self.layer = nnx.List(layers)

    def __call__(self, x_NLD: jax.Array, lengths_N: jax.Array, image_NSD: jax.Array) -> jax.Array:
        for layer in self.layer:
            x_NLD = layer(x_NLD, lengths_N, image_NSD)
        return x_NLD


class BLIPTextLayer(nnx.Module):
    """A post-norm transformer layer with cross-attention to the image."""

    def __init__(self, config: BLIPTextConfig, image_width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        self.attention = BLIPTextAttention(config, width, dtype=dtype, rngs=rngs)
        self.crossattention = BLIPTextAttention(config, image_width, dtype=dtype, rngs=rngs)
        self.intermediate = Dense(width, inner, dtype=dtype, rngs=rngs)
        self.output = DenseNorm(inner, config, dtype=dtype, rngs=rngs)

    def __call__(self, x_NLD: jax.Array, lengths_N: jax.Array, image_NSD: jax.Array) -> jax.Array:
        x_NLD = self.attention(x_NLD, x_NLD, lengths_N)
        x_NLD = self.crossattention(x_NLD, image_NSD)
        return self.output(gelu(self.intermediate(x_NLD)), x_NLD)


class BLIPTextAttention(nnx.Module):
    """Attention to all of a context or to its first `lengths_N` tokens, added to the input and normalised."""

    def __init__(self, config: BLIPTextConfig, context_width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.self = QueryKeyValue(config.hidden_size, context_width, dtype=dtype, rngs=rngs)
        self.output = DenseNorm(config.hidden_size, config, dtype=dtype, rngs=rngs)
        self.num_heads = config.num_attention_heads

    def __call__(self, x_NLD: jax.Array, context_NSD: jax.Array, lengths_N: jax.Array | None = None) -> jax.Array:
        query, key, value = self.self(x_NLD, context_NSD)
        if lengths_N is None:
            return self.output(attention(query, key, value, self.num_heads), x_NLD)
        heads = (x.reshape(*x.shape[:2], self.num_heads, -1) for x in (query, key, value))
        seen_NLhd = jax.nn.dot_product_attention(*heads, key_value_seq_lengths=lengths_N)
        return self.output(seen_NLhd.reshape(x_NLD.shape), x_NLD)


class QueryKeyValue(nnx.Module):
    """The projections to queries, keys and values."""

    def __init__(self, width: int, context_width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.query = Linear(width, width, dtype=dtype, rngs=rngs)
        self.key = Linear(context_width, width, dtype=dtype, rngs=rngs)
        self.value = Linear(context_width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x_NLD: jax.Array, context_NSD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.query(x_NLD), self.key(context_NSD), self.value(context_NSD)


class Dense(nnx.Module):
    """A linear layer with the parameter name that BERT gives it."""

    def __init__(self, width: int, out_width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dense = Linear(width, out_width, dtype=dtype, rngs=rngs)

    def __call__(self, x_NLD: jax.Array) -> jax.Array:
        return self.dense(x_NLD)


class DenseNorm(nnx.Module):
    """A projection back to the hidden width; the result is added to the layer's input and normalised."""

    def __init__(self, width: int, config: BLIPTextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dense = Linear(width, config.hidden_size, dtype=dtype, rngs=rngs)
        self.LayerNorm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs)

    def __call__(self, x_NLD: jax.Array, beside_NLD: jax.Array) -> jax.Array:
        return self.LayerNorm(self.dense(x_NLD) + beside_NLD)
