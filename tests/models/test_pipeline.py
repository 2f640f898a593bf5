"""Opening and writing whole model folders, compared with diffusers' own pipelines."""

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_jax.models.families import FAMILIES
from dpo_jax.models.pipeline import Pipeline, load_pipeline
from dpo_jax.models.random_model import write_random_model
from dpo_jax.models.save import save_single_file


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
        sizes = {tensor.data_ptr(): tensor.numel() for tensor in state.values()}  # tied weights have two names
        assert sum(np.prod(spec.shape) for spec in network.specs.values()) == sum(sizes.values())
        params = opened.load(name, dtype="float32")
        largest = max(state, key=lambda key: state[key].numel())
        assert any(np.isclose(p.sum(), state[largest].sum(), rtol=1e-4) for p in params.values())
    assert opened.vae_factor == oracle.vae_scale_factor
    assert opened.vae.config.scaling_factor == oracle.vae.config.scaling_factor
    assert opened.schedule.training_timesteps.tolist() == list(opened.family.training_timesteps or range(1000))

    oracle.set_progress_bar_config(disable=True)
    if not opened.schedule.is_flow:
        oracle.scheduler = diffusers.DDIMScheduler.from_config(oracle.scheduler.config)
    latents = torch.zeros(1, 4, 8, 8) if opened.family.name == "sdxl_refiner" else None
    size = {"image": latents, "strength": 0.9} if latents is not None else {"height": 32, "width": 32}
    result = oracle("a red circle", num_inference_steps=2, output_type="np", **size)
    assert result.images.shape == (1, 32, 32, 3)


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl", "sdxl_refiner", "sd3", "flux", "flux_schnell", "z_image"])
def test_family_is_found_from_the_folder(name: str, tmp_path: Path) -> None:
    write_random_model(name, tmp_path / "model")
    assert load_pipeline(tmp_path / "model", dtype="float32").family.name == name


def test_a_tokenizer_may_state_fewer_tokens_than_the_family(tmp_path: Path) -> None:
    write_random_model("sd3", tmp_path / "model")
    assert load_pipeline(tmp_path / "model", dtype="float32").text_lengths == (16, 16, 256)  # it states 512
    edit(tmp_path / "model" / "tokenizer_3" / "tokenizer_config.json", model_max_length=12)
    assert load_pipeline(tmp_path / "model", dtype="float32").text_lengths == (16, 16, 12)
    assert load_pipeline(tmp_path / "model", dtype="float32", text_length=20).text_lengths == (16, 16, 20)


def test_turbo_ends_in_pure_noise(sdxl: Path) -> None:
    assert load_pipeline(sdxl, dtype="float32").schedule.signal_T[-1] > 0.05
    assert load_pipeline(sdxl, dtype="float32", family="sdxl_turbo").schedule.signal_T[-1] == 0


def test_no_model_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder or file /.*/absent, and it is not a hub id"):
        load_pipeline(tmp_path / "absent", dtype="float32")
    with pytest.raises(
        FileNotFoundError, match=r"is not a diffusers model folder: .*model_index.json does not exist; .*hf download"
    ):
        load_pipeline(tmp_path, dtype="float32")


def test_a_single_file_that_is_a_pickle(tmp_path: Path) -> None:
    torch.save({"model.diffusion_model.out.2.bias": torch.zeros(4)}, tmp_path / "sd15.ckpt")
    with pytest.raises(ValueError, match=r"sd15.ckpt is not a .safetensors file; opening a pickle can run code"):
        load_pipeline(tmp_path / "sd15.ckpt", dtype="float32")


def test_an_incomplete_folder(sdxl: Path) -> None:
    (sdxl / "vae" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"vae/config.json does not exist, but model_index.json lists vae"):
        load_pipeline(sdxl, dtype="float32")


def test_another_kind_of_pipeline(sdxl: Path) -> None:
    edit(sdxl / "model_index.json", _class_name="FluxPipeline", unet=[None, None])
    with pytest.raises(ValueError, match="is of the class FluxPipeline and has no unet or transformer; supported are"):
        load_pipeline(sdxl, dtype="float32")


