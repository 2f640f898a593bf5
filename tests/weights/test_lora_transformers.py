"""LoRA files of flow transformers against PyTorch diffusers and peft: both must add the same to every layer."""

import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusion3Pipeline, ZImagePipeline
from etils import epath
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dpo_jax.weights import original
from dpo_jax.weights.layout import Specs, to_torch
from dpo_jax.weights.lora_files import Adapter, Merged, read_adapters, read_lora
from dpo_jax.weights.lora_layouts import original_layers
from dpo_jax.weights.lora_write import write_kohya, write_peft
from tests.weights.torch_transformers import CONVERTERS, full_size_shapes, specs_of, tiny

FILE = "pytorch_lora_weights.safetensors"
PIPELINES = {"sd3": StableDiffusion3Pipeline, "flux": FluxPipeline, "z_image": ZImagePipeline}
SPECS = {name: specs_of({key: tensor.shape for key, tensor in tiny(name).state_dict().items()}) for name in PIPELINES}
FLUX = specs_of(full_size_shapes("flux_dev"))
FLUX_LAYERS = [
    "norm_out.linear",
    *(f"transformer_blocks.18.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_v_proj")),
    *(f"single_transformer_blocks.37.{name}" for name in ("attn.to_q", "attn.to_v", "proj_mlp", "proj_out")),
]
"""Layers of FLUX.1 at full size, whose widths diffusers' converter has as constants."""


def layers_of(specs: Specs) -> list[str]:
    return [
        name.removesuffix(".kernel")
        for name, spec in specs.items()
        if name.endswith(".kernel") and len(spec.shape) == 2
    ]


def random_adapter(specs: Specs, layers: list[str], dtype: type = np.float32) -> Adapter:
    """Ranks 1 to 3 and alphas 0.5, 1 and 2 in turn."""
    random = np.random.default_rng(0)
    params = {}
    for number, layer in enumerate(layers):
        inputs, outputs = specs[f"{layer}.kernel"].shape
        rank = 1 + number % 3
        params[f"{layer}.lora_A.kernel"] = random.normal(size=(inputs, rank)).astype(dtype)
        params[f"{layer}.lora_B.kernel"] = random.normal(size=(rank, outputs)).astype(dtype)
    return Adapter(params, {layer: 2.0 ** (number % 3 - 1) for number, layer in enumerate(layers)})


def probed(adapter: Adapter) -> dict[str, np.ndarray]:
    """What the adapter's layers add to a random input."""
    found = {}
    for layer, alpha in adapter.alphas.items():
        A, B = (np.asarray(adapter.params[f"{layer}.lora_{part}.kernel"], np.float64) for part in "AB")
        found[layer] = alpha / A.shape[1] * (np.random.default_rng(1).normal(size=len(A)) @ A @ B)
    return found


def probed_state(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The same for a state dict of diffusers, in which alpha is the rank."""
    found = {}
    for name, A in state.items():
        if name.endswith(".lora_A.weight"):
            B = state[name.replace("lora_A", "lora_B")].numpy().astype(np.float64)
            x = np.random.default_rng(1).normal(size=A.shape[1])
            found[name.removeprefix("transformer.").removesuffix(".lora_A.weight")] = B @ (
                A.numpy().astype(np.float64) @ x
            )
    return found


def deltas(adapter: Adapter, specs: Specs) -> dict[str, np.ndarray]:
    """What the adapter adds, in PyTorch's layout."""
    kernels = [f"{layer}.kernel" for layer in adapter.alphas] + list(adapter.changes)
    merged = Merged({name: np.zeros(specs[name].shape, np.float32) for name in kernels}, adapter)
    return {name.removesuffix(".kernel"): to_torch(np.asarray(merged[name]), specs[name]) for name in kernels}


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name, delta in expected.items():
        np.testing.assert_allclose(actual[name], delta, rtol=0, atol=1e-6 * np.abs(delta).max(), err_msg=name)


def write_for_web_uis(path: Path, adapter: Adapter, specs: Specs, dtype: type = np.float32) -> None:
    write_kohya(path, adapter, specs, dtype=dtype, original_names=True, component="transformer")


def write_for_diffusers(path: Path, adapter: Adapter, specs: Specs, dtype: type = np.float32) -> None:
    write_peft(path, adapter, specs, dtype=dtype, component="transformer")


def pipeline_of(name: str) -> DiffusionPipeline:
    """A pipeline of diffusers around a tiny transformer alone."""
    kind = PIPELINES[name]
    parts = {part for part in inspect.signature(kind.__init__).parameters if part != "self"}
    return kind(**dict.fromkeys(parts) | {"transformer": tiny(name)})


def peft_deltas(transformer: torch.nn.Module) -> dict[str, np.ndarray]:
    adapted = {name: module for name, module in transformer.named_modules() if isinstance(module, BaseTunerLayer)}
    with torch.no_grad():
        return {name: module.get_delta_weight(module.active_adapters[0]).numpy() for name, module in adapted.items()}


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("sd3", write_for_diffusers),
        ("flux", write_for_diffusers),
        ("z_image", write_for_diffusers),
        ("z_image", write_for_web_uis),
    ],
)
def test_diffusers_opens_what_is_written(name: str, write: Callable, tmp_path: Path) -> None:
    specs = SPECS[name]
    # Of kohya's names diffusers only knows those of Z-Image's blocks.
    is_whole = write is write_for_diffusers
    adapter = random_adapter(specs, [layer for layer in layers_of(specs) if is_whole or not layer.startswith("all_")])
    write(tmp_path / FILE, adapter, specs)
    pipeline = pipeline_of(name)
    pipeline.load_lora_weights(tmp_path, weight_name=FILE)
    assert_same(deltas(adapter, specs), peft_deltas(pipeline.transformer))


