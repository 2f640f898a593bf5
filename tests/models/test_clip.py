"""CLIP's text encoder matches transformers."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from dpo_jax.models.clip import CLIPTextConfig, CLIPTextModel
from dpo_jax.models.network import Network
from dpo_jax.weights.layout import from_torch, torch_aliases, torch_name

TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 9,
    "projection_dim": 12,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "layer_norm_eps": 1e-3,
}
SD15 = TINY | {"hidden_act": "quick_gelu", "eos_token_id": 2, "architectures": ["CLIPTextModel"]}
SD2 = TINY | {"hidden_act": "gelu", "eos_token_id": 2, "num_hidden_layers": 23, "architectures": ["CLIPTextModel"]}
SDXL_SECOND = TINY | {"hidden_act": "gelu", "eos_token_id": 2, "architectures": ["CLIPTextModelWithProjection"]}
ADDED_TOKENS = TINY | {"hidden_act": "gelu", "eos_token_id": 40, "architectures": ["CLIPTextModelWithProjection"]}

# Token 40 ends a text, 45 was added to the vocabulary later, and text may be padded with its end or with zeros.
TOKEN_IDS_NL = np.array(
    [[0, 5, 6, 40, 40, 40, 40, 40], [0, 7, 45, 8, 40, 0, 0, 0], [0, 40, 3, 4, 5, 6, 7, 45], [0, 9, 8, 7, 6, 5, 4, 40]]
)

FULL_SIZE = {
    "clip_l": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768},
    "openclip_h": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
        "hidden_act": "gelu",
    },
    "openclip_bigg": {
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "hidden_act": "gelu",
        "projection_dim": 1280,
    },
}


def build(fields, dtype):
    config = CLIPTextConfig.from_dict(fields, "text_encoder/config.json")
    return Network.build(lambda rngs: CLIPTextModel(config, dtype=dtype, rngs=rngs), config)


def torch_model(fields):
    fields = dict(fields)
    name = fields.pop("architectures", ["CLIPTextModel"])[0]
    return getattr(transformers, name)(transformers.CLIPTextConfig(**fields))


def randomised(model, dtype=torch.float32):
    """Draw random weights, even where transformers would start with ones and zeros."""
    generator = torch.Generator().manual_seed(0)
    model = model.to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return model


def copy_params(network, model):
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    assert len(state) == len(network.specs)
    return {name: jnp.asarray(from_torch(state[stored_name(name, state)], s)) for name, s in network.specs.items()}


def stored_name(name, state):
    """Return the stored name: transformers 5 stores only CLIPTextModelWithProjection with the prefix."""
    return next(alias for alias in torch_aliases(name) if alias in state)


def relative_error(ours, theirs):
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize(
    "fields", [SD15, SD2, SDXL_SECOND, ADDED_TOKENS], ids=["sd15", "sd2", "sdxl_second", "added_tokens"]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])
def test_outputs_agree_with_transformers(fields, dtype, tolerance, x64):
    network, model = build(fields, dtype), randomised(torch_model(fields), getattr(torch, dtype))
    ours = network(copy_params(network, model), TOKEN_IDS_NL)
    theirs = model(torch.from_numpy(TOKEN_IDS_NL), output_hidden_states=True)
    assert relative_error(ours.last_hidden_NLD, theirs.last_hidden_state) < tolerance
    assert relative_error(ours.penultimate_NLD, theirs.hidden_states[-2]) < tolerance
    pooled = theirs.text_embeds if network.config.with_projection else theirs.pooler_output
    assert relative_error(ours.pooled_NP, pooled) < tolerance


@pytest.mark.parametrize(
    ("name", "count"), [("clip_l", 123_060_480), ("openclip_h", 340_387_840), ("openclip_bigg", 694_659_840)]
)
def test_full_size_names_and_shapes_agree_with_transformers(name, count):
    specs = build(FULL_SIZE[name], "float32").specs
    with torch.device("meta"):
        state = torch_model(FULL_SIZE[name]).state_dict()
    ours = {stored_name(name, state): spec.torch_shape for name, spec in specs.items()}
    assert ours == {name: tuple(value.shape) for name, value in state.items()}
    assert all(torch_name(name).startswith(("text_model.", "text_projection.")) for name in specs)
    assert sum(np.prod(spec.shape) for spec in specs.values()) == count


@pytest.mark.parametrize("fields", [SD15, SDXL_SECOND], ids=["plain", "projection"])
def test_config_reads_what_transformers_writes(fields, tmp_path):
    torch_model(fields).save_pretrained(tmp_path)
    config = CLIPTextConfig.from_dict(json.loads((tmp_path / "config.json").read_text()), "config.json")
    assert config == CLIPTextConfig.from_dict(fields, "config.json")
    assert config.with_projection == (fields is SDXL_SECOND)
    assert (config.hidden_size, config.eos_token_id, config.layer_norm_eps) == (16, 2, 1e-3)


def test_config_reads_the_text_half_of_a_whole_clip():
    old_text = {**TINY, "hidden_size": 8, "top_k": 50, "num_beams": 1, "torchscript": False, "pruned_heads": {}}
    whole = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": 20,
        "logit_scale_init_value": 2.6592,
        "text_config": old_text,
        "text_config_dict": {"hidden_size": 16},
        "vision_config": {},
    }
    config = CLIPTextConfig.from_dict(whole, "config.json")
    expected = TINY | {"projection_dim": 20, "architectures": ["CLIPTextModelWithProjection"]}
    assert config == CLIPTextConfig.from_dict(expected, "config.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "t5"),
        ("hidden_act", "relu"),
        ("pruned_heads", {"0": [1]}),
        ("is_decoder", True),
        ("eos_token_id", [2, 40]),
        ("vocab_size", None),
        ("num_hidden_layers", 10**12),
        ("relative_attention_num_buckets", 32),
    ],
)
def test_unsupported_field_is_named(field, value):
    with pytest.raises(ValueError, match=rf"^text_encoder/config\.json: .*\b{field}( = |: input should be )"):
        CLIPTextConfig.from_dict(SD15 | {field: value}, "text_encoder/config.json")


def test_too_long_captions_are_refused():
    network = build(SD15, "float32")
    with pytest.raises(ValueError, match="captions of 10 tokens do not fit a text model of 9 positions"):
        network(copy_params(network, torch_model(SD15)), np.zeros((1, 10), int))


def test_bfloat16_stays_close_to_float32():
    params = copy_params(build(SDXL_SECOND, "float32"), randomised(torch_model(SDXL_SECOND)))
    half, full = (build(SDXL_SECOND, dtype)(params, TOKEN_IDS_NL) for dtype in ("bfloat16", "float32"))
    for ours, reference in zip(half, full, strict=True):
        assert ours.dtype == jnp.bfloat16
        assert 0 < np.abs(ours.astype("float32") - reference).max() < 0.05 * np.abs(reference).max()
