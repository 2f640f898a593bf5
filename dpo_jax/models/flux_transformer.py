"""FluxTransformer2DModel: the denoiser of FLUX.1 (Black Forest Labs), with the structure and parameter names of
diffusers.

The image's tokens and the caption's first pass through double blocks, which have their own weights for each and one
attention over both; then through single blocks, which treat both alike, the caption's tokens first. Queries and keys
carry their position by rotary embedding (Su et al., arXiv 2104.09864).

N images, H x W latent cells, C channels; L tokens (an image has one per 2 x 2 cells), D features of all heads,
p = d / 2 pairs of a head's d features, T features of the time embedding.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from dpo_jax.batch import Conditioning
from dpo_jax.errors import UserError
from dpo_jax.models.config_json import Depth, Width, read_config
from dpo_jax.models.execution import PLAIN, Execution
from dpo_jax.models.layers import Linear
from dpo_jax.models.operations import accumulation_dtype, gated_add, gelu_tanh, modulated_layer_norm
from dpo_jax.models.time_embedding import CombinedTimestepTextProjEmbeddings
from dpo_jax.models.transformer_layers import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    Attention,
    JointTransformerBlock,
    Rotary,
    check_inputs,
    patchify,
    unpatchify,
)

PATCH = 2
"""Height and width in latent cells of the patch that becomes one token."""
THETA = 10_000.0
"""The slowest rotation is almost this many times slower than the fastest."""


@dataclasses.dataclass(frozen=True)
class FluxTransformerConfig:
    """The config.json of a diffusers FluxTransformer2DModel; the names and defaults are those of diffusers."""

    in_channels: Width = 64
    """Features of a token: the channels of the latents times the 4 cells of a patch."""
    num_layers: Depth = 19
    """Number of double blocks."""
    num_single_layers: Depth = 38
    attention_head_dim: Width = 128
    num_attention_heads: Width = 24
    joint_attention_dim: Width = 4096
    """Features of a caption's tokens."""
    pooled_projection_dim: Width = 768
    """Features of the pooled caption."""
    guidance_embeds: bool = False
    """True if the model was distilled from guidance and is told its scale (FLUX.1-dev)."""
    axes_dims_rope: tuple[Width, ...] = (16, 56, 56)
    """How many of a head's features rotate with each coordinate of a token: an unused one, its row and its column."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str) -> "FluxTransformerConfig":
        """Read a config.json. Raises a UserError that names `where` and the field that is not supported."""
        supported = _SUPPORTED | {"out_channels": (None, config.get("in_channels", cls.in_channels))}
        result = read_config(cls, config, where, supported=supported)
        result._check(where)
        return result

    def _check(self, where: str) -> None:
        axes, features = self.axes_dims_rope, self.attention_head_dim
        if len(axes) != 3 or sum(axes) != features or any(axis % 2 for axis in axes):
            raise UserError(
                f"{where}: axes_dims_rope = {list(axes)} are not three even numbers with the sum "
                f"attention_head_dim = {features}"
            )
        if self.in_channels % PATCH**2:
            raise UserError(
                f"{where}: in_channels = {self.in_channels} is not a multiple of {PATCH**2}, the cells of a token"
            )

    @property
    def features(self) -> int:
        """Features of a token inside the model, those of all heads."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        return self.in_channels // PATCH**2

    @property
    def context_features(self) -> int:
        return self.joint_attention_dim

    @property
    def pooled_features(self) -> int:
        return self.pooled_projection_dim

    @property
    def size_multiple(self) -> int:
        """Number of which the height and the width of the latents must be multiples."""
        return PATCH

    @property
    def trained_cells(self) -> int:
        """Latent cells a side that the model was trained on."""
        return 128

    @property
    def most_cells(self) -> int | None:
        return None


# Fields that have no other value in FLUX.1-dev and -schnell. Models with more input than output channels also read an
# image, for example FLUX.1-Fill.
_SUPPORTED: dict[str, Any] = {"_class_name": ("FluxTransformer2DModel",), "patch_size": (1,)}


