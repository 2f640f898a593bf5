"""LoRA files against PyTorch diffusers and peft: both must add the same to every kernel."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from diffusers.configuration_utils import FrozenDict
from etils import epath
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dpo_jax.models.families import PUBLISHED
from dpo_jax.models.network import Network
from dpo_jax.models.random_model import RANDOM_MODELS, random_params, write_random_model
from dpo_jax.models.unet import UNet2DConditionModel
from dpo_jax.models.unet_config import UNetConfig
from dpo_jax.weights import safetensors_file
from dpo_jax.weights.layout import Specs, to_torch, torch_name
from dpo_jax.weights.lora_files import Adapter, Merged, read_lora
from dpo_jax.weights.lora_write import write_kohya, write_peft

FILE = "pytorch_lora_weights.safetensors"
TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TO_OUT = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
CONV = "down_blocks.0.resnets.0.conv1"
SHORTCUT = "up_blocks.0.resnets.0.conv_shortcut"
PROJ_IN = "mid_block.attentions.0.proj_in"


def unet_specs(config: dict) -> Specs:
    parsed = UNetConfig.from_dict(config, "unet")
    return Network.build(lambda rngs: UNet2DConditionModel(parsed, dtype="float32", rngs=rngs), parsed).specs


SPECS = {family: unet_specs(RANDOM_MODELS[family][1]) for family in ("sd15", "sdxl")}
SD15 = SPECS["sd15"]


def layers_of(specs: Specs) -> list[str]:
    return [name.removesuffix(".kernel") for name in specs if name.endswith(".kernel")]


def random_adapter(specs: Specs, layers: list[str], dtype: type = np.float32) -> Adapter:
    """Ranks 1 to 4 and alphas 0.5, 1 and 2 in turn."""
    random = np.random.default_rng(0)
    params = {}
    for number, layer in enumerate(layers):
        *window, inputs, outputs = specs[f"{layer}.kernel"].shape
        rank = 1 + number % 4
        params[f"{layer}.lora_A.kernel"] = random.normal(size=(*window, inputs, rank)).astype(dtype)
        params[f"{layer}.lora_B.kernel"] = random.normal(size=(*[1 for _ in window], rank, outputs)).astype(dtype)
    return Adapter(params, {layer: 2.0 ** (number % 3 - 1) for number, layer in enumerate(layers)})


def our_deltas(adapter: Adapter, specs: Specs) -> dict[str, np.ndarray]:
    """What the adapter adds, in PyTorch's layout."""
    kernels = [f"{layer}.kernel" for layer in adapter.alphas]
    merged = Merged({name: np.zeros(specs[name].shape, np.float32) for name in kernels}, adapter)
    return {name.removesuffix(".kernel"): to_torch(np.asarray(merged[name]), specs[name]) for name in kernels}


def peft_deltas(unet: torch.nn.Module) -> dict[str, np.ndarray]:
    adapted = {name: module for name, module in unet.named_modules() if isinstance(module, BaseTunerLayer)}
    with torch.no_grad():
        return {name: module.get_delta_weight(module.active_adapters[0]).numpy() for name, module in adapted.items()}


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name, delta in expected.items():
        np.testing.assert_allclose(actual[name], delta, rtol=0, atol=1e-6 * np.abs(delta).max(), err_msg=name)


def assert_equal(actual: Adapter, expected: Adapter) -> None:
    assert actual.alphas == expected.alphas
    assert actual.params.keys() == expected.params.keys()
    for name, array in expected.params.items():
        np.testing.assert_array_equal(actual.params[name], array, err_msg=name)


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, DiffusionPipeline]:
    folder = tmp_path_factory.mktemp("models") / request.param
    write_random_model(request.param, folder)
    return request.param, DiffusionPipeline.from_pretrained(folder, local_files_only=True)


@pytest.fixture
def model(opened: tuple[str, DiffusionPipeline]) -> Iterator[tuple[str, DiffusionPipeline]]:
    yield opened
    opened[1].unload_lora_weights()


def write_for_web_uis(path: Path, adapter: Adapter, specs: Specs) -> None:
    write_kohya(path, adapter, specs, dtype=np.float32, original_names=specs is SPECS["sdxl"])


def write_for_diffusers(path: Path, adapter: Adapter, specs: Specs) -> None:
    write_peft(path, adapter, specs, dtype=np.float32)


