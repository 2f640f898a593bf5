"""Model folders and single files that are damaged, odd or incomplete give one sentence that names file and field."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpo_jax.models.pipeline import Pipeline, load_pipeline
from dpo_jax.models.random_model import write_random_model
from dpo_jax.models.save import save_single_file
from dpo_jax.models.single_file import V_PRED, ZERO_TERMINAL_SNR

SCHEDULER = "scheduler/scheduler_config.json"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 1\n"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SDXL with random weights, as a folder and as a single file."""
    folder = tmp_path_factory.mktemp("models")
    write_random_model("sdxl", folder / "model")
    pipeline = load_pipeline(folder / "model", dtype="float32")
    save_single_file(pipeline, folder / "single", pipeline.read("unet"), dtype=None, card="")
    return folder


@pytest.fixture
def model(written: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(written / "model", tmp_path / "model"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def opened(model: Path, **options: Any) -> Pipeline:
    return load_pipeline(model, dtype="float32", **options)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet/config.json", {"down_block_types": None}, "down_block_types: input should be a list, not None"),
        ("unet/config.json", {"norm_num_groups": None}, "norm_num_groups: input should be a valid integer, not None"),
        ("unet/config.json", {"layers_per_block": "1"}, "layers_per_block.0: input should be a valid integer, not '1'"),
        ("unet/config.json", {"layers_per_block": 10**12}, "layers_per_block.0: input should be less than or equal"),
        ("unet/config.json", {"layers_per_block": 200}, "make .* layers; at most 256 are supported"),
        ("unet/config.json", {"block_out_channels": [32] * 10**6}, "fit|levels"),
        ("unet/config.json", {"block_out_channels": 32}, "block_out_channels: input should be a list, not 32"),
        ("unet/config.json", {"block_out_channels": [16, 10**9]}, "block_out_channels.1: input should be less than"),
        (
            "unet/config.json",
            {"sample_size": [8, "8"]},
            r"sample_size: input should be a valid integer, not \(8, '8'\)",
        ),
        ("unet/config.json", {"sample_size": 0}, "sample_size: input should be greater than or equal to 1"),
        ("unet/config.json", {"norm_eps": float("nan"), "in_channels": True}, "in_channels: .*True; norm_eps: .*nan"),
        ("unet/config.json", {"auto_map": {"AutoModel": "evil.UNet"}}, "unknown field auto_map"),
        ("vae/config.json", {"block_out_channels": None}, "block_out_channels: input should be a list, not None"),
        ("vae/config.json", {"down_block_types": 3}, "down_block_types = 3 is not supported"),
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor: input should be greater than 0, not 0"),
        ("vae/config.json", {"norm_num_groups": 3}, "do not divide into norm_num_groups = 3"),
        ("vae/config.json", {"in_channels": 4}, "in_channels = 4 and out_channels = 3 are not supported"),
        ("text_encoder/config.json", {"hidden_size": None}, "hidden_size: input should be a valid integer, not None"),
        ("text_encoder/config.json", {"num_attention_heads": 5}, "hidden_size = 32 does not divide into"),
        ("text_encoder/config.json", {"architectures": "x"}, "architectures: input should be a valid list, not 'x'"),
        ("text_encoder/config.json", {"vocab_size": 10**12}, "vocab_size: input should be less than or equal"),
        (SCHEDULER, {"beta_start": "0.00085"}, "beta_start: input should be a valid number, not '0.00085'"),
        (SCHEDULER, {"beta_start": 2, "steps_offset": None}, "beta_start: .* not 2; steps_offset: .* not None"),
        (SCHEDULER, {"_class_name": None}, "the scheduler None is not supported"),
        ("model_index.json", {"_class_name": ["my_pipeline", "MyPipeline"]}, "_class_name: .* valid string"),
        ("model_index.json", {"unet": "x", "vae": []}, "unet: input should be a valid list, not 'x'; vae: list should"),
        ("model_index.json", {"unet": [None, 3]}, "unet.1: input should be a valid string, not 3"),
        ("model_index.json", {"extra": ["a"]}, "extra: list should have at least 2 items"),
        ("model_index.json", {"../x": ["a", "b"]}, "'../x' is not the name of a component"),
        (
            "model_index.json",
            {"unet": ["evil", "UNet"]},
            "unet is evil.UNet, and only diffusers.UNet2DCond.* supported",
        ),
        ("model_index.json", {"tokenizer": ["evil", "T"]}, "tokenizer is evil.T, and only transformers.CLIPTokenizer"),
    ],
)
def test_odd_values(model: Path, file: str, changes: dict[str, Any], message: str) -> None:
    edit(model / file, **changes)
    began = time.monotonic()
    with pytest.raises(ValueError, match=message) as error:
        opened(model)
    assert time.monotonic() - began < 10
    assert file in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("file", ["model_index.json", SCHEDULER, "unet/config.json", "text_encoder_2/config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS, "is a Git LFS pointer"),
        ("<!doctype html>", "is a web page"),
        ("", "is empty"),
        ("\0" * 100, "is nothing but zero bytes"),
        ("[1]", "input should be a valid dictionary"),
        ('{"a": 1,}', "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"a": ' + "9" * 10_000 + "}", "is not valid JSON"),
    ],
    ids=range(8),
)
def test_damaged_configs(model: Path, file: str, content: str, message: str) -> None:
    (model / file).write_text(content)
    with pytest.raises(ValueError, match=f"{file}.* {message}"):
        opened(model)


