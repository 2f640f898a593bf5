"""The blocks of the UNet, with the structure and the parameter names of diffusers.

Axes: N images, H x W latent cells, C channels; for sequences L = H * W cells or caption tokens, D features; T features
of the time embedding `temb_NT`, which is already activated (diffusers activates it again in each resnet).
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from dpo_jax.models.attention import attention
from dpo_jax.models.execution import Execution
from dpo_jax.models.layers import Conv, GroupNorm, LayerNorm, Linear
from dpo_jax.models.operations import geglu
from dpo_jax.models.unet_config import UNetConfig


class DownBlock2D(nnx.Module):
    """Resnets, each followed by cross-attention if the config says so; then half the resolution, except at the end."""

    def __init__(self, config: UNetConfig, level: int, *, execution: Execution, dtype: DTypeLike, rngs: nnx.Rngs):
        widths, layers = config.block_out_channels, config.layers_per_block[level]
        width, before = widths[level], widths[max(level - 1, 0)]
        self.resnets: nnx.List = nnx.List([])
        self.attentions: nnx.List = nnx.List([])
        self.downsamplers: nnx.List = nnx.List([])
        for layer in range(layers):
            in_channels = before if layer == 0 else width
            self.resnets.append(ResnetBlock2D(config, in_channels, width, dtype=dtype, rngs=rngs))
            if config.down_block_types[level] == "CrossAttnDownBlock2D":
                self.attentions.append(Transformer2DModel(config, level, execution=execution, dtype=dtype, rngs=rngs))
        if level < len(widths) - 1:
            self.downsamplers.append(Downsample2D(width, dtype=dtype, rngs=rngs))
        self.execution = execution

    def __call__(self, x_NHWC: jax.Array, temb_NT: jax.Array, context_NLD: jax.Array) -> list[jax.Array]:
        """Return the output of every layer: the last is the next block's input, and all are skips for the way up."""
        outputs = []
        for layer, resnet in enumerate(self.resnets):
            x_NHWC = self.execution.run(resnet, x_NHWC, temb_NT)
            if self.attentions:
                x_NHWC = self.attentions[layer](x_NHWC, context_NLD)
            outputs.append(x_NHWC)
        for downsample in self.downsamplers:
            outputs.append(downsample(x_NHWC))
        return outputs


class UNetMidBlock2DCrossAttn(nnx.Module):
    """A resnet, cross-attention and a resnet at the coarsest resolution."""

    def __init__(self, config: UNetConfig, *, execution: Execution, dtype: DTypeLike, rngs: nnx.Rngs):
        level = len(config.block_out_channels) - 1
        width = config.block_out_channels[level]
        self.resnets = nnx.List([ResnetBlock2D(config, width, width, dtype=dtype, rngs=rngs) for _ in range(2)])
        self.attentions = nnx.List([Transformer2DModel(config, level, execution=execution, dtype=dtype, rngs=rngs)])
        self.execution = execution

    def __call__(self, x_NHWC: jax.Array, temb_NT: jax.Array, context_NLD: jax.Array) -> jax.Array:
        x_NHWC = self.execution.run(self.resnets[0], x_NHWC, temb_NT)
        x_NHWC = self.attentions[0](x_NHWC, context_NLD)
        return self.execution.run(self.resnets[1], x_NHWC, temb_NT)