@pytest.mark.parametrize("write", [write_for_diffusers, write_for_web_uis])
def test_diffusers_opens_what_is_written(model: tuple[str, DiffusionPipeline], write: Callable, tmp_path: Path) -> None:
    family, pipe = model
    specs = SPECS[family]
    adapter = random_adapter(specs, layers_of(specs))
    write(tmp_path / FILE, adapter, specs)
    pipe.load_lora_weights(tmp_path, weight_name=FILE)
    assert_same(our_deltas(adapter, specs), peft_deltas(pipe.unet))


@pytest.mark.parametrize("rslora", [False, True])
def test_reads_what_diffusers_saves(model: tuple[str, DiffusionPipeline], rslora: bool, tmp_path: Path) -> None:
    family, pipe = model
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_out.0", "conv1", "conv_shortcut", "proj_in"],
        rank_pattern={"to_q": 2, r".*resnets\.0.conv1": 3},
        alpha_pattern={"attn2.to_q": 5, "^" + TO_Q: 7, "to_q": 8},
        use_rslora=rslora,
        init_lora_weights=False,
    )
    pipe.unet.add_adapter(config)
    layers = get_peft_model_state_dict(pipe.unet)
    metadata = pipe.unet.peft_config["default"].to_dict()
    type(pipe).save_lora_weights(tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)
    adapter = read_lora(tmp_path, SPECS[family])
    assert_same(our_deltas(adapter, SPECS[family]), peft_deltas(pipe.unet))
    write_peft(tmp_path / "again.safetensors", adapter, SPECS[family], dtype=np.float32)
    assert load_file(tmp_path / "again.safetensors").keys() == load_file(tmp_path / FILE).keys()


def test_reads_what_peft_saves(
    model: tuple[str, DiffusionPipeline], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family, pipe = model
    targets = ["to_k", "conv2", "conv_out"]
    config = LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False)
    adapted = get_peft_model(pipe.unet, config)
    adapted.save_pretrained(tmp_path)
    expected = peft_deltas(pipe.unet)
    adapted.unload()
    assert_same(our_deltas(read_lora(tmp_path, SPECS[family]), SPECS[family]), expected)
    assert not capsys.readouterr().err
    (tmp_path / "adapter_config.json").unlink()
    assert set(read_lora(tmp_path, SPECS[family]).alphas.values()) == {2}
    assert "adapter_config.json is missing" in capsys.readouterr().err
    (tmp_path / "adapter_config.json").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json does not exist"):
        read_lora(tmp_path, SPECS[family])


def old_name(layer: str) -> str:
    return f"unet.{layer}.lora."


def processor_name(layer: str) -> str:
    return f"unet.{layer.removesuffix('.0')}_lora.".replace(".to_", ".processor.to_")


@pytest.mark.parametrize("stem", [old_name, processor_name])
def test_reads_names_of_old_versions(
    model: tuple[str, DiffusionPipeline], stem: Callable[[str], str], tmp_path: Path
) -> None:
    family, pipe = model
    specs = SPECS[family]
    adapter = random_adapter(specs, [layer for layer in layers_of(specs) if ".attn" in layer])
    tensors = {}
    for layer in adapter.alphas:
        for part, old in (("lora_A", "down"), ("lora_B", "up")):
            matrix = adapter.params[f"{layer}.{part}.kernel"].T
            tensors[f"{stem(layer)}{old}.weight"] = torch.tensor(matrix).contiguous()
    save_file(tensors, tmp_path / FILE)
    pipe.load_lora_weights(tmp_path, weight_name=FILE)
    assert_same(our_deltas(read_lora(tmp_path, specs), specs), peft_deltas(pipe.unet))


