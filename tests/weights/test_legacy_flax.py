"""Checkpoints that the last Flax versions of diffusers and transformers wrote (`make_legacy_flax.py`)."""

import hashlib
import json
import lzma
import shutil
from pathlib import Path

import diffusers
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import serialization

from dpo_jax.batch import Conditioning
from dpo_jax.models.clip import CLIPTextConfig, CLIPTextModel
from dpo_jax.models.network import Network
from dpo_jax.models.pipeline import load_pipeline
from dpo_jax.models.random_model import write_random_model
from dpo_jax.models.save import save_pipeline
from dpo_jax.models.unet import UNet2DConditionModel
from dpo_jax.models.unet_config import UNetConfig
from dpo_jax.models.vae import AutoencoderKL, VAEConfig
from dpo_jax.weights.io import load_params
from dpo_jax.weights.layout import Params, ParamSpec, to_torch, torch_aliases

HERE = Path(__file__).parent / "legacy_flax"
MODELS = {
    "unet": (UNetConfig, UNet2DConditionModel),
    "unet_sdxl": (UNetConfig, UNet2DConditionModel),
    "vae": (VAEConfig, AutoencoderKL),
    "text_encoder": (CLIPTextConfig, CLIPTextModel),
    "text_encoder_2": (CLIPTextConfig, CLIPTextModel),
}


@pytest.fixture(scope="module")
def legacy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders as the old libraries wrote them, uncompressed."""
    folder = tmp_path_factory.mktemp("legacy") / "flax"
    shutil.copytree(HERE, folder)
    for path in folder.rglob("*.msgpack.xz"):
        path.with_suffix("").write_bytes(lzma.decompress(path.read_bytes()))
        path.unlink()
    return folder


@pytest.fixture(scope="module")
def outputs() -> dict[str, np.ndarray]:
    return dict(np.load(HERE / "outputs.npz"))


def digest_of(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


def load(folder: Path) -> tuple[Network, Params]:
    config_class, module = MODELS[folder.name]
    config = config_class.from_dict(json.loads((folder / "config.json").read_text()), str(folder))
    network = Network.build(lambda rngs: module(config, dtype="float32", rngs=rngs), config)
    return network, load_params(folder, network.specs, dtype="float32")


@pytest.mark.parametrize("name", MODELS)
def test_numbers_are_exactly_those_of_the_pytorch_twin(name: str, legacy: Path) -> None:
    twin = json.loads((HERE / "twin.json").read_text())[name]
    network, params = load(legacy / name)
    for ours, array in params.items():
        (theirs,) = (alias for alias in torch_aliases(ours) if alias in twin)
        in_torch = to_torch(np.asarray(array), network.specs[ours])
        shape, digest = twin.pop(theirs)
        assert list(in_torch.shape) == shape
        assert digest_of(in_torch) == digest, ours
    assert not twin


def assert_outputs(ours: np.ndarray, outputs: dict[str, np.ndarray], name: str) -> None:
    """Equal to what the Flax model computed, and its PyTorch twin, in float32."""
    for library in ("flax", "torch"):
        np.testing.assert_allclose(ours, outputs[f"{name}_{library}"], rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("name", ["unet", "unet_sdxl"])
def test_unet_computes_what_the_old_library_did(name: str, legacy: Path, outputs: dict[str, np.ndarray]) -> None:
    network, params = load(legacy / name)
    is_sdxl = name == "unet_sdxl"
    conditioning = Conditioning(
        jnp.asarray(outputs["context_NLD"]),
        jnp.asarray(outputs["pooled_NP"]) if is_sdxl else None,
        jnp.asarray(outputs["time_ids_NT"]) if is_sdxl else None,
    )
    x_NHWC = jnp.asarray(outputs["x_NCHW"].transpose(0, 2, 3, 1))
    prediction_NHWC = network(params, x_NHWC, jnp.array([500]), conditioning)
    assert_outputs(np.asarray(prediction_NHWC).transpose(0, 3, 1, 2), outputs, name)


def test_vae_computes_what_the_old_library_did(legacy: Path, outputs: dict[str, np.ndarray]) -> None:
    network, params = load(legacy / "vae")
    x_NHWC = jnp.asarray(outputs["x_NCHW"].transpose(0, 2, 3, 1))
    decoded_NHWC = network(params, x_NHWC, method="decode")
    assert_outputs(np.asarray(decoded_NHWC).transpose(0, 3, 1, 2), outputs, "vae")
    images_NHWC = jnp.asarray(outputs["images_NCHW"].transpose(0, 2, 3, 1))
    mean_NhwC, _ = network(params, images_NHWC, method="encode")
    np.testing.assert_allclose(mean_NhwC.transpose(0, 3, 1, 2), outputs["vae_mean_torch"], atol=2e-5)


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_text_encoder_computes_what_the_old_library_did(
    name: str, legacy: Path, outputs: dict[str, np.ndarray]
) -> None:
    network, params = load(legacy / name)
    output = network(params, jnp.asarray(outputs["ids_NL"]))
    assert_outputs(np.asarray(output.last_hidden_NLD), outputs, name)
    assert_outputs(np.asarray(output.pooled_NP), outputs, f"{name}_pooled")


def test_big_arrays_stored_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 64)
    array = np.arange(7 * 9).reshape(7, 9).astype(ml_dtypes.bfloat16)
    encoded = serialization.msgpack_serialize({"embed": {"kernel": array}})
    assert b"__msgpack_chunked_array__" in encoded
    (tmp_path / "flax_model.msgpack").write_bytes(encoded)
    params = load_params(tmp_path, {"embed.kernel": ParamSpec((7, 9), (1, 0))}, dtype="float32")
    np.testing.assert_array_equal(params["embed.kernel"], array.astype(np.float32))


def test_truncated_msgpack(legacy: Path, tmp_path: Path) -> None:
    encoded = (legacy / "vae" / "diffusion_flax_model.msgpack").read_bytes()
    (tmp_path / "diffusion_flax_model.msgpack").write_bytes(encoded[:-100])
    with pytest.raises(ValueError, match=r"diffusion_flax_model.msgpack is truncated or not a Flax msgpack file"):
        load_params(tmp_path, {}, dtype="float32")


def test_save_pipeline_converts_a_legacy_folder(legacy: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_random_model("sd15", base)
    for name in ("unet", "vae", "text_encoder"):
        shutil.rmtree(base / name)
        shutil.copytree(legacy / name, base / name)
    (base / "safety_checker").mkdir()
    (base / "safety_checker" / "config.json").write_text("{}")
    (base / "safety_checker" / "flax_model.msgpack").write_bytes(b"no model of ours")
    index = json.loads((base / "model_index.json").read_text())
    for name, library in (("unet", "diffusers"), ("vae", "diffusers"), ("text_encoder", "transformers")):
        index[name] = [library, f"Flax{index[name][1]}"]
    index["safety_checker"] = ["stable_diffusion", "FlaxStableDiffusionSafetyChecker"]
    index["_class_name"] = "FlaxStableDiffusionPipeline"
    (base / "model_index.json").write_text(json.dumps(index))

    pipeline = load_pipeline(base, dtype="float32")
    save_pipeline(pipeline, tmp_path / "tuned", pipeline.read("unet"), dtype=None, card="")
    oracle = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "tuned")
    twin = json.loads((HERE / "twin.json").read_text())
    for name in ("unet", "vae", "text_encoder"):
        stored = {digest_of(tensor.float().numpy()) for tensor in getattr(oracle, name).state_dict().values()}
        assert stored == {digest for _, digest in twin[name].values()}