def test_configs_with_a_byte_order_mark(model: Path) -> None:
    for file in ("model_index.json", SCHEDULER, "unet/config.json"):
        (model / file).write_bytes(b"\xef\xbb\xbf" + (model / file).read_bytes())
    opened(model)


@pytest.mark.parametrize("sample_size", [[8, 12], [12, 8], 8.0, 8])
def test_sample_size_in_every_form(model: Path, sample_size: object) -> None:
    edit(model / "unet/config.json", sample_size=sample_size)
    assert opened(model).denoiser.config.sample_size == 8


def test_the_class_in_model_index_decides_about_the_projection(model: Path) -> None:
    edit(model / "text_encoder_2/config.json", architectures=["CLIPTextModel"])
    assert "text_projection.kernel" in opened(model).text_encoders[1].specs


def single(written: Path, path: Path, change: Any) -> Path:
    save_file(change(load_file(written / "single" / "single.safetensors")), path)
    return path


def marked(*marks: str) -> Any:
    return lambda tensors: tensors | {mark: np.zeros(0, np.float32) for mark in marks}


def test_a_single_file_that_predicts_velocity(written: Path, model: Path, tmp_path: Path) -> None:
    file = single(written, tmp_path / "v.safetensors", marked(V_PRED, ZERO_TERMINAL_SNR))
    euler = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
    edit(model / SCHEDULER, prediction_type="v_prediction", rescale_betas_zero_snr=True, **euler)
    pipeline = opened(file, model_config=str(model))
    assert pipeline.schedule.target_x0_T.any()
    assert pipeline.schedule.signal_T[-1] == 0
    assert pipeline.sampling_schedule.timestep_spacing == "trailing"


def test_marks_fill_in_what_the_configs_leave_open(written: Path, model: Path, tmp_path: Path) -> None:
    config = json.loads((model / SCHEDULER).read_text())
    for field in ("prediction_type", "timestep_spacing"):
        del config[field]
    (model / SCHEDULER).write_text(json.dumps(config))
    file = single(written, tmp_path / "v.safetensors", marked(V_PRED))
    pipeline = opened(file, model_config=str(model))
    assert pipeline.schedule.target_x0_T.any()
    assert pipeline.schedule.signal_T[-1] > 0
    file = single(written, tmp_path / "z.safetensors", marked(V_PRED, ZERO_TERMINAL_SNR))
    pipeline = opened(file, model_config=str(model))
    assert pipeline.schedule.signal_T[-1] == 0
    said = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert said.items() <= pipeline.scheduler_config.items()


@pytest.mark.parametrize(
    ("mark", "field", "value", "expected"),
    [
        (V_PRED, "prediction_type", "epsilon", "v_prediction"),
        (ZERO_TERMINAL_SNR, "rescale_betas_zero_snr", False, True),
    ],
)
def test_marks_that_the_configs_contradict(
    written: Path, model: Path, tmp_path: Path, mark: str, field: str, value: object, expected: object
) -> None:
    edit(model / SCHEDULER, **{field: value})
    file = single(written, tmp_path / "v.safetensors", marked(mark))
    message = (
        rf"v.safetensors holds the tensor {mark}, which says {field}={expected!r}, but .*{SCHEDULER} says {value!r}"
    )
    with pytest.raises(ValueError, match=message):
        opened(file, model_config=str(model))


