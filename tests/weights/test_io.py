"""Reading and writing a component's folder, against torch, safetensors and diffusers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_jax.weights.io import load_params, save_component
from dpo_jax.weights.layout import ParamSpec, Specs

SPECS: Specs = {
    "down_blocks.0.conv.kernel": ParamSpec((3, 3, 2, 4), (3, 2, 0, 1)),
    "down_blocks.0.conv.bias": ParamSpec((4,), (0,)),
    "time_embedding.linear_1.kernel": ParamSpec((4, 6), (1, 0)),
    "norm.scale": ParamSpec((6,), (0,)),
    "token_embedding.embedding": ParamSpec((7, 4), (0, 1)),
}
CONFIG = {"_class_name": "UNet2DConditionModel"}
FILE = "diffusion_pytorch_model.safetensors"


def torch_tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "down_blocks.0.conv.weight": (4, 2, 3, 3),
        "down_blocks.0.conv.bias": (4,),
        "time_embedding.linear_1.weight": (6, 4),
        "norm.weight": (6,),
        "token_embedding.weight": (7, 4),
    }
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(torch_tensors(), tmp_path / FILE)
    return tmp_path


def assert_holds(params: dict[str, jax.Array], tensors: dict[str, torch.Tensor]) -> None:
    assert params.keys() == SPECS.keys()
    conv = tensors["down_blocks.0.conv.weight"].permute(2, 3, 1, 0)
    linear = tensors["time_embedding.linear_1.weight"].T
    np.testing.assert_array_equal(params["down_blocks.0.conv.kernel"], conv.float().numpy())
    np.testing.assert_array_equal(params["down_blocks.0.conv.bias"], tensors["down_blocks.0.conv.bias"].float().numpy())
    np.testing.assert_array_equal(params["time_embedding.linear_1.kernel"], linear.float().numpy())
    np.testing.assert_array_equal(params["norm.scale"], tensors["norm.weight"].float().numpy())
    embedding = tensors["token_embedding.weight"]
    np.testing.assert_array_equal(params["token_embedding.embedding"], embedding.float().numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_stored_dtype_loads(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = torch_tensors(dtype)
    save_file(tensors, tmp_path / FILE)
    assert_holds(load_params(tmp_path, SPECS, dtype=jnp.float32), tensors)


def test_loads_in_the_dtype_asked_for(folder: Path) -> None:
    params = load_params(folder, SPECS, dtype=jnp.bfloat16)
    expected = torch_tensors()["norm.weight"].bfloat16().float().numpy()
    assert {p.dtype for p in params.values()} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(params["norm.scale"].astype(jnp.float32), expected)


def test_fp16_variant_is_read_when_it_is_all_there_is(tmp_path: Path) -> None:
    tensors = torch_tensors(torch.float16)
    save_file(tensors, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert_holds(load_params(tmp_path, SPECS, dtype=jnp.float32), tensors)
    full = torch_tensors()
    save_file(full, tmp_path / FILE)
    assert_holds(load_params(tmp_path, SPECS, dtype=jnp.float32), full)


def test_placed_by_sharding(folder: Path) -> None:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    asked = []

    def sharding(name: str, spec: ParamSpec) -> jax.sharding.Sharding:
        asked.append((name, spec))
        axes = ("data",) if len(spec.shape) > 1 else ()
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

    params = load_params(folder, SPECS, dtype=jnp.float32, sharding=sharding)
    assert_holds(params, torch_tensors())
    assert asked == list(SPECS.items())
    assert params["norm.scale"].sharding.spec == jax.sharding.PartitionSpec()
    assert params["down_blocks.0.conv.kernel"].sharding.spec == jax.sharding.PartitionSpec("data")


def test_each_device_gets_its_own_slice(folder: Path) -> None:
    # Devices are counted when JAX starts, so two of them need a process of their own.
    program = """
