"""Z-Image's transformer matches diffusers' in PyTorch: outputs, gradients, adapters, names and shapes; and errors."""

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
from diffusers.models.transformers.transformer_z_image import RopeEmbedder, TimestepEmbedder

from dpo_jax.batch import Conditioning
from dpo_jax.models.execution import PLAIN, Execution
from dpo_jax.models.lora import LowRank, add_lora, find_targets
from dpo_jax.models.network import Network
from dpo_jax.models.z_image_transformer import ZImageTransformer2DModel, ZImageTransformerConfig
from dpo_jax.planning.program import Program
from dpo_jax.weights.layout import from_torch, torch_name

from .torch_parity import (
    FAST,
    double_diffusers,
    double_sinusoids,
    our_params,
    relative_error,
    with_random_vectors,
)

# The config.json of Z-Image and of Z-Image-Turbo.
PUBLISHED = {
    "_class_name": "ZImageTransformer2DModel",
    "_diffusers_version": "0.36.0.dev0",
    "all_f_patch_size": [1],
    "all_patch_size": [2],
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "cap_feat_dim": 2560,
    "dim": 3840,
    "in_channels": 16,
    "n_heads": 30,
    "n_kv_heads": 30,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "norm_eps": 1e-05,
    "qk_norm": True,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
}
TINY = {
    **PUBLISHED,
    "axes_dims": [4, 6, 6],
    "axes_lens": [80, 8, 8],
    "cap_feat_dim": 10,
    "dim": 32,
    "in_channels": 3,
    "n_heads": 2,
    "n_kv_heads": 2,
    "n_layers": 1,
    "n_refiner_layers": 1,
}
DEEP = {**TINY, "n_layers": 2}
TOKENS = [5, 33, 32]
"""Numbers of tokens of the captions: these are padded to 32, 64 and 32."""
N, L, C = 3, 40, 3


def build(config: dict[str, Any], dtype: Any, execution: Execution = PLAIN) -> Network:
    parsed = ZImageTransformerConfig.from_dict(config, "config.json")
    return Network.build(
        lambda rngs: ZImageTransformer2DModel(parsed, execution=execution, dtype=dtype, rngs=rngs), parsed
    )


@cache
def torch_model(n_layers: int = 1) -> diffusers.ZImageTransformer2DModel:
    torch.manual_seed(0)
    model = with_random_vectors(diffusers.ZImageTransformer2DModel.from_config({**TINY, "n_layers": n_layers}))
    for token in (model.x_pad_token, model.cap_pad_token):
        token.data += 0.3 * torch.randn_like(token)
    return model


@cache
def tiny(dtype: str) -> tuple[Network, Any]:
    """Return the network and the same as a compiled function, which tests share."""
    network = build(TINY, jnp.dtype(dtype))
    return network, jax.jit(lambda params, *inputs: network(params, *inputs), compiler_options=FAST)


def run(dtype: str, *inputs: Any) -> jax.Array:
    network, compiled = tiny(dtype)
    return compiled(our_params(network, torch_model().state_dict()), *inputs)


def make_inputs(height: int = 6, width: int = 10) -> tuple[np.ndarray, np.ndarray, Conditioning]:
    """Everything is float64. diffusers takes time from noise to image in 0..1, and it is exact in float32 here."""
    random = np.random.default_rng(0)
    is_token_NL = np.arange(L) < np.array(TOKENS)[:, None]
    conditioning = Conditioning(random.normal(size=(N, L, 10)), is_token_NL=is_token_NL)
    return random.normal(size=(N, height, width, C)), np.array([15.625, 937.5, 500.0]), conditioning


