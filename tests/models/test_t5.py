"""T5's encoder matches transformers': outputs, gradients, names and shapes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from dpo_jax.models.network import Network
from dpo_jax.models.t5 import T5Config, T5EncoderModel, relative_buckets
from dpo_jax.weights.layout import torch_name

from .torch_parity import double_transformers, our_params, relative_error, run, with_random_vectors

XXL: dict[str, Any] = {
    "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "vocab_size": 32128,
}
# Heads are together wider than the model, and 23 tokens reach every bucket.
SMALL = {
    "d_ff": 14,
    "d_kv": 5,
    "d_model": 12,
    "num_heads": 3,
    "num_layers": 3,
    "relative_attention_max_distance": 19,
    "relative_attention_num_buckets": 8,
    "vocab_size": 31,
}
TINY = {**XXL, **SMALL, "layer_norm_epsilon": 1e-3}
TOKEN_IDS_NL = np.random.default_rng(0).integers(2, 31, (2, 23))
TOKEN_IDS_NL[0, 4:] = [1, *[0] * 18]


def build(fields: dict[str, Any], dtype: Any) -> Network:
    config = T5Config.from_dict(fields, "text_encoder_3/config.json")
    return Network.build(lambda rngs: T5EncoderModel(config, dtype=dtype, rngs=rngs), config)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return with_random_vectors(transformers.T5EncoderModel(transformers.T5Config(**TINY)))


def arrays_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if name != "encoder.embed_tokens.weight"}


def test_outputs_and_gradients_in_double_precision(model: torch.nn.Module, x64: None) -> None:
    network = build(TINY, jnp.float64)
    params = our_params(network, arrays_of(model))
    assert len(params) == len(arrays_of(model))
    weights_NLD = np.random.default_rng(1).normal(size=(2, 23, 12))

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        last_hidden_NLD = network(params, jnp.asarray(TOKEN_IDS_NL)).last_hidden_NLD
        return (last_hidden_NLD * weights_NLD).sum(), last_hidden_NLD

    with double_transformers():
        theirs = model(torch.from_numpy(TOKEN_IDS_NL)).last_hidden_state
        (theirs * torch.from_numpy(weights_NLD)).sum().backward()
    gradients, ours = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert relative_error(ours, theirs.detach()) < 1e-9
    oracle = our_params(network, {name: p.grad for name, p in model.named_parameters()})
    assert max(relative_error(gradients[name], oracle[name]) for name in oracle) < 1e-8


def test_outputs_in_single_precision(model: torch.nn.Module) -> None:
    network = build(TINY, jnp.float32)
    ours = run(network, our_params(network, arrays_of(model)), jnp.asarray(TOKEN_IDS_NL)).last_hidden_NLD
    with double_transformers():
        theirs = model(torch.from_numpy(TOKEN_IDS_NL)).last_hidden_state
    assert ours.dtype == jnp.float32
    assert relative_error(ours, theirs.detach()) < 1e-5


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 19), (16, 64), (4, 2)])
def test_buckets_are_those_of_transformers(buckets: int, distance: int) -> None:
    positions = torch.arange(520)
    expected = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket(
        positions[None, :] - positions[:, None], num_buckets=buckets, max_distance=distance
    )
    np.testing.assert_array_equal(relative_buckets(520, buckets, distance), expected.numpy())


def test_names_and_shapes_of_the_full_size() -> None:
    with torch.device("meta"):
        theirs = arrays_of(transformers.T5EncoderModel(transformers.T5Config(**XXL)))
    specs = build(XXL, jnp.bfloat16).specs
    assert {torch_name(name): spec.torch_shape for name, spec in specs.items()} == {
        name: tuple(value.shape) for name, value in theirs.items()
    }
    assert sum(np.prod(spec.shape) for spec in specs.values()) == pytest.approx(4.762e9, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj = 'relu' is not supported, only 'gated-gelu'"),
        ({"model_type": "umt5"}, "model_type = 'umt5' is not supported, only 't5'"),
        ({"quantization_config": {"bits": 4}}, "unknown field quantization_config"),
        ({"relative_attention_num_buckets": 30}, "relative_attention_num_buckets = 30 .* multiple of 4"),
        ({"relative_attention_max_distance": 8}, ".* relative_attention_max_distance = 8 do not fit"),
    ],
)
def test_configs_that_compute_something_else_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"text_encoder_3/config.json: {message}"):
        build({**XXL, **change}, jnp.float32)


def test_a_config_that_states_no_feed_forward_is_the_first_version() -> None:
    with pytest.raises(ValueError, match="feed_forward_proj = 'relu' is not supported"):
        T5Config.from_dict({k: v for k, v in XXL.items() if k != "feed_forward_proj"}, "config.json")