class UpBlock2D(nnx.Module):
    """The mirror of the down block at `level`: it has one more layer, and each layer also reads a skip."""

    def __init__(self, config: UNetConfig, level: int, *, execution: Execution, dtype: DTypeLike, rngs: nnx.Rngs):
        widths, layers = config.block_out_channels, config.layers_per_block[level] + 1
        width, before, skip = widths[level], widths[min(level + 1, len(widths) - 1)], widths[max(level - 1, 0)]
        block_type = config.up_block_types[len(widths) - 1 - level]
        self.resnets: nnx.List = nnx.List([])
        self.attentions: nnx.List = nnx.List([])
        self.upsamplers: nnx.List = nnx.List([])
        for layer in range(layers):
            in_channels = (before if layer == 0 else width) + (skip if layer == layers - 1 else width)
            self.resnets.append(ResnetBlock2D(config, in_channels, width, dtype=dtype, rngs=rngs))
            if block_type == "CrossAttnUpBlock2D":
                self.attentions.append(Transformer2DModel(config, level, execution=execution, dtype=dtype, rngs=rngs))
        if level > 0:
            self.upsamplers.append(Upsample2D(width, dtype=dtype, rngs=rngs))
        self.execution = execution

    def __call__(
        self, x_NHWC: jax.Array, skips: list[jax.Array], temb_NT: jax.Array, context_NLD: jax.Array
    ) -> jax.Array:
        """Run the block. It pops its skips from the end of `skips`; the next skip gives the size to upsample to."""
        for layer, resnet in enumerate(self.resnets):
            x_NHWC = self.execution.run(resnet.joined, x_NHWC, skips.pop(), temb_NT)
            if self.attentions:
                x_NHWC = self.attentions[layer](x_NHWC, context_NLD)
        for upsample in self.upsamplers:
            x_NHWC = upsample(x_NHWC, *skips[-1].shape[1:3])
        return x_NHWC


