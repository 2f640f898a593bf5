"""fp8 weights with scales, against PyTorch's own products."""

import math
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from etils import epath
from safetensors.torch import load_file, save_file

from dpo_jax.weights import original
from dpo_jax.weights.io import load_params, read_params, save_component, tensor_names
from dpo_jax.weights.layout import Specs, to_torch
from tests.weights.torch_transformers import params_of, specs_of, tiny

PREFIX = "model.diffusion_model."
FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], Specs]:
    """A tiny FLUX.1's file in the original layout, and its specs."""
    state = tiny("flux").state_dict()
    specs = specs_of({name: tensor.shape for name, tensor in state.items()})
    path = tmp_path_factory.mktemp("flux") / "flux.safetensors"
    original.write(epath.Path(path), {PREFIX: (params_of(state), specs)}, dtype=None)
    return load_file(path), specs


def scaled(stored: dict[str, torch.Tensor], end: str, per_output: bool) -> dict[str, torch.Tensor]:
    """The file as ComfyUI quantises it: weights of its blocks in fp8."""
    quantised = dict(stored)
    for name, weight in stored.items():
        if ("_blocks." in name and name.endswith(".weight")) or ("final_layer.adaLN" in name and weight.ndim == 2):
            largest = weight.abs().amax(1, keepdim=True) if per_output else weight.abs().max()
            scale = largest / torch.finfo(FP8).max
            quantised[name] = (weight / scale).to(FP8)
            quantised[name.removesuffix("weight") + end] = scale
    return quantised


@pytest.mark.parametrize("per_output", [False, True])
@pytest.mark.parametrize(
    ("end", "others"),
    [
        ("scale_weight", {"scaled_fp8": torch.zeros(2, dtype=FP8), f"{PREFIX}img_in.scale_input": torch.ones(())}),
        ("weight_scale", {f"{PREFIX}img_in.comfy_quant": torch.zeros(3, dtype=torch.uint8)}),
    ],
)
def test_scaled_weights_are_multiplied_out(
    flux: tuple, end: str, others: dict[str, torch.Tensor], per_output: bool, tmp_path: Path
) -> None:
    stored, specs = flux
    file = scaled(stored, end, per_output)
    save_file(file | others, tmp_path / "fp8.safetensors")
    plain = {
        name: tensor if tensor.dtype != FP8 else tensor.float() * file[name.removesuffix("weight") + end].float()
        for name, tensor in file.items()
        if not name.endswith(end)
    }
    assert sum(not torch.equal(plain[name], stored[name]) for name in stored) == 2 * 10 + 2 * 3 + 1
    save_file(plain, tmp_path / "plain.safetensors")
    read, expected = (
        load_params(tmp_path / f"{name}.safetensors", specs, dtype="float32", prefix=PREFIX)
        for name in ("fp8", "plain")
    )
    for name, value in expected.items():
        np.testing.assert_array_equal(read[name], value, err_msg=name)


def test_scaled_weights_are_read_in_parts_and_written(flux: tuple, tmp_path: Path) -> None:
    stored, specs = flux
    path = tmp_path / "fp8.safetensors"
    save_file(scaled(stored, "scale_weight", per_output=True), path)
    whole = load_params(path, specs, dtype="bfloat16", prefix=PREFIX)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), "x")
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    parts = load_params(path, specs, dtype="bfloat16", prefix=PREFIX, sharding=lambda name, spec: sharding)
    read = read_params(path, specs, prefix=PREFIX)
    save_component(tmp_path / "folder", {"_class_name": "x"}, read, specs, dtype=None)
    written = load_file(tmp_path / "folder" / "diffusion_pytorch_model.safetensors")
    name = "single_transformer_blocks.1.proj_mlp.kernel"
    part = read[name][3:5, 2:]
    np.testing.assert_array_equal(np.asarray(part), np.asarray(read[name])[3:5, 2:])
    np.testing.assert_array_equal(to_torch(np.asarray(read[name]), specs[name]), written[name[:-6] + "weight"])
    np.testing.assert_array_equal(np.asarray(read[name], whole[name].dtype), whole[name])
    np.testing.assert_array_equal(parts[name], whole[name])


