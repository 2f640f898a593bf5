"""Weights that are not finite are found when they are loaded, also in parts, and when they are written."""

import dataclasses
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from dpo_jax.models.pipeline import load_pipeline
from dpo_jax.models.random_model import write_random_model
from dpo_jax.models.save import save_denoiser, save_pipeline, save_single_file
from dpo_jax.weights import safetensors_file
from dpo_jax.weights.finite import is_finite
from dpo_jax.weights.io import load_params, save_component
from dpo_jax.weights.layout import ParamSpec

SPECS = {"a.kernel": ParamSpec((4, 6), (1, 0)), "b.bias": ParamSpec((6,), (0,))}
FILE = "diffusion_pytorch_model.safetensors"
FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e5m2", "float8_e4m3fn")


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_value_of_every_dtype(dtype: str) -> None:
    if np.dtype(dtype).itemsize > 2:
        values = np.array([0, -0.0, 1, np.finfo(dtype).max, np.finfo(dtype).tiny / 2, np.inf, -np.inf, np.nan], dtype)
    else:
        bits = np.uint16 if np.dtype(dtype).itemsize == 2 else np.uint8
        values = np.arange(np.iinfo(bits).max + 1).astype(bits).view(dtype)
    with np.errstate(invalid="ignore"):  # signalling NaN
        expected = np.isfinite(values.astype(np.float64))
    assert [is_finite(values[i : i + 1]) for i in range(len(values))] == expected.tolist()


def test_one_among_many_in_any_layout() -> None:
    array = np.zeros((700, 300), np.float32)
    assert is_finite(array)
    array[-1, -1] = np.nan
    assert not is_finite(array)
    assert not is_finite(array.T)
    assert not is_finite(array[::3, ::-1][-1:])
    assert is_finite(array[:-1])
    assert is_finite(np.zeros(0, np.float32))
    assert is_finite(np.array([1, 2]))


def component(folder: Path, **changes: float) -> Path:
    tensors = {"a.weight": np.ones((6, 4), np.float32), "b.bias": np.ones(6, np.float32)}
    for name, value in changes.items():
        tensors[name.replace("_", ".")].flat[-1] = value
    folder.mkdir()
    save_file(tensors, folder / FILE)
    return folder


def test_loading_names_tensor_and_file(tmp_path: Path) -> None:
    folder = component(tmp_path / "unet", a_weight=np.nan)
    with pytest.raises(ValueError, match=rf"unet/{FILE} holds numbers .* as float32 .* in a\.weight; .*--allow_nonfin"):
        load_params(folder, SPECS, dtype="float32")
    assert np.isnan(load_params(folder, SPECS, dtype="float32", allow_nonfinite=True)["a.kernel"]).sum() == 1


def test_numbers_that_the_dtype_can_not_hold(tmp_path: Path) -> None:
    folder = component(tmp_path / "unet", b_bias=1e6)
    load_params(folder, SPECS, dtype="bfloat16")
    with np.errstate(over="ignore"), pytest.raises(ValueError, match=r"not finite as float16 .* in b\.bias;"):
        load_params(folder, SPECS, dtype="float16")


def test_each_part_of_a_sharded_load_is_looked_at(tmp_path: Path) -> None:
    folder = component(tmp_path / "unet", a_weight=np.inf, b_bias=np.nan)
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    with pytest.raises(ValueError, match=r"in a\.weight, b\.bias;"):
        load_params(folder, SPECS, dtype="float32", sharding=lambda name, spec: NamedSharding(mesh, PartitionSpec("x")))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_nothing_is_written(dtype: str, tmp_path: Path) -> None:
    params = {"a.kernel": np.ones((4, 6), np.float32), "b.bias": np.full(6, 1e6 if dtype == "float16" else -np.inf)}
    with np.errstate(over="ignore"):
        with pytest.raises(ValueError, match=rf"b\.bias as {dtype} is not finite .* so {FILE} is not written"):
            save_component(tmp_path / "unet", {"_class_name": "x"}, params, SPECS, dtype=dtype)
        assert list(tmp_path.iterdir()) == []
        save_component(tmp_path / "unet", {"_class_name": "x"}, params, SPECS, dtype=dtype, allow_nonfinite=True)
    assert not np.isfinite(load_file(tmp_path / "unet" / FILE)["b.bias"]).any()


def test_fp8_without_scales_is_read(tmp_path: Path) -> None:
    values = np.array([0.5, -448, 2.0**-9], ml_dtypes.float8_e4m3fn)
    header = {"b.bias": ((3,), values.dtype)}
    safetensors_file.write(epath.Path(tmp_path / "x.safetensors"), [("b.bias", values)], header)
    read = load_params(tmp_path / "x.safetensors", {"b.bias": ParamSpec((3,), (0,))}, dtype="float32")
    np.testing.assert_array_equal(read["b.bias"], [0.5, -448, 2.0**-9])


def test_exports_name_the_file_that_the_tensor_came_from(tmp_path: Path) -> None:
    write_random_model("sd15", tmp_path / "model")
    file = tmp_path / "model" / "vae" / FILE
    tensors = load_file(file)
    tensors["decoder.conv_in.bias"][0] = np.nan
    save_file(tensors, file)
    pipeline = load_pipeline(tmp_path / "model", dtype="float32")
    unet = pipeline.read("unet")
    with pytest.raises(ValueError, match=rf"^{file}: decoder\.conv_in\.bias as float32 is not finite"):
        save_pipeline(pipeline, tmp_path / "folder", unet, dtype=None, card="")
    with pytest.raises(ValueError, match=rf"^{file}: first_stage_model\.decoder\.conv_in\.bias as float32 is not fin"):
        save_single_file(pipeline, tmp_path / "single", unet, dtype=None, card="")
    unet["conv_in.bias"] = np.full_like(unet["conv_in.bias"], np.inf)
    with pytest.raises(ValueError, match=rf"unet/{FILE}, or what was trained or merged into it: conv_in\.bias as"):
        save_denoiser(pipeline, tmp_path / "unet", unet, dtype=None, card="")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    save_pipeline(dataclasses.replace(pipeline, allow_nonfinite=True), tmp_path / "x", unet, dtype=None, card="")
