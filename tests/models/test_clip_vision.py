"""A whole CLIP matches transformers."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from dpo_jax.models.clip_vision import CLIPConfig, CLIPModel
from dpo_jax.models.network import Network
from dpo_jax.weights.layout import from_torch, torch_name

Fields = dict[str, Any]

SMALL: Fields = {
    "model_type": "clip",
    "architectures": ["CLIPModel"],
    "projection_dim": 12,
    "logit_scale_init_value": 2.6592,
    "text_config": {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 9,
        "projection_dim": 12,
        "hidden_act": "gelu",
        "eos_token_id": 49,
        "bos_token_id": 0,
        "pad_token_id": 1,
    },
    "vision_config": {
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": 21,
        "patch_size": 7,
        "projection_dim": 12,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-3,
    },
}

TEXT = {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}
PUBLISHED: dict[str, Fields] = {
    "openai/clip-vit-large-patch14": SMALL
    | {
        "projection_dim": 768,
        "text_config": TEXT
        | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
        },
    },
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": SMALL
    | {
        "projection_dim": 1024,
        "text_config": TEXT
        | {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "hidden_act": "gelu",
        },
        "vision_config": {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "patch_size": 14,
            "hidden_act": "gelu",
        },
    },
}
COUNTS = {"openai/clip-vit-large-patch14": 427_616_513, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": 986_109_441}


def build(fields: Fields, dtype: str) -> Network:
    config = CLIPConfig.from_dict(fields, "config.json")
    return Network.build(lambda rngs: CLIPModel(config, dtype=dtype, rngs=rngs), config)


def torch_model(fields: Fields) -> transformers.CLIPModel:
    return transformers.CLIPModel(transformers.CLIPConfig(**fields))


def randomised(model: torch.nn.Module, size: float) -> torch.nn.Module:
    """Draw random weights, even where transformers would start with ones and zeros."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model.eval()


def features(fields: Fields, dtype: str, size: float, captions: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return pairs of features from dpo_jax and transformers, for images and for texts."""
    torch.manual_seed(0)
    network, model = build(fields, dtype), randomised(torch_model(fields).to(getattr(torch, dtype)), size)
    rng, image_size = np.random.default_rng(0), network.config.vision.image_size
    pixels_NHWC = rng.normal(size=(2, image_size, image_size, 3)).astype(dtype)
    text = network.config.text
    token_ids_NL = rng.integers(3, text.vocab_size - 1, (captions, text.max_position_embeddings))
    token_ids_NL[:, 5:] = text.vocab_size - 1
    with torch.no_grad():
        images = model.get_image_features(torch.from_numpy(pixels_NHWC).permute(0, 3, 1, 2)).pooler_output
        texts = model.get_text_features(torch.from_numpy(token_ids_NL)).pooler_output
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    del model  # so that a large model is in memory only once
    params = {name: jnp.asarray(from_torch(state.pop(torch_name(name)), spec)) for name, spec in network.specs.items()}
    return [
        (np.asarray(network(params, pixels_NHWC, method="image_features")), images.numpy()),
        (np.asarray(network(params, token_ids_NL, method="text_features")), texts.numpy()),
    ]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])
def test_features_agree_with_transformers(dtype: str, tolerance: float, x64: None) -> None:
    for ours, theirs in features(SMALL, dtype, 0.2, 3):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_names_and_shapes_agree_with_transformers(name: str) -> None:
    specs = build(PUBLISHED[name], "float32").specs
    with torch.device("meta"):
        state = torch_model(PUBLISHED[name]).state_dict()
    assert {torch_name(name): spec.torch_shape for name, spec in specs.items()} == {
        name: tuple(value.shape) for name, value in state.items()
    }
    assert sum(np.prod(spec.shape, dtype=int) for spec in specs.values()) == COUNTS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_agrees_with_transformers(name: str) -> None:
    """Uses 428 and 986 million random parameters."""
    for ours, theirs in features(PUBLISHED[name], "float32", 0.002, 1):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def test_config_reads_what_transformers_writes_and_wrote(tmp_path: Any) -> None:
    expected = CLIPConfig.from_dict(SMALL, "config.json")
    assert (expected.vision.image_size, expected.vision.layer_norm_eps, expected.text.hidden_size) == (21, 1e-3, 16)
    assert (expected.projection_dim, expected.vision.hidden_act, expected.text.hidden_act) == (12, "quick_gelu", "gelu")
    written = transformers.CLIPConfig(**SMALL).to_dict()
    assert CLIPConfig.from_dict(written, "config.json") == expected
    # transformers 4 wrote every field of generation, and the halves a second time.
    vision = SMALL["vision_config"]
    old = {
        "top_k": 50,
        "eos_token_id": None,
        "torch_dtype": None,
        "pruned_heads": {},
        "dropout": 0.0,
        "num_channels": 3,
    }
    wrote = SMALL | {"vision_config": old | {"hidden_size": 768}, "vision_config_dict": vision}
    assert CLIPConfig.from_dict(wrote, "config.json") == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (SMALL | {"model_type": "siglip"}, r"^here does not describe a whole CLIP"),
        ({"model_type": "clip", "text_config": {}}, r"^here does not describe a whole CLIP"),
        (SMALL | {"vision_config": {"num_channels": 1}}, r"^here: vision_config: num_channels = 1 is not supported"),
        (SMALL | {"vision_config": {"use_mask": True}}, r"^here: vision_config: unknown field use_mask = True"),
        (SMALL | {"text_config": {"hidden_act": "relu"}}, r"^here: hidden_act = 'relu' is not supported"),
    ],
)
def test_what_is_not_supported_is_named(fields: Fields, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CLIPConfig.from_dict(fields, "here")
