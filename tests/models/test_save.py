"""Writing whole models, compared with the files that PyTorch diffusers and transformers write and open."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from etils import epath
from safetensors import deserialize
from safetensors.torch import load_file, save_file

from dpo_jax.models.families import FAMILIES
from dpo_jax.models.pipeline import Pipeline, load_pipeline
from dpo_jax.models.random_model import write_random_model
from dpo_jax.models.save import save_denoiser, save_pipeline, save_single_file
from dpo_jax.weights import original
from dpo_jax.weights.layout import OLD_VAE_ATTENTION

CARD = "---\nlibrary_name: diffusers\n---\n\nTuned — by hand.\n"
CLIPS = ("text_encoder", "text_encoder_2")
OLD_TOKENIZER = ("vocab.json", "merges.txt")
DTYPES = ("float32", "bfloat16", "float16")


# FLUX.1-schnell and Z-Image-Turbo are stored as their siblings are.
@pytest.fixture(scope="module", params=[name for name in FAMILIES if name not in ("flux_schnell", "z_image_turbo")])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def in_pytorch(family: str, tmp_path_factory: pytest.TempPathFactory) -> diffusers.DiffusionPipeline:
    """A random model of each family."""
    folder = tmp_path_factory.mktemp("random") / family
    write_random_model(family, folder)
    return diffusers.DiffusionPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def of_pytorch(in_pytorch: diffusers.DiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that PyTorch saves in each dtype; "mixed" is float16 with a float32 VAE, as SDXL is often stored."""
    folders = {name: tmp_path_factory.mktemp("pytorch") / name for name in (*DTYPES, "mixed")}
    for name in DTYPES:
        in_pytorch.to(dtype=getattr(torch, name)).save_pretrained(folders[name])
    in_pytorch.vae.float()
    in_pytorch.save_pretrained(folders["mixed"])
    return folders


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sdxl"
    write_random_model("sdxl", folder)
    return folder


@pytest.fixture
def sdxl(sdxl_folder: Path, tmp_path: Path) -> Path:
    """A copy that the test may change."""
    return Path(shutil.copytree(sdxl_folder, tmp_path / "sdxl"))


@pytest.fixture(scope="module")
def sdxl_pipeline(sdxl_folder: Path) -> Pipeline:
    return load_pipeline(sdxl_folder, dtype="float32")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """Another SDXL, whose VAE also has another config."""
    folder = tmp_path_factory.mktemp("models") / "other"
    write_random_model("sdxl", folder, seed=10)
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.13025}))
    return load_pipeline(folder, dtype="float32")


def save(pipeline: Pipeline, output: Path, **options: object) -> Path:
    """Write the model in its stored dtype."""
    save_pipeline(pipeline, output, pipeline.read(pipeline.denoiser_name), **{"dtype": None, "card": CARD, **options})
    return output


def stored(folder: Path) -> dict[str, dict]:
    """Return dtype, shape and bytes of every tensor in a folder, by name."""
    files = [deserialize(path.read_bytes()) for path in sorted(folder.glob("*.safetensors"))]
    return {name: tensor for file in files for name, tensor in file}


def with_prefix(names: dict) -> dict:
    """Add the prefix: transformers 5 writes CLIPTextModel without it if it was read so; dpo_jax always writes it."""
    if "embeddings.token_embedding.weight" not in names:
        return names
    return {f"text_model.{name}" if re.match("embeddings|encoder|final", name) else name: names[name] for name in names}


def assert_same_model(ours: Path, theirs: Path) -> None:
    """Compare two folders. They have the same files, except for README.md, the tokenizer files for old tools, and
    Qwen3's settings for writing text; the same JSON, except for where it was read from; and the same bytes of every
    tensor."""
    paths = {path.relative_to(theirs) for path in theirs.rglob("*") if path.is_file()}
    paths = {path for path in paths if path.name != "generation_config.json"}
    added = {
        path.with_name(name)
        for path in paths
        if path.name == "tokenizer.json" and json.loads((theirs / path).read_text())["model"]["type"] == "BPE"
        for name in OLD_TOKENIZER
    }
    assert {path.relative_to(ours) for path in ours.rglob("*") if path.is_file()} == paths | {Path("README.md")} | added
    for path in paths:
        if path.suffix == ".safetensors":
            tensors, expected = stored(ours / path.parent), stored(theirs / path.parent)
            assert tensors == (with_prefix(expected) if path.parent.name in CLIPS else expected), path
        elif path.name.endswith("config.json") or path.name == "model_index.json":
            expected = json.loads((theirs / path).read_text())
            expected.pop("_name_or_path", None)
            assert json.loads((ours / path).read_text()) == expected, path
        else:
            assert (ours / path).read_bytes() == (theirs / path).read_bytes(), path


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_folder_of_pytorch_is_written_as_it_was(
    dtype: str, family: str, of_pytorch: dict[str, Path], tmp_path: Path
) -> None:
    pipeline = load_pipeline(of_pytorch[dtype], dtype="float32", family=family)
    assert_same_model(save(pipeline, tmp_path / "kept"), of_pytorch[dtype])
    assert_same_model(save(pipeline, tmp_path / "cast", dtype=dtype), of_pytorch[dtype])


