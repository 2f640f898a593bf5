"""The UNet matches diffusers' in PyTorch: outputs, gradients, names and shapes; and the errors of its config."""

import copy
import json
import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dpo_jax.batch import Conditioning
from dpo_jax.models.families import PUBLISHED
from dpo_jax.models.network import Network
from dpo_jax.models.random_model import UNET_SDXL
from dpo_jax.models.time_embedding import sinusoids
from dpo_jax.models.unet import UNet2DConditionModel
from dpo_jax.models.unet_config import UNetConfig
from dpo_jax.weights.layout import torch_name

from .torch_parity import FAST, double_diffusers, our_params, relative_error, run, with_random_vectors

# As published, and the same with fewer channels: at least two per group; heads and depths differ by level as published.
PUBLISHED = {path.parts[-3]: json.loads(path.read_text()) for path in sorted(PUBLISHED.glob("*/unet/config.json"))}
THREE_LEVELS = {"block_out_channels": [8, 16, 24], "norm_num_groups": 4, "cross_attention_dim": 10}
FOUR_LEVELS = {"block_out_channels": [8, 16, 24, 24], "norm_num_groups": 4, "cross_attention_dim": 10}
ADDED = {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 + 6 * 4}
NARROWED: dict[str, dict[str, Any]] = {
    "sd15": {**FOUR_LEVELS, "attention_head_dim": 4, "layers_per_block": 1},
    "sd21": {**FOUR_LEVELS, "attention_head_dim": [1, 2, 3, 3], "layers_per_block": 1},
    "sdxl": {**THREE_LEVELS, **ADDED, "attention_head_dim": [1, 2, 4], "transformer_layers_per_block": [1, 1, 2]},
    "sdxl_turbo": {
        **THREE_LEVELS,
        **ADDED,
        "attention_head_dim": [1, 2, 4],
        "layers_per_block": 1,
        "transformer_layers_per_block": [1, 2, 1],
    },
    "sdxl_refiner": {
        **FOUR_LEVELS,
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 + 5 * 4,
        "attention_head_dim": [1, 2, 3, 3],
        "layers_per_block": 1,
        "transformer_layers_per_block": [1, 1, 2, 2],
    },
}
TIME_IDS = {
    "sdxl": [96, 64, 8, 0, 1024, 768],
    "sdxl_turbo": [512, 768, 0, 0, 512, 512],
    "sdxl_refiner": [64, 64, 0, 0, 6],
}

N, L, P = 2, 5, 6


def tiny_config(family: str) -> dict[str, Any]:
    return {**PUBLISHED[family], **NARROWED[family]}


def build(config: dict[str, Any], dtype: Any) -> Network:
    parsed = UNetConfig.from_dict(config, "config.json")
    return Network.build(lambda rngs: UNet2DConditionModel(parsed, dtype=dtype, rngs=rngs), parsed)


