"""Opening and writing whole model folders, with diffusers' own pipelines as the oracle."""

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from dpo_jax.models.families import FAMILIES
from dpo_jax.models.pipeline import Pipeline, load_pipeline
from dpo_jax.models.random_model import write_random_model


@pytest.fixture(scope="module", params=list(FAMILIES))
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """A random model of each family."""
    folder = tmp_path_factory.mktemp("models") / request.param
    write_random_model(request.param, folder)
    return load_pipeline(folder, dtype="float32", family=request.param)


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sdxl"
    write_random_model("sdxl", folder)
    return folder


@pytest.fixture
def sdxl(sdxl_folder: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(sdxl_folder, tmp_path / "sdxl"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_torch_opens_and_draws_with_every_random_model(opened: Pipeline) -> None:
    oracle = diffusers.DiffusionPipeline.from_pretrained(opened.folder)
    for name, network in opened.components.items():
        state = getattr(oracle, name).state_dict()
        assert sum(np.prod(spec.shape) for spec in network.specs.values()) == sum(v.numel() for v in state.values())
        params = opened.load(name, dtype="float32")
        largest = max(state, key=lambda key: state[key].numel())
        assert any(np.isclose(p.sum(), state[largest].sum(), rtol=1e-4) for p in params.values())
    assert opened.vae_factor == oracle.vae_scale_factor
    assert opened.vae.config.scaling_factor == oracle.vae.config.scaling_factor
    assert opened.schedule.training_timesteps.tolist() == list(opened.family.training_timesteps or range(1000))

    oracle.set_progress_bar_config(disable=True)
    oracle.scheduler = diffusers.DDIMScheduler.from_config(oracle.scheduler.config)
    latents = torch.zeros(1, 4, 8, 8) if opened.family.name == "sdxl_refiner" else None
    size = {"image": latents, "strength": 0.9} if latents is not None else {"height": 32, "width": 32}
    result = oracle("a red circle", num_inference_steps=2, output_type="np", **size)
    assert result.images.shape == (1, 32, 32, 3)


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl", "sdxl_refiner"])
def test_family_is_found_from_the_folder(name: str, tmp_path: Path) -> None:
    write_random_model(name, tmp_path / "model")
    assert load_pipeline(tmp_path / "model", dtype="float32").family.name == name


def test_turbo_ends_in_pure_noise(sdxl: Path) -> None:
    assert load_pipeline(sdxl, dtype="float32").schedule.signal_T[-1] > 0.05
    assert load_pipeline(sdxl, dtype="float32", family="sdxl_turbo").schedule.signal_T[-1] == 0


def test_no_model_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder or file /.*/absent, and it is no hub id either"):
        load_pipeline(tmp_path / "absent", dtype="float32")
    with pytest.raises(FileNotFoundError, match=r"no diffusers model folder at .*model_index.json.*hf download"):
        load_pipeline(tmp_path, dtype="float32")


def test_a_single_file_that_is_a_pickle(tmp_path: Path) -> None:
    torch.save({"model.diffusion_model.out.2.bias": torch.zeros(4)}, tmp_path / "sd15.ckpt")
    with pytest.raises(ValueError, match=r"sd15.ckpt is no .safetensors file; opening a pickle can run code"):
        load_pipeline(tmp_path / "sd15.ckpt", dtype="float32")


def test_an_incomplete_folder(sdxl: Path) -> None:
    (sdxl / "vae" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"vae/config.json, though model_index.json lists vae"):
        load_pipeline(sdxl, dtype="float32")


def test_another_kind_of_pipeline(sdxl: Path) -> None:
    edit(sdxl / "model_index.json", _class_name="FluxPipeline", unet=[None, None])
    with pytest.raises(ValueError, match="is a FluxPipeline without unet; only Stable Diffusion 1, 2 and XL"):
        load_pipeline(sdxl, dtype="float32")


def test_inpainting_model(sdxl: Path) -> None:
    edit(sdxl / "unet" / "config.json", in_channels=9)
    with pytest.raises(ValueError, match=r"UNet takes 9 channels and the VAE makes 4.*inpainting"):
        load_pipeline(sdxl, dtype="float32")


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("sdxl_large", "unknown model family 'sdxl_large', expected one of sd15, sd21, sdxl"),
        (
            "sd15",
            r"sd15 has the text encoders \['text_encoder'\], this folder has .*'text_encoder_2'\]",
        ),
    ],
)
def test_wrong_family(sdxl: Path, family: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_pipeline(sdxl, dtype="float32", family=family)


def test_sd15_and_sd21_differ_in_their_unets(tmp_path: Path) -> None:
    write_random_model("sd21", tmp_path / "model")
    with pytest.raises(ValueError, match="model holds a model of the family sd21, not sd15; leave the family out"):
        load_pipeline(tmp_path / "model", dtype="float32", family="sd15")


def test_unknown_scheduler(sdxl: Path) -> None:
    edit(sdxl / "scheduler" / "scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler")
    with pytest.raises(ValueError, match=r"sdxl/scheduler/scheduler_config.json: unknown scheduler FlowMatchEuler"):
        load_pipeline(sdxl, dtype="float32")


def test_family_and_unet_must_agree(sdxl: Path) -> None:
    edit(sdxl / "unet" / "config.json", addition_embed_type=None, projection_class_embeddings_input_dim=None)
    with pytest.raises(ValueError, match="sdxl takes 6 time ids, but the UNet's addition_embed_type is None"):
        load_pipeline(sdxl, dtype="float32")


def test_unknown_random_family(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown model family 'sd3'"):
        write_random_model("sd3", tmp_path / "model")
