"""DoRA, LoHa, LoKr and full differences: merged as PEFT merges them, and as LyCORIS defines them."""

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from etils import epath
from peft import LoHaConfig, LoKrConfig, LoraConfig

from dpo_jax.models.network import Network
from dpo_jax.models.random_model import RANDOM_MODELS, random_params
from dpo_jax.models.unet import UNet2DConditionModel
from dpo_jax.models.unet_config import UNetConfig
from dpo_jax.weights import safetensors_file
from dpo_jax.weights.layout import to_torch
from dpo_jax.weights.lora_files import Merged, read_adapters, read_lora

TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"
NORM = "mid_block.attentions.0.norm"
FILE = "lora.safetensors"

CONFIG = UNetConfig.from_dict(RANDOM_MODELS["sd15"][1], "unet")
SPECS = Network.build(lambda rngs: UNet2DConditionModel(CONFIG, dtype="float32", rngs=rngs), CONFIG).specs
NAMES = [f"{TO_Q}.kernel", f"{CONV}.kernel", f"{CONV}.bias", f"{NORM}.scale", f"{NORM}.bias"]
BASE = random_params({name: SPECS[name] for name in NAMES}, seed=0)


class Layers(torch.nn.Module):
    """The two layers that are adapted, with the model's weights."""

    def __init__(self) -> None:
        super().__init__()
        linear, conv = (to_torch(np.array(BASE[f"{layer}.kernel"]), SPECS[f"{layer}.kernel"]) for layer in (TO_Q, CONV))
        self.linear = torch.nn.Linear(linear.shape[1], linear.shape[0], bias=False)
        self.conv = torch.nn.Conv2d(conv.shape[1], conv.shape[0], conv.shape[2], padding=1)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor(np.ascontiguousarray(linear)))
            self.conv.weight.copy_(torch.tensor(np.ascontiguousarray(conv)))


def save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header = {name: (array.shape, array.dtype) for name, array in tensors.items()}
    safetensors_file.write(epath.Path(path), tensors.items(), header)


def merged(path: Path, strength: float = 1.0) -> dict[str, np.ndarray]:
    adapter = read_adapters(path, {"unet": SPECS})["unet"]
    found = Merged(BASE, adapter, strength)
    return {name: to_torch(np.asarray(found[name]), SPECS[name]) for name in NAMES}


