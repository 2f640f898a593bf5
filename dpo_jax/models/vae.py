"""AutoencoderKL: images to the moments of their latents and back (Kingma & Welling, arXiv 1312.6114; Rombach et al.,
arXiv 2112.10752), with the structure and the parameter names of diffusers.

Axes: N images, H x W pixels, h x w latent cells, C channels, L = h * w cells as a sequence, D features.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from dpo_jax.errors import UserError
from dpo_jax.models.attention import attention
from dpo_jax.models.config_json import Depth, Finite, Positive, Width, read_config, shown
from dpo_jax.models.layers import Conv, GroupNorm, Linear

EPSILON = 1e-6
MAX_LAYERS = 64
"""Maximum number of layers on the way down; published VAEs have 8."""


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The fields of a diffusers AutoencoderKL config.json that decide its shape or use, with diffusers' defaults."""

    in_channels: Width = 3
    out_channels: Width = 3
    block_out_channels: tuple[Width, ...] = (64,)
    layers_per_block: Depth = 1
    latent_channels: Width = 4
    norm_num_groups: Width = 32
    scaling_factor: Positive = 0.18215
    """The denoiser sees `(latents - shift_factor) * scaling_factor`; encode and decode here apply neither."""
    shift_factor: Finite | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str) -> "VAEConfig":
        """Read a config.json. Raises a UserError that names `where` and the field that is not supported."""
        supported = {
            "_class_name": ("AutoencoderKL", "FlaxAutoencoderKL"),
            "act_fn": ("silu", "swish"),
            "latents_mean": (None,),
            "latents_std": (None,),
        }
        # force_upcast: these weights overflow in float16, but here the caller chooses the dtype.
        metadata = ("sample_size", "down_block_types", "up_block_types", "force_upcast")
        result = read_config(cls, config, where, supported=supported, metadata=metadata)
        for field, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            types, levels = config.get(field, (block,)), len(result.block_out_channels)
            if types != [block] * levels and types != (block,) * levels:
                raise UserError(f"{where}: {field} = {shown(types)} is not supported, only {levels} times {block!r}")
        if (result.in_channels, result.out_channels) != (3, 3):
            raise UserError(
                f"{where}: in_channels = {result.in_channels} and out_channels = {result.out_channels} are not "
                "supported, only 3 (RGB)"
            )
        layers = levels * result.layers_per_block
        if not 0 < layers <= MAX_LAYERS:
            raise UserError(
                f"{where}: block_out_channels = {result.block_out_channels} and layers_per_block = "
                f"{result.layers_per_block} make {layers} layers; a VAE has 1 to {MAX_LAYERS}"
            )
        if any(width % result.norm_num_groups for width in result.block_out_channels):
            raise UserError(
                f"{where}: block_out_channels = {result.block_out_channels} do not divide into "
                f"norm_num_groups = {result.norm_num_groups} groups"
            )
        return result


