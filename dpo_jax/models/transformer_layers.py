"""Layers of the transformers that denoise: Stable Diffusion 3 (Esser et al., arXiv 2403.03206), FLUX.1 and Z-Image,
with the parameter names of diffusers.

Axes: N images, L tokens, D features, h heads of d features, p = d / 2 pairs of them, F features of a patch; T features
of the time embedding `temb_NT`, which is already activated (diffusers activates it again in each modulation). A block
of two streams carries `(x_NLD, context_NLD)`: image tokens and caption tokens.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from dpo_jax.batch import Conditioning
from dpo_jax.errors import UserError
from dpo_jax.models.attention import attention
from dpo_jax.models.execution import Execution
from dpo_jax.models.kernels import split_heads
from dpo_jax.models.layers import Linear, RMSNorm
from dpo_jax.models.operations import gated_add, gelu_tanh, modulated_layer_norm

Streams = tuple[jax.Array, jax.Array]
"""Image tokens and caption tokens."""


class Rotary(NamedTuple):
    """Tables of rotary position embeddings (Su et al., arXiv 2104.09864), shared by all images or one per image."""

    cos_Lp: jax.Array
    """[L, p] or [N, L, p]; float32, or float64 in tests."""
    sin_Lp: jax.Array


def rotate(x_NLhd: jax.Array, rotary: Rotary) -> jax.Array:
    """Rotate each pair of neighbouring features by its token's angles; computed in the tables' dtype."""
    cos, sin = (table[..., None, :] for table in rotary)
    even, odd = (x_NLhd[..., start::2].astype(cos.dtype) for start in (0, 1))
    rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return rotated.reshape(x_NLhd.shape).astype(x_NLhd.dtype)


class AdaLayerNormZero(nnx.Module):
    """Maps the time embedding to shifts, scales and gates of normalised tokens."""

    def __init__(self, features: int, chunks: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.linear = Linear(features, chunks * features, dtype=dtype, rngs=rngs)
        self.chunks = chunks

    def __call__(self, temb_NT: jax.Array) -> list[jax.Array]:
        """Return `chunks` arrays [N, 1, D], which `modulated_layer_norm` and `gated_add` take."""
        return jnp.split(self.linear(temb_NT)[:, None], self.chunks, axis=-1)


class AdaLayerNormContinuous(nnx.Module):
    """Layer normalisation modulated by the time embedding. Its scale comes first, unlike that of AdaLayerNormZero."""

    def __init__(self, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.linear = Linear(features, 2 * features, dtype=dtype, rngs=rngs)

    def __call__(self, x_NLD: jax.Array, temb_NT: jax.Array) -> jax.Array:
        scale_N1D, shift_N1D = jnp.split(self.linear(temb_NT)[:, None], 2, axis=-1)
        return modulated_layer_norm(x_NLD, shift_N1D, scale_N1D)


class FeedForward(nnx.Module):
    """Expands to four times the features, activates them by the approximate gelu, and projects back."""

    def __init__(self, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        # diffusers' list has a dropout layer in the middle, which has no parameters.
        activated = GELU(features, 4 * features, dtype=dtype, rngs=rngs)
        self.net: nnx.List = nnx.List([activated, None, Linear(4 * features, features, dtype=dtype, rngs=rngs)])

    def __call__(self, x_NLD: jax.Array) -> jax.Array:
        return self.net[2](self.net[0](x_NLD))


class GELU(nnx.Module):
    """A projection and its activation; see `operations.gelu_tanh`."""

    def __init__(self, features: int, out_features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.proj = Linear(features, out_features, dtype=dtype, rngs=rngs)

    def __call__(self, x_NLD: jax.Array) -> jax.Array:
        return gelu_tanh(self.proj(x_NLD))


class Attention(nnx.Module):
    """Self-attention of one stream; with `qk_norm`, the queries and keys of each head are normalised."""

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        qk_norm: bool,
        epsilon: float = 1e-6,
        use_bias: bool = True,
        has_output: bool = True,
        execution: Execution,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.to_q, self.to_k, self.to_v = (
            Linear(features, features, use_bias=use_bias, dtype=dtype, rngs=rngs) for _ in range(3)
        )
        self.norm_q, self.norm_k = (
            RMSNorm(features // num_heads, epsilon=epsilon, dtype=dtype, rngs=rngs) if qk_norm else None
            for _ in range(2)
        )
        self.to_out: nnx.List = nnx.List(
            [Linear(features, features, use_bias=use_bias, dtype=dtype, rngs=rngs)] if has_output else []
        )
        self.num_heads, self.execution = num_heads, execution

    def __call__(
        self, x_NLD: jax.Array, rotary: Rotary | None = None, num_keys_N: jax.Array | None = None
    ) -> jax.Array:
        """Return the attention's result [N, L, D]; the last projection is left out if the layer has none."""
        query_NLD = self.normed(self.to_q(x_NLD), self.norm_q)
        key_NLD = self.normed(self.to_k(x_NLD), self.norm_k)
        y_NLD = self.attend(query_NLD, key_NLD, self.to_v(x_NLD), rotary, num_keys_N)
        return self.to_out[0](y_NLD) if self.to_out else y_NLD

    def normed(self, x_NLD: jax.Array, norm: RMSNorm | None) -> jax.Array:
        """Normalise the features of each head."""
        return x_NLD if norm is None else norm(split_heads(x_NLD, self.num_heads)).reshape(x_NLD.shape)

    def attend(
        self,
        query_NLD: jax.Array,
        key_NLD: jax.Array,
        value_NLD: jax.Array,
        rotary: Rotary | None,
        num_keys_N: jax.Array | None = None,
    ) -> jax.Array:
        """Return attention with rotated queries and keys, before the last projection; see `attention.attention`."""
        if rotary is not None:
            query_NLD, key_NLD = (
                rotate(split_heads(x_NLD, self.num_heads), rotary).reshape(x_NLD.shape)
                for x_NLD in (query_NLD, key_NLD)
            )
        return attention(
            query_NLD,
            key_NLD,
            value_NLD,
            self.num_heads,
            num_keys_N=num_keys_N,
            implementation=self.execution.attention,
        )