def test_merge_equals_fuse(model: tuple[str, DiffusionPipeline], tmp_path: Path) -> None:
    family, pipe = model
    specs = SPECS[family]
    adapter = random_adapter(specs, ["conv_in", CONV, SHORTCUT, PROJ_IN, TO_Q, TO_OUT, "time_embedding.linear_1"])
    write_peft(tmp_path / FILE, adapter, specs, dtype=np.float32)
    before = random_params(specs, seed=0)  # as write_random_model draws them
    copy = {name: array.copy() for name, array in before.items()}
    merged = Merged(before, adapter)
    pipe.load_lora_weights(tmp_path, weight_name=FILE)
    pipe.fuse_lora(components=["unet"])
    fused = {name.replace(".base_layer", ""): tensor.clone().numpy() for name, tensor in pipe.unet.state_dict().items()}
    pipe.unfuse_lora(components=["unet"])
    assert merged.keys() == specs.keys()
    for name, spec in specs.items():
        expected = fused[torch_name(name)]
        actual = to_torch(merged[name], spec)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * np.abs(expected).max(), err_msg=name)
        np.testing.assert_array_equal(before[name], copy[name])


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_merged_weights_are_float32_at_least(dtype: type) -> None:
    specs = {f"{TO_Q}.kernel": SD15[f"{TO_Q}.kernel"]}
    adapter = random_adapter(specs, [TO_Q], dtype)
    before = {name: array.astype(dtype) for name, array in random_params(specs, 0).items()}
    (kernel,) = Merged(before, adapter).values()
    wide = np.promote_types(dtype, np.float32)
    A, B = (array.astype(wide) for array in adapter.params.values())
    assert kernel.dtype == wide
    np.testing.assert_array_equal(kernel, before[f"{TO_Q}.kernel"].astype(wide) + 0.5 * (A @ B))


def test_kohya_names_of_sdxl(tmp_path: Path) -> None:
    """At full size, as diffusers converts them."""
    config = json.loads((PUBLISHED / "sdxl" / "unet" / "config.json").read_text())
    specs = unet_specs(config)
    adapter = random_adapter(specs, layers_of(specs), np.float16)
    ranks = [adapter.rank(layer) for layer in adapter.alphas]
    adapter = adapter._replace(alphas=dict.fromkeys(adapter.alphas, max(sorted(ranks), key=ranks.count)))
    path = tmp_path / "lora.safetensors"
    write_kohya(path, adapter, specs, dtype=np.float16, original_names=True)
    assert_equal(read_lora(path, specs), adapter)
    stored = load_file(path)
    assert {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
        "lora_unet_middle_block_1_proj_in.lora_up.weight",
        "lora_unet_output_blocks_5_2_conv.alpha",
    } <= stored.keys()
    tensors, alphas = StableDiffusionXLPipeline.lora_state_dict(stored, unet_config=FrozenDict(config))
    assert len(tensors) == 2 * len(alphas) == len(adapter.params)
    for layer, alpha in adapter.alphas.items():
        stem = processor_name(layer) if ".attn" in layer else old_name(layer)
        axes = specs[f"{layer}.kernel"].torch_axes
        for part, old in (("lora_A", "down"), ("lora_B", "up")):
            expected = adapter.params[f"{layer}.{part}.kernel"].transpose(axes)
            np.testing.assert_array_equal(tensors[f"{stem}{old}.weight"], expected)
        assert alphas[f"{stem}down.weight".split(".lora.")[0] + ".alpha"] == alpha


def test_what_web_uis_read(tmp_path: Path) -> None:
    adapter = random_adapter(SD15, [TO_Q, CONV])
    path = tmp_path / "lora.safetensors"
    write_kohya(path, adapter, SD15, dtype=np.float16, original_names=False, base_model_version="sd_v2_v")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata == {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "2.0",
        "ss_base_model_version": "sd_v2_v",
        "ss_v2": "True",
    }
    stored = load_file(path)
    stem = "lora_unet_down_blocks_0_resnets_0_conv1"
    assert stored[f"{stem}.alpha"].item() == 2.0
    assert stored[f"{stem}.lora_down.weight"].dtype == torch.float16
    assert stored[f"{stem}.lora_down.weight"].shape == (2, 16, 3, 3)
    assert stored[f"{stem}.lora_up.weight"].shape == (16, 2, 1, 1)


def test_alpha_is_multiplied_into_what_diffusers_opens(model: tuple[str, DiffusionPipeline], tmp_path: Path) -> None:
    """Without its metadata, which old diffusers and OneTrainer do not read, the file means the same."""
    family, pipe = model
    specs = SPECS[family]
    layers = [TO_Q, TO_OUT, CONV, PROJ_IN]
    adapter = random_adapter(specs, layers)
    params = dict(adapter.params) | {
        f"{layer}.lora_{part}.kernel": np.repeat(adapter.params[f"{layer}.lora_{part}.kernel"][..., :1, :], 2, axis=-2)
        if part == "B"
        else np.repeat(adapter.params[f"{layer}.lora_{part}.kernel"][..., :1], 2, axis=-1)
        for layer in layers
        for part in "AB"
    }
    adapter = Adapter(params, dict(zip(layers, (0.5, 1.0, 8.0, 3.0), strict=True)))
    write_for_diffusers(tmp_path / "with.safetensors", adapter, specs)
    save_file(load_file(tmp_path / "with.safetensors"), tmp_path / FILE)
    pipe.load_lora_weights(tmp_path, weight_name=FILE)
    assert_same(our_deltas(adapter, specs), peft_deltas(pipe.unet))


