"""LoRA files as other tools name and describe them: each is read as what it is, or refused in one sentence."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from dpo_jax.models.network import Network
from dpo_jax.models.random_model import RANDOM_MODELS
from dpo_jax.models.unet import UNet2DConditionModel
from dpo_jax.models.unet_config import UNetConfig
from dpo_jax.weights import lora_metadata, safetensors_file
from dpo_jax.weights.lora_files import Adapter, read_adapters, read_lora
from dpo_jax.weights.lora_write import write_kohya
from dpo_jax.weights.original_slots import layer_slots

TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TO_OUT = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
CONV = "down_blocks.0.resnets.0.conv1"
LAYERS = (TO_Q, TO_OUT, CONV)
FILE = "lora.safetensors"
K = "lora_adapter_metadata"

CONFIG = UNetConfig.from_dict(RANDOM_MODELS["sdxl"][1], "unet")
SPECS = Network.build(lambda rngs: UNet2DConditionModel(CONFIG, dtype="float32", rngs=rngs), CONFIG).specs
ORIGINAL = {layer: slot.tensor for layer, slot in layer_slots(SPECS).items()}


def save(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    header = {name: (array.shape, array.dtype) for name, array in tensors.items()}
    safetensors_file.write(epath.Path(path), tensors.items(), header, metadata, allow_nonfinite=True)


def matrices(layer: str, rank: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """A and B in PyTorch's axes."""
    random = np.random.default_rng(len(layer))
    spec = SPECS[f"{layer}.kernel"]
    outputs, inputs, *window = spec.torch_shape
    A = random.normal(size=(rank, inputs, *window)).astype(np.float32)
    return A, random.normal(size=(outputs, rank, *[1 for _ in window])).astype(np.float32)


def plain(layers: tuple[str, ...] = LAYERS) -> dict[str, np.ndarray]:
    return {
        f"unet.{layer}.lora_{part}.weight": array
        for layer in layers
        for part, array in zip("AB", matrices(layer), strict=True)
    }


def joined(layer: str) -> str:
    return layer.replace(".", "_")


def dotted(prefix: str, names: dict[str, str] | None = None) -> Callable[[str], str]:
    return lambda layer: prefix + (names or {}).get(layer, layer)


AB, DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
LAYOUTS = {
    "diffusers": (dotted("unet."), AB),
    "diffusers with adapter": (dotted("unet."), ("lora_A.default_0.weight", "lora_B.default_0.weight")),
    "old diffusers": (dotted("unet."), ("lora.down.weight", "lora.up.weight")),
    "peft": (dotted("base_model.model."), AB),
    "peft with adapter": (dotted("base_model.model."), ("lora_A.default.weight", "lora_B.default.weight")),
    "peft in unet": (dotted("unet.base_model.model."), AB),
    "OneTrainer": (dotted("unet.", ORIGINAL), DOWN_UP),
    "ComfyUI": (dotted("diffusion_model.", ORIGINAL), DOWN_UP),
    "ai-toolkit": (dotted("diffusion_model.", ORIGINAL), AB),
    "checkpoint": (dotted("model.diffusion_model.", ORIGINAL), DOWN_UP),
    "no prefix": (dotted(""), AB),
    "kohya": (lambda layer: f"lora_unet_{joined(ORIGINAL[layer])}", DOWN_UP),
    "kohya, diffusers' names": (lambda layer: f"lora_unet_{joined(layer)}", DOWN_UP),
    "LyCORIS": (lambda layer: f"lycoris_{joined(layer)}", DOWN_UP),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_lora(layout: str, tmp_path: Path) -> None:
    stem, parts = LAYOUTS[layout]
    tensors = {
        f"{stem(layer)}.{part}": array for layer in LAYERS for part, array in zip(parts, matrices(layer), strict=True)
    }
    tensors |= {f"{stem(layer)}.alpha": np.array(4, ml_dtypes.bfloat16) for layer in LAYERS}
    save(tmp_path / FILE, tensors)
    read = read_lora(tmp_path / FILE, SPECS)
    assert read.alphas == dict.fromkeys(sorted(LAYERS), 4.0)
    for layer in LAYERS:
        A, B = matrices(layer)
        axes = SPECS[f"{layer}.kernel"].torch_axes
        np.testing.assert_array_equal(read.params[f"{layer}.lora_A.kernel"].transpose(axes), A)
        np.testing.assert_array_equal(read.params[f"{layer}.lora_B.kernel"].transpose(axes), B)


@pytest.mark.parametrize(
    ("key", "owner"),
    [
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "text encoders"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha", "text encoders"),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", "text encoders"),
        ("te1.text_model.encoder.layers.0.mlp.fc1.lora_down.weight", "text encoders"),
        ("bundle_emb.token.clip_l_out", "embeddings"),
        ("emb_params", "embeddings"),
        ("clip_g", "embeddings"),
        ("lora_vae_decoder_conv_in.lora_down.weight", "the VAE"),
    ],
)
def test_what_is_not_for_the_unet_is_left_out_with_a_warning(
    key: str, owner: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    save(tmp_path / FILE, plain() | {key: np.ones((2, 2), np.float32)})
    for _ in range(2):
        assert read_lora(tmp_path / FILE, SPECS).alphas.keys() == set(LAYERS)
    assert capsys.readouterr().err.count(f"lora.safetensors: left out 1 layers for {owner}: ") == 1


@pytest.mark.parametrize(
    ("key", "owner"),
    [
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "text encoders"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "a transformer"),
        ("diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight", "a transformer"),
    ],
)
def test_nothing_for_the_unet(key: str, owner: str, tmp_path: Path) -> None:
    save(tmp_path / FILE, {key: np.ones((2, 2), np.float32)})
    with pytest.raises(ValueError, match=f"is not a LoRA for this UNet: it holds only 1 layers for {owner}"):
        read_lora(tmp_path / FILE, SPECS)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_must_be_finite(dtype: type, value: float, tmp_path: Path) -> None:
    tensors = {name: array.astype(dtype) for name, array in plain().items()}
    tensors[f"unet.{CONV}.lora_B.weight"][3, 1] = value
    save(tmp_path / FILE, tensors)
    with pytest.raises(ValueError, match=rf"lora.safetensors holds values that are not finite.*unet.{CONV}.lora_B"):
        read_lora(tmp_path / FILE, SPECS)


