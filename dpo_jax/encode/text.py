"""Captions to conditioning: token ids in, what the UNet attends to out.

Axes: N captions or candidates, E text encoders, L tokens, D context width, P pooled width, T time ids.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.batch import Conditioning
from dpo_jax.models.families import Family
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.weights.layout import Params

REFINER_AESTHETIC_SCORE = 6.0
"""The score that the SDXL refiner is told for images one wants (arXiv 2307.01952, section 2.5)."""
NEGATIVE_AESTHETIC_SCORE = 2.5
"""And for those that guidance leads away from, as diffusers has it."""


def encode_text(
    pipeline: Pipeline, encoders: Mapping[str, Params], token_ids_NEL: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Runs every text encoder of the family: (context_NLD, pooled_NP), P = 0 where the UNet takes no pooled embedding.

    Which hidden state is the context is the family's data.
    """
    family = pipeline.family
    contexts = []
    pooled_NP = jnp.zeros((len(token_ids_NEL), 0), pipeline.dtype)
    for e, (encoder, network) in enumerate(zip(family.text_encoders, pipeline.text_encoders, strict=True)):
        output = network(encoders[encoder.folder], token_ids_NEL[:, e])
        contexts.append(getattr(output, encoder.context))
        if family.num_time_ids:
            pooled_NP = output.pooled_NP
    return jnp.concatenate(contexts, axis=-1), pooled_NP


def condition(
    family: Family,
    context_NLD: jax.Array,
    pooled_NP: jax.Array,
    size_cond_N6: jax.Array,
    aesthetic_score: float = REFINER_AESTHETIC_SCORE,
) -> Conditioning:
    """What the UNet of the family takes; captions and sizes may have different numbers of rows.

    Time ids are (height, width, crop top, crop left, target height, target width), or, where the family has five,
    (height, width, crop top, crop left, `aesthetic_score`).
    """
    if not family.num_time_ids:
        return Conditioning(context_NLD)
    time_ids_NT = size_cond_N6
    if family.num_time_ids == 5:
        score_N1 = jnp.full((len(size_cond_N6), 1), aesthetic_score, size_cond_N6.dtype)
        time_ids_NT = jnp.concatenate([size_cond_N6[:, :4], score_N1], axis=1)
    return Conditioning(context_NLD, pooled_NP, time_ids_NT)


def make_conditionings(
    pipeline: Pipeline, negative_1EL: np.ndarray, guidance: float, *, negative_is_empty: bool = True
) -> Callable[[Mapping[str, Params], jax.Array, jax.Array], tuple[Conditioning, Conditioning | None]]:
    """`(encoders, token_ids_NEL, size_cond_N6) -> (of the captions, of what guidance leads away from)`, N rows each.

    Args:
        pipeline: the model's structure.
        negative_1EL: token ids of what guidance leads away from.
        guidance: its scale; of 1 or less there is none, and the second is None.
        negative_is_empty: whether they are the empty caption's, which some models embed as zeros.
    """

    def conditionings(
        encoders: Mapping[str, Params], token_ids_NEL: jax.Array, size_cond_N6: jax.Array
    ) -> tuple[Conditioning, Conditioning | None]:
        conditioning = condition(pipeline.family, *encode_text(pipeline, encoders, token_ids_NEL), size_cond_N6)
        if guidance <= 1:
            return conditioning, None
        of_negative = encode_text(pipeline, encoders, jnp.asarray(negative_1EL))
        if negative_is_empty and pipeline.force_zeros_for_empty_prompt:
            of_negative = jax.tree.map(jnp.zeros_like, of_negative)
        context_NLD, pooled_NP = (jnp.repeat(x_1, len(token_ids_NEL), axis=0) for x_1 in of_negative)
        unconditional = condition(pipeline.family, context_NLD, pooled_NP, size_cond_N6, NEGATIVE_AESTHETIC_SCORE)
        return conditioning, unconditional

    return conditionings