class JointAttention(Attention):
    """Attention of image and caption tokens to both. Each stream has its own projections.

    With `context_pre_only`, nothing reads the captions afterwards, and their last projection does not exist.
    `context_first` puts the caption's tokens first in the joint sequence, as FLUX.1 does; `rotary` has that order too.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        qk_norm: bool,
        context_pre_only: bool = False,
        context_first: bool = False,
        execution: Execution,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        super().__init__(features, num_heads, qk_norm=qk_norm, execution=execution, dtype=dtype, rngs=rngs)
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (
            Linear(features, features, dtype=dtype, rngs=rngs) for _ in range(3)
        )
        self.norm_added_q, self.norm_added_k = (
            RMSNorm(features // num_heads, dtype=dtype, rngs=rngs) if qk_norm else None for _ in range(2)
        )
        self.to_add_out = None if context_pre_only else Linear(features, features, dtype=dtype, rngs=rngs)
        self.context_first = context_first

    def __call__(  # type: ignore[override]
        self, x_NLD: jax.Array, context_NLD: jax.Array, rotary: Rotary | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return what is added to each stream; None for a stream that ends here."""

        def joined(x_NLD: jax.Array, context_NLD: jax.Array) -> jax.Array:
            return jnp.concatenate([context_NLD, x_NLD] if self.context_first else [x_NLD, context_NLD], axis=1)

        query_NLD = joined(
            self.normed(self.to_q(x_NLD), self.norm_q), self.normed(self.add_q_proj(context_NLD), self.norm_added_q)
        )
        key_NLD = joined(
            self.normed(self.to_k(x_NLD), self.norm_k), self.normed(self.add_k_proj(context_NLD), self.norm_added_k)
        )
        value_NLD = joined(self.to_v(x_NLD), self.add_v_proj(context_NLD))
        y_NLD = self.attend(query_NLD, key_NLD, value_NLD, rotary)
        first, second = jnp.split(y_NLD, [(context_NLD if self.context_first else x_NLD).shape[1]], axis=1)
        of_x_NLD, of_context_NLD = (second, first) if self.context_first else (first, second)
        return self.to_out[0](of_x_NLD), None if self.to_add_out is None else self.to_add_out(of_context_NLD)


