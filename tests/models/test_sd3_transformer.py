"""The SD3 transformer matches diffusers' in PyTorch: outputs, gradients, adapters, names and shapes."""

import copy
import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from dpo_jax.batch import Conditioning
from dpo_jax.models.execution import PLAIN, Execution
from dpo_jax.models.lora import Adapters, add_lora, find_targets
from dpo_jax.models.network import Network
from dpo_jax.models.sd3_transformer import SD3Transformer2DModel, SD3TransformerConfig, position_table
from dpo_jax.weights.layout import torch_name

from .torch_parity import FAST, double_diffusers, our_params, relative_error, run, with_random_vectors

MEDIUM: dict[str, Any] = {
    "_class_name": "SD3Transformer2DModel",
    "_diffusers_version": "0.32.0",
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "dual_attention_layers": [],
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "qk_norm": None,
    "sample_size": 128,
}
LARGE = {"caption_projection_dim": 2432, "num_attention_heads": 38, "num_layers": 38, "qk_norm": "rms_norm"}
PUBLISHED = {
    "sd3_medium": MEDIUM,
    "sd35_medium": {**MEDIUM, "dual_attention_layers": [*range(13)], "pos_embed_max_size": 384, "qk_norm": "rms_norm"},
    "sd35_large": {**MEDIUM, **LARGE},
}
# The same with fewer features and layers. Layers 0 and 1 are alike, and so are 2 and 3; the last one is always special.
NARROW = {
    "attention_head_dim": 8,
    "caption_projection_dim": 24,
    "in_channels": 4,
    "joint_attention_dim": 10,
    "num_attention_heads": 3,
    "num_layers": 5,
    "out_channels": 4,
    "pooled_projection_dim": 6,
    "pos_embed_max_size": 7,
    "sample_size": 8,
}
TINY = {
    "sd3_medium": {**PUBLISHED["sd3_medium"], **NARROW, "num_layers": 2},
    "sd35_medium": {**PUBLISHED["sd35_medium"], **NARROW, "dual_attention_layers": [0, 1]},
}
LORA = r"\battn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$"
RANK, ALPHA = 3, 2.0
N, L = 2, 5


def build(
    config: dict[str, Any], dtype: Any, execution: Execution = PLAIN, adapters: Adapters | None = None
) -> Network:
    parsed = SD3TransformerConfig.from_dict(config, "config.json")

    def make(rngs: Any) -> SD3Transformer2DModel:
        module = SD3Transformer2DModel(parsed, execution=execution, dtype=dtype, rngs=rngs)
        add_lora(module, adapters or {}, 0.0, rngs)
        return module

    return Network.build(make, parsed)


@cache
def torch_model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return with_random_vectors(diffusers.SD3Transformer2DModel.from_config(TINY[name]))


def make_inputs(height: int = 6, width: int = 10) -> tuple[np.ndarray, np.ndarray, Conditioning]:
    """Everything is float64; one example is early and one is late in diffusion."""
    random = np.random.default_rng(0)
    x_NHWC, context_NLD = random.normal(size=(N, height, width, 4)), random.normal(size=(N, L, 10))
    return x_NHWC, np.array([8.9, 981.25]), Conditioning(context_NLD, random.normal(size=(N, 6)))


def run_torch(
    model: torch.nn.Module, x_NHWC: np.ndarray, t_N: np.ndarray, conditioning: Conditioning, dtype: torch.dtype
) -> torch.Tensor:
    x_NCHW, context, pooled = (
        torch.from_numpy(array).to(dtype)
        for array in (x_NHWC.transpose(0, 3, 1, 2), conditioning.context_NLD, conditioning.pooled_NP)
    )
    return model(x_NCHW, context, pooled, torch.from_numpy(t_N)).sample.permute(0, 2, 3, 1)


@pytest.fixture
def double(x64: None) -> Iterator[None]:
    with double_diffusers():
        yield


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", TINY)
def test_prediction_equals_diffusers_in_float64(name: str) -> None:
    model, network, inputs = torch_model(name), build(TINY[name], jnp.float64), make_inputs()
    with torch.no_grad():
        oracle = run_torch(model, *inputs, torch.float64)
    ours = run(network, our_params(network, model.state_dict()), *inputs)
    assert ours.dtype == jnp.float64
    assert relative_error(ours, oracle) < 1e-9