def run_torch(
    model: torch.nn.Module, x_NHWC: np.ndarray, t_N: np.ndarray, conditioning: Conditioning, dtype: torch.dtype
) -> torch.Tensor:
    """Run diffusers' model as its ZImagePipeline does."""
    assert conditioning.is_token_NL is not None
    x_NCFHW = torch.from_numpy(x_NHWC.transpose(0, 3, 1, 2)[:, :, None].copy()).to(dtype)
    captions = [
        torch.from_numpy(context_LD[is_token_L]).to(dtype)
        for context_LD, is_token_L in zip(conditioning.context_NLD, conditioning.is_token_NL, strict=True)
    ]
    time_N = torch.from_numpy((1000 - t_N) / 1000).to(dtype)
    results = model(list(x_NCFHW.unbind()), time_N, captions, return_dict=False)[0]
    return -torch.stack(results).squeeze(2).permute(0, 2, 3, 1)


@pytest.fixture
def double(x64: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both compute in float64 what diffusers computes in float32 whatever the model's dtype."""

    def rotations(dim: list[int], end: list[int], theta: float) -> list[torch.Tensor]:
        frequencies = [theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d) for d in dim]
        angles = [torch.outer(torch.arange(e).double(), f) for e, f in zip(end, frequencies, strict=True)]
        return [torch.polar(torch.ones_like(angle), angle) for angle in angles]

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(TimestepEmbedder, "timestep_embedding", staticmethod(double_sinusoids))
    monkeypatch.setattr(RopeEmbedder, "precompute_freqs_cis", staticmethod(rotations))
    for n_layers in (1, 2):  # models keep their table of rotations
        monkeypatch.setattr(torch_model(n_layers).rope_embedder, "freqs_cis", None)
    with double_diffusers():
        yield


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("height", "width"), [(6, 10), (16, 8)])
def test_prediction_equals_diffusers_in_float64(height: int, width: int) -> None:
    """The latents are not square; those of 16 x 8 cells are 32 tokens, which need no padding. Every caption gives the
    same alone and in a batch."""
    model, inputs = torch_model(), make_inputs(height, width)
    x_NHWC, t_N, conditioning = inputs
    with torch.no_grad():
        oracle = run_torch(model, *inputs, torch.float64)
        alone = [
            run_torch(model, x[None], t[None], Conditioning(context[None], is_token_NL=is_token[None]), torch.float64)
            for x, t, context, is_token in zip(
                x_NHWC, t_N, conditioning.context_NLD, conditioning.is_token_NL, strict=True
            )
        ]
    ours = run("float64", *inputs)
    assert ours.dtype == jnp.float64
    assert relative_error(ours, oracle) < 1e-9
    assert relative_error(ours, torch.cat(alone)) < 1e-9


@pytest.mark.usefixtures("double")
def test_prediction_without_a_mask_of_tokens() -> None:
    """All of the context is the caption, here 40 tokens, which are padded to 64."""
    x_NHWC, t_N, conditioning = make_inputs()
    with torch.no_grad():
        whole = conditioning._replace(is_token_NL=np.ones((N, L), bool))
        oracle = run_torch(torch_model(), x_NHWC, t_N, whole, torch.float64)
    assert relative_error(run("float64", x_NHWC, t_N, Conditioning(conditioning.context_NLD)), oracle) < 1e-9


@pytest.mark.usefixtures("x64")
def test_padding_may_be_anywhere_and_a_caption_may_be_absent() -> None:
    x_NHWC, t_N, conditioning = make_inputs()
    assert conditioning.is_token_NL is not None
    conditioning = conditioning._replace(is_token_NL=np.stack([*conditioning.is_token_NL[:2], np.zeros(L, bool)]))
    flipped = Conditioning(np.roll(conditioning.context_NLD, 7, axis=1))
    flipped = flipped._replace(is_token_NL=np.roll(conditioning.is_token_NL, 7, axis=1))
    one, other = (run("float64", x_NHWC, t_N, of) for of in (conditioning, flipped))
    assert relative_error(one, other) < 1e-12
    assert np.isfinite(one).all()


def test_prediction_equals_diffusers_in_float32() -> None:
    inputs = make_inputs()
    with torch.no_grad():
        oracle = run_torch(copy.deepcopy(torch_model()).float(), *inputs, torch.float32)
    assert relative_error(run("float32", *inputs), oracle) < 1e-5