def test_a_single_file_becomes_the_folder_it_was(family: str, of_pytorch: dict[str, Path], tmp_path: Path) -> None:
    folder = of_pytorch["mixed"]
    pipeline = load_pipeline(folder, dtype="float32", family=family)
    denoiser = pipeline.read(pipeline.denoiser_name)
    file = save_single_file(pipeline, tmp_path / "single", denoiser, dtype=None, card=CARD)
    assert file == epath.Path(tmp_path / "single" / "single.safetensors")
    assert sorted(path.name for path in file.parent.iterdir()) == ["README.md", "single.safetensors"]
    assert (tmp_path / "single" / "README.md").read_text() == CARD
    configs = folder
    if not pipeline.family.denoiser.is_alone_in_files:
        configs = shutil.copytree(folder, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    reopened = load_pipeline(file, dtype="float32", family=family, model_config=str(configs))
    assert_same_model(save(reopened, tmp_path / "folder"), folder)


def test_a_tokenizer_of_transformers_5_is_written_as_old_tools_read_it_too(tmp_path: Path) -> None:
    tiny = Path(__file__).parents[2] / "dpo_jax" / "tiny" / "model"
    shutil.copytree(tiny, tmp_path / "model", ignore=shutil.ignore_patterns("vocab.json", "merges.txt"))
    for name in ("tokenizer", "tokenizer_2"):
        transformers.CLIPTokenizer.from_pretrained(tiny / name).save_pretrained(tmp_path / "model" / name)
        assert not (tmp_path / "model" / name / "vocab.json").exists()
    save(load_pipeline(tmp_path / "model", dtype="float32"), tmp_path / "ours")
    for name in ("tokenizer", "tokenizer_2"):
        written = tmp_path / "ours" / name
        assert json.loads((written / "vocab.json").read_text()) == json.loads((tiny / name / "vocab.json").read_text())
        lines, expected = ((f / "merges.txt").read_text().splitlines() for f in (written, tiny / name))
        assert (lines[0], lines[1:]) == ("#version: 0.2", expected[1:])


def test_programs_that_a_model_brings_are_not_passed_on(sdxl: Path, tmp_path: Path) -> None:
    (sdxl / "tokenizer" / "custom.py").write_text("raise SystemExit")
    (sdxl / "tokenizer" / "__pycache__").mkdir()
    save(load_pipeline(sdxl, dtype="float32"), tmp_path / "ours")
    assert not list((tmp_path / "ours").rglob("*.py"))


@pytest.mark.parametrize(("held", "dtype"), [("float32", "bfloat16"), ("float16", "float32")])
def test_cast_to_another_dtype_as_pytorch_casts(held: str, dtype: str, sdxl: Path, tmp_path: Path) -> None:
    oracle = diffusers.DiffusionPipeline.from_pretrained(sdxl).to(dtype=getattr(torch, held))
    oracle.save_pretrained(tmp_path / "held")
    oracle.to(dtype=getattr(torch, dtype)).save_pretrained(tmp_path / "cast")
    pipeline = load_pipeline(tmp_path / "held", dtype="float32")
    assert_same_model(save(pipeline, tmp_path / "ours", dtype=dtype), tmp_path / "cast")


def test_text_encoders_open_in_the_dtype_they_were_cast_to(sdxl: Path, tmp_path: Path) -> None:
    """transformers follows the config, also under the name of version 4; diffusers opens UNet and VAE in float32."""
    for name in CLIPS:
        path = sdxl / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"torch_dtype": "float16"}))
    save(load_pipeline(sdxl, dtype="float32"), tmp_path / "ours", dtype="float32")
    oracle = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours")
    assert {getattr(oracle, name).dtype for name in (*CLIPS, "unet", "vae")} == {torch.float32}


