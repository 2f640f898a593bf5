"""Maps captions to conditioning: token ids to the inputs that the denoiser attends to.

Axes: N captions or candidates, L tokens, D context width, P pooled width, T time ids.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.batch import Conditioning
from dpo_jax.models.families import Family
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.weights.layout import Params

REFINER_AESTHETIC_SCORE = 6.0
"""Aesthetic score that the SDXL refiner gets for the wanted images (arXiv 2307.01952, section 2.5)."""
NEGATIVE_AESTHETIC_SCORE = 2.5
"""Aesthetic score for the images that guidance leads away from, as in diffusers."""


def encode_text(
    pipeline: Pipeline, encoders: Mapping[str, Params], token_ids_NL: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Run every text encoder of the family: (context_NLD, pooled_NP); P = 0 if the denoiser takes no pooled embedding.

    The family states which hidden state is the context.
    """
    family = pipeline.family
    contexts = []
    pooled_NP = jnp.zeros((len(token_ids_NL), 0), pipeline.dtype)
    each_NL = split_token_ids(pipeline, token_ids_NL)
    for encoder, network, own_NL in zip(family.text_encoders, pipeline.text_encoders, each_NL, strict=True):
        output = network(encoders[encoder.folder], own_NL)
        contexts.append(getattr(output, encoder.context))
        if pipeline.denoiser.config.pooled_features:
            pooled_NP = output.pooled_NP
    return jnp.concatenate(contexts, axis=-1), pooled_NP


def split_token_ids(pipeline: Pipeline, token_ids_NL: jax.Array) -> list[jax.Array]:
    """Return the token ids of each text encoder, which `token_ids_NL` holds one after the other along L."""
    lengths = pipeline.text_lengths
    assert token_ids_NL.shape[1] == sum(lengths), f"{token_ids_NL.shape[1]} token ids for lengths {lengths}"
    return jnp.split(token_ids_NL, np.cumsum(lengths)[:-1], axis=1)


def text_shapes(pipeline: Pipeline) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of context_LD and pooled_P of a caption."""
    encoders = {
        encoder.folder: {name: jax.ShapeDtypeStruct(spec.shape, pipeline.dtype) for name, spec in network.specs.items()}
        for encoder, network in zip(pipeline.family.text_encoders, pipeline.text_encoders, strict=True)
    }
    token_ids_1L = jax.ShapeDtypeStruct((1, sum(pipeline.text_lengths)), jnp.int32)
    context, pooled = jax.eval_shape(functools.partial(encode_text, pipeline), encoders, token_ids_1L)
    return context.shape[1:], pooled.shape[1:]


def condition(
    family: Family,
    context_NLD: jax.Array,
    pooled_NP: jax.Array,
    size_cond_N6: jax.Array,
    aesthetic_score: float = REFINER_AESTHETIC_SCORE,
) -> Conditioning:
    """Return the conditioning of the family's denoiser; captions and sizes may have different lengths along N.

    Time ids are (height, width, crop top, crop left, target height, target width) or, if the family has five,
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
    pipeline: Pipeline, negative_1L: np.ndarray, guidance: float, *, negative_is_empty: bool = True
) -> Callable[[Mapping[str, Params], jax.Array, jax.Array], tuple[Conditioning, Conditioning | None]]:
    """Return `f(encoders, token_ids_NL, size_cond_N6) -> (conditioning of the captions, negative conditioning)`, N
    each.

    Args:
        pipeline: the model's structure.
        negative_1L: token ids of the caption that guidance leads away from.
        guidance: guidance scale; at 1 or less there is no guidance, and the negative conditioning is None.
        negative_is_empty: True if `negative_1L` is the empty caption, which some models embed as zeros.
    """

    def conditionings(
        encoders: Mapping[str, Params], token_ids_NL: jax.Array, size_cond_N6: jax.Array
    ) -> tuple[Conditioning, Conditioning | None]:
        conditioning = condition(pipeline.family, *encode_text(pipeline, encoders, token_ids_NL), size_cond_N6)
        if guidance <= 1:
            return conditioning, None
        of_negative = encode_text(pipeline, encoders, jnp.asarray(negative_1L))
        if negative_is_empty and pipeline.force_zeros_for_empty_prompt:
            of_negative = jax.tree.map(jnp.zeros_like, of_negative)
        context_NLD, pooled_NP = (jnp.repeat(x_1, len(token_ids_NL), axis=0) for x_1 in of_negative)
        unconditional = condition(pipeline.family, context_NLD, pooled_NP, size_cond_N6, NEGATIVE_AESTHETIC_SCORE)
        return conditioning, unconditional

    return conditionings
