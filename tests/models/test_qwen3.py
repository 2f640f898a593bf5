"""Qwen3's text encoder matches transformers', as Z-Image calls it: outputs, gradients, names and shapes."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from dpo_jax.models.network import Network
from dpo_jax.models.qwen3 import Qwen3Config, Qwen3Model
from dpo_jax.weights.io import read_params
from dpo_jax.weights.layout import torch_name

from .torch_parity import double_transformers, our_params, relative_error, run, with_random_vectors

Z_IMAGE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 9728,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# Heads are together wider than the model, and three of queries share one of keys.
SMALL = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 6,
    "hidden_size": 16,
    "intermediate_size": 20,
    "max_window_layers": 4,
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "vocab_size": 31,
}
TINY = {**Z_IMAGE, **SMALL, "rms_norm_eps": 1e-3, "rope_theta": 500}
TOKEN_IDS_NL = np.random.default_rng(0).integers(0, 31, (3, 11))
LENGTHS_N = np.array([4, 11, 9])
IS_TOKEN_NL = np.arange(11) < LENGTHS_N[:, None]
PADDED_NL = np.where(IS_TOKEN_NL, TOKEN_IDS_NL, -1)


def build(fields: dict[str, Any], dtype: Any) -> Network:
    config = Qwen3Config.from_dict(fields, "text_encoder/config.json")
    return Network.build(lambda rngs: Qwen3Model(config, dtype=dtype, rngs=rngs), config)


def torch_config(fields: dict[str, Any]) -> transformers.Qwen3Config:
    return transformers.Qwen3Config(**fields, attn_implementation="eager")


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = with_random_vectors(transformers.Qwen3Model(torch_config(TINY)))
    model.rotary_emb.inv_freq = 500.0 ** -(torch.arange(0, 6, 2, dtype=torch.float64) / 6)
    return model


def run_torch(model: torch.nn.Module) -> torch.Tensor:
    """Return what diffusers' ZImagePipeline takes."""
    with double_transformers():
        mask = torch.from_numpy(IS_TOKEN_NL)
        ids = torch.from_numpy(np.where(IS_TOKEN_NL, TOKEN_IDS_NL, 3))
        return model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]


def test_outputs_and_gradients_in_double_precision(model: torch.nn.Module, x64: None) -> None:
    network = build(TINY, jnp.float64)
    params = our_params(network, model.state_dict())
    assert len(params) == len(model.state_dict())
    weights_NLD = np.random.default_rng(1).normal(size=(3, 11, 16)) * IS_TOKEN_NL[..., None]

    def loss(params: Any) -> tuple[jax.Array, Any]:
        output = network(params, jnp.asarray(PADDED_NL))
        return (output.penultimate_NLD * weights_NLD).sum(), output

    theirs = run_torch(model)
    (theirs * torch.from_numpy(weights_NLD)).sum().backward()
    gradients, ours = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_array_equal(ours.is_token_NL, IS_TOKEN_NL)
    assert relative_error(ours.penultimate_NLD[IS_TOKEN_NL], theirs.detach()[IS_TOKEN_NL]) < 1e-9
    assert not ours.penultimate_NLD[~IS_TOKEN_NL].any()
    run_layers = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {name for name, _ in model.named_parameters() if name not in run_layers} == {
        name for name in model.state_dict() if name.startswith(("layers.3.", "norm."))
    }
    for name, spec in network.specs.items():
        theirs_or_zero = run_layers.get(torch_name(name))
        if theirs_or_zero is None:
            assert not gradients[name].any()
        else:
            oracle = theirs_or_zero.numpy().transpose(np.argsort(spec.torch_axes))
            assert relative_error(gradients[name], oracle) < 1e-8, name