class AutoencoderKL(nnx.Module):
    """Encoder and decoder. Every level but the last halves the resolution, so 4 levels give latents of 1/8 size."""

    def __init__(self, config: VAEConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):

        def mix(channels: int) -> Conv:
            return Conv(channels, channels, 1, padding=0, dtype=dtype, rngs=rngs)

        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)
        self.quant_conv = mix(2 * config.latent_channels) if config.use_quant_conv else None
        self.post_quant_conv = mix(config.latent_channels) if config.use_post_quant_conv else None

    def encode(self, images_NHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return mean and log variance [N, h, w, C] of the unscaled latents of images in [-1, 1]."""
        moments_NhwC = self.encoder(images_NHWC)
        if self.quant_conv is not None:
            moments_NhwC = self.quant_conv(moments_NhwC)
        mean_NhwC, logvar_NhwC = jnp.split(moments_NhwC, 2, axis=-1)
        return mean_NhwC, jnp.clip(logvar_NhwC, -30.0, 20.0)

    def decode(self, latents_NhwC: jax.Array) -> jax.Array:
        """Return images [N, H, W, C], approximately in [-1, 1], from unscaled latents."""
        if self.post_quant_conv is not None:
            latents_NhwC = self.post_quant_conv(latents_NhwC)
        return self.decoder(latents_NhwC)


class Encoder(nnx.Module):
    """Maps images to the channels of mean and log variance."""

    def __init__(self, config: VAEConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv(config.in_channels, widths[0], dtype=dtype, rngs=rngs)
        self.down_blocks: nnx.List = nnx.List([])
        for level, width in enumerate(widths):
            before, is_last = widths[max(level - 1, 0)], level == len(widths) - 1
            resnets = _resnets(config.layers_per_block, before, width, groups, dtype=dtype, rngs=rngs)
            self.down_blocks.append(DownEncoderBlock2D(resnets, None if is_last else width, dtype=dtype, rngs=rngs))
        self.mid_block = MidBlock2D(widths[-1], groups, config.mid_block_add_attention, dtype=dtype, rngs=rngs)
        self.conv_norm_out = GroupNorm(groups, widths[-1], epsilon=EPSILON, dtype=dtype, rngs=rngs)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, dtype=dtype, rngs=rngs)

    def __call__(self, x_NHWC: jax.Array) -> jax.Array:
        x_NHWC = self.conv_in(x_NHWC)
        for block in self.down_blocks:
            x_NHWC = block(x_NHWC)
        x_NHWC = self.mid_block(x_NHWC)
        return self.conv_out(self.conv_norm_out(x_NHWC, silu=True))


class Decoder(nnx.Module):
    """Maps latents to images: the encoder's mirror, with one more resnet per level."""

    def __init__(self, config: VAEConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv(config.latent_channels, widths[0], dtype=dtype, rngs=rngs)
        self.mid_block = MidBlock2D(widths[0], groups, config.mid_block_add_attention, dtype=dtype, rngs=rngs)
        self.up_blocks: nnx.List = nnx.List([])
        for level, width in enumerate(widths):
            before, is_last = widths[max(level - 1, 0)], level == len(widths) - 1
            resnets = _resnets(config.layers_per_block + 1, before, width, groups, dtype=dtype, rngs=rngs)
            self.up_blocks.append(UpDecoderBlock2D(resnets, None if is_last else width, dtype=dtype, rngs=rngs))
        self.conv_norm_out = GroupNorm(groups, widths[-1], epsilon=EPSILON, dtype=dtype, rngs=rngs)
        self.conv_out = Conv(widths[-1], config.out_channels, dtype=dtype, rngs=rngs)

    def __call__(self, x_NhwC: jax.Array) -> jax.Array:
        x_NHWC = self.mid_block(self.conv_in(x_NhwC))
        for block in self.up_blocks:
            x_NHWC = block(x_NHWC)
        return self.conv_out(self.conv_norm_out(x_NHWC, silu=True))


class DownEncoderBlock2D(nnx.Module):
    """Resnets, then half the resolution if `downsample_channels` is given."""

    def __init__(self, resnets: nnx.List, downsample_channels: int | None, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.resnets = resnets
        self.downsamplers = nnx.List(
            [] if downsample_channels is None else [Downsample2D(downsample_channels, dtype=dtype, rngs=rngs)]
        )

    def __call__(self, x_NHWC: jax.Array) -> jax.Array:
        for block in (*self.resnets, *self.downsamplers):
            x_NHWC = block(x_NHWC)
        return x_NHWC


class UpDecoderBlock2D(nnx.Module):
    """Resnets, then twice the resolution if `upsample_channels` is given."""

    def __init__(self, resnets: nnx.List, upsample_channels: int | None, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.resnets = resnets
        self.upsamplers = nnx.List(
            [] if upsample_channels is None else [Upsample2D(upsample_channels, dtype=dtype, rngs=rngs)]
        )

    def __call__(self, x_NHWC: jax.Array) -> jax.Array:
        for block in (*self.resnets, *self.upsamplers):
            x_NHWC = block(x_NHWC)
        return x_NHWC


class MidBlock2D(nnx.Module):
    """Two resnets with self-attention over all cells between them."""

    def __init__(self, channels: int, num_groups: int, add_attention: bool, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.resnets = _resnets(2, channels, channels, num_groups, dtype=dtype, rngs=rngs)
        self.attentions = nnx.List([Attention(channels, num_groups, dtype=dtype, rngs=rngs)] if add_attention else [])

    def __call__(self, x_NHWC: jax.Array) -> jax.Array:
        first, second = self.resnets
        for block in (first, *self.attentions, second):
            x_NHWC = block(x_NHWC)
        return x_NHWC


class ResnetBlock2D(nnx.Module):
    """Two normalised convolutions with a shortcut; an autoencoder has no time embedding."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(num_groups, in_channels, epsilon=EPSILON, dtype=dtype, rngs=rngs)
        self.conv1 = Conv(in_channels, out_channels, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(num_groups, out_channels, epsilon=EPSILON, dtype=dtype, rngs=rngs)
        self.conv2 = Conv(out_channels, out_channels, dtype=dtype, rngs=rngs)
        self.conv_shortcut = (
            Conv(in_channels, out_channels, 1, padding=0, dtype=dtype, rngs=rngs)
            if in_channels != out_channels
            else None
        )

    def __call__(self, x_NHWC: jax.Array) -> jax.Array:
        y_NHWC = self.conv1(self.norm1(x_NHWC, silu=True))
        y_NHWC = self.conv2(self.norm2(y_NHWC, silu=True))
        return y_NHWC + (x_NHWC if self.conv_shortcut is None else self.conv_shortcut(x_NHWC))


class Attention(nnx.Module):
    """Residual self-attention over the cells of an image, with one head of all channels."""

    def __init__(self, channels: int, num_groups: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(num_groups, channels, epsilon=EPSILON, dtype=dtype, rngs=rngs)
        self.to_q = Linear(channels, channels, dtype=dtype, rngs=rngs)
        self.to_k = Linear(channels, channels, dtype=dtype, rngs=rngs)
        self.to_v = Linear(channels, channels, dtype=dtype, rngs=rngs)
        self.to_out = nnx.List([Linear(channels, channels, dtype=dtype, rngs=rngs)])

    def __call__(self, x_NHWC: jax.Array) -> jax.Array:
        n, _, _, channels = x_NHWC.shape
        x_NLD = self.group_norm(x_NHWC).reshape(n, -1, channels)
        y_NLD = attention(self.to_q(x_NLD), self.to_k(x_NLD), self.to_v(x_NLD), num_heads=1)
        return x_NHWC + self.to_out[0](y_NLD).reshape(x_NHWC.shape)


class Downsample2D(nnx.Module):
    """Halves the resolution with a strided convolution."""

    def __init__(self, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        # The original pads only at the bottom and at the right.
        self.conv = Conv(channels, channels, stride=2, padding=((0, 1), (0, 1)), dtype=dtype, rngs=rngs)

    def __call__(self, x_NHWC: jax.Array) -> jax.Array:
        return self.conv(x_NHWC)


class Upsample2D(nnx.Module):
    """Doubles the resolution by repeating pixels, then a convolution."""

    def __init__(self, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x_NHWC: jax.Array) -> jax.Array:
        return self.conv(x_NHWC.repeat(2, axis=1).repeat(2, axis=2))


def _resnets(
    count: int, in_channels: int, out_channels: int, num_groups: int, *, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.List:
    """Return a chain of resnets whose first one changes the number of channels."""
    inputs = [in_channels] + [out_channels] * (count - 1)
    return nnx.List([ResnetBlock2D(channels, out_channels, num_groups, dtype=dtype, rngs=rngs) for channels in inputs])