@pytest.mark.parametrize("name", PIPELINES)
def test_reads_what_diffusers_saves(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    # z_image lacks some of these layers, and flux others.
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_out.0", "proj_out", "norm_out.linear", "w1"],
        rank_pattern={"to_q": 2},
        alpha_pattern={"attn.to_q": 5},
        init_lora_weights=False,
    )
    model.add_adapter(config)
    layers, metadata = get_peft_model_state_dict(model), model.peft_config["default"].to_dict()
    options = {"transformer_lora_layers": layers, "transformer_lora_adapter_metadata": metadata}
    PIPELINES[name].save_lora_weights(tmp_path, **options)
    adapter = read_lora(tmp_path, SPECS[name], "transformer")
    assert_same(deltas(adapter, SPECS[name]), peft_deltas(model))
    write_for_diffusers(tmp_path / "again.safetensors", adapter, SPECS[name])
    assert load_file(tmp_path / "again.safetensors").keys() == load_file(tmp_path / FILE).keys()


def test_diffusers_opens_kohyas_file_of_flux(tmp_path: Path) -> None:
    adapter = random_adapter(FLUX, FLUX_LAYERS)
    write_for_web_uis(tmp_path / FILE, adapter, FLUX)
    stored = load_file(tmp_path / FILE)
    assert {name for name in stored if name.endswith(".alpha")} == {
        "lora_unet_double_blocks_18_img_attn_qkv.alpha",
        "lora_unet_double_blocks_18_img_attn_proj.alpha",
        "lora_unet_double_blocks_18_txt_attn_qkv.alpha",
        "lora_unet_single_blocks_37_linear1.alpha",
        "lora_unet_single_blocks_37_linear2.alpha",
        "lora_unet_final_layer_adaLN_modulation_1.alpha",
    }
    assert_same(
        {name: array for name, array in probed_state(FluxPipeline.lora_state_dict(tmp_path)).items() if array.any()},
        probed(adapter),
    )


def kohyas_flux(alpha: float) -> dict[str, torch.Tensor]:
    """What kohya's scripts write for FLUX.1 if they train layers of the original as they are."""
    random = torch.Generator().manual_seed(0)
    shapes = {
        "double_blocks_0_img_attn_qkv": (3072, 9216),
        "double_blocks_0_txt_mlp_0": (3072, 12288),
        "single_blocks_3_linear1": (3072, 21504),
        "single_blocks_3_modulation_lin": (3072, 9216),
    }
    stored = {}
    for name, (inputs, outputs) in shapes.items():
        stored[f"lora_unet_{name}.lora_down.weight"] = torch.randn(12, inputs, generator=random)
        stored[f"lora_unet_{name}.lora_up.weight"] = torch.randn(outputs, 12, generator=random)
        stored[f"lora_unet_{name}.alpha"] = torch.tensor(alpha)
    return stored


def test_reads_kohyas_file_of_flux_as_diffusers_does(tmp_path: Path) -> None:
    stored = kohyas_flux(alpha=6.0)
    save_file(stored, tmp_path / FILE)
    expected = probed_state(FluxPipeline.lora_state_dict(tmp_path))
    adapter = read_lora(tmp_path, FLUX, "transformer")
    assert_same(probed(adapter), expected)
    assert set(adapter.alphas.values()) == {6}
    assert expected.keys() == {
        *(f"transformer_blocks.0.attn.to_{part}" for part in "qkv"),
        *(f"single_transformer_blocks.3.attn.to_{part}" for part in "qkv"),
        *("transformer_blocks.0.ff_context.net.0.proj", "single_transformer_blocks.3.proj_mlp"),
        "single_transformer_blocks.3.norm.linear",
    }


