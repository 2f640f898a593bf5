"""Embeddings of the timestep and of what denoisers read beside it, with the parameter names of diffusers.

N images, P pooled features, D features. Neighbouring timesteps differ by less than bfloat16 resolves, so these cheap
layers compute in `accumulation_dtype`. Their weights are still rounded like all others: the policy's are float32 and
the reference's are not, and both must start equal.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from dpo_jax.models.layers import Linear
from dpo_jax.models.operations import accumulation_dtype

SINUSOIDS = 256
"""Number of sinusoids of a timestep in transformers."""


class CombinedTimestepTextProjEmbeddings(nnx.Module):
    """The embedded timestep, pooled caption and, in models distilled from guidance, guidance scale, summed."""

    def __init__(
        self, features: int, pooled_features: int, *, has_guidance: bool = False, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.high = accumulation_dtype(dtype)
        embedding = functools.partial(TimestepEmbedding, features=features, dtype=self.high, rounded=dtype, rngs=rngs)
        self.timestep_embedder = embedding(SINUSOIDS)
        self.guidance_embedder = embedding(SINUSOIDS) if has_guidance else None
        self.text_embedder = embedding(pooled_features)

    def __call__(self, t_N: jax.Array, pooled_NP: jax.Array | None, guidance_N: jax.Array | None = None) -> jax.Array:
        """Return the activated sum [N, D]: every modulation in diffusers begins by activating it.

        The denoiser has checked its conditioning. `guidance_N` is the guidance scale as the embedder takes it: FLUX.1
        multiplies it by 1000.
        """
        assert pooled_NP is not None
        emb_ND = self.timestep_embedder(sinusoids(t_N, SINUSOIDS, self.high))
        if self.guidance_embedder is not None:
            assert guidance_N is not None
            emb_ND = emb_ND + self.guidance_embedder(sinusoids(guidance_N, SINUSOIDS, self.high))
        return jax.nn.silu(emb_ND + self.text_embedder(pooled_NP))


class TimestepEmbedding(nnx.Module):
    """Two linear layers with SiLU between them."""

    def __init__(
        self, in_features: int, features: int, *, dtype: DTypeLike, rounded: DTypeLike | None = None, rngs: nnx.Rngs
    ):
        self.linear_1 = Linear(in_features, features, dtype=dtype, rounded=rounded, rngs=rngs)
        self.linear_2 = Linear(features, features, dtype=dtype, rounded=rounded, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


def sinusoids(t: jax.Array, features: int, dtype: DTypeLike) -> jax.Array:
    """Cosines, then sines, of `t` times frequencies from 1 down to about 1 / 10000: [*t.shape, features].

    Every rounding follows diffusers: in float32 at t = 999, another order moves a feature by 1e-4.
    """
    half = features // 2
    exponent = -math.log(10_000) * np.arange(half, dtype=dtype) / half
    frequencies = np.exp(exponent.astype(np.float64)).astype(dtype)
    angles = t.astype(dtype)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