import sys, jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
from dpo_jax.weights.io import load_params
from dpo_jax.weights.layout import ParamSpec
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
specs = {"time_embedding.linear_1.kernel": ParamSpec((4, 6), (1, 0))}
(kernel,) = load_params(sys.argv[1], specs, dtype="float32", sharding=lambda name, spec: split).values()
assert [shard.data.shape for shard in kernel.addressable_shards] == [(4, 3), (4, 3)]
np.save(sys.argv[2], kernel)
"""
    tensor = torch_tensors()["time_embedding.linear_1.weight"]
    save_file({"time_embedding.linear_1.weight": tensor}, folder / FILE)
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", program, folder, folder / "out.npy"], check=True, env=environment)
    np.testing.assert_array_equal(np.load(folder / "out.npy"), tensor.T.numpy())


def test_all_faults_in_one_error(tmp_path: Path) -> None:
    tensors = torch_tensors()
    del tensors["norm.weight"]
    tensors["token_embedding.weight"] = torch.zeros(8, 4)
    tensors |= {f"extra.{i}": torch.zeros(1) for i in range(7)}
    tensors["text_model.embeddings.position_ids"] = torch.zeros(1, 3, dtype=torch.int64)
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(ValueError, match="does not hold the model") as error:
        load_params(tmp_path, SPECS, dtype=jnp.float32)
    message = str(error.value)
    assert "1 missing: norm.weight" in message
    assert "7 unexpected: extra.0, extra.1, extra.2, extra.3, extra.4 and 2 more" in message
    assert "1 misshapen: token_embedding.weight (stored as (8, 4), the model needs (7, 4))" in message
    assert "position_ids" not in message


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_file(folder: Path, size: int) -> None:
    path = folder / FILE
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"{FILE} is (truncated|empty)"):
        load_params(folder, SPECS, dtype=jnp.float32)


def test_not_a_safetensors_file(folder: Path) -> None:
    (folder / FILE).write_text("<html>404 not found, and some more words</html>")
    with pytest.raises(ValueError, match=f"{FILE} is a web page: the download failed"):
        load_params(folder, SPECS, dtype=jnp.float32)


def test_pickles_are_refused(tmp_path: Path) -> None:
    torch.save(torch_tensors(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only pickled weights \(diffusion_pytorch_model.bin\).*save_pretrained"):
        load_params(tmp_path, SPECS, dtype=jnp.float32)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weights in .*looked for diffusion_pytorch_model.safetensors"):
        load_params(tmp_path, SPECS, dtype=jnp.float32)
    with pytest.raises(FileNotFoundError, match=r"no folder .*absent"):
        load_params(tmp_path / "absent", SPECS, dtype=jnp.float32)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 300])
def test_save_then_load_is_identity(folder: Path, tmp_path: Path, max_shard_bytes: int) -> None:
    params = load_params(folder, SPECS, dtype=jnp.float32)
    output = tmp_path / "saved"
    save_component(output, CONFIG, params, SPECS, dtype=jnp.float32, max_shard_bytes=max_shard_bytes)
    files = sorted(path.name for path in output.glob("*.safetensors"))
    assert len(files) == (1 if max_shard_bytes > 1000 else 2)
    stored = {name: tensor for file in files for name, tensor in load_file(output / file).items()}
    expected = torch_tensors()
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(stored[name], tensor)
    assert_holds(load_params(output, SPECS, dtype=jnp.float32), expected)
    assert json.loads((output / "config.json").read_text()) == CONFIG


def test_a_missing_shard_is_named(folder: Path, tmp_path: Path) -> None:
    params = load_params(folder, SPECS, dtype=jnp.float32)
    save_component(tmp_path / "saved", CONFIG, params, SPECS, dtype=jnp.float32, max_shard_bytes=300)
    (tmp_path / "saved" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"absent: diffusion_pytorch_model-00002-of-00002.safetensors"):
        load_params(tmp_path / "saved", SPECS, dtype=jnp.float32)


def test_bfloat16_is_written_as_torch_reads_it(folder: Path, tmp_path: Path) -> None:
    params = load_params(folder, SPECS, dtype=jnp.float32)
    save_component(tmp_path / "saved", {"architectures": ["CLIPTextModel"]}, params, SPECS, dtype=ml_dtypes.bfloat16)
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    for name, tensor in torch_tensors().items():
        assert torch.equal(stored[name], tensor.bfloat16())


def test_a_failed_save_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    params = load_params(folder, SPECS, dtype=jnp.float32)
    params["norm.scale"] = params["norm.scale"][:-1]
    with pytest.raises(AssertionError):
        save_component(tmp_path / "saved", CONFIG, params, SPECS, dtype=jnp.float32)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_nothing_is_overwritten(folder: Path) -> None:
    params = load_params(folder, SPECS, dtype=jnp.float32)
    with pytest.raises(ValueError, match="already exists and is not an empty folder"):
        save_component(folder, CONFIG, params, SPECS, dtype=jnp.float32)
    assert_holds(load_params(folder, SPECS, dtype=jnp.float32), torch_tensors())