def test_marks_win_over_the_published_configs(written: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpo_jax.models import single_file as module

    find = module.find_model
    monkeypatch.setattr(
        module, "find_model", lambda name, **o: find(str(model) if "stabilityai" in name else name, **o)
    )
    file = single(written, model.parent / "v.safetensors", marked(V_PRED, ZERO_TERMINAL_SNR))
    assert json.loads((model / SCHEDULER).read_text())["prediction_type"] == "epsilon"
    pipeline = opened(file)
    assert pipeline.schedule.target_x0_T.any()
    assert pipeline.schedule.signal_T[-1] == 0
    assert pipeline.sampling_schedule.timestep_spacing == "trailing"


def test_a_single_file_without_vae_takes_another(written: Path, tmp_path: Path) -> None:
    def without_vae(tensors: dict[str, Any]) -> dict[str, Any]:
        return {name: tensor for name, tensor in tensors.items() if not name.startswith("first_stage_model.")}

    file, configs = single(written, tmp_path / "novae.safetensors", without_vae), str(written / "model")
    with pytest.raises(ValueError, match=r"novae.safetensors has no VAE; give one as --vae \(config.vae in training\)"):
        opened(file, model_config=configs)
    pipeline = opened(file, model_config=configs, vae=configs)
    assert pipeline.read("vae").keys() == pipeline.vae.specs.keys()
    whole = str(written / "single" / "single.safetensors")
    assert opened(file, model_config=configs, vae=whole).read("vae").keys() == pipeline.vae.specs.keys()
    with pytest.raises(
        ValueError, match=r"lacks a part of the model: none of its tensors begins with first_stage_model"
    ):
        opened(file, model_config=configs, vae=str(file)).read("vae")


def test_a_unet_alone_under_another_prefix(written: Path, tmp_path: Path) -> None:
    def unet_alone(tensors: dict[str, Any]) -> dict[str, Any]:
        whole = {name: tensor for name, tensor in tensors.items() if name.startswith("model.diffusion_model.")}
        return {name.removeprefix("model."): tensor for name, tensor in whole.items()}

    file = single(written, tmp_path / "unet.safetensors", unet_alone)
    pipeline, expected = opened(written / "model", unet=str(file)), opened(written / "model").read("unet")
    for name, array in pipeline.read("unet").items():
        np.testing.assert_array_equal(array, expected[name])
    with pytest.raises(ValueError, match=r"holds a UNet without text encoders \(give the model .* this file as --unet"):
        opened(file)


def test_what_other_tools_leave_beside_the_networks(written: Path, tmp_path: Path) -> None:
    clip = "conditioner.embedders.0.transformer."
    extras = {
        f"{clip}text_projection.weight": (4, 4),
        f"{clip}vision_model.post_layernorm.weight": (3,),
        f"{clip}visual_projection.weight": (4, 3),
        f"{clip}logit_scale": (),
        f"{clip}text_model.embeddings.position_ids": (1, 16),
        "conditioner.embedders.1.model.visual.proj": (3, 4),
        "model_ema.decay": (),
        "denoiser.sigmas": (1000,),
        "alphas_cumprod": (1000,),
    }
    file = single(
        written,
        tmp_path / "more.safetensors",
        lambda tensors: tensors | {name: np.ones(shape, np.float32) for name, shape in extras.items()},
    )
    pipeline, expected = opened(file, model_config=str(written / "model")), opened(written / "model")
    for component in pipeline.components:
        params, theirs = pipeline.read(component), expected.read(component)
        assert params.keys() == theirs.keys()
        for name, array in params.items():
            np.testing.assert_array_equal(array, theirs[name])


def test_what_other_tools_leave_in_a_folder(model: Path) -> None:
    file = model / "text_encoder" / "model.safetensors"
    more = {"text_projection.weight": np.ones((4, 4)), "vision_model.x": np.ones(3), "logit_scale": np.ones(())}
    save_file(load_file(file) | more, file)
    opened(model).read("text_encoder")
    save_file(load_file(file) | {"text_model.surprise": np.ones(3)}, file)
    with pytest.raises(ValueError, match=r"1 unexpected: text_model.surprise$"):
        opened(model).read("text_encoder")