def test_scaled_folder(tmp_path: Path) -> None:
    weight = torch.tensor([[1.0, -2.0], [0.5, 4.0]])
    file = {"a.weight": weight.to(FP8), "a.weight_scale": torch.tensor(0.25)}
    save_file(file, tmp_path / "model.safetensors")
    read = load_params(tmp_path, specs_of({"a.weight": weight.shape}), dtype="float32")
    np.testing.assert_array_equal(read["a.kernel"], weight.numpy().T / 4)


WEIGHT = torch.ones(4, 6)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.weight": WEIGHT.to(FP8), "a.scale_weight": torch.ones(4, 2, 1)}, r"a\.weight is float8_e4m3fn of shape"),
        ({"a.weight": WEIGHT.to(FP8), "a.scale_weight": torch.ones(6)}, r"its scale float32 of shape \(6,\)"),
        ({"a.weight": WEIGHT.to(torch.uint8), "a.weight_scale": torch.ones(())}, r"a\.weight is uint8"),
        ({"a.weight": WEIGHT, "a.weight_scale": torch.ones(())}, r"a\.weight is float32"),
        (
            {"a.weight": WEIGHT.to(torch.uint8), "a.weight_scale_2": torch.ones(())},
            "scales of blocks: a.weight_scale_2",
        ),
        ({"a.weight": WEIGHT.to(torch.uint8), "a.weight.absmax": torch.ones(3)}, "bitsandbytes: a.weight.absmax"),
        ({"a.qweight": WEIGHT.to(torch.int32)}, "GPTQ, AWQ or SVDQuant: a.qweight"),
    ],
)
def test_other_ways_to_quantise_are_refused(tensors: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    specs = specs_of({"a.weight": WEIGHT.shape})
    for place in (path, tmp_path):
        with pytest.raises(ValueError, match=rf"quantised in a way that is not read.*{message}.*dequantize\(\)"):
            load_params(place, specs, dtype="float32")


def test_other_components_may_be_quantised(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({f"{PREFIX}a.weight": WEIGHT, "text_encoders.t5xxl.transformer.a.weight.absmax": torch.ones(3)}, path)
    specs = specs_of({"a.weight": WEIGHT.shape})
    assert load_params(path, specs, dtype="float32", prefix=PREFIX)["a.kernel"].sum() == WEIGHT.numel()
    with pytest.raises(ValueError, match="bitsandbytes"):
        load_params(path, specs, dtype="float32", prefix="text_encoders.t5xxl.transformer.")


def test_numbers_that_are_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": WEIGHT.to(torch.uint8)}, path)
    with pytest.raises(ValueError, match=r"1 misshapen: a.weight \(stored as uint8, which is not floating point\)"):
        load_params(path, specs_of({"a.weight": WEIGHT.shape}), dtype="float32")
    save_file({"a.weight": WEIGHT.to(torch.int8)}, path)
    with pytest.raises(ValueError, match=r"a.weight is stored as I8; supported are .*, so use a copy of the model"):
        load_params(path, specs_of({"a.weight": WEIGHT.shape}), dtype="float32")
    save_file({"a.scale_weight": torch.ones(())}, path)
    with pytest.raises(ValueError, match=r"holds the scale a.scale_weight, but not a.weight; copy it again"):
        load_params(path, specs_of({"a.weight": WEIGHT.shape}), dtype="float32")


def test_gguf_is_named(tmp_path: Path) -> None:
    path = tmp_path / "flux1-dev-Q4_K_S.gguf"
    path.write_bytes(b"GGUF" + bytes(math.prod((4, 25))))
    with pytest.raises(
        ValueError, match=r"Q4_K_S.gguf is a GGUF file, whose weights are quantised; use the same model"
    ):
        tensor_names(epath.Path(path))