def test_alpha_must_be_finite_and_weights_floating_point(tmp_path: Path) -> None:
    save(tmp_path / FILE, plain() | {f"unet.{TO_Q}.alpha": np.array(np.nan, np.float32)})
    with pytest.raises(ValueError, match=rf"not finite .*unet.{TO_Q}.alpha"):
        read_lora(tmp_path / FILE, SPECS)
    save(tmp_path / FILE, {name: array.astype(np.int32) for name, array in plain().items()})
    with pytest.raises(ValueError, match=r"6 tensors that are not floating point: .*\(int32\)"):
        read_lora(tmp_path / FILE, SPECS)


def test_a_lora_of_rank_0(tmp_path: Path) -> None:
    save(tmp_path / FILE, {k: v[:0] if "lora_A" in k else v[:, :0] for k, v in plain((TO_Q,)).items()})
    with pytest.raises(ValueError, match=rf"1 misshapen: {TO_Q} \(of rank 0, so it has no weights\)"):
        read_lora(tmp_path / FILE, SPECS)


@pytest.mark.parametrize(
    ("metadata", "alphas"),
    [
        ({}, (2.0, 2.0)),
        ({"lora_alpha": "16", "r": "2"}, (16.0, 16.0)),
        ({"ss_network_alpha": "8.0"}, (8.0, 8.0)),
        ({"ss_network_alpha": "None"}, (2.0, 2.0)),
        ({"ss_network_alpha": "Dynamic"}, (2.0, 2.0)),
        ({K: json.dumps({"unet.lora_alpha": 6, "text_encoder.lora_alpha": 9, "unet.other": [1]})}, (6.0, 6.0)),
        ({K: json.dumps({"unet.lora_alpha": 6, "unet.alpha_pattern": {r"to_q|\w+\.conv9": 5}})}, (5.0, 6.0)),
        ({K: json.dumps({"unet.lora_alpha": 6, "unet.alpha_pattern": None}), "lora_alpha": "3"}, (6.0, 6.0)),
        ({K: json.dumps({"unet.r": 2, "unet.lora_alpha": 3, "unet.use_rslora": True})}, (3 * 2**0.5,) * 2),
    ],
)
def test_alpha_from_metadata(metadata: dict[str, str], alphas: tuple[float, float], tmp_path: Path) -> None:
    save(tmp_path / FILE, plain((TO_Q, CONV)), metadata)
    assert read_lora(tmp_path / FILE, SPECS).alphas == dict(zip((TO_Q, CONV), alphas, strict=True))


