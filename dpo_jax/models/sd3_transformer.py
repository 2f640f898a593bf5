"""SD3Transformer2DModel: the denoiser of Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206), with the
structure and parameter names of diffusers.

N images, H x W latent cells, C channels, L tokens, D features; the conditioning's axes are in `batch.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import pydantic
from flax import nnx
from jax.typing import DTypeLike

from dpo_jax.batch import Conditioning
from dpo_jax.errors import UserError
from dpo_jax.models.config_json import Depth, Width, read_config
from dpo_jax.models.execution import PLAIN, Execution
from dpo_jax.models.layers import Conv, Linear, make_param
from dpo_jax.models.time_embedding import CombinedTimestepTextProjEmbeddings
from dpo_jax.models.transformer_layers import (
    AdaLayerNormContinuous,
    JointTransformerBlock,
    check_inputs,
    unpatchify,
)


@dataclasses.dataclass(frozen=True)
class SD3TransformerConfig:
    """The fields of a diffusers SD3Transformer2DModel config.json, with diffusers' defaults."""

    sample_size: Width = 128
    """Height and width of the latents that the model was trained on; other sizes can be used."""
    patch_size: Annotated[int, pydantic.Field(ge=1, le=16)] = 2
    in_channels: Width = 16
    out_channels: Width | None = 16
    num_layers: Depth = 18
    num_attention_heads: Width = 18
    attention_head_dim: Width = 64
    joint_attention_dim: Width = 4096
    """Width of the caption's token embeddings."""
    caption_projection_dim: Width = 1152
    """Width of the caption's tokens inside the model, which equals that of the image's tokens."""
    pooled_projection_dim: Width = 2048
    pos_embed_max_size: Width = 96
    """Rows and columns of the table of positions, in patches."""
    dual_attention_layers: tuple[Annotated[int, pydantic.Field(ge=0, lt=256)], ...] = ()
    """Blocks that also attend from image tokens to image tokens alone."""
    qk_norm: str | None = None
    """"rms_norm" (SD3.5) normalises queries and keys."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str) -> "SD3TransformerConfig":
        """Read a config.json. Raises a UserError that names `where` and the field that is not supported."""
        supported = {"_class_name": ("SD3Transformer2DModel",), "qk_norm": (None, "rms_norm")}
        result = read_config(cls, config, where, supported=supported)
        if result.caption_projection_dim != result.features:
            raise UserError(
                f"{where}: caption_projection_dim = {result.caption_projection_dim} differs from num_attention_heads * "
                f"attention_head_dim = {result.num_attention_heads} * {result.attention_head_dim} = {result.features}, "
                "but images and captions are attended to together"
            )
        if result.features % 4:
            raise UserError(
                f"{where}: num_attention_heads * attention_head_dim = {result.features} is not a multiple of 4: "
                "positions are embedded as sines and cosines of rows and columns"
            )
        if result.out_channels not in (None, result.in_channels):
            raise UserError(
                f"{where}: out_channels = {result.out_channels} is not supported, only in_channels = "
                f"{result.in_channels}: the model predicts the velocity of its latents"
            )
        return result

    @property
    def features(self) -> int:
        """Width of the tokens inside the model."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        return self.in_channels

    @property
    def context_features(self) -> int:
        return self.joint_attention_dim

    @property
    def pooled_features(self) -> int:
        return self.pooled_projection_dim

    @property
    def size_multiple(self) -> int:
        """Height and width of the latents must be multiples of it."""
        return self.patch_size

    @property
    def trained_cells(self) -> int:
        """Latent cells per side that the model was trained on."""
        return self.sample_size

    @property
    def most_cells(self) -> int | None:
        """The table of positions has so many rows and columns of patches."""
        return self.pos_embed_max_size * self.patch_size