def test_shards_are_named_and_read_as_those_of_pytorch(
    sdxl_pipeline: Pipeline, sdxl_folder: Path, tmp_path: Path
) -> None:
    size = 50_000
    oracle = diffusers.DiffusionPipeline.from_pretrained(sdxl_folder)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    oracle.save_pretrained(theirs)
    for name in sdxl_pipeline.components:
        shutil.rmtree(theirs / name)
        getattr(oracle, name).save_pretrained(theirs / name, max_shard_size=size)
    save(sdxl_pipeline, ours, max_shard_bytes=size)
    reread = save(load_pipeline(theirs, dtype="float32"), tmp_path / "reread")

    reopened = diffusers.DiffusionPipeline.from_pretrained(ours)
    for name in sdxl_pipeline.components:
        assert stored(ours / name) == stored(theirs / name) == stored(reread / name)
        stem = "model" if name in CLIPS else "diffusion_pytorch_model"
        indices = []
        for folder in (ours / name, theirs / name):
            shards = sorted(path.name for path in folder.glob("*.safetensors"))
            assert len(shards) > 2  # the number differs, because they fill shards by other rules
            assert shards == [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
            indices.append(json.loads((folder / f"{stem}.safetensors.index.json").read_text()))
        for shard in (ours / name).glob("*.safetensors"):
            sizes = [len(tensor["data"]) for _, tensor in deserialize(shard.read_bytes())]
            assert sum(sizes) <= size or len(sizes) == 1
        assert indices[0]["weight_map"].keys() == indices[1]["weight_map"].keys()
        assert indices[0]["metadata"]["total_size"] == indices[1]["metadata"]["total_size"]
        state, expected = getattr(reopened, name).state_dict(), getattr(oracle, name).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoders_of_every_transformers_get_the_old_prefix(
    prefix: str, sdxl: Path, sdxl_folder: Path, tmp_path: Path
) -> None:
    for name in CLIPS:
        path = sdxl / name / "model.safetensors"
        tensors = {key.replace("text_model.", prefix): value for key, value in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    output = save(load_pipeline(sdxl, dtype="float32"), tmp_path / "ours")
    for name, model in zip(CLIPS, (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection), strict=True):
        assert stored(output / name) == stored(sdxl_folder / name)
        assert {key.partition(".")[0] for key in stored(output / name)} <= {"text_model", "text_projection"}
        opened, info = model.from_pretrained(output / name, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        embedding = load_file(sdxl_folder / name / "model.safetensors")["text_model.embeddings.token_embedding.weight"]
        assert torch.equal(opened.get_input_embeddings().weight, embedding)


def test_a_vae_of_old_names_gets_those_of_today(sdxl: Path, sdxl_folder: Path, tmp_path: Path) -> None:
    path = sdxl / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for new, old in OLD_VAE_ATTENTION.items():
        tensors = {key.replace(f".{new}.", f".{old}."): value for key, value in tensors.items()}
    assert sum(".query." in key for key in tensors) == 4
    save_file(tensors, path, {"format": "pt"})
    assert_same_model(save(load_pipeline(sdxl, dtype="float32"), tmp_path / "ours"), sdxl_folder)


KINDS = ("its folder", "a pipeline's folder", "a file of its own", "a file of today's names", "a whole single file")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("component", ["unet", "vae"])
def test_another_component_is_loaded_and_written(
    component: str, kind: str, sdxl_pipeline: Pipeline, other: Pipeline, tmp_path: Path
) -> None:
    base, theirs = Path(sdxl_pipeline.folder), Path(other.folder)
    file = tmp_path / "sdxl_vae.safetensors"
    if kind == "a file of its own":  # as sdxl_vae.safetensors is: original names without a prefix
        parts = {"": (other.read(component), other.components[component].specs)}
        original.write(epath.Path(file), parts, dtype=None)
    if kind == "a whole single file":
        save_single_file(other, tmp_path / "all", other.read("unet"), dtype=None, card=CARD)
    paths = (
        theirs / component,
        theirs,
        file,
        theirs / component / "diffusion_pytorch_model.safetensors",
        tmp_path / "all" / "all.safetensors",
    )
    path = dict(zip(KINDS, paths, strict=True))[kind]
    pipeline = load_pipeline(base, dtype="float32", **{component: str(path)})
    loaded = pipeline.load(component, dtype="float32")
    for name, value in other.load(component, dtype="float32").items():
        np.testing.assert_array_equal(loaded[name], value)

    output = save(pipeline, tmp_path / "ours")
    for name in pipeline.components:
        assert stored(output / name) == stored((theirs if name == component else base) / name)
    # A single file has no config, so the model's is used.
    source = other if path.is_dir() else sdxl_pipeline
    assert pipeline.components[component].config == source.components[component].config
    assert json.loads((output / component / "config.json").read_text()) == source.config(component)


def test_the_given_unet_is_written_and_all_else_as_it_was(
    sdxl_pipeline: Pipeline, sdxl_folder: Path, tmp_path: Path
) -> None:
    tuned = {name: 2 * value for name, value in sdxl_pipeline.read("unet").items()}
    save_pipeline(sdxl_pipeline, tmp_path / "whole", tuned, dtype="float32", card=CARD)
    save_denoiser(sdxl_pipeline, tmp_path / "unet", tuned, dtype="float32", card=CARD)
    save_single_file(sdxl_pipeline, tmp_path / "single", tuned, dtype="float32", card=CARD)
    single = load_pipeline(tmp_path / "single/single.safetensors", dtype="float32", model_config=str(sdxl_folder)).read(
        "unet"
    )
    oracles = (
        diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "whole").unet,
        diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet"),
    )
    before = load_file(sdxl_folder / "unet" / "diffusion_pytorch_model.safetensors")
    for oracle in oracles:
        after = oracle.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], 2 * before[name]) for name in before)
    assert all(np.array_equal(single[name], tuned[name]) for name in tuned)
    for name in ("whole", "unet", "single"):
        assert (tmp_path / name / "README.md").read_text() == CARD
    shutil.rmtree(tmp_path / "whole" / "unet")
    shutil.copytree(sdxl_folder / "unet", tmp_path / "whole" / "unet")
    assert_same_model(tmp_path / "whole", sdxl_folder)