def test_bfloat16_stays_near_and_rounded_weights_predict_the_same() -> None:
    """The policy's weights are float32 and the reference's bfloat16, and both start equal. They must match to the bit,
    because beta multiplies the difference of their predictions."""
    model, inputs = copy.deepcopy(torch_model()).float(), make_inputs()
    network, compiled = tiny("bfloat16")
    params = our_params(network, model.state_dict())
    rounded = {name: x.astype(jnp.bfloat16) for name, x in params.items()}
    with torch.no_grad():
        oracle = run_torch(model, *inputs, torch.float32)
    policy, reference = (compiled(weights, *inputs) for weights in (params, rounded))
    assert policy.dtype == jnp.bfloat16
    assert 1e-4 < relative_error(policy, oracle) < 0.03
    np.testing.assert_array_equal(policy, reference)


def weighted_sum(prediction_NHWC: Any) -> Any:
    """Return a number on which every element of the prediction has its own influence."""
    weight_NHWC = np.random.default_rng(1).normal(size=tuple(prediction_NHWC.shape))
    if isinstance(prediction_NHWC, torch.Tensor):
        return (prediction_NHWC * torch.from_numpy(weight_NHWC)).sum()
    return (prediction_NHWC * weight_NHWC).sum()


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    "execution", [pytest.param(PLAIN, marks=pytest.mark.slow), Execution("block", scan=True)], ids=str
)
def test_every_gradient_equals_diffusers(execution: Execution) -> None:
    """Also if blocks run as a loop and compute everything again in the backward pass."""
    model, network, inputs = copy.deepcopy(torch_model(2)), build(DEEP, jnp.float64, execution), make_inputs()
    weighted_sum(run_torch(model, *inputs, torch.float64)).backward()
    oracle = our_params(network, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    gradient = jax.jit(jax.grad(lambda params: weighted_sum(network(params, *inputs))), compiler_options=FAST)
    ours = gradient(our_params(network, model.state_dict()))
    assert all(np.linalg.norm(array) > 0 for array in oracle.values())
    assert max(relative_error(ours[name], oracle[name]) for name in network.specs) < 1e-8


LORA_TARGETS = r"attention\.(to_[qkv]|to_out\.0)$"


@pytest.mark.usefixtures("double")
def test_a_lora_equals_pefts() -> None:
    parsed = ZImageTransformerConfig.from_dict(TINY, "config.json")
    adapters = find_targets(tiny("float64")[0], LORA_TARGETS, rank=3, alpha=2.0)
    assert set(adapters.values()) == {LowRank(3, 2.0)}

    def make(rngs: Any) -> ZImageTransformer2DModel:
        module = ZImageTransformer2DModel(parsed, dtype=jnp.float64, rngs=rngs)
        add_lora(module, adapters, 0.0, rngs)
        return module

    config = peft.LoraConfig(
        r=3, lora_alpha=2.0, target_modules=rf".*({LORA_TARGETS})", init_lora_weights=False, lora_dropout=0.0
    )
    theirs = peft.get_peft_model(copy.deepcopy(torch_model()), config)
    weighted_sum(run_torch(theirs, *make_inputs(), torch.float64)).backward()
    state = {
        name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".default", ""): parameter
        for name, parameter in theirs.named_parameters()
    }
    network = Network.build(make, parsed)
    params = our_params(network, state)
    adapter = {name: value for name, value in params.items() if ".lora_" in name}
    assert len(adapter) == 2 * len(adapters) == 2 * 4 * 3
    gradient = jax.jit(
        jax.grad(lambda adapter: weighted_sum(network(params | adapter, *make_inputs()))), compiler_options=FAST
    )
    for name, ours in gradient(adapter).items():
        oracle = from_torch(state[torch_name(name)].grad.numpy(), network.specs[name])
        assert relative_error(ours, oracle) < 1e-8, name


