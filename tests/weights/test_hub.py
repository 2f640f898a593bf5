"""Finding models by name, on a small local hub that speaks the real one's protocol to huggingface_hub."""

import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from flax import serialization
from safetensors.torch import save_file

from dpo_jax.errors import MissingFileError
from dpo_jax.models.pipeline import load_pipeline
from dpo_jax.models.random_model import write_random_model
from dpo_jax.weights.hub import files_to_fetch, find_lora, find_model
from dpo_jax.weights.io import LEGACY_FLAX, SAFETENSORS, load_params
from dpo_jax.weights.layout import ParamSpec

from ..hub_server import Hub


def listing(**folders: str) -> list[str]:
    """`listing(root="README.md", unet="config.json model.onnx")`: the paths of a repository's files."""
    return [
        name if folder == "root" else f"{folder}/{name}" for folder, names in folders.items() for name in names.split()
    ]


TOKENIZER = "merges.txt special_tokens_map.json tokenizer_config.json vocab.json"
DIFFUSERS = "config.json diffusion_pytorch_model.fp16.safetensors diffusion_pytorch_model.safetensors"
TRANSFORMERS = "config.json model.fp16.safetensors model.safetensors"
DIFFUSERS_BIN = f"{DIFFUSERS} diffusion_pytorch_model.bin diffusion_pytorch_model.fp16.bin"
TRANSFORMERS_BIN = f"{TRANSFORMERS} pytorch_model.bin pytorch_model.fp16.bin"
ONNX = "model.onnx openvino_model.bin openvino_model.xml"

# What these repositories held in 2025.
SD15 = listing(
    root=".gitattributes README.md model_index.json v1-5-pruned-emaonly.ckpt v1-5-pruned-emaonly.safetensors "
    "v1-5-pruned.ckpt v1-5-pruned.safetensors v1-inference.yaml",
    feature_extractor="preprocessor_config.json",
    safety_checker=TRANSFORMERS_BIN,
    scheduler="scheduler_config.json",
    text_encoder=TRANSFORMERS_BIN,
    tokenizer=TOKENIZER,
    unet=f"{DIFFUSERS_BIN} diffusion_pytorch_model.non_ema.bin diffusion_pytorch_model.non_ema.safetensors",
    vae=DIFFUSERS_BIN,
)
SDXL = listing(
    root=".gitattributes 01.png LICENSE.md README.md comparison.png model_index.json pipeline.png "
    "sd_xl_base_1.0.safetensors sd_xl_base_1.0_0.9vae.safetensors sd_xl_offset_example-lora_1.0.safetensors",
    scheduler="scheduler_config.json",
    text_encoder=f"{TRANSFORMERS} flax_model.msgpack {ONNX}",
    text_encoder_2=f"{TRANSFORMERS} flax_model.msgpack {ONNX} model.onnx_data",
    tokenizer=TOKENIZER,
    tokenizer_2=TOKENIZER,
    unet=f"{DIFFUSERS} diffusion_flax_model.msgpack {ONNX} model.onnx_data",
    vae=f"{DIFFUSERS} diffusion_flax_model.msgpack",
    vae_1_0=DIFFUSERS,
    vae_decoder=f"config.json {ONNX}",
    vae_encoder=f"config.json {ONNX}",
)
TURBO = listing(
    root=".gitattributes LICENSE.md README.md model_index.json output_tile.jpg sd_xl_turbo_1.0.safetensors "
    "sd_xl_turbo_1.0_fp16.safetensors",
    scheduler="scheduler_config.json",
    text_encoder=f"{TRANSFORMERS} model.onnx",
    text_encoder_2=f"{TRANSFORMERS} model.onnx model.onnx_data",
    tokenizer=TOKENIZER,
    tokenizer_2=TOKENIZER,
    unet=f"{DIFFUSERS} model.onnx model.onnx_data",
    vae=DIFFUSERS,
    vae_decoder="config.json model.onnx",
    vae_encoder="config.json model.onnx",
)
REFINER = listing(
    root=".gitattributes 01.png LICENSE.md README.md model_index.json sd_xl_refiner_1.0.safetensors "
    "sd_xl_refiner_1.0_0.9vae.safetensors",
    scheduler="scheduler_config.json",
    text_encoder_2=TRANSFORMERS,
    tokenizer_2=TOKENIZER,
    unet=DIFFUSERS,
    vae=DIFFUSERS,
    vae_1_0=DIFFUSERS,
)
VAE_FP16_FIX = listing(
    root=".gitattributes README.md config.json diffusion_pytorch_model.bin diffusion_pytorch_model.safetensors "
    "images/decoded.png sdxl.vae.safetensors sdxl_vae.safetensors"
)
DPO_UNET = listing(root=".gitattributes README.md", unet="config.json diffusion_pytorch_model.safetensors")
FLAX_SDXL = listing(
    root="README.md model_index.json",
    scheduler="scheduler_config.json",
    text_encoder="config.json flax_model.msgpack",
    text_encoder_2="config.json flax_model.msgpack",
    tokenizer=TOKENIZER,
    tokenizer_2=TOKENIZER,
    unet="config.json diffusion_flax_model.msgpack",
    vae="config.json diffusion_flax_model.msgpack",
)