class FluxTransformer2DModel(nnx.Module):
    """Predicts the velocity from noisy latents, their timestep and the caption."""

    def __init__(
        self, config: FluxTransformerConfig, *, execution: Execution = PLAIN, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        width, heads = config.features, config.num_attention_heads
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(
            width, config.pooled_projection_dim, has_guidance=config.guidance_embeds, dtype=dtype, rngs=rngs
        )
        self.context_embedder = Linear(config.joint_attention_dim, width, dtype=dtype, rngs=rngs)
        self.x_embedder = Linear(config.in_channels, width, dtype=dtype, rngs=rngs)
        settings: dict[str, Any] = {"execution": execution, "dtype": dtype, "rngs": rngs}
        self.transformer_blocks = nnx.List(
            [
                JointTransformerBlock(width, heads, qk_norm=True, context_first=True, **settings)
                for _ in range(config.num_layers)
            ]
        )
        self.single_transformer_blocks = nnx.List(
            [FluxSingleTransformerBlock(width, heads, **settings) for _ in range(config.num_single_layers)]
        )
        self.norm_out = AdaLayerNormContinuous(width, dtype=dtype, rngs=rngs)
        self.proj_out = Linear(width, config.in_channels, dtype=dtype, rngs=rngs)
        self.config, self.execution, self.dtype = config, execution, dtype

    def __call__(self, x_NHWC: jax.Array, t_N: jax.Array, conditioning: Conditioning) -> jax.Array:
        """Return the velocity [N, H, W, C] in the compute dtype.

        `t_N` goes from 0 to 1000, and `conditioning.guidance_N` is the guidance scale, for example 3.5; a model without
        an embedding of the guidance does not read it. Padding is attended to like a caption. Raises a UserError if
        latents or conditioning do not fit.
        """
        check_inputs("FLUX transformer", self.config, x_NHWC, conditioning)
        if self.config.guidance_embeds and conditioning.guidance_N is None:
            raise UserError(
                "this FLUX transformer has guidance_embeds = true, but its conditioning has no guidance_N (a guidance "
                "scale, for example 3.5)"
            )
        _, height, width, _ = x_NHWC.shape
        captions, high = conditioning.context_NLD.shape[1], accumulation_dtype(self.dtype)
        guidance_N = None if conditioning.guidance_N is None else conditioning.guidance_N.astype(high) * 1000
        temb_NT = self.time_text_embed(t_N, conditioning.pooled_NP, guidance_N)
        rotary = make_rotary(captions, height // PATCH, width // PATCH, self.config.axes_dims_rope, high)

        x_NLD = self.x_embedder(patchify(x_NHWC, PATCH, channels_first=True))
        streams = x_NLD, self.context_embedder(conditioning.context_NLD)
        x_NLD, context_NLD = self.execution.run_chain(self.transformer_blocks, streams, temb_NT, rotary)
        x_NLD = jnp.concatenate([context_NLD, x_NLD], axis=1)
        x_NLD = self.execution.run_chain(self.single_transformer_blocks, x_NLD, temb_NT, rotary)
        x_NLD = self.proj_out(self.norm_out(x_NLD[:, captions:], temb_NT))
        return unpatchify(x_NLD, height, width, PATCH, channels_first=True)


class FluxSingleTransformerBlock(nnx.Module):
    """Attention of captions and images to both and, beside it, a feed-forward layer; both share the normalisation and
    the last projection."""

    def __init__(self, features: int, num_heads: int, *, execution: Execution, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = AdaLayerNormZero(features, 3, dtype=dtype, rngs=rngs)
        self.attn = Attention(
            features, num_heads, qk_norm=True, has_output=False, execution=execution, dtype=dtype, rngs=rngs
        )
        self.proj_mlp = Linear(features, 4 * features, dtype=dtype, rngs=rngs)
        self.proj_out = Linear(5 * features, features, dtype=dtype, rngs=rngs)

    def __call__(self, x_NLD: jax.Array, temb_NT: jax.Array, rotary: Rotary) -> jax.Array:
        shift_N1D, scale_N1D, gate_N1D = self.norm(temb_NT)
        normed_NLD = modulated_layer_norm(x_NLD, shift_N1D, scale_N1D)
        parts = [self.attn(normed_NLD, rotary), gelu_tanh(self.proj_mlp(normed_NLD))]
        return gated_add(x_NLD, gate_N1D, self.proj_out(jnp.concatenate(parts, axis=-1)))


def make_rotary(captions: int, rows: int, columns: int, axes: tuple[int, ...], dtype: DTypeLike) -> Rotary:
    """Return the rotary tables of a caption's tokens, which are all at the origin, and after them of an image's.

    Args:
        captions: number of the caption's tokens.
        rows: number of rows of the image's tokens.
        columns: number of tokens per row.
        axes: features that rotate with each coordinate; see `FluxTransformerConfig.axes_dims_rope`.
        dtype: dtype of the tables, which are computed in float64.
    """
    positions = np.zeros((1, 1)), np.arange(rows)[:, None], np.arange(columns)[None, :]
    # There is one small table per coordinate, because the whole table would be a constant of megabytes in the program.
    angles = [x[..., None] * THETA ** -(np.arange(0, axis, 2) / axis) for x, axis in zip(positions, axes, strict=True)]

    def table(function: np.ufunc) -> jax.Array:
        parts = [jnp.asarray(function(x), dtype) for x in angles]
        image = jnp.concatenate([jnp.broadcast_to(x, (rows, columns, x.shape[-1])) for x in parts], axis=-1)
        caption_Lp = jnp.full((captions, image.shape[-1]), function(0.0), dtype)
        return jnp.concatenate([caption_Lp, image.reshape(rows * columns, -1)])

    return Rotary(table(np.cos), table(np.sin))