def test_prediction_equals_diffusers_in_float32() -> None:
    model, network, inputs = torch_model("sd35_medium"), build(TINY["sd35_medium"], jnp.float32), make_inputs()
    with torch.no_grad():
        oracle = run_torch(copy.deepcopy(model).float(), *inputs, torch.float32)
    assert relative_error(run(network, our_params(network, model.state_dict()), *inputs), oracle) < 1e-5


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("execution", [PLAIN, Execution("block", scan=True)], ids=str)
def test_every_gradient_equals_diffusers(execution: Execution) -> None:
    model, network = copy.deepcopy(torch_model("sd35_medium")), build(TINY["sd35_medium"], jnp.float64, execution)
    inputs = make_inputs()
    weight_NHWC = np.random.default_rng(1).normal(size=inputs[0].shape)

    (run_torch(model, *inputs, torch.float64) * torch.from_numpy(weight_NHWC)).sum().backward()
    # The table of positions is a buffer in PyTorch, which has no gradient.
    trained = {name: spec for name, spec in network.specs.items() if spec.is_trainable}
    assert network.specs.keys() - trained.keys() == {"pos_embed.pos_embed"}
    oracle = {torch_name(name): p.grad for name, p in model.named_parameters()}
    assert set(map(torch_name, trained)) == set(oracle)
    gradient = jax.jit(jax.grad(lambda params: (network(params, *inputs) * weight_NHWC).sum()), compiler_options=FAST)
    ours = gradient(our_params(network, model.state_dict()))

    oracle = our_params(Network(network.graphdef, trained, None), oracle)
    # Nothing reads what captions attend to in the last block.
    last = "transformer_blocks.4.attn"
    unused = {f"{last}.{name}" for name in ("add_q_proj.kernel", "add_q_proj.bias", "norm_added_q.scale")}
    assert {name for name in trained if not np.any(oracle[name])} == unused
    assert not any(np.any(ours[name]) for name in unused)
    assert max(relative_error(ours[name], oracle[name]) for name in trained.keys() - unused) < 1e-8


def test_equal_blocks_are_traced_once_in_a_loop() -> None:
    def products(scan: bool) -> int:
        network = build(TINY["sd35_medium"], jnp.float32, Execution(scan=scan))
        return str(jax.make_jaxpr(network)(shapes(network), *make_inputs())).count("dot_general")

    dual, plain, last, rest = 8 + 4 + 4 + 2 + 4, 8 + 2 + 2 + 4, 7 + 2 + 2 + 2, 7
    assert products(False) == 2 * dual + 2 * plain + last + rest
    assert products(True) == dual + plain + last + rest


def shapes(network: Network) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in network.specs.items()}


def test_weights_rounded_before_or_where_they_are_used_make_the_same() -> None:
    """The policy's weights are float32 and the reference's bfloat16, and both start equal, to the bit."""
    model, network, inputs = torch_model("sd35_medium"), build(TINY["sd35_medium"], jnp.bfloat16), make_inputs()
    params = {name: x.astype(jnp.float32) for name, x in our_params(network, model.state_dict()).items()}
    rounded = {name: x.astype(jnp.bfloat16) for name, x in params.items()}
    policy, reference = (jax.jit(network)(weights, *inputs) for weights in (params, rounded))
    assert policy.dtype == jnp.bfloat16
    np.testing.assert_array_equal(policy, reference)
    with torch.no_grad():
        assert 1e-4 < relative_error(policy, run_torch(model, *inputs, torch.float64)) < 0.03


@pytest.mark.usefixtures("double")
def test_adapters_equal_peft() -> None:
    model = copy.deepcopy(torch_model("sd35_medium"))
    adapters = find_targets(build(TINY["sd35_medium"], jnp.float64), LORA, rank=RANK, alpha=ALPHA)
    assert len(adapters) == 5 * 8 - 1  # the last block has no to_add_out
    network, inputs = build(TINY["sd35_medium"], jnp.float64, Execution(scan=True), adapters), make_inputs()
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=f".*{LORA}", init_lora_weights=False)
    theirs = peft.get_peft_model(model, config)
    with torch.no_grad():
        oracle = run_torch(theirs, *inputs, torch.float64)
        without = run_torch(torch_model("sd35_medium"), *inputs, torch.float64)
    state = {
        name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".default", ""): value
        for name, value in theirs.state_dict().items()
    }
    assert relative_error(oracle, without) > 1e-3
    assert relative_error(run(network, our_params(network, state), *inputs), oracle) < 1e-9


