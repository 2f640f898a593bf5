"""Cards and files of exports state licence, base, scheduler and steps, and no path of this machine."""

import json
import re
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
from etils import epath
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from dpo_jax.cli import flatten, load_config
from dpo_jax.models.families import FAMILIES
from dpo_jax.models.pipeline import Pipeline, load_pipeline
from dpo_jax.models.random_model import write_random_model
from dpo_jax.training.export import export, exportable_model
from dpo_jax.training.model_card import model_card, read_result
from dpo_jax.training.model_origin import Origin, model_spec, origin_of, public_name, without_paths
from dpo_jax.weights import safetensors_file

ROOT = Path(__file__).parents[2]
BIG = 10**10
TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "mine"
    write_random_model("sdxl", folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Pipeline:
    return load_pipeline(folder, dtype="float32")


def with_scheduler(folder: Path, target: Path, **fields: object) -> Path:
    """Return a copy of the model with other fields of its scheduler."""
    target.mkdir()
    for path in folder.iterdir():
        if path.name != "scheduler":
            (target / path.name).symlink_to(path)
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    (target / "scheduler").mkdir()
    (target / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | fields))
    return target


@pytest.fixture(scope="module")
def velocity(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    fields = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return with_scheduler(folder, tmp_path_factory.mktemp("models") / "velocity", **fields)


def save_lora(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> Path:
    header = {name: (array.shape, array.dtype) for name, array in tensors.items()}
    safetensors_file.write(epath.Path(path), tensors.items(), header, metadata)
    return path


def lora_with_text(pipeline: Pipeline, path: Path) -> Path:
    """Write a LoRA of one layer of the UNet and one of each text encoder, under kohya's names."""
    random = np.random.default_rng(0)
    layers = {f"lora_unet_{TO_Q.replace('.', '_')}": pipeline.denoiser.specs[f"{TO_Q}.kernel"].torch_shape}
    mlp = "text_model.encoder.layers.0.mlp.fc1"
    for number, encoder in enumerate(pipeline.text_encoders, 1):
        layers[f"lora_te{number}_{mlp.replace('.', '_')}"] = encoder.specs[f"{mlp}.kernel"].torch_shape
    tensors = {}
    for name, (outputs, inputs) in layers.items():
        tensors[f"{name}.lora_down.weight"] = random.normal(size=(2, inputs)).astype(np.float32)
        tensors[f"{name}.lora_up.weight"] = random.normal(size=(outputs, 2)).astype(np.float32)
        tensors[f"{name}.alpha"] = np.array(6, np.float32)
    return save_lora(path, tensors)


def test_a_lora_of_text_encoders_is_merged_as_diffusers_merges_it(
    folder: Path, pipeline: Pipeline, tmp_path: Path
) -> None:
    file = lora_with_text(pipeline, tmp_path / "lora.safetensors")
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    pipe.load_lora_weights(file)
    pipe.fuse_lora(components=["unet", "text_encoder", "text_encoder_2"])
    pipe.unload_lora_weights()
    tuned = exportable_model(str(folder), lora=str(file))
    output = export(tuned, tmp_path / "merged", format="diffusers", dtype=None, max_shard_bytes=BIG)
    ours = diffusers.StableDiffusionXLPipeline.from_pretrained(output)
    plain = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    for component in ("unet", "text_encoder", "text_encoder_2"):
        base, found, expected = (getattr(p, component).state_dict() for p in (plain, ours, pipe))
        changed = [name for name in base if not np.array_equal(base[name], found[name])]
        assert len(changed) == 1
        for name, tensor in expected.items():
            np.testing.assert_allclose(found[name], tensor, rtol=1e-5, atol=1e-6)
    for format in ("unet", "lora", "kohya"):
        export(tuned, tmp_path / format, format=format, dtype=None, max_shard_bytes=BIG)
        assert "The LoRA also changes the text encoders" in (tmp_path / format / "README.md").read_text()


@pytest.mark.parametrize("format", ["diffusers", "unet", "single", "lora", "kohya"])
def test_nothing_exported_names_a_place_on_this_machine(
    format: str, folder: Path, pipeline: Pipeline, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(folder, tmp_path / "private" / "base"))
    for name, field in (
        ("model_index.json", "_name_or_path"),
        ("unet/config.json", "_name_or_path"),
        ("text_encoder/config.json", "_name_or_path"),
        ("tokenizer/tokenizer_config.json", "name_or_path"),
    ):
        text = json.loads((model / name).read_text()) | {field: str(model)}
        (model / name).write_text(json.dumps(text))
    file = lora_with_text(pipeline, tmp_path / "private" / "lora.safetensors")
    output = tmp_path / "exported"
    tuned = exportable_model(str(model), lora=str(file))
    export(tuned, output, format=format, dtype=None, max_shard_bytes=BIG)
    for path in output.rglob("*"):
        if path.is_file():
            assert b"private" not in path.read_bytes(), path
            assert str(tmp_path).encode() not in path.read_bytes(), path
    assert "Converted from base with lora.safetensors" in (output / "README.md").read_text()


@pytest.mark.parametrize(
    ("model", "license", "base"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", "openrail++", "stabilityai/stable-diffusion-xl-base-1.0"),
        (
            "stabilityai/stable-diffusion-xl-base-1.0/sd_xl_base_1.0.safetensors@main",
            "openrail++",
            "stabilityai/stable-diffusion-xl-base-1.0",
        ),
        ("someone/other", None, "someone/other"),
        ("/home/me/sdxl", None, None),
        ("random:sdxl", None, None),
    ],
)
def test_licence_and_base_in_the_card(model: str, license: str | None, base: str | None, pipeline: Pipeline) -> None:
    origin = origin_of(model, pipeline)
    text = model_card({"model": model}, pipeline, "diffusers", "mine", "float32", origin, [origin.remark])
    card = ModelCard(text)
    assert (card.data.license, card.data.base_model) == (license, base)
    assert ("is unknown. State it with --license" in text) == (license is None)
    assert "/home" not in text


def test_licence_of_a_model_of_published_size(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pipeline, "is_of_published_size", True)
    origin = origin_of("/data/sdxl", pipeline)
    assert origin.license == FAMILIES["sdxl"].license
    assert "is that of stabilityai/stable-diffusion-xl-base-1.0, the usual base" in origin.remark
    assert "If the base model has another, state it with --license, and the base's hub id with" in origin.remark


def test_what_the_user_says_of_licence_and_base(pipeline: Pipeline) -> None:
    assert origin_of("/data/x", pipeline, "mit", "me/base") == Origin("me/base", ("mit", "", ""))
    assert origin_of("/data/x", pipeline, base_model=FAMILIES["sdxl"].published).license == FAMILIES["sdxl"].license
    with pytest.raises(ValueError, match="--base_model=/data/x is not a hub id"):
        origin_of("/data/x", pipeline, base_model="/data/x")
    with pytest.raises(ValueError, match="--license=all rights reserved is not the hub's id"):
        origin_of("/data/x", pipeline, "all rights reserved")


def test_turbos_licence_has_a_name_and_a_link(folder: Path) -> None:
    pipeline = load_pipeline(folder, dtype="float32", family="sdxl_turbo")
    origin = origin_of("stabilityai/sdxl-turbo", pipeline)
    data = ModelCard(model_card({"model": "x"}, pipeline, "unet", "mine", "float32", origin)).data
    assert (data.license, data.license_name) == ("other", "sai-nc-community")
    assert data.license_link.startswith("https://huggingface.co/stabilityai/sdxl-turbo/")


def test_every_family_has_what_web_uis_read(tmp_path: Path) -> None:
    licenses = {name: family.license.id for name, family in FAMILIES.items()}
    assert licenses == {
        "sd15": "creativeml-openrail-m",
        "sd21": "openrail++",
        "sdxl": "openrail++",
        "sdxl_turbo": "other",
        "sdxl_refiner": "openrail++",
        "sd3": "other",
        "flux": "other",
        "flux_schnell": "apache-2.0",
        "z_image": "apache-2.0",
        "z_image_turbo": "apache-2.0",
    }
    write_random_model("sd21", tmp_path / "sd21")
    base = with_scheduler(tmp_path / "sd21", tmp_path / "base", prediction_type="epsilon")
    for folder, version, architecture in (
        (tmp_path / "sd21", "sd_v2_v", "stable-diffusion-v2-768-v"),
        (base, "sd_v2", "stable-diffusion-v2-512"),
    ):
        assert load_pipeline(folder, dtype="float32").marks[:2] == (version, architecture)


def test_a_lora_says_what_it_is(folder: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    file = lora_with_text(pipeline, tmp_path / "lora.safetensors")
    tuned = exportable_model(str(folder), lora=str(file))
    expected = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.prediction_type": "epsilon",
        "modelspec.resolution": "32x32",
        "modelspec.license": "mit",
    }
    for format, implementation in (
        ("lora", "diffusers"),
        ("kohya", "https://github.com/Stability-AI/generative-models"),
    ):
        path = export(tuned, tmp_path / format, format=format, dtype=None, max_shard_bytes=BIG, license="mit")
        found = safetensors_file.read_metadata(path)
        assert expected.items() <= found.items()
        assert (found["modelspec.title"], found["modelspec.implementation"]) == (format, implementation)
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["modelspec.date"])
        card = (tmp_path / format / "README.md").read_text()
        assert ("Web UIs (ComfyUI, AUTOMATIC1111, Forge) do not read its names" in card) == (format == "lora")


def test_single_files_of_velocity_models_say_so_to_web_uis(folder: Path, velocity: Path, tmp_path: Path) -> None:
    for model, marks, prediction in ((folder, set(), "epsilon"), (velocity, {"v_pred", "ztsnr"}, "v")):
        name = model.name
        tuned = exportable_model(str(model), lora=None)
        path = export(tuned, tmp_path / name, format="single", dtype=None, max_shard_bytes=BIG)
        tensors = load_file(path)
        assert {name for name in tensors if not name.startswith(("model.", "first_stage", "conditioner."))} == marks
        assert all(tensors[mark].shape == (0,) for mark in marks)
        metadata = safetensors_file.read_metadata(path)
        assert metadata["modelspec.prediction_type"] == prediction
        assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
        card = (tmp_path / name / "README.md").read_text()
        assert ("pipe.scheduler = diffusers." in card) == bool(marks)
    assert "Scheduler: EulerDiscreteScheduler, `prediction_type=v_prediction`, `rescale_betas_zero_snr=True`" in card
    opened = diffusers.StableDiffusionXLPipeline.from_single_file(path, config=str(folder), local_files_only=True)
    code = re.search(r"^pipe.scheduler = .*$", card, re.MULTILINE)[0]
    exec(code, {"pipe": opened, "diffusers": diffusers})
    assert opened.scheduler.config.prediction_type == "v_prediction"
    assert opened.scheduler.alphas_cumprod[-1] < 1e-6
    reopened = load_pipeline(path, dtype="float32", model_config=str(velocity))
    assert reopened.predicts_velocity
    assert reopened.ends_in_noise


def test_an_exported_folder_has_the_schedule_of_the_model(velocity: Path, tmp_path: Path) -> None:
    tuned = exportable_model(str(velocity), lora=None)
    export(tuned, tmp_path / "out", format="diffusers", dtype=None, max_shard_bytes=BIG)
    written = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert (written["prediction_type"], written["rescale_betas_zero_snr"]) == ("v_prediction", True)
    assert "`rescale_betas_zero_snr=True`" in (tmp_path / "out" / "README.md").read_text()


def test_figures_carry_the_step_they_were_measured_at(pipeline: Pipeline) -> None:
    config = flatten(load_config(f"{ROOT}/configs/sd15.py:lora"))
    config |= {"model": "/home/me/sd15", "data.path": "/home/me/data", "lora.init": "~/lora.safetensors"}
    facts = {
        "config": config,
        "step": 1200,
        "validation": {"step": 1000, "validation/pair_accuracy": 0.625},
        "result": {
            "win_rate": 0.5, "win_rate_low": 0.25, "win_rate_high": 0.75, "ties": 0, "comparisons": 4,
            "base_score": 1.0, "tuned_score": 2.0, "settings": {"models": {"tuned": "run abc, step 800"}},
        },
    }  # fmt: skip
    card = model_card(facts, pipeline, "lora", "mine", "float32", Origin(None, None))
    assert "Measured after step 1000; the weights here are those after step 1200." in card
    assert "- measured on tuned: run abc, step 800" in card
    assert "/home" not in card
    assert "~/" not in card
    assert '"data.path": "data"' in card
    facts["validation"]["step"] = 1200
    assert "Measured after step 1200, on these weights." in model_card(
        facts, pipeline, "lora", "mine", "float32", Origin(None, None)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "valid dictionary"),
        ("{", "is not valid JSON"),
        ("{}", r"win_rate: field required; win_rate_low: .* and \d more"),
        ('{"rounds": []}', "rounds: list should have at least 1 item"),
        ('{"rounds": [{"images": 1, "scores": {"a": 2}}]}', "rounds.0.scores.a: "),
    ],
)
def test_a_damaged_result_names_its_file(text: str, message: str, tmp_path: Path) -> None:
    assert read_result(tmp_path) is None
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ValueError, match=rf"{tmp_path}/result.json.*{message}"):
        read_result(tmp_path)


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("/data/models/sdxl", "sdxl"),
        ("/data/my models/x/", "x"),
        ("~/m", "m"),
        ("C:\\Users\\me\\m", "m"),
        ("\\\\host\\share\\m", "m"),
        ("implicit=/a/exported:/b/base", "implicit=exported:base"),
        ("aesthetic=C:\\me\\l14.safetensors", "aesthetic=l14.safetensors"),
        ("python /home/me/judge.py --x=/a/b", "python judge.py --x=b"),
        ("file:///a/b", "b"),
        *(
            (same, same)
            for same in (r"\.(to_q|to_k)$", "a/b:c/d", "gs://b/x", "https://h/x", "random:sd15", "rel/path")
        ),
    ],
)
def test_public_names(text: str, public: str) -> None:
    assert public_name(text) == public
    assert without_paths({"a": [text, 1, None]}) == {"a": [public, 1, None]}


def test_refiner_and_sd15_specs(tmp_path: Path) -> None:
    write_random_model("sd15", tmp_path / "sd15")
    pipeline = load_pipeline(tmp_path / "sd15", dtype="float32")
    found = model_spec(
        {"model": "x", "step": 7, "config": {"data.resolution": 48}}, pipeline, "kohya", "t", Origin(None, None)
    )
    assert found["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert found["modelspec.implementation"] == "diffusers"
    assert found["modelspec.resolution"] == "48x48"
    assert found["modelspec.description"] == "Trained for 7 steps with dpo_jax"
    assert "modelspec.license" not in found