def test_metadata_gives_the_commonest_and_what_differs(tmp_path: Path) -> None:
    layers = [TO_Q, TO_OUT, CONV]
    adapter = random_adapter(SD15, layers)
    adapter.params[f"{TO_OUT}.lora_A.kernel"] = adapter.params[f"{TO_OUT}.lora_A.kernel"][:, :1]
    adapter.params[f"{TO_OUT}.lora_B.kernel"] = adapter.params[f"{TO_OUT}.lora_B.kernel"][:1]
    adapter = adapter._replace(alphas={TO_Q: 3.0, TO_OUT: 3.0, CONV: 1.5})
    write_peft(tmp_path / FILE, adapter, SD15, dtype=np.float32)
    config = json.loads(safetensors_file.read_metadata(epath.Path(tmp_path / FILE))["lora_adapter_metadata"])
    assert config == {
        "unet.r": 1,
        "unet.lora_alpha": 1,
        "unet.rank_pattern": {f"^{CONV}": 3},
        "unet.alpha_pattern": {f"^{CONV}": 3},
        "unet.target_modules": sorted(layers),
    }


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_read_then_write_is_identity(dtype: type, tmp_path: Path) -> None:
    adapter = random_adapter(SD15, layers_of(SD15), dtype)
    ranks = {layer: adapter.rank(layer) for layer in adapter.alphas}
    for number, write in enumerate(
        (
            lambda path, adapter: write_peft(path, adapter, SD15, dtype=dtype),
            lambda path, adapter: write_kohya(path, adapter, SD15, dtype=dtype, original_names=False),
            lambda path, adapter: write_kohya(path, adapter, SD15, dtype=dtype, original_names=True),
        )
    ):
        # With other alphas the weights change.
        adapter = adapter._replace(alphas=dict.fromkeys(ranks, 1) if number else ranks)
        path, again = tmp_path / f"{number}.safetensors", tmp_path / f"{number}_again.safetensors"
        write(path, adapter)
        assert_equal(read_lora(path, SD15), adapter)
        params, alphas, _ = read_lora(path, SD15)
        write(again, Adapter(dict(reversed(params.items())), dict(reversed(alphas.items()))))
        assert again.read_bytes() == path.read_bytes()
        load_file(path)


@pytest.mark.parametrize("shape", [(), (1, 1)])
def test_projections_come_as_linear_layers_or_convolutions(shape: tuple[int, ...], tmp_path: Path) -> None:
    """SD1.x stores `proj_in` as a 1x1 convolution; LoRAs of it come either way."""
    tensors = {
        f"unet.{PROJ_IN}.lora_A.weight": torch.randn(2, 32, *shape),
        f"unet.{PROJ_IN}.lora_B.weight": torch.randn(32, 2, *shape),
    }
    save_file(tensors, tmp_path / FILE)
    adapter = read_lora(tmp_path / FILE, SD15)
    assert adapter.alphas == {PROJ_IN: 2.0}
    assert adapter.params[f"{PROJ_IN}.lora_A.kernel"].shape == (1, 1, 32, 2)
    actual = our_deltas(adapter, SD15)[PROJ_IN].squeeze()
    A, B = (tensor.numpy().reshape(tensor.shape[:2]) for tensor in tensors.values())
    np.testing.assert_allclose(actual, B @ A, rtol=1e-6, atol=1e-6)


def test_what_is_read_outlives_the_file(tmp_path: Path) -> None:
    adapter = random_adapter(SD15, [TO_Q])._replace(alphas={TO_Q: 1.0})
    write_peft(tmp_path / FILE, adapter, SD15, dtype=np.float32)
    read = read_lora(tmp_path, SD15)
    (tmp_path / FILE).write_bytes(bytes((tmp_path / FILE).stat().st_size))
    assert_equal(read, adapter)


def linear(layer: str, *, prefix: str = "unet.", inputs: int = 32, outputs: int = 32) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}{layer}.lora_A.weight": torch.zeros(2, inputs),
        f"{prefix}{layer}.lora_B.weight": torch.zeros(outputs, 2),
    }


