"""Captions become the conditioning that diffusers' pipelines of flow models make of them."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from diffusers import FluxPipeline, StableDiffusion3Pipeline, ZImagePipeline

from dpo_jax.data.tokenizer_files import TokenizerSpec
from dpo_jax.data.tokenizers import load_tokenizers
from dpo_jax.encode.text import condition, encode_text
from dpo_jax.models.clip import CLIPTextConfig, CLIPTextModel
from dpo_jax.models.families import FLUX_ENCODERS, SD3_ENCODERS, Z_IMAGE_ENCODERS, TextEncoder
from dpo_jax.models.network import network_of
from dpo_jax.models.qwen3 import Qwen3Config, Qwen3Model
from dpo_jax.models.random_tokenizers import (
    END,
    START,
    WORDS,
    byte_vocabulary,
    write_clip_tokenizer,
    write_qwen_tokenizer,
    write_t5_tokenizer,
)
from dpo_jax.models.t5 import T5Config, T5EncoderModel
from dpo_jax.weights.layout import from_torch, torch_aliases

CAPTIONS = ["a red circle", "", "the photo of a blue square " * 9, "odd: 猫 é"]
MODULES: dict[str, Any] = {
    "clip": (CLIPTextModel, CLIPTextConfig),
    "t5": (T5EncoderModel, T5Config),
    "qwen": (Qwen3Model, Qwen3Config),
}


def clip(folder: Path, name: str, width: int, projection: int | None) -> tuple[Any, Any]:
    vocabulary, merges = byte_vocabulary(WORDS)
    write_clip_tokenizer(folder / name, vocabulary, merges)
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=projection or width,
        bos_token_id=vocabulary[START],
        eos_token_id=vocabulary[END],
    )
    model = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return model(config).eval(), transformers.CLIPTokenizer.from_pretrained(folder / name)


def t5(folder: Path, name: str) -> tuple[Any, Any]:
    config = transformers.T5Config(
        vocab_size=write_t5_tokenizer(folder / name),
        d_model=28,
        d_kv=7,
        d_ff=20,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return transformers.T5EncoderModel(config).eval(), transformers.T5Tokenizer.from_pretrained(folder / name)


def qwen(folder: Path, name: str) -> tuple[Any, Any]:
    config = transformers.Qwen3Config(
        vocab_size=write_qwen_tokenizer(folder / name),
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
    )
    return transformers.Qwen3Model(config).eval(), transformers.Qwen2Tokenizer.from_pretrained(folder / name)


def conditioning_of(
    folder: Path, encoders: Sequence[TextEncoder], models: Sequence[Any], lengths: Sequence[int], **family: bool
) -> Any:
    """Return the conditioning of `CAPTIONS` with the weights of PyTorch's models."""
    networks, specs, params = [], [], {}
    for encoder, model, length in zip(encoders, models, lengths, strict=True):
        fields = {**model.config.to_dict(), "architectures": [type(model).__name__]}
        kind = {"clip_text_model": "clip", "t5": "t5", "qwen3": "qwen"}[model.config.model_type]
        module, config = MODULES[kind]
        network = network_of(module, config.from_dict(fields, encoder.folder), dtype="float32")
        state = {name: value.numpy() for name, value in model.state_dict().items()}
        params[encoder.folder] = {
            name: jnp.asarray(from_torch(state[next(x for x in torch_aliases(name) if x in state)], spec))
            for name, spec in network.specs.items()
        }
        networks.append(network)
        specs.append(TokenizerSpec(encoder.tokenizer, kind, length))
    of_family = SimpleNamespace(**{"text_encoders": encoders, "num_time_ids": 0, "masks_padding": False} | family)
    pipeline: Any = SimpleNamespace(
        family=of_family, text_encoders=networks, text_lengths=tuple(lengths), dtype=jnp.float32
    )
    token_ids_NL = jnp.asarray(load_tokenizers(folder, specs)(CAPTIONS))
    return condition(pipeline.family, *encode_text(pipeline, params, token_ids_NL), jnp.zeros((len(CAPTIONS), 6)))


def assert_close(ours: Any, theirs: torch.Tensor) -> None:
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def test_sd3_joins_two_clips_by_features_and_t5_by_tokens(tmp_path: Path) -> None:
    (one, one_tokens), (two, two_tokens) = clip(tmp_path, "tokenizer", 8, 10), clip(tmp_path, "tokenizer_2", 12, 14)
    three, three_tokens = t5(tmp_path, "tokenizer_3")
    theirs = StableDiffusion3Pipeline(
        transformer=None,
        scheduler=None,
        vae=None,
        text_encoder=one,
        tokenizer=one_tokens,
        text_encoder_2=two,
        tokenizer_2=two_tokens,
        text_encoder_3=three,
        tokenizer_3=three_tokens,
    )
    context, _, pooled, _ = theirs.encode_prompt(
        CAPTIONS, None, None, do_classifier_free_guidance=False, device="cpu", max_sequence_length=21
    )
    ours = conditioning_of(tmp_path, SD3_ENCODERS, [one, two, three], [16, 16, 21])
    assert ours.context_NLD.shape == (4, 16 + 21, 28)
    assert not ours.context_NLD[:, :16, 8 + 12 :].any()
    assert_close(ours.context_NLD, context)
    assert_close(ours.pooled_NP, pooled)
    assert ours.is_token_NL is None
    assert ours.time_ids_NT is None


def test_flux_takes_clip_pooled_and_t5_by_token(tmp_path: Path) -> None:
    (one, one_tokens), (two, two_tokens) = clip(tmp_path, "tokenizer", 8, None), t5(tmp_path, "tokenizer_2")
    theirs = FluxPipeline(
        transformer=None,
        scheduler=None,
        vae=None,
        text_encoder=one,
        tokenizer=one_tokens,
        text_encoder_2=two,
        tokenizer_2=two_tokens,
    )
    context, pooled, _ = theirs.encode_prompt(CAPTIONS, None, device="cpu", max_sequence_length=21)
    ours = conditioning_of(tmp_path, FLUX_ENCODERS, [one, two], [16, 21])
    assert_close(ours.context_NLD, context)
    assert_close(ours.pooled_NP, pooled)
    assert ours.pooled_NP.shape == (4, 8)


def test_z_image_reads_the_tokens_of_a_chat(tmp_path: Path) -> None:
    model, tokens = qwen(tmp_path, "tokenizer")
    theirs = ZImagePipeline(scheduler=None, vae=None, text_encoder=model, tokenizer=tokens, transformer=None)
    contexts, _ = theirs.encode_prompt(
        list(CAPTIONS), device="cpu", do_classifier_free_guidance=False, max_sequence_length=40
    )
    ours = conditioning_of(tmp_path, Z_IMAGE_ENCODERS, [model], [40], masks_padding=True)
    assert ours.pooled_NP is None
    assert ours.is_token_NL.sum(-1).tolist() == [len(context) for context in contexts]
    for context_LD, is_token_L, expected in zip(ours.context_NLD, ours.is_token_NL, contexts, strict=True):
        assert_close(context_LD[is_token_L], expected)
