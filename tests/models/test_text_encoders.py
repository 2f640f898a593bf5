"""Captions become what the denoisers of flow models read of them, as diffusers' pipelines make it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from diffusers import FluxPipeline, StableDiffusion3Pipeline, ZImagePipeline

from dpo_jax.data.tokenizer_files import TokenizerSpec
from dpo_jax.data.tokenizers import load_tokenizers
from dpo_jax.models.network import network_of
from dpo_jax.models.random_tokenizers import (
    END,
    START,
    WORDS,
    byte_vocabulary,
    write_clip_tokenizer,
    write_qwen_tokenizer,
    write_t5_tokenizer,
)
from dpo_jax.models.text_encoders import FLUX, KINDS, SD3, Z_IMAGE, Composition, TextEmbedding
from dpo_jax.weights.layout import from_torch, torch_aliases

CAPTIONS = ["a red circle", "", "the photo of a blue square " * 9, "odd: 猫 é"]


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


def composed(
    folder: Path, composition: Composition, kinds: str, models: Sequence[Any], lengths: Sequence[int]
) -> TextEmbedding:
    """Return what our networks make of `CAPTIONS` with the weights of PyTorch's models."""
    outputs, configs = [], []
    for number, (kind, model, length) in enumerate(zip(kinds.split(), models, lengths, strict=True)):
        fields = {**model.config.to_dict(), "architectures": [type(model).__name__]}
        config = KINDS[kind].config.from_dict(fields, "config.json")
        network = network_of(KINDS[kind].module, config, dtype="float32")
        state = {name: value.numpy() for name, value in model.state_dict().items()}
        params = {
            name: jnp.asarray(from_torch(state[next(x for x in torch_aliases(name) if x in state)], spec))
            for name, spec in network.specs.items()
        }
        name = f"tokenizer_{number + 1}" if number else "tokenizer"
        tokenizers = load_tokenizers(folder, [TokenizerSpec(name, config.tokenizer_kind, length)])
        outputs.append(network(params, jnp.asarray(tokenizers(CAPTIONS))))
        configs.append(config)
    text = composition.compose(outputs)
    assert (text.context_NLD.shape[-1], text.pooled_NP.shape[-1]) == composition.features(configs)
    assert text.context_NLD.shape[1] == composition.length(lengths)
    assert (text.is_token_NL is not None) == composition.masks_padding
    return text


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
    ours = composed(tmp_path, SD3, "clip clip t5", [one, two, three], [16, 16, 21])
    assert ours.context_NLD.shape == (4, 16 + 21, 28)
    assert not ours.context_NLD[:, :16, 8 + 12 :].any()
    assert_close(ours.context_NLD, context)
    assert_close(ours.pooled_NP, pooled)


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
    ours = composed(tmp_path, FLUX, "clip t5", [one, two], [16, 21])
    assert_close(ours.context_NLD, context)
    assert_close(ours.pooled_NP, pooled)
    assert ours.pooled_NP.shape == (4, 8)


def test_z_image_reads_the_tokens_of_a_chat(tmp_path: Path) -> None:
    model, tokens = qwen(tmp_path, "tokenizer")
    theirs = ZImagePipeline(scheduler=None, vae=None, text_encoder=model, tokenizer=tokens, transformer=None)
    contexts, _ = theirs.encode_prompt(
        list(CAPTIONS), device="cpu", do_classifier_free_guidance=False, max_sequence_length=40
    )
    ours = composed(tmp_path, Z_IMAGE, "qwen3", [model], [40])
    assert ours.pooled_NP.shape == (4, 0)
    assert ours.is_token_NL is not None
    assert ours.is_token_NL.sum(-1).tolist() == [len(context) for context in contexts]
    for context_LD, is_token_L, expected in zip(ours.context_NLD, ours.is_token_NL, contexts, strict=True):
        assert_close(context_LD[is_token_L], expected)
