"""LoRA matches PyTorch's peft in outputs, gradients and initial values; and properties that the trainer relies on."""

import re
from functools import cache

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx

from dpo_jax.batch import Conditioning
from dpo_jax.errors import UserError
from dpo_jax.models import random_model
from dpo_jax.models.families import FAMILIES
from dpo_jax.models.layers import Conv, Linear
from dpo_jax.models.lora import LowRank, add_lora, find_targets, init_lora, is_lora
from dpo_jax.models.network import network_of
from dpo_jax.models.pipeline import Pipeline, load_pipeline
from dpo_jax.models.random_model import write_random_model
from dpo_jax.planning.program import Program
from dpo_jax.weights.layout import from_torch, torch_name

ATTENTION = r"attn[12]\.(to_q|to_k|to_v|to_out\.0)$"
EVERY_KIND = (
    r"attn1\.to_q$|resnets\.0\.conv1$|conv_shortcut$|downsamplers\.0\.conv$|ff\.net\.2$|proj_in$|time_emb_proj$"
)
RANK, ALPHA = 3, 2.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "sd15"
    write_random_model("sd15", folder)
    return str(folder)


@cache
def opened(folder: str, dtype: str, pattern: str, dropout: float = 0.0) -> Pipeline:
    pipeline = load_pipeline(folder, dtype=dtype)
    return pipeline.with_lora(find_targets(pipeline.denoiser, pattern, rank=RANK, alpha=ALPHA), dropout)


def inputs(dtype: str) -> tuple[jax.Array, jax.Array, Conditioning]:
    random = np.random.default_rng(0)
    x_NHWC, context_NLD = random.normal(size=(2, 8, 8, 4)), random.normal(size=(2, 5, 32))
    return jnp.asarray(x_NHWC, dtype), jnp.asarray([10, 900]), Conditioning(jnp.asarray(context_NLD, dtype))


@pytest.mark.parametrize(
    ("family", "config", "layer"),
    [
        ("sd15", random_model.UNET, "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"),
        ("sd3", random_model.SD3, "transformer_blocks.0.attn.to_q"),
        ("flux", random_model.FLUX, "transformer_blocks.0.attn.to_q"),
        ("z_image", random_model.Z_IMAGE, "layers.0.attention.to_q"),
    ],
)
def test_targets_that_match_nothing_are_answered_with_those_of_attention(family, config, layer) -> None:
    kind = FAMILIES[family].denoiser
    denoiser = network_of(kind.module, kind.config.from_dict(config, family), dtype=jnp.float32)
    with pytest.raises(UserError, match="match no layer of the model, whose layers have names such as") as error:
        find_targets(denoiser, "to_z", rank=4, alpha=4.0)
    example, advised = re.findall(r"names such as (\S+)\. Set lora.targets .* such as '(.*)'$", str(error.value))[0]
    assert f"{example}.kernel" in denoiser.specs
    assert {example, layer} <= find_targets(denoiser, advised, rank=4, alpha=4.0).keys()


