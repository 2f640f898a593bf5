"""A whole CLIP (Radford et al., arXiv 2103.00020): an image encoder and a text encoder with a shared feature space.

The structure and the parameter names are those of transformers' CLIPModel.

Axes: N images or captions, H x W pixels, C channels, D hidden width, S image tokens (the patches and the class token),
L caption tokens, P projected width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from dpo_jax.errors import UserError
from dpo_jax.files import conform
from dpo_jax.models.clip import (
    ACTIVATIONS,
    METADATA,
    CLIPEncoder,
    CLIPTextConfig,
    CLIPTextTransformer,
    LayersConfig,
    Parts,
)
from dpo_jax.models.config_json import Width, read_config
from dpo_jax.models.layers import Conv, Embedding, LayerNorm, Linear, make_param

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation by which images (RGB, 0 to 1) are normalised: OpenAI's values, for every model here."""


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig(LayersConfig):
    """The fields of a transformers CLIP vision config that change the output; the defaults are transformers'."""

    hidden_size: Width = 768
    intermediate_size: Width = 3072
    num_attention_heads: Width = 12
    image_size: Width = 224
    patch_size: Width = 32


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """The configs of both halves, and the width that both are projected to."""

    text: CLIPTextConfig
    vision: CLIPVisionConfig
    projection_dim: Width = 512

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str) -> "CLIPConfig":
        """Read the config.json of a whole CLIP. Raises a UserError that names `where` and what is not supported."""
        parts: Parts = conform(config, Parts, where)
        if config.get("model_type") != "clip" or parts.vision_config is None or parts.text_config is None:
            raise UserError(f"{where} does not describe a whole CLIP, with an image and a text encoder")
        # Old files repeat the vision half in `vision_config_dict`, which wins in transformers.
        vision = {**parts.vision_config, **(parts.vision_config_dict or {})}
        supported = {
            "model_type": ("clip_vision_model",),
            "hidden_act": tuple(ACTIVATIONS),
            "num_channels": (3,),
            "add_cross_attention": (False,),
            "is_decoder": (False,),
            "is_encoder_decoder": (False,),
            "pruned_heads": ({}, None),
        }
        metadata = METADATA | {"eos_token_id", "projection_dim"}
        text = CLIPTextConfig.from_dict(config, where)
        where = f"{where}: vision_config"
        result = read_config(CLIPVisionConfig, vision, where, supported=supported, metadata=metadata)
        result.check(where)
        if result.image_size < result.patch_size:
            raise UserError(f"{where}: image_size = {result.image_size} is less than patch_size = {result.patch_size}")
        # `text` has checked the type of this field and holds the default for both halves if the file has none.
        return cls(text, result, config.get("projection_dim", cls.projection_dim))


class CLIPModel(nnx.Module):
    """CLIPModel of transformers."""

    def __init__(self, config: CLIPConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        text, vision, width = config.text, config.vision, config.projection_dim
        self.text_model = CLIPTextTransformer(text, dtype=dtype, rngs=rngs)
        self.vision_model = CLIPVisionTransformer(vision, dtype=dtype, rngs=rngs)
        self.visual_projection = Linear(vision.hidden_size, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.text_projection = Linear(text.hidden_size, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.logit_scale = make_param(nnx.initializers.constant(2.6592), rngs, ())

    def image_features(self, pixels_NHWC: jax.Array) -> jax.Array:
        """Map normalised pixels (see `IMAGE_MEAN`) to features_NP, which do not have unit length."""
        return self.visual_projection(self.vision_model(pixels_NHWC))

    def text_features(self, token_ids_NL: jax.Array) -> jax.Array:
        """Map token ids to features_NP, which do not have unit length."""
        return self.text_projection(self.text_model(token_ids_NL).pooled_NP)


class CLIPVisionTransformer(nnx.Module):
    """Patches and a class token go through the layers; returns the class token's output, normalised."""

    def __init__(self, config: CLIPVisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, epsilon = config.hidden_size, config.layer_norm_eps
        self.embeddings = CLIPVisionEmbeddings(config, dtype=dtype, rngs=rngs)
        self.pre_layrnorm = LayerNorm(width, epsilon=epsilon, dtype=dtype, rngs=rngs)  # published with this typo
        self.encoder = CLIPEncoder(config, is_causal=False, dtype=dtype, rngs=rngs)
        self.post_layernorm = LayerNorm(width, epsilon=epsilon, dtype=dtype, rngs=rngs)

    def __call__(self, pixels_NHWC: jax.Array) -> jax.Array:
        hidden_NSD, _ = self.encoder(self.pre_layrnorm(self.embeddings(pixels_NHWC)))
        return self.post_layernorm(hidden_NSD[:, 0])


class CLIPVisionEmbeddings(nnx.Module):
    """Projected patches after a class token, plus learned position embeddings."""

    def __init__(self, config: CLIPVisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = make_param(nnx.initializers.normal(width**-0.5), rngs, (width,))
        self.patch_embedding = Conv(3, width, patch, stride=patch, padding=0, use_bias=False, dtype=dtype, rngs=rngs)
        self.num_positions = (config.image_size // patch) ** 2 + 1
        self.position_embedding = Embedding(self.num_positions, width, dtype=dtype, rngs=rngs)
        self.dtype = dtype

    def __call__(self, pixels_NHWC: jax.Array) -> jax.Array:
        patches_NhwD = self.patch_embedding(pixels_NHWC)
        N, h, w, D = patches_NhwD.shape
        class_N1D = jnp.broadcast_to(self.class_embedding[...].astype(self.dtype), (N, 1, D))
        tokens_NSD = jnp.concatenate([class_N1D, patches_NhwD.reshape(N, h * w, D)], axis=1)
        return tokens_NSD + self.position_embedding(jnp.arange(self.num_positions))