class SD3Transformer2DModel(nnx.Module):
    """Predicts the velocity (noise minus clean latents) from noisy latents, their timestep and the caption."""

    def __init__(self, config: SD3TransformerConfig, *, execution: Execution = PLAIN, dtype: DTypeLike, rngs: nnx.Rngs):
        features, layers = config.features, range(config.num_layers)
        self.pos_embed = PatchEmbed(config, dtype=dtype, rngs=rngs)
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(
            features, config.pooled_projection_dim, dtype=dtype, rngs=rngs
        )
        self.context_embedder = Linear(config.joint_attention_dim, features, dtype=dtype, rngs=rngs)
        self.transformer_blocks = nnx.List(
            [
                JointTransformerBlock(
                    features,
                    config.num_attention_heads,
                    qk_norm=config.qk_norm is not None,
                    dual_attention=layer in config.dual_attention_layers,
                    context_pre_only=layer == layers[-1],
                    execution=execution,
                    dtype=dtype,
                    rngs=rngs,
                )
                for layer in layers
            ]
        )
        self.norm_out = AdaLayerNormContinuous(features, dtype=dtype, rngs=rngs)
        self.proj_out = Linear(features, config.patch_size**2 * config.in_channels, dtype=dtype, rngs=rngs)
        self.config, self.execution = config, execution

    def __call__(self, x_NHWC: jax.Array, t_N: jax.Array, conditioning: Conditioning) -> jax.Array:
        """Return the velocity [N, H, W, C] in the compute dtype; UserError if latents or conditioning do not fit.

        `t_N` is 1000 times the noise level sigma.
        """
        check_inputs("SD3 transformer", self.config, x_NHWC, conditioning)
        _, height, width, _ = x_NHWC.shape
        temb_NT = self.time_text_embed(t_N, conditioning.pooled_NP)
        streams = self.pos_embed(x_NHWC), self.context_embedder(conditioning.context_NLD)
        x_NLD, _ = self.execution.run_chain(self.transformer_blocks, streams, temb_NT)
        y_NLF = self.proj_out(self.norm_out(x_NLD, temb_NT))
        return unpatchify(y_NLF, height, width, self.config.patch_size, channels_first=False)


class PatchEmbed(nnx.Module):
    """Makes one token of each patch and adds its position from a stored table, whose middle the image covers."""

    def __init__(self, config: SD3TransformerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        size, self.side = config.patch_size, config.pos_embed_max_size
        self.proj = Conv(config.in_channels, config.features, size, stride=size, padding=0, dtype=dtype, rngs=rngs)

        def table(_: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
            return position_table(self.side, config.sample_size // size, config.features).reshape(shape).astype(dtype)

        self.pos_embed = make_param(table, rngs, (1, self.side**2, config.features), is_trainable=False)
        self.dtype = dtype

    def __call__(self, x_NHWC: jax.Array) -> jax.Array:
        """Return tokens [N, L, D], row by row; UserError if the table has too few rows or columns."""
        x_NhwD = self.proj(x_NHWC)
        n, height, width, features = x_NhwD.shape
        if max(height, width) > self.side:
            raise UserError(
                f"latents of {x_NHWC.shape[1]} x {x_NHWC.shape[2]} cells make {height} x {width} patches, but this "
                f"model has pos_embed_max_size = {self.side} rows and columns; draw smaller images"
            )
        top, left = (self.side - height) // 2, (self.side - width) // 2
        # The window is cut first: the whole table is a tenth of the weights of SD3.5-medium.
        table_SSD = self.pos_embed[...].reshape(self.side, self.side, features)
        window_hwD = table_SSD[top : top + height, left : left + width].astype(self.dtype)
        return (x_NhwD + window_hwD).reshape(n, -1, features)


def position_table(side: int, base: int, features: int) -> jax.Array:
    """Return the fixed embedding [side, side, D] of rows and columns, scaled to `base` of them.

    The first half of the features are sines and cosines of the column, the second half of the row.
    """
    quarter = features // 4
    position_S = jnp.arange(side) / (side / base)
    angles_Sq = position_S[:, None] * 10_000 ** (-jnp.arange(quarter) / quarter)
    waves_Sd = jnp.concatenate([jnp.sin(angles_Sq), jnp.cos(angles_Sq)], axis=-1)
    shape = side, side, 2 * quarter
    of_column_SSd, of_row_SSd = (jnp.broadcast_to(waves, shape) for waves in (waves_Sd[None], waves_Sd[:, None]))
    return jnp.concatenate([of_column_SSd, of_row_SSd], axis=-1)