def test_outputs_and_gradients_are_those_of_peft(folder: str, x64: None) -> None:
    pipeline = opened(folder, "float64", EVERY_KIND)
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet").double()
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=rf".*({EVERY_KIND})", init_lora_weights=False, lora_dropout=0.0
    )
    theirs = peft.get_peft_model(unet, config)
    state = {name.removeprefix("base_model.model."): p for name, p in theirs.named_parameters() if "lora_" in name}
    specs = pipeline.trained_specs
    ours = {
        name: jnp.asarray(from_torch(state[torch_name(name).replace(".weight", ".default.weight")].detach().numpy(), s))
        for name, s in specs.items()
    }
    assert len(ours) == len(state) > 20
    base = pipeline.load("unet", dtype=jnp.float64)
    x_NHWC, t_N, conditioning = inputs("float64")
    t_N = jnp.zeros_like(t_N)  # diffusers' sinusoids, which are float32 even here, are exact at 0

    def total(adapter: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        prediction = pipeline.denoise(base | adapter, x_NHWC, t_N, conditioning)
        return (prediction**2).sum(), prediction

    (_, ours_NHWC), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(ours)
    theirs_NCHW = theirs(
        torch.tensor(np.asarray(x_NHWC)).permute(0, 3, 1, 2),
        torch.tensor(np.asarray(t_N)),
        torch.tensor(np.asarray(conditioning.context_NLD)),
    ).sample
    theirs_NCHW.square().sum().backward()
    np.testing.assert_allclose(ours_NHWC, theirs_NCHW.permute(0, 2, 3, 1).detach(), rtol=1e-9, atol=1e-9)
    for name, grad in grads.items():
        gradient = state[torch_name(name).replace(".weight", ".default.weight")].grad
        np.testing.assert_allclose(grad, from_torch(gradient.numpy(), specs[name]), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("dtype", "pattern"),
    [
        pytest.param("float32", ATTENTION, marks=pytest.mark.slow),
        ("bfloat16", ATTENTION),
        pytest.param("bfloat16", EVERY_KIND, marks=pytest.mark.slow),
    ],
)
def test_a_fresh_adapter_changes_nothing_at_all(folder: str, dtype: str, pattern: str) -> None:
    pipeline = opened(folder, dtype, pattern)
    base = pipeline.load("unet", dtype=dtype)
    fresh = init_lora(pipeline.trained_specs, 0, "kaiming")
    both = jax.jit(lambda adapter: [pipeline.denoise(params, *inputs(dtype)) for params in (base | adapter, base)])
    with_it, without = both(fresh)
    assert np.array_equal(with_it, without)
    with_more, _ = both({name: value + 0.1 for name, value in fresh.items()})
    assert not np.array_equal(with_more, without)


@pytest.mark.parametrize("make", [Linear, Conv])
@pytest.mark.parametrize("size", [1e-5, 1e-4])
def test_what_a_new_adapter_adds_survives_bfloat16(make: type[Linear | Conv], size: float) -> None:
    """This holds on average over outputs, although it is less than half of the last bit that bfloat16 keeps of each."""
    random, width = np.random.default_rng(0), 64
    layer = make(width, width, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    add_lora(nnx.List([layer]), {"0": LowRank(8, 8)}, 0.0, nnx.Rngs(1))
    x_NHWC = jnp.asarray(random.normal(size=(16, 32, 32, width)), jnp.bfloat16)
    B = random.choice([-size, size], layer.lora_B.kernel.shape)

    def output(B: np.ndarray) -> np.ndarray:
        layer.lora_B.kernel[...] = jnp.asarray(B, jnp.bfloat16)
        return np.asarray(jax.jit(lambda x: layer(x))(x_NHWC), np.float64)

    expected = np.asarray(layer.lora_A(x_NHWC), np.float64) @ B.reshape(8, width)
    added = output(B) - output(0 * B)
    assert expected.std() < 2**-9 * np.median(np.abs(output(0 * B)))
    assert (added * expected).sum() == pytest.approx((expected**2).sum(), rel=0.05)


@pytest.mark.parametrize(("initializer", "pefts"), [("kaiming", True), ("gaussian", "gaussian")])
def test_initial_values_are_distributed_as_pefts(folder: str, initializer: str, pefts: bool | str) -> None:
    pipeline = load_pipeline(folder, dtype="float32")
    pipeline = pipeline.with_lora(find_targets(pipeline.denoiser, EVERY_KIND, rank=16, alpha=16))
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    torch.manual_seed(0)
    unet.add_adapter(peft.LoraConfig(r=16, target_modules=rf".*({EVERY_KIND})", init_lora_weights=pefts))
    theirs = {name.replace(".default.", "."): p.detach().numpy() for name, p in unet.named_parameters()}
    ours = init_lora(pipeline.trained_specs, 0, initializer)
    assert len(ours) > 20
    for name, value in ours.items():
        expected = theirs[torch_name(name)]
        if ".lora_B." in name:
            assert not value.any()
            assert not expected.any()
            continue
        fan_in = value.size // 16
        std = 1 / 16 if initializer == "gaussian" else (3 * fan_in) ** -0.5
        for drawn in (np.asarray(value), expected):
            assert drawn.std() == pytest.approx(std, rel=4 / drawn.size**0.5), name
            assert abs(drawn.mean()) < 4 * std / drawn.size**0.5, name
            kurtosis = (drawn**4).mean() / drawn.std() ** 4  # 3 for a normal distribution, 1.8 for a uniform one
            assert (kurtosis > 2.4) == (initializer == "gaussian"), name
    other = init_lora(pipeline.trained_specs, 1, initializer)
    assert not np.array_equal(next(iter(ours.values())), next(iter(other.values())))


def test_dropout_zeroes_its_share_and_keeps_the_mean(folder: str) -> None:
    pipeline = opened(folder, "float32", r"mid_block.*attn2\.to_v$", dropout=0.25)
    base = pipeline.load("unet", dtype="float32")
    adapter = {name: jnp.full(s.shape, 0.02) for name, s in pipeline.trained_specs.items()}
    x_NHWC, t_N, conditioning = jax.tree.map(lambda x: jnp.repeat(x[:1], 48, axis=0), inputs("float32"))
    keys_N = jax.random.split(jax.random.key(0), 48)
    both = jax.jit(
        lambda keys_N: [pipeline.denoise(base | adapter, x_NHWC, t_N, conditioning, *keys) for keys in ((), (keys_N,))]
    )
    plain, dropped = both(keys_N)
    # A late linear layer: small changes of its output reach the end almost linearly.
    spread = dropped.std(axis=0)
    assert spread.max() > 1e-5
    error = np.abs(dropped.mean(axis=0) - plain[0]) / (spread / 48**0.5 + 1e-9)
    assert np.median(error) < 2
    # Each example of the output depends only on its own key.
    _, turned_round = both(keys_N[::-1])
    np.testing.assert_allclose(turned_round[::-1], dropped, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("pattern", "rank", "message"),
    [
        ("to_qq", 4, r"'to_qq' match no layer of the model, whose layers have names such as down_blocks"),
        ("attn(", 4, r"'attn\(' are not a regular expression"),
        ("attn1", 0, "a LoRA of rank 0 has no weights"),
    ],
)
def test_targets_that_cannot_be(folder: str, pattern: str, rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_targets(load_pipeline(folder, dtype="float32").denoiser, pattern, rank=rank, alpha=1.0)


def test_products_of_the_derivative_read_bfloat16(folder: str) -> None:
    """Products of float32, as the sums are, would take several times as long."""
    pipeline = opened(folder, "bfloat16", EVERY_KIND)
    params = {name: jnp.zeros(spec.shape, jnp.bfloat16) for name, spec in pipeline.adapted_denoiser.specs.items()}
    traced = jax.make_jaxpr(jax.grad(lambda p: pipeline.denoise(p, *inputs("bfloat16")).astype(jnp.float32).sum()))
    adapted = {spec.shape for name, spec in pipeline.trained_specs.items() if is_lora(name)}
    program = Program(traced(params))
    read = [
        {program.avals[variable].dtype.name for variable in operation.inputs}
        for operation in program.operations
        if operation.name in ("dot_general", "conv_general_dilated")
        and adapted & {program.avals[variable].shape for variable in operation.inputs}
    ]
    assert len(read) > 2 * len(pipeline.adapters)
    assert all(dtypes == {"bfloat16"} for dtypes in read)