class ResnetBlock2D(nnx.Module):
    """Two normalised convolutions with the time embedding added between them, beside a shortcut."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        groups, epsilon, time_features = config.norm_num_groups, config.norm_eps, 4 * config.block_out_channels[0]
        self.norm1 = GroupNorm(groups, in_channels, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.conv1 = Conv(in_channels, out_channels, dtype=dtype, rngs=rngs)
        self.time_emb_proj = Linear(time_features, out_channels, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(groups, out_channels, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.conv2 = Conv(out_channels, out_channels, dtype=dtype, rngs=rngs)
        changes = in_channels != out_channels
        self.conv_shortcut = Conv(in_channels, out_channels, 1, padding=0, dtype=dtype, rngs=rngs) if changes else None

    def __call__(self, x_NHWC: jax.Array, temb_NT: jax.Array) -> jax.Array:
        y_NHWC = self.conv1(self.norm1(x_NHWC, silu=True))
        y_NHWC = y_NHWC + self.time_emb_proj(temb_NT)[:, None, None, :]
        y_NHWC = self.conv2(self.norm2(y_NHWC, silu=True))
        return y_NHWC + (x_NHWC if self.conv_shortcut is None else self.conv_shortcut(x_NHWC))

    def joined(self, x_NHWC: jax.Array, skip_NHWC: jax.Array, temb_NT: jax.Array) -> jax.Array:
        """Run the block on input and skip, concatenated here so that rematerialized blocks do not keep them twice."""
        return self(jnp.concatenate([x_NHWC, skip_NHWC], axis=-1), temb_NT)


class Transformer2DModel(nnx.Module):
    """Transformer blocks over the cells of an image, beside a shortcut."""

    def __init__(self, config: UNetConfig, level: int, *, execution: Execution, dtype: DTypeLike, rngs: nnx.Rngs):
        width, heads = config.block_out_channels[level], config.attention_head_dim[level]
        self.norm = GroupNorm(config.norm_num_groups, width, epsilon=1e-6, dtype=dtype, rngs=rngs)
        # Both compute the same product, but SD1.x stores it as a 1x1 convolution.
        self.proj_in, self.proj_out = (
            Linear(width, width, dtype=dtype, rngs=rngs)
            if config.use_linear_projection
            else Conv(width, width, 1, padding=0, dtype=dtype, rngs=rngs)
            for _ in range(2)
        )
        make_block = functools.partial(
            BasicTransformerBlock, width, config.cross_attention_dim[level], heads, execution=execution, dtype=dtype
        )
        blocks = range(config.transformer_layers_per_block[level])
        self.transformer_blocks = nnx.List([make_block(rngs=rngs) for _ in blocks])
        self.execution = execution

    def __call__(self, x_NHWC: jax.Array, context_NLD: jax.Array) -> jax.Array:
        n, _, _, width = x_NHWC.shape
        y_NLD = self.proj_in(self.norm(x_NHWC)).reshape(n, -1, width)
        y_NLD = self.execution.run_chain(self.transformer_blocks, y_NLD, context_NLD)
        return x_NHWC + self.proj_out(y_NLD.reshape(x_NHWC.shape))


class BasicTransformerBlock(nnx.Module):
    """Self-attention, cross-attention to the caption and a feed-forward layer, each normalised first and residual."""

    def __init__(
        self,
        features: int,
        context_features: int,
        num_heads: int,
        *,
        execution: Execution,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.norm1 = LayerNorm(features, dtype=dtype, rngs=rngs)
        self.attn1 = Attention(features, features, num_heads, execution=execution, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(features, dtype=dtype, rngs=rngs)
        self.attn2 = Attention(features, context_features, num_heads, execution=execution, dtype=dtype, rngs=rngs)
        self.norm3 = LayerNorm(features, dtype=dtype, rngs=rngs)
        self.ff = FeedForward(features, dtype=dtype, rngs=rngs)

    def __call__(self, x_NLD: jax.Array, context_NLD: jax.Array) -> jax.Array:
        y_NLD = self.norm1(x_NLD)
        x_NLD = x_NLD + self.attn1(y_NLD, y_NLD)
        x_NLD = x_NLD + self.attn2(self.norm2(x_NLD), context_NLD)
        return x_NLD + self.ff(self.norm3(x_NLD))


class Attention(nnx.Module):
    """Attention with queries from the image, and keys and values from the image (self-attention) or the caption."""

    def __init__(
        self,
        features: int,
        context_features: int,
        num_heads: int,
        *,
        execution: Execution,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.to_q = Linear(features, features, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_k = Linear(context_features, features, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_v = Linear(context_features, features, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_out = nnx.List([Linear(features, features, dtype=dtype, rngs=rngs)])
        self.num_heads, self.execution = num_heads, execution

    def __call__(self, x_NLD: jax.Array, context_NLD: jax.Array) -> jax.Array:
        query_NLD, key_NLD, value_NLD = self.to_q(x_NLD), self.to_k(context_NLD), self.to_v(context_NLD)
        y_NLD = attention(query_NLD, key_NLD, value_NLD, self.num_heads, implementation=self.execution.attention)
        return self.to_out[0](y_NLD)


class FeedForward(nnx.Module):
    """Expands to four times the features, gates them, and projects back."""

    def __init__(self, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        # diffusers' list has a dropout layer in the middle, which has no parameters.
        gated = GEGLU(features, 4 * features, dtype=dtype, rngs=rngs)
        self.net: nnx.List = nnx.List([gated, None, Linear(4 * features, features, dtype=dtype, rngs=rngs)])

    def __call__(self, x_NLD: jax.Array) -> jax.Array:
        return self.net[2](self.net[0](x_NLD))


class GEGLU(nnx.Module):
    """A projection to values and gates; see `operations.geglu`."""

    def __init__(self, features: int, out_features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.proj = Linear(features, 2 * out_features, dtype=dtype, rngs=rngs)

    def __call__(self, x_NLD: jax.Array) -> jax.Array:
        return geglu(self.proj(x_NLD))


class Downsample2D(nnx.Module):
    """Halves the resolution with a strided convolution."""

    def __init__(self, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, stride=2, dtype=dtype, rngs=rngs)

    def __call__(self, x_NHWC: jax.Array) -> jax.Array:
        return self.conv(x_NHWC)


class Upsample2D(nnx.Module):
    """Doubles the resolution by repeating cells, cut to `height` and `width` (one less if odd), then a convolution."""

    def __init__(self, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x_NHWC: jax.Array, height: int, width: int) -> jax.Array:
        return self.conv(x_NHWC.repeat(2, axis=1).repeat(2, axis=2)[:, :height, :width])