@pytest.mark.parametrize("prefix", ["diffusion_model.", "model.diffusion_model.", ""])
def test_dotted_names_of_the_original(prefix: str, tmp_path: Path) -> None:
    """ComfyUI's and ai-toolkit's names; a second file says the same in kohya's."""
    slots = original_layers(SPECS["flux"])
    layers = [
        layer for layer in slots if "blocks" in layer and ("qkv" in layer or "linear1" in layer or "proj" in layer)
    ]
    random = torch.Generator().manual_seed(0)
    dotted, joined = {}, {}
    for layer in layers:
        spec = SPECS["flux"][f"{next(iter(slots[layer]))}.kernel"]
        A = torch.randn(4, spec.shape[0], generator=random)
        B = torch.randn(next(iter(slots[layer].values())).total, 4, generator=random)
        dotted |= {f"{prefix}{layer}.lora_A.weight": A, f"{prefix}{layer}.lora_B.weight": B}
        name = f"lora_unet_{layer.replace('.', '_')}"
        joined |= {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B, f"{name}.alpha": torch.tensor(4.0)}
    save_file(dotted, tmp_path / "dotted.safetensors")
    save_file(joined, tmp_path / "joined.safetensors")
    one, two = (
        read_lora(tmp_path / f"{name}.safetensors", SPECS["flux"], "transformer") for name in ("dotted", "joined")
    )
    assert len(one.alphas) == 2 * (3 + 3 + 2) + 2 * 4
    assert_same(deltas(one, SPECS["flux"]), deltas(two, SPECS["flux"]))


@pytest.mark.parametrize(
    "prefix",
    [
        *("transformer.", "diffusion_model.", "base_model.model.", "base_model.model.transformer.", ""),
        *("lora_unet_", "lora_transformer_", "lycoris_"),
    ],
)
@pytest.mark.parametrize("name", PIPELINES)
def test_current_names_under_all_prefixes(name: str, prefix: str, tmp_path: Path) -> None:
    """OneTrainer, ai-toolkit, SimpleTuner and PEFT write diffusers' names under these."""
    specs = SPECS[name]
    adapter = random_adapter(specs, layers_of(specs))
    write_for_diffusers(tmp_path / FILE, adapter, specs)
    stored = {}
    for key, tensor in load_file(tmp_path / FILE).items():
        layer, part = key.removeprefix("transformer.").split(".lora_")
        stored[f"{prefix}{layer.replace('.', '_') if prefix.endswith('_') else layer}.lora_{part}"] = tensor
    save_file(stored, tmp_path / "renamed.safetensors")
    expected = read_lora(tmp_path / FILE, specs, "transformer")
    assert_same(probed(read_lora(tmp_path / "renamed.safetensors", specs, "transformer")), probed(expected))


@pytest.mark.parametrize("name", ["sd3", "z_image"])
def test_web_uis_get_the_rows_that_they_expect(name: str, tmp_path: Path) -> None:
    """Web UIs add B A to the original's weights: what diffusers' converters make of that is our difference."""
    specs = SPECS[name]
    targets = ("to_q", "to_v", "add_k_proj", "norm_out.linear", "norm1_context.linear", "attn2.to_k", "w1")
    layers = [layer for layer in layers_of(specs) if layer.endswith(targets)]
    adapter = random_adapter(specs, layers)
    write_for_web_uis(tmp_path / FILE, adapter, specs)
    lora = load_file(tmp_path / FILE)
    zeros = {key: np.zeros(spec.shape, np.float32) for key, spec in specs.items()}
    original.write(epath.Path(tmp_path / "zeros.safetensors"), {"": (zeros, specs)}, dtype=None)
    file = load_file(tmp_path / "zeros.safetensors")
    changed = 0
    for key in file:
        part = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"
        if f"{part}.alpha" in lora:
            down = lora[f"{part}.lora_down.weight"]
            assert lora[f"{part}.alpha"] == len(down)
            file[key] = lora[f"{part}.lora_up.weight"] @ down
            changed += 1
    assert changed == len(lora) / 3
    names = {"sd3": "joint_blocks_0_x_block_attn2_qkv", "z_image": "noise_refiner_0_attention_qkv"}
    assert f"lora_unet_{names[name]}.alpha" in lora
    converted = {key.removesuffix(".weight"): tensor.numpy() for key, tensor in CONVERTERS[name](file).items()}
    expected = deltas(adapter, specs)
    assert_same({layer: converted[layer] for layer in expected}, expected)
    assert {layer for layer, tensor in converted.items() if tensor.any()} == expected.keys()

    read = read_lora(tmp_path, specs, "transformer")
    assert read.alphas == {layer: adapter.rank(layer) for layer in layers}
    assert_same(deltas(read, specs), expected)


