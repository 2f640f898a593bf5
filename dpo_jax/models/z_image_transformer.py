"""ZImageTransformer2DModel: the denoiser of Z-Image (Tongyi Lab, arXiv 2511.22699), with the structure and parameter
names of diffusers.

The image's tokens and the caption's each pass through refiner blocks of their own, then through one chain of blocks as
a single sequence, the image's tokens first. Every part is padded to a multiple of 32 tokens with a learned token, which
is attended to like any other. What a batch needs beyond that to give all captions one length is not attended to, so a
caption gives the same result alone and in any batch. Queries and keys carry their position by rotary embedding
(Su et al., arXiv 2104.09864).

N images, H x W latent cells, C channels; L tokens, D features, h heads; p = d / 2 pairs of a head's d features; T
features of the time embedding.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from flax import nnx
from jax.typing import DTypeLike

from dpo_jax.batch import Conditioning
from dpo_jax.errors import UserError
from dpo_jax.models.config_json import Depth, Positive, Width, read_config
from dpo_jax.models.execution import PLAIN, Execution
from dpo_jax.models.layers import Linear, RMSNorm, make_param
from dpo_jax.models.operations import accumulation_dtype, gated_add, modulated_layer_norm, rms_norm, swiglu
from dpo_jax.models.time_embedding import SINUSOIDS, sinusoids
from dpo_jax.models.transformer_layers import Attention, Rotary, check_inputs, patchify, unpatchify

PATCH = 2
"""Height and width in latent cells of the patch that becomes one token."""
TOKENS_MULTIPLE = 32
"""The tokens of an image and those of a caption are padded to a multiple of this number."""
TIME_FEATURES = 256
"""Largest number of features of the time embedding."""
TIME_HIDDEN = 1024
"""Features between the two layers of the time embedding."""
QK_EPSILON = 1e-5
"""Epsilon of the normalisation of queries and keys."""
MAX_TIMESTEP = 1000
"""The timestep of pure noise."""
Positions = Annotated[int, pydantic.Field(ge=1, le=2**20)]


@dataclasses.dataclass(frozen=True)
class ZImageTransformerConfig:
    """The config.json of a diffusers ZImageTransformer2DModel; the names and defaults are those of diffusers."""

    in_channels: Width = 16
    """Channels of the latents."""
    dim: Width = 3840
    """Features of a token inside the model, those of all heads."""
    n_layers: Depth = 30
    """Number of blocks that image and caption pass together."""
    n_refiner_layers: Depth = 2
    """Number of blocks that each of the two passes before."""
    n_heads: Width = 30
    norm_eps: Positive = 1e-5
    cap_feat_dim: Width = 2560
    """Features of a caption's tokens."""
    rope_theta: Positive = 256.0
    """The slowest rotation is almost this many times slower than the fastest."""
    t_scale: Positive = 1000.0
    """Number by which time from 0 (noise) to 1 is multiplied before it is embedded."""
    axes_dims: tuple[Width, ...] = (32, 48, 48)
    """How many of a head's features rotate with each coordinate of a token: its place in the caption, row, column."""
    axes_lens: tuple[Positions, ...] = (1024, 512, 512)
    """Number of positions of each coordinate."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str) -> "ZImageTransformerConfig":
        """Read a config.json. Raises a UserError that names `where` and the field that is not supported."""
        supported = _SUPPORTED | {"n_kv_heads": (config.get("n_heads", cls.n_heads),)}
        result = read_config(cls, config, where, supported=supported)
        result._check(where)
        return result

    def _check(self, where: str) -> None:
        if self.dim % self.n_heads:
            raise UserError(f"{where}: dim = {self.dim} does not divide into n_heads = {self.n_heads} heads")
        features = self.dim // self.n_heads
        if len(self.axes_dims) != 3 or sum(self.axes_dims) != features or any(axis % 2 for axis in self.axes_dims):
            raise UserError(
                f"{where}: axes_dims = {list(self.axes_dims)} are not three even numbers with the sum "
                f"dim / n_heads = {features}"
            )
        if len(self.axes_lens) != 3:
            raise UserError(f"{where}: axes_lens = {list(self.axes_lens)} are not three numbers")

    @property
    def latent_channels(self) -> int:
        return self.in_channels

    @property
    def context_features(self) -> int:
        return self.cap_feat_dim

    @property
    def pooled_features(self) -> int:
        """0: the model reads no pooled caption."""
        return 0

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
        """Rows and columns of patches have positions of their own."""
        return min(self.axes_lens[1:]) * PATCH

    @property
    def time_features(self) -> int:
        """Features of the time embedding."""
        return min(self.dim, TIME_FEATURES)


# Fields that have no other value in Z-Image and Z-Image-Turbo. diffusers ignores n_kv_heads. Z-Image-Omni also reads
# images, as features of SigLIP.
_SUPPORTED: dict[str, Any] = {
    "_class_name": ("ZImageTransformer2DModel",),
    "all_patch_size": ([PATCH], (PATCH,)),
    "all_f_patch_size": ([1], (1,)),
    "qk_norm": (True,),
    "siglip_feat_dim": (None,),
}


class ZImageTransformer2DModel(nnx.Module):
    """Predicts the velocity from noisy latents, their timestep and the caption."""

    patches = f"{PATCH}-1"
    """diffusers' name of the layers for patches of 2 x 2 cells of one frame."""

    def __init__(
        self, config: ZImageTransformerConfig, *, execution: Execution = PLAIN, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        patch_features = PATCH**2 * config.in_channels
        settings: dict[str, Any] = {"execution": execution, "dtype": dtype, "rngs": rngs}

        def chain(length: int, is_modulated: bool = True) -> nnx.List:
            blocks = (ZImageTransformerBlock(config, is_modulated=is_modulated, **settings) for _ in range(length))
            return nnx.List(list(blocks))

        self.all_x_embedder = nnx.Dict({self.patches: Linear(patch_features, config.dim, dtype=dtype, rngs=rngs)})
        self.all_final_layer = nnx.Dict({self.patches: FinalLayer(config, patch_features, dtype=dtype, rngs=rngs)})
        self.noise_refiner = chain(config.n_refiner_layers)
        self.context_refiner = chain(config.n_refiner_layers, is_modulated=False)
        self.t_embedder = TimestepEmbedder(config.time_features, dtype=dtype, rngs=rngs)
        self.cap_embedder = nnx.List(
            [
                RMSNorm(config.cap_feat_dim, epsilon=config.norm_eps, dtype=dtype, rngs=rngs),
                Linear(config.cap_feat_dim, config.dim, dtype=dtype, rngs=rngs),
            ]
        )
        self.x_pad_token, self.cap_pad_token = (
            make_param(nnx.initializers.normal(0.02), rngs, (1, config.dim)) for _ in range(2)
        )
        self.layers = chain(config.n_layers)
        self.config, self.execution, self.dtype = config, execution, dtype

    def __call__(self, x_NHWC: jax.Array, t_N: jax.Array, conditioning: Conditioning) -> jax.Array:
        """Return the velocity, noise minus image, [N, H, W, C] in the compute dtype.

        `t_N` goes from 0 to 1000, which is pure noise; the model itself counts time from noise to image and predicts
        the opposite velocity. Without `conditioning.is_token_NL`, all of the context is the caption. Raises a UserError
        if latents or conditioning do not fit.
        """
        self._check(x_NHWC, conditioning)
        _, height, width, _ = x_NHWC.shape
        rows, columns = height // PATCH, width // PATCH
        temb_NT = self.t_embedder(self.config.t_scale * ((MAX_TIMESTEP - t_N) / MAX_TIMESTEP))
        x_NLD = self.all_x_embedder[self.patches](patchify(x_NHWC, PATCH, channels_first=False))
        x_NLD = _padded(x_NLD, self.x_pad_token)
        context_NLD, num_captions_N = self._embed_captions(conditioning)
        image, captions = x_NLD.shape[1], context_NLD.shape[1]
        of_image, of_captions = make_rotary(self.config, captions, num_captions_N, rows, columns, self.dtype)

        x_NLD = self.execution.run_chain(self.noise_refiner, x_NLD, temb_NT, of_image, None)
        context_NLD = self.execution.run_chain(self.context_refiner, context_NLD, None, of_captions, num_captions_N)
        joint_NLD = jnp.concatenate([x_NLD, context_NLD], axis=1)
        num_keys_N = None if num_captions_N is None else image + num_captions_N
        joint_NLD = self.execution.run_chain(
            self.layers, joint_NLD, temb_NT, _joined(of_image, of_captions), num_keys_N
        )
        y_NLF = self.all_final_layer[self.patches](joint_NLD[:, : rows * columns], temb_NT)
        return -unpatchify(y_NLF, height, width, PATCH, channels_first=False)

    def _embed_captions(self, conditioning: Conditioning) -> tuple[jax.Array, jax.Array | None]:
        """Return captions of a common length [N, L, D], and how many tokens of each count, None for all of them."""
        context_NLD, is_token_NL = conditioning.context_NLD, conditioning.is_token_NL
        norm, linear = self.cap_embedder
        if is_token_NL is None:
            return _padded(linear(norm(context_NLD)), self.cap_pad_token), None
        tokens_first_NL = jnp.argsort(~is_token_NL, axis=1, stable=True)
        context_NLD = jnp.take_along_axis(context_NLD, tokens_first_NL[..., None], axis=1)
        context_NLD = _padded(linear(norm(context_NLD)), self.cap_pad_token)
        num_tokens_N = is_token_NL.sum(axis=1, dtype=jnp.int32)
        is_token_NL = jnp.arange(context_NLD.shape[1]) < num_tokens_N[:, None]
        context_NLD = jnp.where(is_token_NL[..., None], context_NLD, self.cap_pad_token[...].astype(context_NLD.dtype))
        return context_NLD, num_tokens_N + -num_tokens_N % TOKENS_MULTIPLE

    def _check(self, x_NHWC: jax.Array, conditioning: Conditioning) -> None:
        check_inputs("Z-Image transformer", self.config, x_NHWC, conditioning)
        captions, (_, height, width, _) = conditioning.context_NLD.shape[1], x_NHWC.shape
        # Captions begin at place 1, and the image has the place after them.
        needed = captions + -captions % TOKENS_MULTIPLE + 2, height // PATCH, width // PATCH
        if any(one > limit for one, limit in zip(needed, self.config.axes_lens, strict=True)):
            raise UserError(
                f"captions of {captions} tokens and latents of {height} x {width} cells need axes_lens = "
                f"{list(needed)}, but this Z-Image transformer has {list(self.config.axes_lens)}; choose smaller "
                "images or shorter captions"
            )


class ZImageTransformerBlock(nnx.Module):
    """Attention and a feed-forward layer, each normalised before and after, and residual. If it `is_modulated`, the
    time embedding scales what goes into both and gates what comes out."""

    def __init__(
        self,
        config: ZImageTransformerConfig,
        *,
        is_modulated: bool,
        execution: Execution,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        features = config.dim
        self.attention = Attention(
            features,
            config.n_heads,
            qk_norm=True,
            use_bias=False,
            epsilon=QK_EPSILON,
            execution=execution,
            dtype=dtype,
            rngs=rngs,
        )
        self.feed_forward = FeedForward(features, int(features / 3 * 8), dtype=dtype, rngs=rngs)
        self.attention_norm1, self.ffn_norm1, self.attention_norm2, self.ffn_norm2 = (
            RMSNorm(features, epsilon=config.norm_eps, dtype=dtype, rngs=rngs) for _ in range(4)
        )
        self.adaLN_modulation: nnx.List = nnx.List(
            [Linear(config.time_features, 4 * features, dtype=dtype, rngs=rngs)] if is_modulated else []
        )

    def __call__(
        self, x_NLD: jax.Array, temb_NT: jax.Array | None, rotary: Rotary, num_keys_N: jax.Array | None
    ) -> jax.Array:
        if not self.adaLN_modulation:
            x_NLD += self.attention_norm2(self.attention(self.attention_norm1(x_NLD), rotary, num_keys_N))
            return x_NLD + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x_NLD)))
        modulation_N1D = self.adaLN_modulation[0](temb_NT)[:, None]
        scale_N1D, gate_N1D, ff_scale_N1D, ff_gate_N1D = jnp.split(modulation_N1D, 4, axis=-1)
        y_NLD = self.attention(_modulated(self.attention_norm1, x_NLD, scale_N1D), rotary, num_keys_N)
        x_NLD = gated_add(x_NLD, jnp.tanh(gate_N1D), self.attention_norm2(y_NLD))
        y_NLD = self.feed_forward(_modulated(self.ffn_norm1, x_NLD, ff_scale_N1D))
        return gated_add(x_NLD, jnp.tanh(ff_gate_N1D), self.ffn_norm2(y_NLD))