def torch_base(name: str) -> np.ndarray:
    return to_torch(np.array(BASE[name]), SPECS[name])


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=["linear", "conv"], init_lora_weights=False),
        LoHaConfig(r=3, alpha=5, target_modules=["linear", "conv"], init_weights=False),
        LoHaConfig(r=3, alpha=5, target_modules=["linear", "conv"], init_weights=False, use_effective_conv2d=True),
        LoKrConfig(r=1, alpha=5, target_modules=["linear", "conv"], init_weights=False),
        LoKrConfig(
            r=1, alpha=5, target_modules=["linear", "conv"], init_weights=False, decompose_both=True,
            use_effective_conv2d=True,
        ),
        LoKrConfig(r=64, alpha=5, target_modules=["linear", "conv"], init_weights=False),
    ],
    ids=["DoRA", "LoHa", "LoHa, Tucker", "LoKr", "LoKr of four", "LoKr, full"],
)  # fmt: skip
def test_merges_as_peft_does(config: peft.PeftConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(Layers(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + torch.rand_like(parameter))
    tensors = {}
    names = {"linear": TO_Q, "conv": CONV}
    for key, value in peft.get_peft_model_state_dict(model).items():
        layer, _, part = key.removeprefix("base_model.model.").partition(".")
        tensors[f"lora_unet_{names[layer].replace('.', '_')}.{part}"] = value.numpy().copy()
    is_full = isinstance(config, LoKrConfig) and config.r == 64
    if not is_full:  # PEFT divides by the rank even where no product has one
        tensors |= {f"lora_unet_{name.replace('.', '_')}.alpha": np.array(5, np.float32) for name in names.values()}
    save(tmp_path / FILE, tensors)
    model.merge_adapter()
    scale = config.r / config.alpha if is_full else 1
    for layer, name in names.items():
        expected = getattr(model.base_model.model, layer).base_layer.weight.detach().numpy()
        base = torch_base(f"{name}.kernel")
        expected = base + (expected - base) * scale
        actual = merged(tmp_path / FILE)[f"{name}.kernel"]
        assert not np.allclose(actual, base, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
        half = merged(tmp_path / FILE, 0.5)[f"{name}.kernel"]
        np.testing.assert_allclose(half, (base + expected) / 2, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"\(2 weights\), which can be merged into a model but not trained"):
        read_lora(tmp_path / FILE, SPECS)


def test_dora_along_inputs(tmp_path: Path) -> None:
    """LyCORIS' scales, also of (1, inputs): they replace the norms of columns."""
    random = np.random.default_rng(0)
    W = torch_base(f"{TO_Q}.kernel")
    outputs, inputs = W.shape
    A, B = random.normal(size=(2, inputs)).astype(np.float32), random.normal(size=(outputs, 2)).astype(np.float32)
    changed = W + 0.5 * B @ A
    stem = f"lora_unet_{TO_Q.replace('.', '_')}"
    for axis, shape in ((0, (1, inputs)), (1, (outputs, 1))):
        scales = random.uniform(1, 2, shape).astype(np.float32)
        tensors = {f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B, f"{stem}.dora_scale": scales}
        save(tmp_path / FILE, tensors | {f"{stem}.alpha": np.array(1, np.float32)})
        expected = scales * changed / np.linalg.norm(changed, axis=axis, keepdims=True)
        np.testing.assert_allclose(merged(tmp_path / FILE)[f"{TO_Q}.kernel"], expected, rtol=1e-5, atol=1e-6)


def test_tucker_lora_is_a_lora(tmp_path: Path) -> None:
    """LoCon: a 1x1 convolution down, one of the window's size in between, and a 1x1 convolution up."""
    random = np.random.default_rng(0)
    W = torch_base(f"{CONV}.kernel")
    outputs, inputs, *_ = W.shape
    down = random.normal(size=(3, inputs, 1, 1)).astype(np.float32)
    mid = random.normal(size=(3, 3, 3, 3)).astype(np.float32)
    up = random.normal(size=(outputs, 3, 1, 1)).astype(np.float32)
    stem = f"lora_unet_{CONV.replace('.', '_')}"
    arrays = {"lora_down": down, "lora_mid": mid, "lora_up": up}
    save(tmp_path / FILE, {f"{stem}.{part}.weight": array for part, array in arrays.items()})
    image = torch.tensor(random.normal(size=(1, inputs, 5, 5)).astype(np.float32))
    conv = torch.nn.functional.conv2d
    through = conv(conv(conv(image, torch.tensor(down)), torch.tensor(mid), padding=1), torch.tensor(up))
    difference = merged(tmp_path / FILE)[f"{CONV}.kernel"] - W
    np.testing.assert_allclose(
        conv(image, torch.tensor(np.ascontiguousarray(difference)), padding=1), through, rtol=1e-3, atol=1e-3
    )
    assert read_lora(tmp_path / FILE, SPECS).alphas == {CONV: 3.0}


def test_full_differences_of_weights_biases_and_norms(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    parts = {f"{CONV}.kernel": "diff", f"{CONV}.bias": "diff_b", f"{NORM}.scale": "w_norm", f"{NORM}.bias": "b_norm"}
    tensors, expected = {}, {}
    for name, part in parts.items():
        layer = name.rpartition(".")[0].replace(".", "_")
        difference = random.normal(size=torch_base(name).shape).astype(np.float32)
        tensors[f"lora_unet_{layer}.{part}"] = difference
        expected[name] = torch_base(name) + 0.5 * difference
    save(tmp_path / FILE, tensors)
    found = merged(tmp_path / FILE, 0.5)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"hada_w1_a": (32, 2), "hada_w1_b": (2, 32)}, "hada_w2_a is missing"),
        ({"hada_w1_a": (32, 2), "hada_w1_b": (3, 32), "hada_w2_a": (32, 2), "hada_w2_b": (2, 32)}, "are stored as"),
        ({"lokr_w1": (4, 4), "lokr_w2": (8, 9)}, r"LoKr of shape \(32, 36\), the model needs \(32, 32\)"),
        ({"lokr_w1": (4,), "lokr_w2": (8, 8)}, r"lokr_w1 is stored as \(4,\)"),
        ({"lokr_w1": (4, 4), "lokr_w2_a": (8, 0), "lokr_w2_b": (0, 8)}, "of rank 0"),
        ({"diff": (32, 31)}, r"full difference of shape \(32, 31\)"),
        ({"diff_b": (32,)}, "the model has no .*to_q.bias"),
        ({"lora_down.weight": (2, 32), "lora_up.weight": (32, 2), "dora_scale": (31, 1)}, "DoRA with 31 magnitudes"),
        ({"dora_scale": (32, 1)}, r"1 incomplete: .*\(only dora_scale\)"),
        (
            {"lora_down.weight": (2, 32), "lora_up.weight": (32, 2), "lora_mid.weight": (3, 3, 1, 1)},
            r"lora_mid \(3, 3, 1, 1\) and lora_down \(2, 32\) do not fit",
        ),
    ],
)
def test_what_does_not_fit_is_told(arrays: dict[str, tuple[int, ...]], reason: str, tmp_path: Path) -> None:
    stem = f"lora_unet_{TO_Q.replace('.', '_')}"
    save(tmp_path / FILE, {f"{stem}.{part}": np.ones(shape, np.float32) for part, shape in arrays.items()})
    with pytest.raises(ValueError, match=rf"is not a LoRA for this UNet: .*{reason}"):
        read_adapters(tmp_path / FILE, {"unet": SPECS})
