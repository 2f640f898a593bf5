"""UNet2DConditionModel: the denoiser of Stable Diffusion (Rombach et al., arXiv 2112.10752) and SDXL (Podell et al.,
arXiv 2307.01952), with the structure and parameter names of diffusers.

N images, H x W latent cells, C channels, T time features; the conditioning's axes are in `batch.py`.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from dpo_jax.batch import Conditioning
from dpo_jax.errors import UserError
from dpo_jax.models.execution import PLAIN, Execution
from dpo_jax.models.layers import Conv, GroupNorm
from dpo_jax.models.operations import accumulation_dtype
from dpo_jax.models.time_embedding import TimestepEmbedding, sinusoids
from dpo_jax.models.unet_blocks import DownBlock2D, UNetMidBlock2DCrossAttn, UpBlock2D
from dpo_jax.models.unet_config import UNetConfig


class UNet2DConditionModel(nnx.Module):
    """Predicts the training target (noise or velocity) from noisy latents, their timestep and the caption."""

    def __init__(self, config: UNetConfig, *, execution: Execution = PLAIN, dtype: DTypeLike, rngs: nnx.Rngs):
        widths, levels = config.block_out_channels, range(len(config.block_out_channels))
        time_features, high = 4 * widths[0], accumulation_dtype(dtype)
        self.conv_in = Conv(config.in_channels, widths[0], dtype=dtype, rngs=rngs)
        # Neighbouring timesteps differ by less than bfloat16 resolves, so these cheap layers compute in float32. Their
        # weights are still rounded like all others: the policy's are float32 and the reference's are not, and both must
        # start equal.
        embedding = functools.partial(TimestepEmbedding, features=time_features, dtype=high, rounded=dtype, rngs=rngs)
        self.time_embedding = embedding(widths[0])
        added_features = config.projection_class_embeddings_input_dim
        self.add_embedding = embedding(added_features) if added_features is not None else None
        self.down_blocks = nnx.List(
            [DownBlock2D(config, level, execution=execution, dtype=dtype, rngs=rngs) for level in levels]
        )
        self.mid_block = UNetMidBlock2DCrossAttn(config, execution=execution, dtype=dtype, rngs=rngs)
        self.up_blocks = nnx.List(
            [UpBlock2D(config, level, execution=execution, dtype=dtype, rngs=rngs) for level in reversed(levels)]
        )
        self.conv_norm_out = GroupNorm(
            config.norm_num_groups, widths[0], epsilon=config.norm_eps, dtype=dtype, rngs=rngs
        )
        self.conv_out = Conv(widths[0], config.out_channels, dtype=dtype, rngs=rngs)
        self.config, self.dtype = config, dtype

    def __call__(self, x_NHWC: jax.Array, t_N: jax.Array, conditioning: Conditioning) -> jax.Array:
        """Return the prediction [N, H, W, C] in the compute dtype; ValueError if the conditioning does not fit."""
        needed, given = self.config.cross_attention_dim, conditioning.context_NLD.shape[-1]
        if set(needed) != {given}:
            raise UserError(f"this UNet has cross_attention_dim = {needed}, but the captions have {given} features")
        high = accumulation_dtype(self.dtype)
        emb_NT = self.time_embedding(sinusoids(t_N, self.config.block_out_channels[0], high))
        if self.add_embedding is not None:
            emb_NT = emb_NT + self.add_embedding(self._added_features(conditioning, high))
        temb_NT = jax.nn.silu(emb_NT)

        x_NHWC = self.conv_in(x_NHWC)
        skips = [x_NHWC]
        for down_block in self.down_blocks:
            skips += down_block(skips[-1], temb_NT, conditioning.context_NLD)
        x_NHWC = self.mid_block(skips[-1], temb_NT, conditioning.context_NLD)
        for up_block in self.up_blocks:
            x_NHWC = up_block(x_NHWC, skips, temb_NT, conditioning.context_NLD)
        return self.conv_out(self.conv_norm_out(x_NHWC, silu=True))

    def _added_features(self, conditioning: Conditioning, dtype: DTypeLike) -> jax.Array:
        """Return the pooled caption and the embedded time ids, concatenated."""
        pooled_NP, time_ids_NT = conditioning.pooled_NP, conditioning.time_ids_NT
        if pooled_NP is None or time_ids_NT is None:
            missing = "pooled_NP" if pooled_NP is None else "time_ids_NT"
            raise UserError(f"this UNet has addition_embed_type = 'text_time', but its conditioning has no {missing}")
        each, needed = self.config.addition_time_embed_dim, self.config.projection_class_embeddings_input_dim
        assert each is not None  # `UNetConfig.from_dict` has checked this
        pooled, ids = pooled_NP.shape[-1], time_ids_NT.shape[-1]
        if pooled + ids * each != needed:
            raise UserError(
                f"this UNet takes projection_class_embeddings_input_dim = {needed} added features, but the "
                f"conditioning has {pooled} pooled + {ids} time ids * {each} = {pooled + ids * each}"
            )
        embedded_NTD = sinusoids(time_ids_NT, each, dtype)
        return jnp.concatenate([pooled_NP.astype(dtype), embedded_NTD.reshape(len(pooled_NP), -1)], axis=-1)
