"""The head that turns features into a score: the MLP of LAION's aesthetic predictor, also used by ImageReward."""

import jax
from flax import nnx
from jax.typing import DTypeLike

from dpo_jax.models.layers import Linear

WIDTHS = (1024, 128, 64, 16, 1)
PLACES = (0, 2, 4, 6, 7)
"""Indices in the original's list of layers, which counts dropout layers and has no activations."""


class ScoreMLP(nnx.Module):
    """Five linear layers in a row, under their original names; maps [N, features] to [N]."""

    def __init__(self, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        layers = {}
        for place, width in zip(PLACES, WIDTHS, strict=True):
            layers[str(place)] = Linear(features, width, dtype=dtype, rngs=rngs)
            features = width
        self.layers = nnx.Dict(layers)

    def __call__(self, features_ND: jax.Array) -> jax.Array:
        for place in PLACES:
            features_ND = self.layers[str(place)](features_ND)
        return features_ND[:, 0]
