"""ImageReward's network against transformers' BLIP and the MLP in PyTorch."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from dpo_jax.models.blip import BLIPTextConfig, BLIPVisionConfig, ImageReward, ImageRewardConfig
from dpo_jax.models.network import Network
from dpo_jax.weights import original_names
from dpo_jax.weights.layout import from_torch, torch_name

SMALL = ImageRewardConfig(
    BLIPVisionConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    ),
    BLIPTextConfig(
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=3,
        vocab_size=50,
        max_position_embeddings=40,
    ),
)


class TorchImageReward(torch.nn.Module):
    """ImageReward from github.com/THUDM/ImageReward, ImageReward/ImageReward.py, built from transformers' halves."""

    def __init__(self, config: ImageRewardConfig):
        super().__init__()
        vision, text = dataclasses.asdict(config.vision), dataclasses.asdict(config.text)
        self.vision_model = BlipVisionModel(BlipVisionConfig(**vision))
        text |= {"encoder_hidden_size": config.vision.hidden_size, "is_decoder": True, "bos_token_id": 1}
        text |= {"eos_token_id": 2, "sep_token_id": 2, "pad_token_id": 0}
        # With `is_decoder` the config has cross-attention; its argument below leaves the attention to both sides.
        self.text_encoder = BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False)
        linear, drop = torch.nn.Linear, torch.nn.Dropout
        layers = [linear(config.text.hidden_size, 1024), drop(0.2), linear(1024, 128), drop(0.2)]
        layers += [linear(128, 64), drop(0.1), linear(64, 16), linear(16, 1)]
        self.mlp = torch.nn.Module()
        self.mlp.layers = torch.nn.Sequential(*layers)
        self.config = config

    @torch.no_grad()
    def forward(self, pixels_NCHW: torch.Tensor, token_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        image = self.vision_model(pixels_NCHW).last_hidden_state
        hidden = self.text_encoder(
            input_ids=token_ids,
            attention_mask=mask,
            encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(image.shape[:-1], dtype=torch.long),
            is_decoder=False,
        ).last_hidden_state
        return (self.mlp.layers(hidden[:, 0])[:, 0] - self.config.mean) / self.config.std


def randomised(model: torch.nn.Module, size: float) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def build(config: ImageRewardConfig, dtype: str = "float32") -> Network:
    return Network.build(lambda rngs: ImageReward(config, dtype=dtype, rngs=rngs), config)


def copied(network: Network, model: torch.nn.Module) -> dict[str, Any]:
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    assert state.keys() == set(map(torch_name, network.specs))
    return {name: jnp.asarray(from_torch(state[torch_name(name)], spec)) for name, spec in network.specs.items()}


def inputs(config: ImageRewardConfig, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return pixels, token ids padded with zeros, and their lengths."""
    rng = np.random.default_rng(0)
    pixels_NHWC = rng.normal(size=(3, config.vision.image_size, config.vision.image_size, 3)).astype(np.float32)
    lengths_N = np.array([tokens, 4, 2])
    token_ids_NL = rng.integers(1, config.text.vocab_size, (3, tokens))
    return pixels_NHWC, np.where(np.arange(tokens) < lengths_N[:, None], token_ids_NL, 0), lengths_N


def compare(config: ImageRewardConfig, size: float, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    torch.manual_seed(0)
    network, model = build(config), randomised(TorchImageReward(config), size)
    pixels_NHWC, token_ids_NL, lengths_N = inputs(config, tokens)
    mask = torch.from_numpy((np.arange(tokens) < lengths_N[:, None]).astype(np.int64))
    theirs = model(torch.from_numpy(pixels_NHWC).permute(0, 3, 1, 2), torch.from_numpy(token_ids_NL), mask)
    return np.asarray(network(copied(network, model), pixels_NHWC, token_ids_NL, lengths_N)), theirs.numpy()


def test_rewards_agree_with_pytorch() -> None:
    ours, theirs = compare(SMALL, 0.2, 9)
    assert np.ptp(theirs) > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


def test_padding_is_not_seen() -> None:
    network = build(SMALL)
    params = copied(network, randomised(TorchImageReward(SMALL), 0.2))
    pixels_NHWC, token_ids_NL, lengths_N = inputs(SMALL, 9)
    other_NL = np.where(np.arange(9) < lengths_N[:, None], token_ids_NL, 7)
    rewards, same = (network(params, pixels_NHWC, ids, lengths_N) for ids in (token_ids_NL, other_NL))
    np.testing.assert_array_equal(rewards, same)
    assert (rewards != network(params, pixels_NHWC, other_NL, np.full(3, 9)))[1:].all()


def test_bfloat16_stays_close() -> None:
    params = copied(build(SMALL), randomised(TorchImageReward(SMALL), 0.02))
    arguments = inputs(SMALL, 9)
    full, half = (build(SMALL, dtype)(params, *arguments) for dtype in ("float32", "bfloat16"))
    assert half.dtype == jnp.float32
    assert 0 < np.abs(half - full).max() < 0.02


def test_full_size_names_are_those_of_the_published_file() -> None:
    """The original's classes make these numbers: 24 layers of 12 in timm's ViT and 6 beside them, 12 of 26 in BERT and
    4, the MLP; the sizes are those of ViT-L/16 at 224 pixels and of BERT base with 30,524 tokens."""
    specs = build(ImageRewardConfig()).specs
    names = original_names.image_reward_names(specs)
    shapes = {names[torch_name(name)].tensor: spec.torch_shape for name, spec in specs.items()}
    image = {name for name in shapes if name.startswith("blip.visual_encoder.")}
    text = {name for name in shapes if name.startswith("blip.text_encoder.")}
    mlp = {f"mlp.layers.{place}.{kind}" for place in (0, 2, 4, 6, 7) for kind in ("weight", "bias")}
    assert (len(image), len(text)) == (24 * 12 + 6, 12 * 26 + 4)
    assert shapes.keys() == image | text | mlp
    assert shapes["blip.visual_encoder.blocks.23.attn.qkv.weight"] == (3072, 1024)
    assert shapes["blip.visual_encoder.pos_embed"] == (1, 197, 1024)
    assert shapes["blip.visual_encoder.patch_embed.proj.weight"] == (1024, 3, 16, 16)
    assert shapes["blip.text_encoder.embeddings.word_embeddings.weight"] == (30524, 768)
    assert shapes["blip.text_encoder.encoder.layer.11.crossattention.self.key.weight"] == (768, 1024)


@pytest.mark.slow
def test_full_size_agrees_with_pytorch() -> None:
    """Uses 447 million random parameters."""
    ours, theirs = compare(ImageRewardConfig(), 0.01, 35)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())
