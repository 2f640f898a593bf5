"""FLUX.1's transformer matches diffusers' in PyTorch: outputs, gradients, names and shapes; and its config's errors."""

import copy
import inspect
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from diffusers.loaders import single_file_utils
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from etils import epath
from safetensors.torch import load_file

from dpo_jax.batch import Conditioning
from dpo_jax.models.execution import PLAIN, Execution
from dpo_jax.models.flux_transformer import FluxTransformer2DModel, FluxTransformerConfig, make_rotary
from dpo_jax.models.lora import LowRank, add_lora, find_targets
from dpo_jax.models.network import Network
from dpo_jax.planning.program import Program
from dpo_jax.weights import original
from dpo_jax.weights.io import load_params
from dpo_jax.weights.layout import from_torch, torch_name

from .torch_parity import FAST, double_diffusers, our_params, relative_error, run, with_random_vectors

# The config.json of FLUX.1-dev; that of schnell differs in guidance_embeds.
PUBLISHED = {
    "_class_name": "FluxTransformer2DModel",
    "_diffusers_version": "0.30.0.dev0",
    "_name_or_path": "../checkpoints/flux-dev/transformer",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
NARROWED = {
    "attention_head_dim": 16,
    "axes_dims_rope": [4, 6, 6],
    "in_channels": 12,
    "joint_attention_dim": 10,
    "num_attention_heads": 2,
    "pooled_projection_dim": 6,
}
TINY = {
    "dev": {**PUBLISHED, **NARROWED, "num_layers": 2, "num_single_layers": 2},
    "schnell": {**PUBLISHED, **NARROWED, "guidance_embeds": False, "num_layers": 1, "num_single_layers": 1},
}
N, L, C = 2, 5, 3


def build(config: dict[str, Any], dtype: Any, execution: Execution = PLAIN) -> Network:
    parsed = FluxTransformerConfig.from_dict(config, "config.json")
    return Network.build(
        lambda rngs: FluxTransformer2DModel(parsed, execution=execution, dtype=dtype, rngs=rngs), parsed
    )


@cache
def torch_model(variant: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return with_random_vectors(diffusers.FluxTransformer2DModel.from_config(TINY[variant]))


def make_inputs(height: int = 4, width: int = 6) -> tuple[np.ndarray, np.ndarray, Conditioning]:
    """Everything is float64. diffusers takes thousandths of these timesteps, and they return unchanged in float32."""
    random = np.random.default_rng(0)
    conditioning = Conditioning(
        random.normal(size=(N, L, 10)), random.normal(size=(N, 6)), guidance_N=np.array([3.5, 1.0])
    )
    return random.normal(size=(N, height, width, C)), np.array([15.625, 937.5]), conditioning


def run_torch(
    model: torch.nn.Module, x_NHWC: np.ndarray, t_N: np.ndarray, conditioning: Conditioning, dtype: torch.dtype
) -> torch.Tensor:
    """Run diffusers' model as its FluxPipeline does."""
    x_NCHW, context, pooled, guidance, sigma = (
        torch.from_numpy(array).to(dtype)
        for array in (
            x_NHWC.transpose(0, 3, 1, 2).copy(),
            conditioning.context_NLD,
            conditioning.pooled_NP,
            conditioning.guidance_N,
            t_N / 1000,
        )
    )
    _, _, height, width = x_NCHW.shape
    result = model(
        FluxPipeline._pack_latents(x_NCHW, N, C, height, width),
        context,
        pooled,
        sigma,
        FluxPipeline._prepare_latent_image_ids(N, height // 2, width // 2, "cpu", dtype),
        torch.zeros(L, 3, dtype=dtype),
        guidance if model.config.guidance_embeds else None,
    ).sample
    return FluxPipeline._unpack_latents(result, 8 * height, 8 * width, 8).permute(0, 2, 3, 1)


@pytest.fixture
def double(x64: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Float64 everywhere, also in diffusers' rotary embedding, which asks for float32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    with double_diffusers():
        yield


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("variant", TINY)
def test_prediction_equals_diffusers_in_float64(variant: str) -> None:
    """The latents are not square and the guidance differs by image, so no axis or example can take another's place."""
    model, network, inputs = torch_model(variant), build(TINY[variant], jnp.float64), make_inputs()
    with torch.no_grad():
        oracle = run_torch(model, *inputs, torch.float64)
    ours = run(network, our_params(network, model.state_dict()), *inputs)
    assert ours.dtype == jnp.float64
    assert relative_error(ours, oracle) < 1e-9


@pytest.mark.parametrize("variant", TINY)
def test_prediction_equals_diffusers_in_float32(variant: str) -> None:
    model, network, inputs = torch_model(variant), build(TINY[variant], jnp.float32), make_inputs()
    with torch.no_grad():
        oracle = run_torch(copy.deepcopy(model).float(), *inputs, torch.float32)
    ours = run(network, our_params(network, model.state_dict()), *inputs)
    assert relative_error(ours, oracle) < 1e-5


def test_bfloat16_stays_near_and_rounded_weights_predict_the_same() -> None:
    """The policy's weights are float32 and the reference's bfloat16, and both start equal. They must match to the bit,
    because beta multiplies the difference of their predictions."""
    model, network, inputs = torch_model("dev"), build(TINY["dev"], jnp.bfloat16), make_inputs()
    params = our_params(network, copy.deepcopy(model).float().state_dict())
    rounded = {name: x.astype(jnp.bfloat16) for name, x in params.items()}
    with torch.no_grad():
        oracle = run_torch(model, *inputs, torch.float64)
    policy, reference = (run(network, weights, *inputs) for weights in (params, rounded))
    assert policy.dtype == jnp.bfloat16
    assert 1e-4 < relative_error(policy, oracle) < 0.03
    np.testing.assert_array_equal(policy, reference)


def test_rotary_tables_are_those_of_diffusers() -> None:
    rows, columns, axes = 64, 60, (16, 56, 56)
    ids = torch.cat([torch.zeros(L, 3), FluxPipeline._prepare_latent_image_ids(1, rows, columns, "cpu", torch.float32)])
    for ours, oracle in zip(
        make_rotary(L, rows, columns, axes, jnp.float32), FluxPosEmbed(10_000, axes)(ids), strict=True
    ):
        np.testing.assert_allclose(ours.repeat(2, axis=-1), oracle.numpy(), rtol=0, atol=6e-8)


def weighted_sum(prediction_NHWC: Any) -> Any:
    """Return a number on which every element of the prediction has its own influence."""
    weight_NHWC = np.random.default_rng(1).normal(size=tuple(prediction_NHWC.shape))
    if isinstance(prediction_NHWC, torch.Tensor):
        return (prediction_NHWC * torch.from_numpy(weight_NHWC)).sum()
    return (prediction_NHWC * weight_NHWC).sum()


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("variant", "execution"), [("schnell", Execution()), ("dev", Execution("block", scan=True))], ids=str
)
def test_every_gradient_equals_diffusers(variant: str, execution: Execution) -> None:
    """Also if blocks run as a loop and compute everything again in the backward pass."""
    model, network, inputs = (
        copy.deepcopy(torch_model(variant)),
        build(TINY[variant], jnp.float64, execution),
        make_inputs(),
    )
    weighted_sum(run_torch(model, *inputs, torch.float64)).backward()
    oracle = our_params(network, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    gradient = jax.jit(jax.grad(lambda params: weighted_sum(network(params, *inputs))), compiler_options=FAST)
    ours = gradient(our_params(network, model.state_dict()))
    assert all(np.linalg.norm(array) > 0 for array in oracle.values())
    assert max(relative_error(ours[name], oracle[name]) for name in network.specs) < 1e-8


def test_in_a_loop_blocks_of_a_kind_are_traced_once() -> None:
    def products(scan: bool) -> int:
        network = build(TINY["dev"], jnp.float32, Execution(scan=scan))
        params = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in network.specs.items()}
        return str(jax.make_jaxpr(lambda params: network(params, *make_inputs()))(params)).count("dot_general")

    outside = 3 * 2 + 4  # embeddings of two layers each; tokens in, caption in, modulation at the end, tokens out
    assert products(False) - outside == 2 * (products(True) - outside)


LORA_TARGETS = (
    r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$|single_transformer_blocks.*\.(proj_mlp|proj_out)$"
)


@pytest.mark.usefixtures("double")
def test_a_lora_equals_pefts() -> None:
    """On the attention of both kinds of blocks and on the other projections of single blocks."""
    parsed = FluxTransformerConfig.from_dict(TINY["schnell"], "config.json")
    base = build(TINY["schnell"], jnp.float64)
    adapters = find_targets(base, LORA_TARGETS, rank=3, alpha=2.0)
    assert set(adapters.values()) == {LowRank(3, 2.0)}

    def make(rngs: Any) -> FluxTransformer2DModel:
        module = FluxTransformer2DModel(parsed, dtype=jnp.float64, rngs=rngs)
        add_lora(module, adapters, 0.0, rngs)
        return module

    config = peft.LoraConfig(
        r=3, lora_alpha=2.0, target_modules=rf".*({LORA_TARGETS})", init_lora_weights=False, lora_dropout=0.0
    )
    theirs = peft.get_peft_model(copy.deepcopy(torch_model("schnell")), config)
    weighted_sum(run_torch(theirs, *make_inputs(), torch.float64)).backward()
    state = {
        name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".default", ""): parameter
        for name, parameter in theirs.named_parameters()
    }
    network = Network.build(make, parsed)
    params = our_params(network, state)
    adapter = {name: value for name, value in params.items() if ".lora_" in name}
    assert len(adapter) == 2 * len(adapters) == 2 * (8 + 5)
    gradient = jax.jit(
        jax.grad(lambda adapter: weighted_sum(network(params | adapter, *make_inputs()))), compiler_options=FAST
    )
    for name, ours in gradient(adapter).items():
        oracle = from_torch(state[torch_name(name)].grad.numpy(), network.specs[name])
        assert relative_error(ours, oracle) < 1e-8, name


@pytest.mark.parametrize(
    ("guidance_embeds", "count", "size", "caption", "teraflops"),
    [
        (True, 1160, 11_901_408_320, 512, 74.38),
        pytest.param(False, 1156, 11_891_178_560, 256, 69.47, marks=pytest.mark.slow),
    ],
    ids=["dev", "schnell"],
)
def test_published_names_shapes_and_work(
    guidance_embeds: bool, count: int, size: int, caption: int, teraflops: float
) -> None:
    """The work is that of an image of 1024 x 1024 pixels, as PyTorch's counter counts it for diffusers' model."""
    config = {**PUBLISHED, "guidance_embeds": guidance_embeds}
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel.from_config(config)
    network = build(config, jnp.bfloat16, Execution(scan=True))
    ours = {torch_name(name): spec.torch_shape for name, spec in network.specs.items()}
    assert ours == {name: tuple(array.shape) for name, array in model.state_dict().items()}
    assert len(ours) == count
    assert sum(map(math.prod, ours.values())) == size
    read = network.config
    sizes = read.latent_channels, read.context_features, read.pooled_features, read.size_multiple, read.trained_cells
    assert sizes == (16, 4096, 768, 2, 128)

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    params = {name: array(*spec.shape) for name, spec in network.specs.items()}
    conditioning = Conditioning(array(1, caption, 4096), array(1, 768), guidance_N=array(1))
    program = Program(jax.make_jaxpr(network)(params, array(1, 128, 128, 16), array(1), conditioning))
    assert program.flops() == pytest.approx(teraflops * 1e12, rel=1e-3)


def test_original_file_is_what_diffusers_converts(tmp_path: Path) -> None:
    """A file in Black Forest Labs' layout holds exactly diffusers' weights, and is the same when written again."""
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert "inner_dim = 3072" in source
    namespace = dict(vars(single_file_utils))
    exec(source.replace("inner_dim = 3072", "inner_dim = 32"), namespace)
    network, state = build(TINY["dev"], jnp.float32), copy.deepcopy(torch_model("dev")).float().state_dict()
    first, again = (epath.Path(tmp_path / name) for name in ("first.safetensors", "again.safetensors"))
    original.write(first, {"": (our_params(network, state), network.specs)}, dtype=None)
    converted = namespace["convert_flux_transformer_checkpoint_to_diffusers"](load_file(first))
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in state.items())
    read = load_params(first, network.specs, dtype="float32", prefix="model.diffusion_model.")
    original.write(again, {"": (read, network.specs)}, dtype=None)
    assert again.read_bytes() == first.read_bytes()


def test_config_defaults_are_diffusers() -> None:
    with torch.device("meta"):
        defaults = dict(diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1).config)
    read = FluxTransformerConfig.from_dict({"_class_name": "FluxTransformer2DModel", **defaults}, "config.json")
    assert read == FluxTransformerConfig(num_layers=1, num_single_layers=1)
    assert FluxTransformerConfig.from_dict({}, "config.json") == FluxTransformerConfig()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"_class_name": "Flux2Transformer2DModel"},
            "transformer/config.json: _class_name = 'Flux2Transformer2DModel'",
        ),
        ({"patch_size": 2}, "transformer/config.json: patch_size = 2 is not supported, only 1"),
        ({"in_channels": 384, "out_channels": 64}, "out_channels = 64 is not supported, only None or 384"),
        ({"in_channels": 6}, "in_channels = 6 is not a multiple of 4"),
        (
            {"axes_dims_rope": [4, 6]},
            r"axes_dims_rope = \[4, 6\] are not three even numbers .* attention_head_dim = 16",
        ),
        ({"axes_dims_rope": [4, 5, 7]}, r"axes_dims_rope = \[4, 5, 7\] are not three even numbers"),
        ({"axes_dims_rope": [4, 6, 8]}, r"axes_dims_rope = \[4, 6, 8\] are not three even numbers"),
        ({"guidance_embeds": "yes"}, "guidance_embeds: input should be a valid boolean"),
        ({"num_layers": 0}, "num_layers"),
        ({"surprise": 1}, "transformer/config.json: unknown field surprise = 1"),
    ],
)
def test_config_errors_name_the_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FluxTransformerConfig.from_dict({**TINY["dev"], **change}, "transformer/config.json")


@pytest.mark.parametrize(
    ("shape", "change", "message"),
    [
        ((4, 6, C), {"pooled_NP": None}, "this FLUX transformer takes pooled captions of 6 features, not 0"),
        ((4, 6, C), {"guidance_N": None}, "guidance_embeds = true, but its conditioning has no guidance_N"),
        ((4, 6, C), {"context_NLD": np.zeros((N, L, 11))}, "takes captions of 10 features, not 11"),
        ((5, 6, C), {}, "latents of 5 x 6 cells do not divide into patches of 2 x 2"),
        ((4, 6, 4), {}, "takes latents of 3 channels, not 4"),
    ],
)
def test_inputs_must_fit(shape: tuple[int, ...], change: dict[str, Any], message: str) -> None:
    network = build(TINY["dev"], jnp.float32)
    params = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in network.specs.items()}
    _, t_N, conditioning = make_inputs()
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(network, params, np.zeros((N, *shape)), t_N, conditioning._replace(**change))