class JointTransformerBlock(nnx.Module):
    """Joint attention, then a feed-forward layer for each stream, each modulated by the time embedding and residual.

    A block with `dual_attention` also attends from image tokens to image tokens alone. The last block of Stable
    Diffusion 3 is `context_pre_only`: it changes the image tokens only.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        qk_norm: bool,
        dual_attention: bool = False,
        context_pre_only: bool = False,
        context_first: bool = False,
        execution: Execution,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.norm1 = AdaLayerNormZero(features, 9 if dual_attention else 6, dtype=dtype, rngs=rngs)
        self.norm1_context: AdaLayerNormZero | AdaLayerNormContinuous = (
            AdaLayerNormContinuous(features, dtype=dtype, rngs=rngs)
            if context_pre_only
            else AdaLayerNormZero(features, 6, dtype=dtype, rngs=rngs)
        )
        self.attn = JointAttention(
            features,
            num_heads,
            qk_norm=qk_norm,
            context_pre_only=context_pre_only,
            context_first=context_first,
            execution=execution,
            dtype=dtype,
            rngs=rngs,
        )
        self.attn2 = (
            Attention(features, num_heads, qk_norm=qk_norm, execution=execution, dtype=dtype, rngs=rngs)
            if dual_attention
            else None
        )
        self.ff = FeedForward(features, dtype=dtype, rngs=rngs)
        self.ff_context = None if context_pre_only else FeedForward(features, dtype=dtype, rngs=rngs)

    def __call__(self, streams: Streams, temb_NT: jax.Array, rotary: Rotary | None = None) -> Streams:
        x_NLD, context_NLD = streams
        shift, scale, gate, ff_shift, ff_scale, ff_gate, *dual = self.norm1(temb_NT)
        if isinstance(self.norm1_context, AdaLayerNormContinuous):
            normed_context_NLD = self.norm1_context(context_NLD, temb_NT)
        else:
            shift_c, scale_c, gate_c, ff_shift_c, ff_scale_c, ff_gate_c = self.norm1_context(temb_NT)
            normed_context_NLD = modulated_layer_norm(context_NLD, shift_c, scale_c)
        attended_NLD, attended_context_NLD = self.attn(
            modulated_layer_norm(x_NLD, shift, scale), normed_context_NLD, rotary
        )
        y_NLD = gated_add(x_NLD, gate, attended_NLD)
        if self.attn2 is not None:
            dual_shift, dual_scale, dual_gate = dual
            y_NLD = gated_add(y_NLD, dual_gate, self.attn2(modulated_layer_norm(x_NLD, dual_shift, dual_scale)))
        y_NLD = gated_add(y_NLD, ff_gate, self.ff(modulated_layer_norm(y_NLD, ff_shift, ff_scale)))
        if self.ff_context is not None:
            context_NLD = gated_add(context_NLD, gate_c, attended_context_NLD)
            fed_NLD = self.ff_context(modulated_layer_norm(context_NLD, ff_shift_c, ff_scale_c))
            context_NLD = gated_add(context_NLD, ff_gate_c, fed_NLD)
        return y_NLD, context_NLD


def check_inputs(model: str, config: Any, x_NHWC: jax.Array, conditioning: Conditioning) -> None:
    """Raise a UserError if latents, caption tokens or pooled captions do not fit the `config` of a transformer.

    `config` has the properties `latent_channels`, `size_multiple`, `context_features` and `pooled_features`.
    """
    _, height, width, channels = x_NHWC.shape
    if channels != config.latent_channels:
        raise UserError(f"this {model} takes latents of {config.latent_channels} channels, not {channels}")
    if height % config.size_multiple or width % config.size_multiple:
        raise UserError(
            f"latents of {height} x {width} cells do not divide into patches of {config.size_multiple} x "
            f"{config.size_multiple}; choose an image size that does"
        )
    given = conditioning.context_NLD.shape[-1]
    if given != config.context_features:
        raise UserError(f"this {model} takes captions of {config.context_features} features, not {given}")
    pooled = 0 if conditioning.pooled_NP is None else conditioning.pooled_NP.shape[-1]
    if config.pooled_features not in (0, pooled):
        raise UserError(f"this {model} takes pooled captions of {config.pooled_features} features, not {pooled}")


def patchify(x_NHWC: jax.Array, size: int, *, channels_first: bool) -> jax.Array:
    """Return the patches of `size` x `size` cells, row by row: [N, L, F].

    A patch's features are its channels, each with all its cells, if `channels_first` (FLUX.1), and otherwise its cells,
    each with all its channels (Stable Diffusion 3 and Z-Image).
    """
    n, height, width, channels = x_NHWC.shape
    split = x_NHWC.reshape(n, height // size, size, width // size, size, channels)
    split = split.transpose(0, 1, 3, 5, 2, 4) if channels_first else split.transpose(0, 1, 3, 2, 4, 5)
    return split.reshape(n, -1, size * size * channels)


def unpatchify(x_NLF: jax.Array, height: int, width: int, size: int, *, channels_first: bool) -> jax.Array:
    """Undo `patchify`: return [N, height, width, C]."""
    n, rows, columns = len(x_NLF), height // size, width // size
    if channels_first:
        split = x_NLF.reshape(n, rows, columns, -1, size, size).transpose(0, 1, 4, 2, 5, 3)
    else:
        split = x_NLF.reshape(n, rows, columns, size, size, -1).transpose(0, 1, 3, 2, 4, 5)
    return split.reshape(n, height, width, -1)
