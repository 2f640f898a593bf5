"""Captions to conditioning: token ids in, what the UNet attends to out.

Axes: B prompts, K candidates, E text encoders, L tokens, D context width, P pooled width, T time ids.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dpo_jax.batch import Conditioning
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.weights.layout import Params

REFINER_AESTHETIC_SCORE = 6.0
"""The score that the SDXL refiner is told for images one wants (arXiv 2307.01952, section 2.5)."""


def encode_text(
    pipeline: Pipeline, frozen: Mapping[str, Params], token_ids_BEL: jax.Array, size_cond_N6: jax.Array
) -> Conditioning:
    """Runs every text encoder of the family; context and pooled embedding have B rows, time ids those of `size_cond`.

    Which hidden state is the context and how many time ids there are is the family's data. Time ids are (height, width,
    crop top, crop left, target height, target width), or with five of them (height, width, crop top, crop left,
    aesthetic score).
    """
    family = pipeline.family
    contexts, pooled_BP = [], None
    for e, (encoder, network) in enumerate(zip(family.text_encoders, pipeline.text_encoders, strict=True)):
        output = network(frozen[encoder.folder], token_ids_BEL[:, e])
        contexts.append(getattr(output, encoder.context))
        pooled_BP = output.pooled_NP
    context_BLD = jnp.concatenate(contexts, axis=-1)
    if not family.num_time_ids:
        return Conditioning(context_BLD)
    time_ids_NT = size_cond_N6
    if family.num_time_ids == 5:
        score_N1 = jnp.full((len(size_cond_N6), 1), REFINER_AESTHETIC_SCORE, size_cond_N6.dtype)
        time_ids_NT = jnp.concatenate([size_cond_N6[:, :4], score_N1], axis=1)
    return Conditioning(context_BLD, pooled_BP, time_ids_NT)