def test_tensors_of_alpha_come_before_what_is_said_of_all(tmp_path: Path) -> None:
    save(
        tmp_path / FILE,
        plain((TO_Q, CONV)) | {f"unet.{TO_Q}.alpha": np.array(1, np.float32)},
        {"ss_network_alpha": "x"},
    )
    assert read_lora(tmp_path / FILE, SPECS).alphas == {TO_Q: 1.0, CONV: 2.0}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({K: "[]"}, r"metadata lora_adapter_metadata: the whole: input should be a valid dictionary, not \[\]"),
        ({K: "{oops"}, "metadata lora_adapter_metadata is not valid JSON"),
        ({K: "[" * 100_000}, "nested too deeply"),
        ({K: json.dumps({"unet.lora_alpha": None})}, "lora_alpha: input should be a valid number, not None"),
        ({K: json.dumps({"unet.lora_alpha": "6"})}, "lora_alpha: input should be a valid number, not '6'"),
        ({K: '{"unet.lora_alpha": NaN}'}, "lora_alpha: input should be a finite number, not nan"),
        ({K: '{"unet.alpha_pattern": {"a": Infinity}}'}, "alpha_pattern.a: input should be a finite number, not inf"),
        ({K: json.dumps({"unet.alpha_pattern": {"(": 2}})}, r"alpha_pattern '\(' is not a regular expression"),
        ({K: json.dumps({"unet.alpha_pattern": [2]})}, r"alpha_pattern: input should be a valid dictionary"),
        ({K: json.dumps({"unet.alpha_pattern": {"a|" * 10_000: 2}})}, "pattern of alpha_pattern has 20,000 characters"),
        ({K: json.dumps({"unet.alpha_pattern": {f"a{i}": 2 for i in range(5001)}})}, "have at most 5000 items"),
        ({"lora_alpha": "much"}, "the metadata lora_alpha='much' is not a number"),
        ({"lora_alpha": "inf"}, "the metadata lora_alpha='inf' is not a number"),
    ],
)
def test_metadata_that_says_nothing(metadata: dict[str, str], message: str, tmp_path: Path) -> None:
    save(tmp_path / FILE, plain(), metadata)
    with pytest.raises(ValueError, match=f"lora.safetensors: the .*{message}|{message}") as error:
        read_lora(tmp_path / FILE, SPECS)
    assert str(error.value).startswith(str(tmp_path / FILE))


def test_config_beside_the_file_is_checked_as_well(tmp_path: Path) -> None:
    save(tmp_path / "adapter_model.safetensors", {f"base_model.model.{k[5:]}": v for k, v in plain().items()})
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": "x"}')
    with pytest.raises(ValueError, match=r"adapter_config.json: lora_alpha: input should be a valid number, not 'x'"):
        read_lora(tmp_path, SPECS)


@pytest.mark.parametrize("pattern", ["(x+x+)+y|(.|..|_|\\w)*!", "((((a?){9}){9}){9}){9}(.*.*.*.*.*.*.*)*$^"])
def test_a_pattern_of_a_stranger_does_not_hang(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_metadata, "SECONDS_TO_MATCH", 0.3)
    save(tmp_path / FILE, plain(), {K: json.dumps({"unet.alpha_pattern": {pattern: 2}})})
    start = time.monotonic()
    try:
        read_lora(tmp_path / FILE, SPECS)
    except ValueError as error:
        assert "takes longer than 0.3 seconds to match" in str(error)  # noqa: PT017
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("prefix", ["lora_te_", "lora_te1_", "text_encoder."])
def test_text_encoders_are_read_where_they_are_asked_for(prefix: str, tmp_path: Path) -> None:
    from dpo_jax.weights.layout import ParamSpec

    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    specs = {"unet": SPECS, "text_encoder": {f"{layer}.kernel": ParamSpec((4, 4), (1, 0))}}
    name = joined(layer) if prefix.endswith("_") else layer
    A, B = np.ones((2, 4), np.float32), np.ones((4, 2), np.float32)
    save(tmp_path / FILE, plain() | {f"{prefix}{name}.lora_down.weight": A, f"{prefix}{name}.lora_up.weight": B})
    found = read_adapters(tmp_path / FILE, specs)
    assert found["text_encoder"].alphas == {layer: 2.0}
    assert found["unet"].alphas.keys() == set(LAYERS)


def test_half_precision_that_overflows_is_not_written(tmp_path: Path) -> None:
    A, B = (array.T for array in matrices(TO_Q))
    adapter = Adapter({f"{TO_Q}.lora_A.kernel": A * 1e5, f"{TO_Q}.lora_B.kernel": B}, {TO_Q: 2.0})
    with pytest.raises(ValueError, match=r"lora_down.weight as float16 is not finite .* too large for this dtype"):
        write_kohya(tmp_path / FILE, adapter, SPECS, dtype=np.float16, original_names=True)
    write_kohya(tmp_path / FILE, adapter, SPECS, dtype=ml_dtypes.bfloat16, original_names=True)