QKV = "lora_unet_double_blocks_1_img_attn_qkv"


def random_parts(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "parts",
    [
        {"diff": (48, 16)},
        {"hada_w1_a": (48, 2), "hada_w1_b": (2, 16), "hada_w2_a": (48, 2), "hada_w2_b": (2, 16)},
        {"lokr_w1": (8, 4), "lokr_w2": (6, 4)},
        {"lora_down.weight": (4, 16), "lora_up.weight": (48, 4), "dora_scale": (48, 1)},
        {"lora_down.weight": (4, 16), "lora_up.weight": (48, 4), "diff_b": (48,)},
    ],
)
def test_other_methods_change_the_rows_of_each_layer(parts: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    """The same as for one layer of all rows."""
    arrays = random_parts(**parts)
    save_file({f"{QKV}.{part}": array for part, array in arrays.items()}, tmp_path / FILE)
    save_file({f"whole.{part}": array for part, array in arrays.items()}, tmp_path / "whole.safetensors")
    whole = specs_of({"whole.weight": torch.Size([48, 16]), "whole.bias": torch.Size([48])})
    adapter = read_adapters(tmp_path / FILE, {"transformer": SPECS["flux"]})["transformer"]
    at_once = read_adapters(tmp_path / "whole.safetensors", {"transformer": whole})["transformer"]
    weights = random_parts(weight=(48, 16), bias=(48,))
    merged = Merged({"whole.kernel": weights["weight"].numpy().T, "whole.bias": weights["bias"].numpy()}, at_once)
    for place, part in enumerate("qkv"):
        layer, rows = f"transformer_blocks.1.attn.to_{part}", slice(16 * place, 16 * place + 16)
        params = {f"{layer}.kernel": weights["weight"][rows].numpy().T, f"{layer}.bias": weights["bias"][rows].numpy()}
        own = Merged(params, adapter)
        np.testing.assert_allclose(own[f"{layer}.kernel"], merged["whole.kernel"][:, rows], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(own[f"{layer}.bias"], merged["whole.bias"][rows])


DOWN, UP = "lora_down.weight", "lora_up.weight"
Q = "transformer.transformer_blocks.1.attn.to_q"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {f"{QKV}.{DOWN}": (4, 16), f"{QKV}.{UP}": (32, 4)},
            r"img_attn.qkv \(.* B as \(32, 4\), the model needs 48 out",
        ),
        ({f"{QKV}.{DOWN}": (), f"{QKV}.{UP}": (48, 4)}, r"img_attn.qkv \(of rank 0, so it has no weights\)"),
        ({f"{QKV}.{DOWN}": (0, 16), f"{QKV}.{UP}": (48, 0)}, "1 misshapen: .*of rank 0"),
        ({f"{QKV}.{DOWN}": (4, 16)}, r"1 incomplete: .*img_attn.qkv \(only lora_A\)"),
        ({f"{QKV}.{DOWN}": (4, 16), f"{QKV}.{UP}": (48, 4), f"{QKV}.alpha": (2,)}, r"alpha is stored as \(2,\)"),
        ({f"{QKV}.{DOWN}": (4, 16), f"{QKV}.{UP}": (48, 4), f"{QKV}.lora_mid.weight": (4, 4)}, "a lora_mid of several"),
        (
            {f"{QKV}.{DOWN}": (4, 16), f"{QKV}.{UP}": (48, 4), f"{QKV}.dora_scale": (1, 16)},
            "DoRA along the inputs of several layers",
        ),
        (
            {
                f"{QKV}.{DOWN}": (4, 16),
                f"{QKV}.{UP}": (48, 4),
                f"{Q}.lora_A.weight": (4, 16),
                f"{Q}.lora_B.weight": (16, 4),
            },
            r"1 stored twice: transformer_blocks\.1\.attn\.to_q",
        ),
        (
            {f"{QKV}.diff": (48, 16), f"{Q}.diff": (16, 16)},
            r"1 stored twice: transformer_blocks\.1\.attn\.to_q\.kernel",
        ),
        (
            {"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": (4, 16)},
            "made for SD3, is not a LoRA for this transformer: 1 layers that it lacks: lora_unet_joint_blocks_0",
        ),
        (
            {"diffusion_model.layers.0.attention.qkv.lora_A.weight": (4, 16)},
            "made for Z-Image, is not a LoRA for this transformer: 1 layers that it lacks: diffusion_model.layers",
        ),
        (
            {"transformer.transformer_blocks.7.attn.to_q.lora_A.weight": (4, 16)},
            r"1 layers that it lacks: transformer\.transformer_blocks\.7\.attn\.to_q$",
        ),
        (
            {"lora_unet_input_blocks_1_1_proj_in.lora_down.weight": (4, 16)},
            "is not a LoRA for this transformer: it holds only 1 layers for a UNet: lora_unet_input_blocks_1_1_proj_in",
        ),
    ],
)
def test_what_does_not_fit_is_told(tensors: dict[str, tuple[int, ...]], message: str, tmp_path: Path) -> None:
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, tmp_path / FILE)
    with pytest.raises(ValueError, match=message):
        read_adapters(tmp_path, {"transformer": SPECS["flux"]})