def test_outputs_in_single_precision(model: torch.nn.Module) -> None:
    network = build(TINY, jnp.float32)
    ours = run(network, our_params(network, model.state_dict()), jnp.asarray(PADDED_NL)).penultimate_NLD
    assert ours.dtype == jnp.float32
    assert relative_error(ours[IS_TOKEN_NL], run_torch(model).detach()[IS_TOKEN_NL]) < 1e-5


def test_the_folder_of_a_language_model_is_read(tmp_path: Path) -> None:
    """Published text encoders were saved with the names of Qwen3ForCausalLM, those that diffusers saves without."""
    torch.manual_seed(0)
    whole = transformers.Qwen3ForCausalLM(torch_config({**TINY, "tie_word_embeddings": False}))
    whole.save_pretrained(tmp_path / "whole")
    whole.model.save_pretrained(tmp_path / "alone")
    specs = build(TINY, jnp.float32).specs
    both = [read_params(tmp_path / folder, specs) for folder in ("whole", "alone")]
    for name in specs:
        np.testing.assert_array_equal(both[0][name], both[1][name])


def test_padding_changes_no_token(model: torch.nn.Module) -> None:
    network = build(TINY, jnp.float32)
    params = our_params(network, model.state_dict())
    together = run(network, params, jnp.asarray(PADDED_NL)).penultimate_NLD
    alone = run(network, params, jnp.asarray(PADDED_NL[:1, :4])).penultimate_NLD
    np.testing.assert_allclose(together[:1, :4], alone, rtol=1e-4, atol=1e-6)


def test_the_last_layer_is_not_run(model: torch.nn.Module) -> None:
    network = build(TINY, jnp.float32)
    params = our_params(network, model.state_dict())
    unread = {name: jnp.full_like(x, jnp.nan) for name, x in params.items() if name.startswith(("layers.3.", "norm."))}
    assert np.isfinite(run(network, {**params, **unread}, jnp.asarray(PADDED_NL)).penultimate_NLD).all()


def test_names_and_shapes_of_the_full_size() -> None:
    with torch.device("meta"):
        theirs = transformers.Qwen3Model(torch_config(Z_IMAGE)).state_dict()
    specs = build(Z_IMAGE, jnp.bfloat16).specs
    assert {torch_name(name): spec.torch_shape for name, spec in specs.items()} == {
        name: tuple(value.shape) for name, value in theirs.items()
    }
    assert sum(np.prod(spec.shape) for spec in specs.values()) == pytest.approx(4.02e9, rel=1e-2)


def test_a_config_of_transformers_5_is_read_alike() -> None:
    ours = Qwen3Config.from_dict(torch_config(TINY).to_dict() | {"dtype": None}, "config.json")
    assert ours == Qwen3Config.from_dict(TINY, "config.json")
    assert ours.rope_theta == 500
    assert Qwen3Config.from_dict(torch_config({}).to_dict(), "config.json") == Qwen3Config.from_dict({}, "config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias = True is not supported, only False"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, only 'silu'"),
        ({"model_type": "qwen2"}, "model_type = 'qwen2' is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        ({"layer_types": ["sliding_attention"] * 36}, "layer_types = .* is not supported, only 'full_attention'"),
        ({"layer_types": ["full_attention"]}, "layer_types = .* for each of the 36 layers"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling = .* is not supported, only None"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type = 'yarn' is not supported"),
        ({"rope_parameters": {"rope_theta": 1e6, "factor": 4.0}}, "rope_parameters.factor: .*not permitted"),
        ({"num_key_value_heads": 5}, "num_attention_heads = 32 is not a multiple of num_key_value_heads = 5"),
        ({"head_dim": 63}, "head_dim = 63 is not even"),
        ({"num_hidden_layers": 1, "layer_types": None}, "num_hidden_layers = 1 is not supported"),
        ({"num_experts": 8}, "unknown field num_experts = 8"),
    ],
)
def test_configs_that_compute_something_else_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"text_encoder/config.json: {message}"):
        build({**Z_IMAGE, **change}, jnp.float32)