@cache
def torch_unet(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return with_random_vectors(diffusers.UNet2DConditionModel.from_config(tiny_config(family)))


def make_inputs(family: str, height: int = 8, width: int = 16) -> tuple[np.ndarray, np.ndarray, Conditioning]:
    """Everything is float64; one example is early and one is late in diffusion."""
    random = np.random.default_rng(0)
    x_NHWC, context_NLD = random.normal(size=(N, height, width, 4)), random.normal(size=(N, L, 10))
    t_N = np.array([3, 981], np.int32)
    if family not in TIME_IDS:
        return x_NHWC, t_N, Conditioning(context_NLD)
    time_ids_NT = np.array([TIME_IDS[family], np.roll(TIME_IDS[family], 1)], np.float64)
    return x_NHWC, t_N, Conditioning(context_NLD, random.normal(size=(N, P)), time_ids_NT)


def run_torch(
    model: torch.nn.Module, x_NHWC: np.ndarray, t_N: np.ndarray, conditioning: Conditioning, dtype: torch.dtype
) -> torch.Tensor:
    x_NCHW, context, *added = (
        torch.from_numpy(array).to(dtype)
        for array in (x_NHWC.transpose(0, 3, 1, 2), *conditioning)
        if array is not None
    )
    kwargs = {"added_cond_kwargs": dict(zip(("text_embeds", "time_ids"), added, strict=True))} if added else {}
    return model(x_NCHW, torch.from_numpy(t_N), context, **kwargs).sample.permute(0, 2, 3, 1)


@pytest.fixture
def double_torch() -> Iterator[None]:
    with double_diffusers():
        yield


@pytest.mark.usefixtures("x64", "double_torch")
@pytest.mark.parametrize("family", NARROWED)
def test_prediction_equals_diffusers_in_float64(family: str) -> None:
    model, network, inputs = torch_unet(family), build(tiny_config(family), jnp.float64), make_inputs(family)
    with torch.no_grad():
        oracle = run_torch(model, *inputs, torch.float64)
    ours = run(network, our_params(network, model.state_dict()), *inputs)
    assert ours.dtype == jnp.float64
    assert relative_error(ours, oracle) < 1e-9


@pytest.mark.parametrize(
    "family", [f if f in ("sd15", "sdxl") else pytest.param(f, marks=pytest.mark.slow) for f in NARROWED]
)
def test_prediction_equals_diffusers_in_float32(family: str) -> None:
    model, network, inputs = torch_unet(family), build(tiny_config(family), jnp.float32), make_inputs(family)
    with torch.no_grad():
        oracle = run_torch(copy.deepcopy(model).float(), *inputs, torch.float32)
    ours = run(network, our_params(network, model.state_dict()), *inputs)
    assert relative_error(ours, oracle) < 1e-5


def test_bfloat16_stays_near() -> None:
    """About 30 consecutive roundings of 2^-9 give an error of 1%; float32 parameters are cast where they are used."""
    model, network = torch_unet("sdxl_turbo"), build(tiny_config("sdxl_turbo"), jnp.bfloat16)
    inputs = make_inputs("sdxl_turbo")
    with torch.no_grad():
        oracle = run_torch(model, *inputs, torch.float64)
    ours = run(network, our_params(network, model.state_dict()), *inputs)
    assert ours.dtype == jnp.bfloat16
    assert 1e-4 < relative_error(ours, oracle) < 0.03


@pytest.mark.usefixtures("x64", "double_torch")
def test_latents_of_odd_size() -> None:
    """The way up must meet the sizes of the way down: 7 -> 4 -> 2 -> 4 -> 7."""
    model, network = torch_unet("sdxl_turbo"), build(tiny_config("sdxl_turbo"), jnp.float64)
    inputs = make_inputs("sdxl_turbo", 7, 10)
    with torch.no_grad():
        oracle = run_torch(model, *inputs, torch.float64)
    assert relative_error(run(network, our_params(network, model.state_dict()), *inputs), oracle) < 1e-9


@pytest.mark.usefixtures("x64", "double_torch")
def test_every_gradient_equals_diffusers() -> None:
    model, network = copy.deepcopy(torch_unet("sdxl_turbo")), build(tiny_config("sdxl_turbo"), jnp.float64)
    inputs = make_inputs("sdxl_turbo")
    weight_NHWC = np.random.default_rng(1).normal(size=inputs[0].shape)

    (run_torch(model, *inputs, torch.float64) * torch.from_numpy(weight_NHWC)).sum().backward()
    oracle = our_params(network, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    gradient = jax.jit(jax.grad(lambda params: (network(params, *inputs) * weight_NHWC).sum()), compiler_options=FAST)
    ours = gradient(our_params(network, model.state_dict()))

    assert all(np.linalg.norm(array) > 0 for array in oracle.values())
    assert max(relative_error(ours[name], oracle[name]) for name in network.specs) < 1e-8


@pytest.mark.parametrize("features", [256, 320, 384])
def test_sinusoids_round_as_diffusers_do(features: int) -> None:
    t = np.array([*range(1000), 1024, 2048, 4096])
    oracle = diffusers.models.embeddings.get_timestep_embedding(
        torch.from_numpy(t), features, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    error = np.abs(sinusoids(jnp.asarray(t), features, jnp.float32) - oracle.numpy())
    # PyTorch's float32 exp is off by one rounding for about 1% of the frequencies, and large t multiplies this.
    assert error.max() < 3e-4
    assert (error < 1e-6).mean() > 0.98


@pytest.mark.parametrize(
    ("family", "count", "size"),
    [
        ("sd15", 686, 859_520_964),
        ("sd21", 686, 865_910_724),
        ("sdxl", 1680, 2_567_463_684),
        ("sdxl_turbo", 1680, 2_567_463_684),
        ("sdxl_refiner", 1220, 2_259_526_660),
    ],
)
def test_published_names_and_shapes(family: str, count: int, size: int) -> None:
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel.from_config(PUBLISHED[family])
    network = build(PUBLISHED[family], jnp.bfloat16)
    ours = {torch_name(name): spec.torch_shape for name, spec in network.specs.items()}
    assert ours == {name: tuple(array.shape) for name, array in model.state_dict().items()}
    assert len(ours) == count
    assert sum(map(math.prod, ours.values())) == size


def test_config_defaults_are_diffusers() -> None:
    defaults = dict(diffusers.UNet2DConditionModel(block_out_channels=(32,) * 4, cross_attention_dim=8).config)
    read = UNetConfig.from_dict(defaults, "config.json")
    assert read == UNetConfig(block_out_channels=(32,) * 4, cross_attention_dim=(8,) * 4)
    assert UNetConfig.from_dict({}, "config.json") == UNetConfig()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time_cond_proj_dim": 256}, "unet/config.json: time_cond_proj_dim = 256 is not supported"),
        ({"act_fn": "gelu"}, "unet/config.json: act_fn = 'gelu' is not supported"),
        ({"only_cross_attention": [True, False, False]}, "only_cross_attention = .*True.* is not supported"),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type = 'UNetMidBlock2D' is not supported"),
        ({"num_attention_heads": 8}, "num_attention_heads = 8 is not supported"),
        ({"surprise": 1}, "unet/config.json: unknown field surprise = 1"),
        ({"attention_head_dim": [1, 2]}, r"attention_head_dim = \(1, 2\) does not fit the 3 levels"),
        ({"attention_head_dim": [3, 2, 4]}, "do not divide into attention_head_dim"),
        ({"norm_num_groups": 5}, "do not divide into norm_num_groups = 5"),
        (
            {"transformer_layers_per_block": [1, [1, 2], 1]},
            r"transformer_layers_per_block.1: input should be a valid integer, not \[1, 2\]",
        ),
        ({"down_block_types": ["DownBlock2D"] * 2 + ["AttnDownBlock2D"]}, "'AttnDownBlock2D' in down_block_types"),
        ({"addition_embed_type": "image"}, "addition_embed_type = 'image' is not supported"),
        ({"addition_embed_type": None}, "projection_class_embeddings_input_dim = 30 needs addition_embed_type"),
        ({"addition_time_embed_dim": None}, "'text_time' needs addition_time_embed_dim"),
    ],
)
def test_config_errors_name_the_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNetConfig.from_dict({**tiny_config("sdxl"), **change}, "unet/config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pooled_NP": None}, "no pooled_NP"),
        ({"time_ids_NT": None}, "no time_ids_NT"),
        ({"time_ids_NT": np.zeros((N, 5))}, r"6 pooled \+ 5 time ids \* 4 = 26"),
        ({"context_NLD": np.zeros((N, L, 11))}, "cross_attention_dim = .*10.* 11 features"),
    ],
)
def test_conditioning_must_fit(change: dict[str, Any], message: str) -> None:
    network = build(tiny_config("sdxl_turbo"), jnp.float32)
    params = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in network.specs.items()}
    x_NHWC, t_N, conditioning = make_inputs("sdxl_turbo")
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda params: network(params, x_NHWC, t_N, conditioning._replace(**change)), params)


def test_weights_rounded_before_or_where_they_are_used_make_the_same() -> None:
    """The policy's weights are float32 and the reference's bfloat16, and both start equal. They must match to the bit,
    because beta multiplies the difference of their predictions."""
    config = UNetConfig.from_dict(UNET_SDXL, "config.json")
    unet = Network.build(lambda rngs: UNet2DConditionModel(config, dtype=jnp.bfloat16, rngs=rngs), config)
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    params = {name: 0.1 * normal(*spec.shape) + ("scale" in name) for name, spec in unet.specs.items()}
    rounded = {name: x.astype(jnp.bfloat16) for name, x in params.items()}
    conditioning = Conditioning(normal(2, 5, 80), normal(2, 40), jnp.ones((2, 6)))
    inputs = normal(2, 16, 16, 4), jnp.array([3, 900]), conditioning
    policy, reference = (jax.jit(unet)(weights, *inputs) for weights in (params, rounded))
    assert np.isfinite(policy).all()
    np.testing.assert_array_equal(policy, reference)