def test_a_base_held_as_fp16_variant_gets_plain_names(sdxl: Path, sdxl_folder: Path, tmp_path: Path) -> None:
    for path in sdxl.glob("*/*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    assert_same_model(save(load_pipeline(sdxl, dtype="float32"), tmp_path / "ours"), sdxl_folder)


@pytest.mark.parametrize("write", [save_pipeline, save_denoiser, save_single_file])
def test_a_failed_save_leaves_nothing(write: Callable, sdxl_pipeline: Pipeline, tmp_path: Path) -> None:
    unet = sdxl_pipeline.read("unet")
    last = list(unet)[-1]
    with pytest.raises(AssertionError):
        write(sdxl_pipeline, tmp_path / "ours", unet | {last: unet[last][:-1]}, dtype=None, card=CARD)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("write", [save_pipeline, save_denoiser, save_single_file])
def test_nothing_is_overwritten(write: Callable, sdxl_pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="already exists and is not an empty folder"):
        write(sdxl_pipeline, tmp_path, sdxl_pipeline.read("unet"), dtype=None, card=CARD)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.fixture(scope="module")
def checked_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SD1.5 with a safety checker, like the published ones."""
    folder = tmp_path_factory.mktemp("models") / "sd15"
    write_random_model("sd15", folder)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {"vocab_size": 5, "bos_token_id": 3, "eos_token_id": 4, **size}
    config = transformers.CLIPConfig(text_config=text, vision_config={"image_size": 8, "patch_size": 4, **size})
    StableDiffusionSafetyChecker(config).save_pretrained(folder / "safety_checker")
    transformers.CLIPImageProcessor().save_pretrained(folder / "feature_extractor")
    index = folder / "model_index.json"
    components = {
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    }
    index.write_text(json.dumps(json.loads(index.read_text()) | components))
    return folder


@pytest.fixture
def checked(checked_folder: Path, tmp_path: Path) -> Path:
    """A copy that the test may change."""
    return Path(shutil.copytree(checked_folder, tmp_path / "sd15"))


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_a_safety_checker_is_kept_without_its_pickle(
    variant: str, checked: Path, checked_folder: Path, tmp_path: Path
) -> None:
    safety_checker = checked / "safety_checker"
    (safety_checker / "model.safetensors").rename(safety_checker / f"model{variant}.safetensors")
    for name in ("pytorch_model.bin", "pytorch_model.fp16.bin", "model.ckpt", "flax_model.msgpack"):
        (safety_checker / name).write_bytes(b"code")
    output = save(load_pipeline(checked, dtype="float32"), tmp_path / "ours")
    assert_same_model(output, checked_folder)
    assert diffusers.DiffusionPipeline.from_pretrained(output).safety_checker is not None


def test_of_two_safety_checkers_the_plain_one_is_kept(checked: Path, checked_folder: Path, tmp_path: Path) -> None:
    (checked / "safety_checker" / "model.fp16.safetensors").write_bytes(b"half as good")
    assert_same_model(save(load_pipeline(checked, dtype="float32"), tmp_path / "ours"), checked_folder)


@pytest.mark.parametrize("held", ["nothing", "its config", "a pickle", "legacy Flax"])
def test_no_safety_checker_where_none_can_be_opened(held: str, checked: Path, tmp_path: Path) -> None:
    weights = checked / "safety_checker" / "model.safetensors"
    if held == "a pickle":
        weights.rename(weights.with_name("pytorch_model.bin"))
    elif held == "legacy Flax":
        weights.rename(weights.with_name("flax_model.msgpack"))
    elif held == "its config":
        weights.unlink()
    else:
        shutil.rmtree(weights.parent)
    output = save(load_pipeline(checked, dtype="float32"), tmp_path / "ours")
    assert not (output / "safety_checker").exists()
    assert json.loads((output / "model_index.json").read_text())["safety_checker"] == [None, None]
    opened = diffusers.DiffusionPipeline.from_pretrained(output)
    assert opened.safety_checker is None
    assert opened.feature_extractor is not None