def test_text_encoders_of_a_file(tmp_path: Path) -> None:
    """kohya numbers T5 as the third encoder, ComfyUI calls it t5xxl; FLUX.1 has it in text_encoder_2."""
    clip = specs_of({"text_model.encoder.layers.0.mlp.fc1.weight": torch.Size([6, 4])})
    t5 = specs_of({"encoder.block.0.layer.0.SelfAttention.q.weight": torch.Size([6, 4])})
    first = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    for second in (
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        f"text_encoders.t5xxl.transformer.{next(iter(t5))[:-7]}",
    ):
        tensors = {
            f"{layer}.{part}": torch.ones(shape)
            for layer in (first, second, f"{Q}")
            for part, shape in ((DOWN, (2, 4)), (UP, (6, 2)))
        }
        tensors |= {f"{Q}.{DOWN}": torch.ones(2, 16), f"{Q}.{UP}": torch.ones(16, 2)}
        save_file(tensors, tmp_path / FILE)
        for names in (("text_encoder", "text_encoder_2"), ("text_encoder", "text_encoder_3")):
            specs = dict(zip(names, (clip, t5), strict=True))
            found = read_adapters(tmp_path, {"transformer": SPECS["flux"]} | specs)
            assert {name: list(adapter.alphas) for name, adapter in found.items()} == {
                "transformer": [Q.removeprefix("transformer.")],
                names[0]: ["text_model.encoder.layers.0.mlp.fc1"],
                names[1]: ["encoder.block.0.layer.0.SelfAttention.q"],
            }


def test_metadata_of_web_uis(tmp_path: Path) -> None:
    adapter = random_adapter(SPECS["flux"], [Q.removeprefix("transformer.")])
    metadata = {"modelspec.architecture": "flux-1-dev/lora"}
    options = {"base_model_version": "flux1", "component": "transformer", "metadata": metadata}
    write_kohya(tmp_path / FILE, adapter, SPECS["flux"], dtype=np.float16, original_names=True, **options)
    with safe_open(tmp_path / FILE, "np") as file:
        assert (
            file.metadata()
            == {
                "format": "pt",
                "ss_network_module": "networks.lora",
                "ss_network_dim": "1",
                "ss_network_alpha": "1.0",
                "ss_base_model_version": "flux1",
                "ss_v2": "False",
            }
            | metadata
        )


def test_layers_without_effect_are_kept_apart(tmp_path: Path) -> None:
    """A LoRA before its first step: B is zero, and A is what training goes on from."""
    layers = [f"transformer_blocks.0.attn.to_{part}" for part in "qv"]
    adapter = random_adapter(SPECS["flux"], layers)
    params = {name: array * ("lora_A" in name) for name, array in adapter.params.items()}
    write_for_web_uis(tmp_path / FILE, Adapter(params, adapter.alphas), SPECS["flux"])
    read = read_lora(tmp_path, SPECS["flux"], "transformer")
    assert {layer: read.rank(layer) for layer in layers} == {layer: adapter.rank(layer) for layer in layers}
    for name, array in params.items():
        layer = name.partition(".lora_")[0]
        scale = adapter.alphas[layer] / adapter.rank(layer) if "lora_A" in name else 1
        np.testing.assert_allclose(read.params[name], array * scale, rtol=1e-6)
