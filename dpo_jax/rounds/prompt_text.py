"""What rollouts and updates read of prompts: the text encoders' outputs, computed once, or token ids.

Axes: P distinct prompts, N captions, L tokens, D context width.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from dpo_jax.batch import EncodedText
from dpo_jax.encode.text import encode_text
from dpo_jax.errors import UserError
from dpo_jax.files import readable_bytes
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.sharding import Placement, batch_parts, batch_sharding, replicated
from dpo_jax.training.experiment import Experiment
from dpo_jax.training.model import load_encoders, load_tokenizers_of, reads_encoded_prompts
from dpo_jax.weights.layout import Params

TextOf = Callable[[Sequence[str]], np.ndarray | EncodedText]
"""Maps N captions to token ids [N, L] or features [N, ...], on the host."""
PROMPTS_A_DEVICE = 32
"""Prompts that a device encodes at a time."""
MOST_OF_HOST = 0.5
"""Features may take this share of the host's memory."""


class EncodedPrompts:
    """The features of all prompts of a run and of the empty caption, in the host's memory of every process.

    Args:
        prompts: P distinct prompts, "" among them.
        text_P: their features, [P, ...].
    """

    def __init__(self, prompts: Sequence[str], text_P: EncodedText):
        self._rows: Mapping[str, int] = {prompt: row for row, prompt in enumerate(prompts)}
        self._text_P = text_P

    def __call__(self, captions: Sequence[str]) -> EncodedText:
        rows_N = [self._rows[caption] for caption in captions]
        return jax.tree.map(lambda x_P: x_P[rows_N], self._text_P)

    def join(self, experiment: Experiment) -> Experiment:
        """Return the experiment with the features of the empty caption, which guidance leads away from."""
        negative_text = jax.device_put(self([""]), replicated(experiment.mesh))
        return dataclasses.replace(
            experiment, frozen=dataclasses.replace(experiment.frozen, negative_text=negative_text)
        )


def text_of_prompts(
    config: ConfigDict, pipeline: Pipeline, placement: Placement, prompts: Iterable[str]
) -> EncodedPrompts | TextOf:
    """Return what a run reads of these prompts; raises UserError if their features do not fit the host's memory."""
    if not reads_encoded_prompts(config):
        return load_tokenizers_of(pipeline)
    distinct = list(dict.fromkeys([*prompts, ""]))
    size = len(distinct) * sum(map(math.prod, pipeline.text_shapes)) * pipeline.dtype.itemsize
    held = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > MOST_OF_HOST * held:
        raise UserError(
            f"config.online.encode_prompts=True keeps the features of {len(distinct)} prompts, {readable_bytes(size)}, "
            f"in the memory of each process, which has {readable_bytes(held)}. Name fewer prompts, or set it to False"
        )
    return EncodedPrompts(distinct, encode_prompts(config, pipeline, placement, distinct))


def encode_prompts(config: ConfigDict, pipeline: Pipeline, placement: Placement, prompts: Sequence[str]) -> EncodedText:
    """Run the text encoders, which are loaded for this alone; returns features [P, ...] in the compute dtype."""
    names = [name for name in pipeline.components if name not in (pipeline.denoiser_name, "vae")]
    encoders = load_encoders(config, pipeline, placement, names)
    parts, mesh = batch_parts(placement.mesh), placement.mesh

    def encode(encoders: Mapping[str, Params], token_ids_NL: jax.Array) -> EncodedText:
        whole = {name: pipeline.gather(placement, name, weights) for name, weights in encoders.items()}
        text = encode_text(pipeline, whole, token_ids_NL)
        return EncodedText(text.context_NLD.astype(pipeline.dtype), text.pooled_NP.astype(pipeline.dtype))

    jitted = jax.jit(encode, out_shardings=replicated(mesh))
    P, size = len(prompts), min(PROMPTS_A_DEVICE, -(-len(prompts) // parts)) * parts
    tokenizers = load_tokenizers_of(pipeline)
    batches: list[EncodedText] = []
    for start in range(0, P, size):
        token_ids_NL = tokenizers([prompts[i % P] for i in range(start, start + size)])
        batches.append(jax.device_get(jitted(encoders, jax.device_put(token_ids_NL, batch_sharding(mesh)))))
    return jax.tree.map(lambda *batches: np.concatenate(batches)[:P], *batches)
