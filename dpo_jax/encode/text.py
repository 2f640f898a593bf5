"""Maps captions to conditioning: token ids to the inputs that the denoiser attends to.

Axes: N captions or candidates, L tokens, D context width, P pooled width, T time ids.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.batch import TOLD_GUIDANCE, Conditioning, EncodedText
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.models.text_encoders import TextEmbedding
from dpo_jax.weights.layout import Params

REFINER_AESTHETIC_SCORE = 6.0
"""Aesthetic score that the SDXL refiner gets for the wanted images (arXiv 2307.01952, section 2.5)."""
NEGATIVE_AESTHETIC_SCORE = 2.5
"""Aesthetic score for the images that guidance leads away from, as in diffusers."""


def encode_text(pipeline: Pipeline, encoders: Mapping[str, Params], token_ids_NL: jax.Array) -> TextEmbedding:
    """Run every text encoder of the family, and compose what its denoiser reads."""
    family = pipeline.family
    each_NL = split_token_ids(pipeline, token_ids_NL)
    outputs = [
        network(encoders[encoder.folder], own_NL)
        for encoder, network, own_NL in zip(family.text_encoders, pipeline.text_encoders, each_NL, strict=True)
    ]
    return family.composition.compose(outputs)


def stored_text(pipeline: Pipeline, context_NLD: jax.Array, pooled_NP: jax.Array) -> TextEmbedding:
    """Return the embedding whose context and pooled output were stored; padding that is not attended to is 0."""
    is_token_NL = (context_NLD != 0).any(axis=-1) if pipeline.family.composition.masks_padding else None
    return TextEmbedding(context_NLD.astype(pipeline.dtype), pooled_NP.astype(pipeline.dtype), is_token_NL)


def embed(pipeline: Pipeline, encoders: Mapping[str, Params], text: jax.Array | EncodedText) -> TextEmbedding:
    """Return the embedding of captions: of token ids [N, L], which the encoders are run on, or of stored features."""
    if isinstance(text, EncodedText):
        return stored_text(pipeline, *text)
    return encode_text(pipeline, encoders, text)


def split_token_ids(pipeline: Pipeline, token_ids_NL: jax.Array) -> list[jax.Array]:
    """Return the token ids of each text encoder, which `token_ids_NL` holds one after the other along L."""
    lengths = pipeline.text_lengths
    assert token_ids_NL.shape[1] == sum(lengths), f"{token_ids_NL.shape[1]} token ids for lengths {lengths}"
    return jnp.split(token_ids_NL, np.cumsum(lengths)[:-1], axis=1)


def condition(
    pipeline: Pipeline,
    text: TextEmbedding,
    size_cond_N6: jax.Array,
    *,
    aesthetic_score: float = REFINER_AESTHETIC_SCORE,
    guidance: float = TOLD_GUIDANCE,
) -> Conditioning:
    """Return the conditioning of the family's denoiser; captions and sizes may have different lengths along N.

    Time ids are (height, width, crop top, crop left, target height, target width) or, if the family has five,
    (height, width, crop top, crop left, `aesthetic_score`). A model that was distilled from guidance is told the scale
    `guidance`.
    """
    num_time_ids = pipeline.family.num_time_ids
    time_ids_NT = size_cond_N6 if num_time_ids else None
    if num_time_ids == 5:
        score_N1 = jnp.full((len(size_cond_N6), 1), aesthetic_score, size_cond_N6.dtype)
        time_ids_NT = jnp.concatenate([size_cond_N6[:, :4], score_N1], axis=1)
    return Conditioning(
        text.context_NLD,
        text.pooled_NP if text.pooled_NP.shape[-1] else None,
        time_ids_NT,
        text.is_token_NL,
        jnp.full(len(text.context_NLD), guidance, jnp.float32) if pipeline.is_told_guidance else None,
    )


def make_conditionings(
    pipeline: Pipeline, negative_1L: np.ndarray, guidance: float, *, negative_is_empty: bool = True
) -> Callable[..., tuple[Conditioning, Conditioning | None]]:
    """Return `f(encoders, text, size_cond_N6, negative_text=None) -> (conditioning of the captions, negative
    conditioning)`, N each; a text is token ids [N, L] or features [N, ...], see `embed`.

    Args:
        pipeline: the model's structure.
        negative_1L: token ids of the caption that guidance leads away from, unless `negative_text` has its features.
        guidance: guidance scale; at 1 or less, or if the model is told the scale, there is no negative conditioning.
        negative_is_empty: True if `negative_1L` is the empty caption, which some models embed as zeros.
    """

    def conditionings(
        encoders: Mapping[str, Params],
        text: jax.Array | EncodedText,
        size_cond_N6: jax.Array,
        negative_text: EncodedText | None = None,
    ) -> tuple[Conditioning, Conditioning | None]:
        conditioning = condition(pipeline, embed(pipeline, encoders, text), size_cond_N6, guidance=guidance)
        if pipeline.guidance_scale(guidance) <= 1:
            return conditioning, None
        negative = embed(pipeline, encoders, jnp.asarray(negative_1L) if negative_text is None else negative_text)
        if negative_is_empty and pipeline.force_zeros_for_empty_prompt:
            negative = jax.tree.map(jnp.zeros_like, negative)
        negative = jax.tree.map(lambda x_1: jnp.repeat(x_1, len(size_cond_N6), axis=0), negative)
        return conditioning, condition(pipeline, negative, size_cond_N6, aesthetic_score=NEGATIVE_AESTHETIC_SCORE)

    return conditionings