def test_inpainting_model(sdxl: Path) -> None:
    edit(sdxl / "unet" / "config.json", in_channels=9)
    with pytest.raises(ValueError, match=r"unet takes 9 channels, but the VAE makes 4; .*inpainting"):
        load_pipeline(sdxl, dtype="float32")


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("sdxl_large", "unknown model family 'sdxl_large', expected one of sd15, sd21, sdxl"),
        ("sd15", r"sdxl holds a model of the family sdxl, not sd15; leave the family out"),
    ],
)
def test_wrong_family(sdxl: Path, family: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_pipeline(sdxl, dtype="float32", family=family)


def test_the_variant_asked_for_is_read(sdxl: Path) -> None:
    plain = load_pipeline(sdxl, dtype="float32")
    before = plain.fingerprint()
    weights = sdxl / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(
        {name: tensor.half() for name, tensor in load_file(weights).items()},
        weights.with_name("diffusion_pytorch_model.fp16.safetensors"),
    )
    half = load_pipeline(sdxl, dtype="float32", variant="fp16")
    assert {array.dtype.name for array in plain.read("vae").values()} == {"float32"}
    assert {array.dtype.name for array in half.read("vae").values()} == {"float16"}
    assert {array.dtype.name for array in half.read("unet").values()} == {"float32"}  # it has no other
    assert plain.fingerprint() == before != half.fingerprint()


@pytest.mark.parametrize(
    "file", ["scheduler/scheduler_config.json", "vae/config.json", "tokenizer_2/tokenizer_config.json"]
)
def test_fingerprint_sees_changed_configs(sdxl: Path, file: str) -> None:
    before = load_pipeline(sdxl, dtype="float32").fingerprint()
    (sdxl / file).write_text((sdxl / file).read_text() + " ")
    assert load_pipeline(sdxl, dtype="float32").fingerprint() != before


def test_a_unet_that_the_text_encoders_do_not_fit(tmp_path: Path) -> None:
    write_random_model("sd15", tmp_path / "sd15")
    write_random_model("sdxl", tmp_path / "sdxl")
    edit(tmp_path / "sdxl/unet/config.json", cross_attention_dim=48)
    with pytest.raises(ValueError, match=r"sdxl/unet attends to 48 features per token, but the .* of sdxl make 80"):
        load_pipeline(tmp_path / "sdxl", dtype="float32")
    edit(tmp_path / "sdxl/unet/config.json", cross_attention_dim=80, projection_class_embeddings_input_dim=80)
    with pytest.raises(ValueError, match=r"sdxl/unet takes 80 added features, but sdxl makes 88"):
        load_pipeline(tmp_path / "sdxl", dtype="float32")
    edit(tmp_path / "sd15/unet/config.json", cross_attention_dim=64)
    with pytest.raises(ValueError, match=r"attends to 64 features per token, but the .* of sd15 make 32"):
        load_pipeline(tmp_path / "sd15", dtype="float32")


def test_folders_that_are_something_else(sdxl: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    for where in ({"model": tmp_path / "run"}, {"model": sdxl, "unet": str(tmp_path / "run")}):
        with pytest.raises(ValueError, match=r"run is the work directory of a training run; export it first"):
            load_pipeline(**where, dtype="float32")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "one.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"if the model is one.safetensors, give the path of that file"):
        load_pipeline(tmp_path / "one", dtype="float32")


def test_a_single_file_of_sd21_does_not_say_what_it_predicts(tmp_path: Path) -> None:
    write_random_model("sd21", tmp_path / "model")
    pipeline = load_pipeline(tmp_path / "model", dtype="float32")
    file = save_single_file(pipeline, tmp_path / "one", pipeline.read("unet"), dtype=None, card="")
    with pytest.raises(ValueError, match=r"does not say what it predicts; set model_config to sd2-community"):
        load_pipeline(file, dtype="float32")
    found = load_pipeline(file, dtype="float32", model_config=str(tmp_path / "model"))
    assert found.family.name == "sd21"


def test_sd15_and_sd21_differ_in_their_unets(tmp_path: Path) -> None:
    write_random_model("sd21", tmp_path / "model")
    with pytest.raises(ValueError, match="model holds a model of the family sd21, not sd15; leave the family out"):
        load_pipeline(tmp_path / "model", dtype="float32", family="sd15")


def test_unknown_scheduler(sdxl: Path) -> None:
    edit(sdxl / "scheduler" / "scheduler_config.json", _class_name="EDMEulerScheduler")
    with pytest.raises(ValueError, match=r"sdxl/scheduler/scheduler_config.json: the scheduler EDMEuler"):
        load_pipeline(sdxl, dtype="float32")


def test_family_and_unet_must_agree(sdxl: Path) -> None:
    edit(sdxl / "unet" / "config.json", addition_embed_type=None, projection_class_embeddings_input_dim=None)
    with pytest.raises(ValueError, match="sdxl takes 6 time ids, but the UNet's addition_embed_type is None"):
        load_pipeline(sdxl, dtype="float32")


@pytest.fixture(scope="module")
def flow_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of random models, and flux.safetensors, the transformer of one of them."""
    folder = tmp_path_factory.mktemp("flow")
    for family in ("sd15", "sd3", "flux", "flux_schnell"):
        write_random_model(family, folder / family)
    flux = load_pipeline(folder / "flux", dtype="float32")
    file = save_single_file(flux, folder / "single", flux.read("transformer"), dtype=None, card="")
    Path(file).rename(folder / "flux.safetensors")
    shutil.copytree(folder / "flux", folder / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("sd15", {"transformer": "sd3"}, r"the denoiser of .*sd15 is a unet; set unet instead$"),
        ("sd3", {"unet": "sd15"}, r"the denoiser of .*sd3 is a transformer; set transformer instead$"),
        (
            "sd3",
            {"transformer": "flux"},
            r"describes a FluxTr.*, but the transformer of .*sd3 is a SD3Tr\w+$",
        ),
        (
            "sd15",
            {"unet": "flux.safetensors"},
            r"holds the transformer of FLUX.1; a file or folder of a UNet is",
        ),
        ("sd3", {"transformer": "flux.safetensors"}, r"holds the transformer of FLUX.1; .* of SD3 is needed here$"),
        ("sd3", {"family": "flux"}, r"sd3 holds a model of the family sd3, not flux; leave the family out$"),
        ("flux", {"family": "flux_schnell"}, r"flux holds a model of the family flux, not flux_schnell; leave"),
        ("flux.safetensors", {"family": "sd3"}, r"holds a model of the family flux, not sd3; leave the family out$"),
        ("flux.safetensors", {"model_config": "sd3"}, r"sd3 holds a model of the family sd3, not flux; leave"),
        (
            "flux.safetensors",
            {"model_config": "configs"},
            r"holds no text_encoder, and there are no weights in .*configs/text_encoder; set model_config to a folder "
            r"or hub id of a whole model of the family flux$",
        ),
    ],
)
def test_parts_of_another_family(model: str, options: dict[str, str], message: str, flow_models: Path) -> None:
    options = {name: value if name == "family" else str(flow_models / value) for name, value in options.items()}

    def read() -> None:
        opened = load_pipeline(flow_models / model, dtype="float32", **options)
        opened.read(opened.denoiser_name)

    with pytest.raises(ValueError, match=message):
        read()


@pytest.mark.parametrize("name", ["Flux2Transformer2DModel", "QwenImageTransformer2DModel"])
def test_transformers_that_are_not_supported(name: str, flow_models: Path, tmp_path: Path) -> None:
    model_index = json.loads((flow_models / "flux" / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(model_index | {"transformer": ["diffusers", name]}))
    with pytest.raises(ValueError, match=rf"model_index.json: transformer is diffusers.{name}, and only .*SD3.* or .*"):
        load_pipeline(tmp_path, dtype="float32")


def test_sd3_without_t5(flow_models: Path, tmp_path: Path) -> None:
    shutil.copytree(flow_models / "sd3", tmp_path / "sd3")
    edit(tmp_path / "sd3" / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    with pytest.raises(ValueError, match=r"sd3 has the text encoders .*_3'\], .*; take one with all of them"):
        load_pipeline(tmp_path / "sd3", dtype="float32")


def test_a_transformers_file_takes_the_rest_from_the_model_of_its_configs(flow_models: Path) -> None:
    file = flow_models / "flux.safetensors"
    opened = load_pipeline(file, dtype="float32", model_config=str(flow_models / "flux"))
    assert Path(opened.weights["transformer"]) == file
    assert {Path(path).parent for name, path in opened.weights.items() if name != "transformer"} == {
        flow_models / "flux"
    }
    # Another VAE needs no VAE there.
    shutil.copytree(flow_models / "flux", flow_models / "no_vae")
    shutil.rmtree(flow_models / "no_vae" / "vae")
    options = {"model_config": str(flow_models / "no_vae"), "vae": str(flow_models / "sd3")}
    assert Path(load_pipeline(file, dtype="float32", **options).weights["vae"]) == flow_models / "sd3" / "vae"


def test_unknown_random_family(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown model family 'sd4'"):
        write_random_model("sd4", tmp_path / "model")