class FeedForward(nnx.Module):
    """A gated layer (SwiGLU) without biases."""

    def __init__(self, features: int, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.w1, self.w3 = (Linear(features, hidden, use_bias=False, dtype=dtype, rngs=rngs) for _ in range(2))
        self.w2 = Linear(hidden, features, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x_NLD: jax.Array) -> jax.Array:
        return self.w2(swiglu(self.w1(x_NLD), self.w3(x_NLD)))


class FinalLayer(nnx.Module):
    """Maps image tokens to the features of their patches."""

    def __init__(self, config: ZImageTransformerConfig, out_features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.linear = Linear(config.dim, out_features, dtype=dtype, rngs=rngs)
        # diffusers' list begins with the activation, which has no parameters.
        self.adaLN_modulation: nnx.List = nnx.List(
            [None, Linear(config.time_features, config.dim, dtype=dtype, rngs=rngs)]
        )

    def __call__(self, x_NLD: jax.Array, temb_NT: jax.Array) -> jax.Array:
        scale_N1D = self.adaLN_modulation[1](jax.nn.silu(temb_NT))[:, None]
        return self.linear(modulated_layer_norm(x_NLD, None, scale_N1D))


class TimestepEmbedder(nnx.Module):
    """Two linear layers with SiLU between them; for their dtype see `time_embedding`."""

    def __init__(self, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.high = accumulation_dtype(dtype)
        self.mlp: nnx.List = nnx.List(
            [
                Linear(SINUSOIDS, TIME_HIDDEN, dtype=self.high, rounded=dtype, rngs=rngs),
                None,
                Linear(TIME_HIDDEN, features, dtype=self.high, rounded=dtype, rngs=rngs),
            ]
        )

    def __call__(self, t_N: jax.Array) -> jax.Array:
        return self.mlp[2](jax.nn.silu(self.mlp[0](sinusoids(t_N, SINUSOIDS, self.high))))


def make_rotary(
    config: ZImageTransformerConfig,
    captions: int,
    num_captions_N: jax.Array | None,
    rows: int,
    columns: int,
    dtype: DTypeLike,
) -> tuple[Rotary, Rotary]:
    """Return the rotary tables of images' tokens and those of captions, both with padding.

    Captions are at places 1, 2, ... with row and column 0. An image's tokens are all at the place after its caption's
    last one, in their rows and columns, and its padding is at the origin.

    Args:
        config: the model's.
        captions: number of places that captions take in the batch.
        num_captions_N: how many of these are the image's own; None for all of them.
        rows: number of rows of an image's tokens.
        columns: number of tokens per row.
        dtype: the compute dtype.
    """
    high = accumulation_dtype(dtype)
    place_N = captions + 1 if num_captions_N is None else num_captions_N + 1

    def angles(positions: int, axis: int) -> np.ndarray:
        frequencies = config.rope_theta ** -(np.arange(0, axis, 2) / axis)
        return np.outer(np.arange(positions), frequencies).astype(high)  # diffusers rounds the angles too

    sizes = captions + 2, rows, columns
    of_places, of_rows, of_columns = (angles(size, axis) for size, axis in zip(sizes, config.axes_dims, strict=True))

    def tables(function: np.ufunc) -> tuple[jax.Array, jax.Array]:
        places, *cells = (jnp.asarray(function(x)) for x in (of_places, of_rows[:, None], of_columns[None]))
        parts = places[place_N][..., None, None, :], *cells
        batch = parts[0].shape[:-3]
        image = jnp.concatenate([jnp.broadcast_to(x, (*batch, rows, columns, x.shape[-1])) for x in parts], axis=-1)
        image = image.reshape(*batch, rows * columns, -1)
        padding = [(0, 0)] * len(batch) + [(0, -rows * columns % TOKENS_MULTIPLE), (0, 0)]
        of_zero = float(function(0.0))
        others = sum(x.shape[-1] for x in cells)
        caption = jnp.pad(places[1 : captions + 1], [(0, 0), (0, others)], constant_values=of_zero)
        return jnp.pad(image, padding, constant_values=of_zero), caption

    (cos_image, cos_caption), (sin_image, sin_caption) = tables(np.cos), tables(np.sin)
    return Rotary(cos_image, sin_image), Rotary(cos_caption, sin_caption)


def _joined(of_images: Rotary, of_captions: Rotary) -> Rotary:
    """Return the tables of images' tokens and, after them, captions'."""

    def join(image: jax.Array, caption: jax.Array) -> jax.Array:
        return jnp.concatenate([image, jnp.broadcast_to(caption, (*image.shape[:-2], *caption.shape))], axis=-2)

    return Rotary(*map(join, of_images, of_captions))


def _modulated(norm: RMSNorm, x_NLD: jax.Array, scale_N1D: jax.Array) -> jax.Array:
    """Return the normalised tokens times `1 + scale`, rounded once."""
    high = accumulation_dtype(norm.dtype)
    weight_D = norm.scale[...].astype(norm.dtype).astype(high)
    return rms_norm(x_NLD, weight_D * (1 + scale_N1D.astype(high)), norm.epsilon)


def _padded(x_NLD: jax.Array, token: nnx.Param) -> jax.Array:
    """Append as many of the learned `token` [1, D] as a multiple of 32 tokens needs."""
    n, length, features = x_NLD.shape
    missing = n, -length % TOKENS_MULTIPLE, features
    return jnp.concatenate([x_NLD, jnp.broadcast_to(token[...].astype(x_NLD.dtype), missing)], axis=1)