@pytest.mark.parametrize(
    ("name", "count", "size"),
    [("sd3_medium", 682, 2_028_328_000), ("sd35_medium", 908, 2_243_171_520), ("sd35_large", 1226, 8_056_627_520)],
)
def test_published_names_and_shapes(name: str, count: int, size: int) -> None:
    with torch.device("meta"):
        model = diffusers.SD3Transformer2DModel.from_config(PUBLISHED[name])
    network = build(PUBLISHED[name], jnp.bfloat16)
    ours = {torch_name(name): spec.torch_shape for name, spec in network.specs.items()}
    assert ours == {name: tuple(array.shape) for name, array in model.state_dict().items()}
    trained = [spec.torch_shape for spec in network.specs.values() if spec.is_trainable]
    assert len(trained) == count == len(ours) - 1
    assert sum(map(math.prod, trained)) == size


@pytest.mark.usefixtures("x64")
def test_table_of_positions_is_that_of_diffusers() -> None:
    model = diffusers.SD3Transformer2DModel.from_config(TINY["sd35_medium"])
    np.testing.assert_allclose(
        position_table(7, 4, 24).reshape(1, -1, 24), model.pos_embed.pos_embed.numpy(), rtol=0, atol=1e-6
    )


def test_config_defaults_are_diffusers() -> None:
    with torch.device("meta"):
        defaults = dict(diffusers.SD3Transformer2DModel(num_layers=1, joint_attention_dim=8).config)
    read = SD3TransformerConfig.from_dict(defaults, "config.json")
    assert read == SD3TransformerConfig(num_layers=1, joint_attention_dim=8)


def test_config_tells_what_the_denoiser_takes() -> None:
    config = SD3TransformerConfig.from_dict(PUBLISHED["sd35_medium"], "config.json")
    assert (config.latent_channels, config.context_features, config.pooled_features) == (16, 4096, 2048)
    assert (config.size_multiple, config.trained_cells, config.features) == (2, 128, 1536)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qk_norm": "layer_norm"}, "config.json: qk_norm = 'layer_norm' is not supported, only None or 'rms_norm'"),
        ({"surprise": 1}, "config.json: unknown field surprise = 1"),
        ({"caption_projection_dim": 32}, r"caption_projection_dim = 32 differs from .* 3 \* 8 = 24"),
        (
            {"num_attention_heads": 3, "attention_head_dim": 6, "caption_projection_dim": 18},
            "num_attention_heads . attention_head_dim = 18 is not a multiple of 4",
        ),
        ({"out_channels": 8}, "out_channels = 8 is not supported, only in_channels = 4"),
        ({"dual_attention_layers": [0, "all"]}, "dual_attention_layers.1"),
        ({"num_layers": 0}, "num_layers"),
    ],
)
def test_config_errors_name_the_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SD3TransformerConfig.from_dict({**TINY["sd35_medium"], **change}, "transformer/config.json")


@pytest.mark.parametrize(
    ("size", "change", "message"),
    [
        ((6, 10), {"pooled_NP": None}, "takes pooled captions of 6 features, not 0"),
        ((6, 10), {"pooled_NP": np.zeros((N, 7))}, "takes pooled captions of 6 features, not 7"),
        ((6, 10), {"context_NLD": np.zeros((N, L, 11))}, "takes captions of 10 features, not 11"),
        ((6, 9), {}, "latents of 6 x 9 cells do not divide into patches of 2 x 2"),
        ((6, 16), {}, "6 x 16 cells make 3 x 8 patches, but this model has pos_embed_max_size = 7"),
    ],
)
def test_inputs_must_fit(size: tuple[int, int], change: dict[str, Any], message: str) -> None:
    network = build(TINY["sd3_medium"], jnp.float32)
    x_NHWC, t_N, conditioning = make_inputs(*size)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda params: network(params, x_NHWC, t_N, conditioning._replace(**change)), shapes(network))