def test_published_names_shapes_and_work() -> None:
    """The work is that of an image of 1024 x 1024 pixels and a caption of 512 tokens, as PyTorch's counter counts it
    for diffusers' model. Ours leaves out the last layer of the caption's tokens."""
    with torch.device("meta"):
        model = diffusers.ZImageTransformer2DModel.from_config(PUBLISHED)
    network = build(PUBLISHED, jnp.bfloat16, Execution(scan=True))
    ours = {torch_name(name): spec.torch_shape for name, spec in network.specs.items()}
    assert ours == {name: tuple(array.shape) for name, array in model.state_dict().items()}
    assert len(ours) == 521
    assert sum(map(math.prod, ours.values())) == 6_154_908_736
    read = network.config
    sizes = read.latent_channels, read.context_features, read.pooled_features, read.size_multiple, read.trained_cells
    assert sizes == (16, 2560, 0, 2, 128)

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    params = {name: array(*spec.shape) for name, spec in network.specs.items()}
    conditioning = Conditioning(array(1, 512, 2560), is_token_NL=jax.ShapeDtypeStruct((1, 512), bool))
    program = Program(jax.make_jaxpr(network)(params, array(1, 128, 128, 16), array(1), conditioning))
    assert program.flops() == pytest.approx(62.506e12, rel=1e-3)


def test_config_defaults_are_diffusers() -> None:
    with torch.device("meta"):
        defaults = dict(diffusers.ZImageTransformer2DModel(n_layers=1, n_refiner_layers=1).config)
    read = ZImageTransformerConfig.from_dict({"_class_name": "ZImageTransformer2DModel", **defaults}, "config.json")
    assert read == ZImageTransformerConfig(n_layers=1, n_refiner_layers=1)
    assert ZImageTransformerConfig.from_dict({}, "config.json") == ZImageTransformerConfig()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "Lumina2Transformer2DModel"}, "transformer/config.json: _class_name = 'Lumina2Transf"),
        ({"all_patch_size": [2, 4]}, r"transformer/config.json: all_patch_size = \[2, 4\] is not supported, only"),
        ({"all_f_patch_size": [2]}, r"all_f_patch_size = \[2\] is not supported"),
        ({"n_kv_heads": 1}, "n_kv_heads = 1 is not supported, only 2"),
        ({"qk_norm": False}, "qk_norm = False is not supported"),
        ({"siglip_feat_dim": 1152}, "siglip_feat_dim = 1152 is not supported, only None"),
        ({"n_heads": 3, "n_kv_heads": 3}, "dim = 32 does not divide into n_heads = 3"),
        ({"axes_dims": [4, 12]}, r"axes_dims = \[4, 12\] are not three even numbers .* dim / n_heads = 16"),
        ({"axes_dims": [4, 5, 7]}, r"axes_dims = \[4, 5, 7\] are not three even numbers"),
        ({"axes_dims": [4, 6, 8]}, r"axes_dims = \[4, 6, 8\] are not three even numbers"),
        ({"axes_lens": [80, 8]}, r"axes_lens = \[80, 8\] are not three numbers"),
        ({"n_layers": 0}, "n_layers"),
        ({"surprise": 1}, "transformer/config.json: unknown field surprise = 1"),
    ],
)
def test_config_errors_name_the_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZImageTransformerConfig.from_dict({**TINY, **change}, "transformer/config.json")


@pytest.mark.parametrize(
    ("shape", "caption", "message"),
    [
        ((N, 5, 6, C), (N, L, 10), "latents of 5 x 6 cells do not divide"),
        ((N, 4, 6, 4), (N, L, 10), "latents of 3 channels, not 4"),
        ((N, 4, 6, C), (N, L, 11), "captions of 10 features, not 11"),
        ((N, 4, 18, C), (N, L, 10), r"latents of 4 x 18 cells need axes_lens = \[66, 2, 9\], .* \[80, 8, 8\]"),
        ((N, 4, 6, C), (N, 65, 10), r"captions of 65 tokens .* need axes_lens = \[98, 2, 3\]"),
    ],
)
def test_latents_and_captions_must_fit(shape: tuple[int, ...], caption: tuple[int, ...], message: str) -> None:
    network, _ = tiny("float32")
    params = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in network.specs.items()}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda params: network(params, np.zeros(shape), np.zeros(N), Conditioning(np.zeros(caption))), params
        )