def test_all_faults_in_one_error(tmp_path: Path) -> None:
    tensors = linear(TO_Q, inputs=768)
    tensors |= {name: tensor for n in range(7) for name, tensor in linear(f"down_blocks.{n}.attn.to_q").items()}
    tensors |= linear(TO_OUT) | linear(TO_OUT, prefix="")
    only_A = dict(list(linear(TO_Q.replace("to_q", "to_k")).items())[:1])
    text = {"text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": torch.zeros(2, 4)}
    metadata = {"ss_base_model_version": "sdxl_base_v1-0"}
    save_file(tensors | only_A | text, tmp_path / "lora.safetensors", metadata)
    with pytest.raises(ValueError, match="is not a LoRA for this UNet") as error:
        read_lora(tmp_path / "lora.safetensors", SD15)
    message = str(error.value)
    assert "lora.safetensors, made for sdxl_base_v1-0, is not a LoRA" in message
    assert "7 layers that it lacks: unet.down_blocks.0.attn.to_q, unet.down_blocks.1.attn.to_q, " in message
    assert "and 2 more" in message
    assert f"1 misshapen: {TO_Q} (stored as (2, 768), the model needs (2, 32))" in message
    assert "2 stored twice" in message
    assert f"1 incomplete: {TO_Q.replace('to_q', 'to_k')} (only lora_A)" in message


def test_lora_of_another_family(tmp_path: Path) -> None:
    sdxl = SPECS["sdxl"]
    write_for_web_uis(tmp_path / FILE, random_adapter(sdxl, layers_of(sdxl)), sdxl)
    with pytest.raises(ValueError, match=r"\d+ layers that it lacks: lora_unet_.* misshapen: "):
        read_lora(tmp_path, SD15)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (f"unet.{TO_Q}.lora_B.bias", "LoRA with biases"),
        ("lora_unet_mid_block_attentions_0_proj_in.oft_blocks", "OFT"),
        ("lora_unet_mid_block_attentions_0_proj_in.a1.weight", "GLoRA"),
        ("lora_unet_mid_block_attentions_0_proj_in.on_input", "IA3"),
    ],
)
def test_what_is_not_supported_is_named(key: str, reason: str, tmp_path: Path) -> None:
    save_file(linear(TO_Q) | {key: torch.zeros(1)}, tmp_path / FILE)
    with pytest.raises(ValueError, match=rf": 1 of a method that is not supported: .*\({reason}\)"):
        read_lora(tmp_path, SD15)


def test_alpha_must_be_one_number(tmp_path: Path) -> None:
    save_file(linear(TO_Q) | {f"unet.{TO_Q}.alpha": torch.zeros(2)}, tmp_path / FILE)
    with pytest.raises(ValueError, match=f"1 misshapen: {TO_Q}"):
        read_lora(tmp_path, SD15)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"has no file pytorch_lora_weights.safetensors or .*; give the path of the"
    ):
        read_lora(tmp_path, SD15)
    with pytest.raises(FileNotFoundError, match=r"no LoRA at .*absent.safetensors; give a .safetensors file"):
        read_lora(tmp_path / "absent.safetensors", SD15)
    save_file({}, tmp_path / FILE)
    with pytest.raises(ValueError, match="not a LoRA for this UNet: it is empty"):
        read_lora(tmp_path, SD15)


def test_pickles_are_refused(tmp_path: Path) -> None:
    torch.save(linear(TO_Q), tmp_path / "pytorch_lora_weights.bin")
    for path in (tmp_path, tmp_path / "pytorch_lora_weights.bin"):
        with pytest.raises(
            ValueError, match=r"weights.bin is not a .safetensors file; opening a pickle.*weights_only=True"
        ):
            read_lora(path, SD15)


def test_alpha_may_be_a_whole_number(tmp_path: Path) -> None:
    """As diffusers' own conversion to kohya's names writes it."""
    from safetensors.numpy import load_file, save_file

    specs = SPECS["sdxl"]
    adapter = random_adapter(specs, layers_of(specs)[:2])
    write_kohya(tmp_path / "a.safetensors", adapter, specs, dtype=np.float32, original_names=True)
    tensors = load_file(tmp_path / "a.safetensors")
    whole = {name: array.astype(np.int64) if name.endswith(".alpha") else array for name, array in tensors.items()}
    save_file(whole, tmp_path / "b.safetensors")
    read = read_lora(tmp_path / "b.safetensors", specs)
    assert list(read.alphas.values()) == [float(array) for name, array in whole.items() if name.endswith(".alpha")]