def shards(stem: str, count: int, variant: str = "") -> str:
    """The index and the files of a network in several files."""
    label = f".{variant}" if variant else ""
    files = [f"{stem}{label}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return " ".join([f"{stem}.safetensors.index{label}.json", *files])


TOKENIZER_T5 = "special_tokens_map.json tokenizer.json tokenizer_config.json"
T5, T5_HALF = f"config.json {shards('model', 2)}", f"config.json {shards('model', 2, 'fp16')}"
SD3 = listing(
    root=".gitattributes LICENSE.md README.md model_index.json sd3demo.jpg",
    scheduler="scheduler_config.json",
    text_encoder=TRANSFORMERS,
    text_encoder_2=TRANSFORMERS,
    text_encoder_3=f"{T5} {shards('model', 2, 'fp16')}",
    tokenizer=TOKENIZER,
    tokenizer_2=TOKENIZER,
    tokenizer_3=f"{TOKENIZER_T5} spiece.model",
    transformer="config.json diffusion_pytorch_model.safetensors",
    vae="config.json diffusion_pytorch_model.safetensors",
)
FLUX_TRANSFORMER = f"config.json {shards('diffusion_pytorch_model', 3)}"
FLUX = listing(
    root=".gitattributes LICENSE.md README.md ae.safetensors dev_grid.jpg flux1-dev.safetensors model_index.json",
    scheduler="scheduler_config.json",
    text_encoder="config.json model.safetensors",
    text_encoder_2=T5,
    tokenizer=TOKENIZER,
    tokenizer_2=f"{TOKENIZER_T5} spiece.model",
    transformer=FLUX_TRANSFORMER,
    vae="config.json diffusion_pytorch_model.safetensors",
)

SMALL = {"root": "model_index.json", "scheduler": "scheduler_config.json"}
PLAIN = "config.json diffusion_pytorch_model.safetensors"
HALF = "config.json diffusion_pytorch_model.fp16.safetensors"
FLAX = "config.json diffusion_flax_model.msgpack"
CLIP_PLAIN, CLIP_HALF = "config.json model.safetensors", "config.json model.fp16.safetensors"
ONE_CLIP = SMALL | {"tokenizer": TOKENIZER}
TWO_CLIPS = ONE_CLIP | {"tokenizer_2": TOKENIZER}
REFINERS_CLIP = SMALL | {"tokenizer_2": TOKENIZER}
PLAIN_SDXL = TWO_CLIPS | {"unet": PLAIN, "vae": PLAIN, "text_encoder": CLIP_PLAIN, "text_encoder_2": CLIP_PLAIN}
HALF_SDXL = TWO_CLIPS | {"unet": HALF, "vae": HALF, "text_encoder": CLIP_HALF, "text_encoder_2": CLIP_HALF}
FLAX_CLIP = "config.json flax_model.msgpack"
FLOW_SD3 = TWO_CLIPS | {"tokenizer_3": TOKENIZER_T5, "transformer": PLAIN, "vae": PLAIN}
PLAIN_SD3 = FLOW_SD3 | {"text_encoder": CLIP_PLAIN, "text_encoder_2": CLIP_PLAIN, "text_encoder_3": T5}
HALF_SD3 = FLOW_SD3 | {"text_encoder": CLIP_HALF, "text_encoder_2": CLIP_HALF, "text_encoder_3": T5_HALF}
PLAIN_FLUX = ONE_CLIP | {"tokenizer_2": TOKENIZER_T5, "transformer": FLUX_TRANSFORMER, "vae": PLAIN}


@pytest.mark.parametrize(
    ("repo_files", "variant", "expected"),
    [
        (SD15, "", ONE_CLIP | {"unet": PLAIN, "vae": PLAIN, "text_encoder": CLIP_PLAIN}),
        (SD15, "fp16", ONE_CLIP | {"unet": HALF, "vae": HALF, "text_encoder": CLIP_HALF}),
        (SDXL, "", PLAIN_SDXL),
        (SDXL, "fp16", HALF_SDXL),
        (TURBO, "", PLAIN_SDXL),
        (REFINER, "fp16", REFINERS_CLIP | {"unet": HALF, "vae": HALF, "text_encoder_2": CLIP_HALF}),
        (SD3, "", PLAIN_SD3),
        (SD3, "fp16", HALF_SD3),
        (FLUX, "bf16", PLAIN_FLUX | {"text_encoder": CLIP_PLAIN, "text_encoder_2": T5}),
        (VAE_FP16_FIX, "", {"root": PLAIN}),
        (VAE_FP16_FIX, "fp16", {"root": PLAIN}),
        (DPO_UNET, "", {"unet": PLAIN}),
        (
            FLAX_SDXL,
            "",
            TWO_CLIPS | {"unet": FLAX, "vae": FLAX, "text_encoder": FLAX_CLIP, "text_encoder_2": FLAX_CLIP},
        ),
    ],
    ids=[
        *("sd15", "sd15-fp16", "sdxl", "sdxl-fp16", "turbo", "refiner-fp16", "sd3", "sd3-fp16", "flux", "vae"),
        *("vae-fp16", "unet", "flax"),
    ],
)
def test_published_repositories_are_fetched_without_what_is_not_read(
    repo_files: list[str], variant: str, expected: dict[str, str]
) -> None:
    assert sorted(files_to_fetch(repo_files, "a/b", variant=variant)) == sorted(listing(**expected))


def test_every_kind_of_tokenizer_comes_whole() -> None:
    repo_files = ["model_index.json", "vae/config.json", "tokenizer/spiece.model", "tokenizer_2/chat_template.jinja"]
    repo_files += ["tokenizer_3/spiece.model", "tokenizer_3/tokenizer.json", "tokenizer/README.md"]
    wanted = files_to_fetch(repo_files, "a/b", weights=False)
    read = {"tokenizer/spiece.model", "tokenizer_2/chat_template.jinja", "tokenizer_3/tokenizer.json"}
    assert {*wanted} == {"model_index.json", "vae/config.json", *read}


def test_some_components_or_configs_alone() -> None:
    assert files_to_fetch(SDXL, "a/b", only={"vae"}) == listing(root="model_index.json", vae=PLAIN)
    assert files_to_fetch([*SDXL, *VAE_FP16_FIX], "a/b", only={"vae"}) == listing(root="model_index.json", vae=PLAIN)
    assert files_to_fetch(VAE_FP16_FIX, "a/b", only={"vae"}) == PLAIN.split()
    configs = TWO_CLIPS | dict.fromkeys(("unet", "vae", "text_encoder", "text_encoder_2"), "config.json")
    assert sorted(files_to_fetch(SDXL, "a/b", weights=False)) == sorted(listing(**configs))
    with pytest.raises(ValueError, match=r"^a/b is not a diffusers model: it has no vae with a config.json$"):
        files_to_fetch(DPO_UNET, "a/b", only={"vae"})


def test_a_sharded_network_comes_with_its_own_shards() -> None:
    shards = [f"diffusion_pytorch_model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    half = [f"diffusion_pytorch_model.fp16-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    old_half = [f"diffusion_pytorch_model-{i:05d}-of-00002.fp16.safetensors" for i in (1, 2)]
    indices = ["diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.fp16.json"]
    pickles = ["diffusion_pytorch_model.bin.index.json", "diffusion_pytorch_model-00001-of-00001.bin"]
    files = ["config.json", *indices, *shards, *half, *old_half, *pickles, "model-00001-of-00002.safetensors"]
    assert files_to_fetch(files, "a/b") == ["config.json", indices[0], *shards]
    assert set(files_to_fetch(files, "a/b", variant="fp16")) == {"config.json", indices[1], *half, *old_half}


def test_what_is_fetched_is_what_loading_would_prefer(tmp_path: Path) -> None:
    """With any two files of weights in a folder, the fetched one loads to the same numbers as the whole folder."""
    specs = {"norm.scale": ParamSpec((1,), (0,))}
    files: dict[str, dict[str, bytes]] = {}  # each way to hold the weights: its files
    for number, name in enumerate((*SAFETENSORS, *LEGACY_FLAX)):
        stem, _, ending = name.partition(".safetensors.index")
        shard = f"{stem}{ending.removesuffix('.json')}-00001-of-00001.safetensors" if ending else name
        save_file({"norm.weight": torch.tensor([float(number)])}, tmp_path / "weights")
        files[name] = {shard: (tmp_path / "weights").read_bytes()}
        if ending:
            files[name][name] = json.dumps({"weight_map": {"norm.weight": shard}}).encode()
        if name in LEGACY_FLAX:
            files[name] = {name: serialization.msgpack_serialize({"norm": {"scale": np.array([number], np.float32)}})}

    for count, pair in enumerate(itertools.combinations_with_replacement(files, 2)):
        held = files[pair[0]] | files[pair[1]] | {"config.json": b"{}"}
        whole, fetched = tmp_path / f"whole{count}", tmp_path / f"fetched{count}"
        for folder, names in ((whole, held), (fetched, files_to_fetch(list(held), "a/b"))):
            folder.mkdir()
            for name in names:
                (folder / name).write_bytes(held[name])
        loaded = [load_params(folder, specs, dtype="float32")["norm.scale"].item() for folder in (whole, fetched)]
        assert loaded[0] == loaded[1], pair
        names = {path.name for path in fetched.iterdir()} - {"config.json"}
        assert names in [files[name].keys() for name in pair], "more than one set of weights"


@pytest.mark.parametrize(
    ("repo_files", "message"),
    [
        (
            listing(root="model_index.json", unet="config.json diffusion_pytorch_model.bin", vae=PLAIN),
            r"^a/b holds only pickled weights for unet; opening a pickle can run code; .*save_pretrained",
        ),
        (listing(root="config.json diffusion_pytorch_model.ckpt"), "only pickled weights for the model at its root;"),
        (
            listing(root="model_index.json", unet="config.json model.onnx", vae=PLAIN),
            r"^a/b holds no weights for unet$",
        ),
        (listing(root="README.md data.parquet"), r"^a/b is not a diffusers model: it has no text_encoder or "),
    ],
)
def test_repositories_that_hold_nothing_to_read(repo_files: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        files_to_fetch(repo_files, "a/b")


def test_an_unknown_variant() -> None:
    with pytest.raises(
        ValueError, match="a/b: variant='fp61' is not known; set it to 'fp16' or 'bf16', or leave it empty"
    ):
        files_to_fetch(SD15, "a/b", variant="fp61")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL and, beside it, what must not be fetched."""
    folder = tmp_path_factory.mktemp("models") / "sdxl"
    write_random_model("sdxl", folder)
    for decoy in SDXL:
        path = folder / decoy
        if not path.exists() and not decoy.endswith(".fp16.safetensors"):
            path.parent.mkdir(exist_ok=True)
            path.write_text("not to be fetched")
    return folder


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub that `find_model` asks, holding somebody/sdxl; the cache is empty."""
    hub = Hub()
    hub.put("somebody/sdxl", model)
    hub.be_asked(monkeypatch, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    yield hub
    hub.switch_off()


PIPELINE = set(listing(**PLAIN_SDXL))


def test_a_model_of_the_hub_opens_and_stays_when_the_hub_is_gone(hub: Hub, model: Path) -> None:
    folder = find_model("somebody/sdxl")
    assert hub.fetched == PIPELINE
    assert {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()} == PIPELINE
    opened, source = load_pipeline(folder, dtype="float32"), load_pipeline(model, dtype="float32")
    assert opened.components.keys() == source.components.keys()
    for component in source.components:
        expected = source.load(component, dtype="float32")
        for name, value in opened.load(component, dtype="float32").items():
            np.testing.assert_array_equal(value, expected[name])

    hub.fetched.clear()
    assert find_model("somebody/sdxl") == folder
    hub.switch_off()
    assert find_model("somebody/sdxl") == folder
    assert find_model("somebody/sdxl", only={"unet"}) == folder
    assert hub.fetched == set()


def test_only_what_is_asked_for_is_fetched(
    hub: Hub, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (find_model("somebody/sdxl", only={"unet"}) / "unet" / "diffusion_pytorch_model.safetensors").exists()
    assert hub.fetched == {"model_index.json", *listing(unet=PLAIN)}
    find_model("somebody/sdxl", weights=False)
    assert hub.fetched == {name for name in PIPELINE if not name.endswith(".safetensors")} | set(listing(unet=PLAIN))

    shutil.copytree(model / "vae", tmp_path / "vae_alone")
    hub.put("somebody/vae", tmp_path / "vae_alone")
    hub.fetched.clear()
    vae = find_model("somebody/vae", only={"vae"})
    assert hub.fetched == {path.name for path in vae.iterdir()} == set(PLAIN.split())

    shutil.copytree(model / "unet", tmp_path / "unet_alone" / "unet")
    hub.put("somebody/unet", tmp_path / "unet_alone")
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    find_model("somebody/unet")
    assert hub.fetched == {*PLAIN.split(), *listing(unet=PLAIN)}
    assert "No files matched" not in caplog.text


def test_a_variant_is_fetched_where_there_is_one(
    hub: Hub, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = tmp_path / "half"
    shutil.copytree(model, half)
    shutil.copy(half / "unet" / "diffusion_pytorch_model.safetensors", half / HALF.replace("config.json ", "unet/"))
    hub.put("somebody/half", half)
    find_model("somebody/half", variant="fp16")
    assert hub.fetched == PIPELINE - set(listing(unet=PLAIN)) | set(listing(unet=HALF))
    assert "fp16" not in capsys.readouterr().err
    find_model("somebody/sdxl", variant="fp16")
    assert (
        "repository somebody/sdxl on the hub has no fp16 weights; fetching its full-precision ones\n"
        in capsys.readouterr().err
    )


def test_a_revision_and_a_single_file(hub: Hub, model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model, other)
    (other / "sd_xl_base_1.0.safetensors").write_text("of the other revision")
    commit = hub.put("somebody/sdxl", other, "refs/pr/95")
    name = "somebody/sdxl/sd_xl_base_1.0.safetensors"
    assert find_model(name).read_text() == "not to be fetched"
    assert hub.fetched == {"sd_xl_base_1.0.safetensors"}
    for revision in ("refs/pr/95", commit):
        assert find_model(name, revision=revision).read_text() == "of the other revision"
    assert find_model("somebody/sdxl", revision="refs/pr/95").name == commit
    with pytest.raises(FileNotFoundError, match=r"^the model somebody/sdxl on the hub has no revision 'v7'$"):
        find_model("somebody/sdxl", revision="v7")
    with pytest.raises(
        FileNotFoundError,
        match=r"^there is no file somebody/sdxl/no\.safetensors, and the repository somebody/sdxl on ",
    ):
        find_model("somebody/sdxl/no.safetensors")
    hub.switch_off()
    assert find_model(name).read_text() == "not to be fetched"


def test_a_lora_comes_with_its_alpha(hub: Hub, tmp_path: Path) -> None:
    """A LoRA is found by its repository's id or its file's name, and is fetched with peft's config and nothing else."""
    lora = tmp_path / "lora"
    for folder, name in (("", "pytorch_lora_weights"), ("peft", "adapter_model"), ("", "full_model")):
        (lora / folder).mkdir(parents=True, exist_ok=True)
        (lora / folder / f"{name}.safetensors").write_bytes(name.encode())
    (lora / "peft" / "adapter_config.json").write_text("{}")
    hub.put("me/lora", lora)
    assert (find_lora("me/lora@main") / "pytorch_lora_weights.safetensors").read_bytes() == b"pytorch_lora_weights"
    assert hub.fetched == {"pytorch_lora_weights.safetensors"}
    file = find_lora("me/lora/peft/adapter_model.safetensors")
    assert file.read_bytes() == b"adapter_model"
    assert (file.parent / "adapter_config.json").exists()
    assert len(hub.fetched) == 3
    with pytest.raises(FileNotFoundError, match="me/lora on the hub has no revision 'nothing'"):
        find_lora("me/lora@nothing")


def test_what_exists_here_comes_first(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.switch_off()
    (tmp_path / "somebody" / "sdxl").mkdir(parents=True)
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(find_model("somebody/sdxl")) == "somebody/sdxl"
    assert str(find_model("model.safetensors")) == "model.safetensors"
    assert str(find_model("~/model.safetensors")) == str(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["sdxl", "./models/sdxl", "/models/sdxl", "~/models/sdxl", "a/b/c", "a/b/model.ckpt"])
def test_names_that_can_only_be_paths(hub: Hub, name: str) -> None:
    with pytest.raises(
        FileNotFoundError, match=rf"^there is no folder or file {name}, and it is not a hub id \(owner/name"
    ):
        find_model(name)


@pytest.mark.parametrize("name", ["me/sdxl.git", "me/my--sdxl", "me/sdxl-"])
def test_names_that_the_hub_does_not_take(hub: Hub, name: str) -> None:
    with pytest.raises(
        MissingFileError,
        match=rf"^there is no folder or file {name}, and {name} does not name a model on the hub \((Repo|Cannot)",
    ):
        find_model(name)


def test_a_model_that_is_not_on_the_hub_or_not_for_everybody(hub: Hub, model: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"^there is no folder or file models/sdxl, and no model models/sdxl on the"
    ):
        find_model("models/sdxl")
    hub.gated.add("somebody/sdxl")
    with pytest.raises(FileNotFoundError, match=r"no model somebody/sdxl on the hub that you may read .*hf auth login"):
        find_model("somebody/sdxl")


def test_a_hub_out_of_reach(hub: Hub) -> None:
    find_model("somebody/sdxl", only={"unet"})
    hub.switch_off()
    with pytest.raises(FileNotFoundError) as raised:
        find_model("models/sdxl")
    assert str(raised.value).replace("[Errno 111] ", "") == (
        "there is no folder or file models/sdxl, and some files of the model models/sdxl are neither in the cache nor "
        "reachable on the hub (Connection refused); on a machine with a network run: hf download models/sdxl "
        "--include '*.json' --include '*.txt' --include '*.jinja' --include '*spiece.model' "
        "--include '*/*.safetensors' --local-dir models/sdxl, and "
        "give the path of that folder"
    )
    with pytest.raises(
        FileNotFoundError,
        match="folder or file somebody/sdxl, and some files of the model somebody/sdxl are neither in",
    ):
        find_model("somebody/sdxl")  # only its UNet is cached
    command = r"hf download a/b c\.safetensors --revision v2 --local-dir models/b, and give the path of that file$"
    with pytest.raises(FileNotFoundError, match=command):
        find_model("a/b/c.safetensors", revision="v2")


def test_offline_as_users_set_it(hub: Hub, tmp_path: Path) -> None:
    folder = find_model("somebody/sdxl")
    shutil.rmtree(tmp_path / "cache" / "models--somebody--sdxl" / "trees")  # older versions kept no list of files
    code = """if True:
        from dpo_jax.weights.hub import find_model
        print(find_model("somebody/sdxl"))
        try:
            find_model("somebody/other")
        except FileNotFoundError as error:
            print(error)
        """
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found, error = result.stdout.splitlines()
    assert found == str(folder)
    assert "some files of the model somebody/other are neither in the cache nor reachable on the hub" in error
    assert "HF_HUB_OFFLINE" in error
