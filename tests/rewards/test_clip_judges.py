"""The CLIP judges agree with transformers on small random models, in the layouts of the published files."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from dpo_jax.data import images
from dpo_jax.data.store.prepared import open_prepared
from dpo_jax.data.store.scores import candidates, read_scores
from dpo_jax.models.clip_vision import IMAGE_MEAN, IMAGE_STD
from dpo_jax.rewards import clip_judges, open_judge
from dpo_jax.rewards.images import letterbox

from ..conftest import Command
from .conftest import CAPTIONS, IMAGE_SIZE

Clip = tuple[CLIPModel, Path]
Images = list[np.ndarray]


def cosines(model: CLIPModel, folder: Path, pixels_NCHW: torch.Tensor, captions: list[str]) -> np.ndarray:
    """The cosines of the features of image and caption."""
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    inputs = tokenizer(captions, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        text = model.get_text_features(**inputs).pooler_output
        image = model.get_image_features(pixels_NCHW).pooler_output
    return torch.nn.functional.cosine_similarity(text, image).numpy()


def cropped(images: Images) -> torch.Tensor:
    crop = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=crop)
    return torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in images])


def letterboxed(images: Images) -> torch.Tensor:
    pixels = np.stack([letterbox(image, IMAGE_SIZE) for image in images]) / 255
    return torch.from_numpy((pixels - IMAGE_MEAN) / IMAGE_STD).float().permute(0, 3, 1, 2)


def openclip_state(model: CLIPModel) -> dict[str, torch.Tensor]:
    """A CLIPModel's tensors in OpenCLIP's layout: the inverse of transformers' convert_open_clip script."""
    theirs = dict(model.state_dict())
    result = {"logit_scale": theirs.pop("logit_scale")}
    for half, prefix, projection in (("text_model", "", "text"), ("vision_model", "visual.", "visual")):
        matrix = theirs.pop(f"{projection}_projection.weight").T.contiguous()
        result["visual.proj" if prefix else "text_projection"] = matrix
        for name in [name for name in theirs if name.startswith(f"{half}.encoder.layers")]:
            if match := re.fullmatch(rf"{half}\.encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name):
                layer, kind = match.groups()
                parts = [theirs[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                result[f"{prefix}transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
            elif not re.search(r"\.[kv]_proj\.", name):
                short = name.replace(f"{half}.encoder.layers", f"{prefix}transformer.resblocks")
                for old, new in (
                    *(("self_attn.out_proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")),
                    *(("layer_norm1", "ln_1"), ("layer_norm2", "ln_2")),
                ):
                    short = short.replace(old, new)
                result[short] = theirs[name]
    for new, old in {
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
        "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
        "visual.ln_post.weight": "vision_model.post_layernorm.weight",
        "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    }.items():
        result[new] = theirs[old]
    return {name: tensor.contiguous() for name, tensor in result.items()}


@pytest.fixture(scope="module")
def hps(clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in OpenCLIP's layout, with config and tokenizer beside it."""
    model, clip_folder = clip
    folder = tmp_path_factory.mktemp("hps")
    for file in clip_folder.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    save_file(openclip_state(model), folder / "HPS.safetensors")
    return folder / "HPS.safetensors"


@pytest.mark.parametrize("captions", [CAPTIONS, CAPTIONS[::-1]])
def test_clipscore_and_pickscore_agree_with_transformers(clip: Clip, images: Images, captions: list[str]) -> None:
    model, folder = clip
    expected = cosines(model, folder, cropped(images), captions)
    assert min(expected) < 0 < 0.05 < np.ptp(expected)
    judge = open_judge(f"clipscore={folder}", batch_size=2)
    assert judge.name == "clipscore"
    np.testing.assert_allclose(judge.score(images, captions), 100 * expected.clip(0), atol=1e-4)
    scores = open_judge(f"pickscore={folder}", batch_size=3).score(images, captions)
    np.testing.assert_allclose(scores, model.logit_scale.exp().item() * expected, atol=1e-5)
    assert scores.dtype == np.float32


@pytest.mark.parametrize("name", ["hpsv2", "hpsv2.1"])
def test_hps_reads_openclips_layout_and_reports_the_cosine(clip: Clip, hps: Path, images: Images, name: str) -> None:
    expected = cosines(*clip, letterboxed(images), CAPTIONS)
    judge = open_judge(f"{name}={hps}")
    np.testing.assert_allclose(judge.score(images, CAPTIONS), expected, atol=1e-6)
    assert judge.name == name
    # The same model in transformers' layout, as a folder and as a file.
    for source in (clip[1], clip[1] / "model.safetensors"):
        np.testing.assert_allclose(open_judge(f"{name}={source}").score(images, CAPTIONS), expected, atol=1e-6)


def test_hps_mends_captions(hps: Path, images: Images) -> None:
    odd, plain = "&amp;lt; A\n red ﬁsh\u2019s ", "< a red fish's"
    assert clip_judges.clean_like_open_clip(odd) == plain
    judge = open_judge(f"hpsv2={hps}")
    assert judge.score(images[:1], [odd]) == judge.score(images[:1], [plain])


def test_padding_after_the_end_token_changes_nothing(clip: Clip, images: Images, tmp_path: Path) -> None:
    """OpenCLIP pads with zeros, transformers' configs with the end token or "!"."""
    shutil.copytree(clip[1], tmp_path / "clip")
    config_file = tmp_path / "clip" / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"pad_token": "!"}))
    (tmp_path / "clip" / "special_tokens_map.json").unlink(missing_ok=True)
    other, usual = (open_judge(f"pickscore={folder}") for folder in (tmp_path / "clip", clip[1]))
    np.testing.assert_array_equal(other.score(images, CAPTIONS), usual.score(images, CAPTIONS))


def test_each_caption_is_encoded_once(clip: Clip, images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = open_judge(f"pickscore={clip[1]}", batch_size=4)
    first = judge.score(images, CAPTIONS)
    seen: list[str] = []
    load = clip_judges.load_tokenizers

    def spying(*arguments: str) -> Callable[[list[str]], np.ndarray]:
        tokenizers = load(*arguments)
        return lambda captions: (seen.extend(captions), tokenizers(captions))[1]

    monkeypatch.setattr(clip_judges, "load_tokenizers", spying)
    monkeypatch.setattr(clip_judges, "CAPTIONS_KEPT", 4)
    judge = open_judge(f"pickscore={clip[1]}", batch_size=4)
    for _ in range(2):
        np.testing.assert_array_equal(judge.score(images, CAPTIONS), first)
    assert seen == list(dict.fromkeys(CAPTIONS))
    judge.score(images[:1], ["the oldest is forgotten"])
    judge.score(images[:2], CAPTIONS[1:3])
    assert seen[4:] == ["the oldest is forgotten", CAPTIONS[0]]


def test_scores_depend_on_neither_batch_nor_company(clip: Clip, images: Images) -> None:
    judges = [open_judge(f"pickscore={clip[1]}", batch_size=size) for size in (1, 3, 64)]
    one, *others = (judge.score(images, CAPTIONS) for judge in judges)
    for other in others:
        np.testing.assert_allclose(other, one, atol=2e-5)
    assert judges[1].score(images[2:3], CAPTIONS[2:3]) == pytest.approx(one[2], abs=2e-5)
    assert judges[0].score([], []).shape == (0,)


def test_bfloat16_is_near(clip: Clip, images: Images) -> None:
    half, full = (open_judge(f"pickscore={clip[1]}", dtype=dtype) for dtype in ("bfloat16", "float32"))
    expected = full.score(images, CAPTIONS)
    difference = np.abs(half.score(images, CAPTIONS) - expected)
    assert 0 < difference.max() < 0.1 * np.abs(expected).max()


SHARDED = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
from dpo_jax.rewards import open_judge
from dpo_jax.sharding import Placement, make_mesh
import dpo_jax.sharding
dpo_jax.sharding.SMALL = 8  # so that small weights are split too
spec, images, captions, result = sys.argv[1:]
images, captions = list(np.load(images).values()), captions.split(",")
assert len(jax.devices()) == 4
scores = [
    open_judge(spec, batch_size=3, placement=placement).score(images, captions)
    for placement in (None, Placement(make_mesh(data=2, fsdp=2)))
]
np.save(result, np.stack(scores))
"""


def test_scores_on_a_mesh_are_those_of_one_device(clip: Clip, images: Images, tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", *images)
    spec, result = f"pickscore={clip[1]}", tmp_path / "scores.npy"
    arguments = [spec, tmp_path / "images.npz", ",".join(CAPTIONS), result]
    subprocess.run([sys.executable, "-c", SHARDED, *map(str, arguments)], check=True)
    expected = open_judge(spec).score(images, CAPTIONS)
    for scores in np.load(result):
        np.testing.assert_allclose(scores, expected, atol=1e-5)


def aesthetic_mlp(width: int) -> torch.nn.Sequential:
    """The class of github.com/christophschuhmann/improved-aesthetic-predictor's simple_inference.py."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(width, 1024), torch.nn.Dropout(0.2), torch.nn.Linear(1024, 128), torch.nn.Dropout(0.2)]
    layers += [torch.nn.Linear(128, 64), torch.nn.Dropout(0.1), torch.nn.Linear(64, 16), torch.nn.Linear(16, 1)]
    return torch.nn.Sequential(*layers).eval()


def test_aesthetic_predictor_agrees_with_pytorch(clip: Clip, images: Images, tmp_path: Path) -> None:
    model, folder = clip
    shutil.copytree(folder, tmp_path / "clip")
    mlp = aesthetic_mlp(12)
    file = tmp_path / "clip" / "sac+logos+ava1-l14-linearMSE.safetensors"
    save_file({f"layers.{name}": tensor for name, tensor in mlp.state_dict().items()}, file)
    with torch.no_grad():
        features = model.get_image_features(cropped(images)).pooler_output
        expected = mlp(features / features.norm(dim=-1, keepdim=True))[:, 0].numpy()
    assert np.ptp(expected) > 1e-3
    judge = open_judge(f"aesthetic={file}", batch_size=2)
    np.testing.assert_allclose(judge.score(images, CAPTIONS), expected, atol=1e-6)
    half = open_judge(f"aesthetic={file}", dtype="bfloat16").score(images, CAPTIONS)
    np.testing.assert_allclose(half, expected, atol=1e-3)


def test_the_command_scores_a_data_set(command: Command, clip: Clip, mixed_pairs: Path) -> None:
    spec = f"pickscore={clip[1]}"
    done = command("score", f"--data={mixed_pairs}", f"--judge={spec}", "--batch_size=5")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"written to {mixed_pairs}/scores/pickscore.arrow"
    prepared = open_prepared(mixed_pairs)
    scores_M = read_scores(mixed_pairs, ["pickscore"], candidates(prepared.records["images"]))[0]
    records = [prepared.record(i) for i in range(len(prepared))]
    shown = [images.decode(data) for record in records for data in prepared.read_images(record)]
    captions = [text for record in records for text in record["captions"] or [record["caption"]] * 2]
    expected = open_judge(spec).score(list(map(np.asarray, shown)), captions)
    np.testing.assert_allclose(scores_M, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("logit_scale", 1000.0, r"logit_scale = 1000, and CLIPs have about 4\.6"),
        ("text_projection.weight", np.nan, r"not finite.* in text_projection\.weight; .*a judge has to be whole"),
    ],
)
def test_damaged_weights_are_named(clip: Clip, tmp_path: Path, name: str, value: float, message: str) -> None:
    shutil.copytree(clip[1], tmp_path / "clip")
    tensors = load_file(tmp_path / "clip" / "model.safetensors")
    tensors[name][...] = value
    save_file(tensors, tmp_path / "clip" / "model.safetensors")
    with pytest.raises(ValueError, match=f"^{tmp_path}/clip.*{message}"):
        open_judge(f"pickscore={tmp_path}/clip")


def test_a_pickle_is_refused_with_a_command_that_converts_it(clip: Clip, images: Images, tmp_path: Path) -> None:
    model, folder = clip
    shutil.copytree(folder, tmp_path / "clip", ignore=shutil.ignore_patterns("*.safetensors"))
    file = tmp_path / "clip" / "HPS_v2_compressed.pt"
    torch.save({"epoch": 3, "state_dict": openclip_state(model)}, file)
    with pytest.raises(ValueError, match=r"is not a \.safetensors file; opening a pickle can run code") as error:
        open_judge(f"hpsv2={file}")
    command = str(error.value).partition("weights_only: ")[2]
    assert subprocess.run(command, shell=True).returncode == 0
    judge = open_judge(f"hpsv2={file.with_suffix('.safetensors')}")
    np.testing.assert_allclose(judge.score(images, CAPTIONS), cosines(*clip, letterboxed(images), CAPTIONS), atol=1e-6)


def test_a_folder_with_a_pickle_is_refused_with_a_command_that_converts_it(
    clip: Clip, images: Images, tmp_path: Path
) -> None:
    model, folder = clip
    shutil.copytree(folder, tmp_path / "old", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(model.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"old has no model\.safetensors; if it has a pytorch_model\.bin") as error:
        open_judge(f"pickscore={tmp_path}/old")
    command = str(error.value).partition("converts it: ")[2].replace("NEW_FOLDER", f"{tmp_path}/new")
    assert subprocess.run(command, shell=True).returncode == 0
    for file in folder.iterdir():
        if not (tmp_path / "new" / file.name).exists():
            shutil.copy(file, tmp_path / "new")
    scores = (open_judge(f"pickscore={path}").score(images, CAPTIONS) for path in (folder, tmp_path / "new"))
    np.testing.assert_array_equal(*scores)


def test_missing_files_are_one_sentence(clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"^there is no folder or file nobody/nothing,") as error:
        open_judge("pickscore=nobody/nothing")
    assert "hf download nobody/nothing config.json model.safetensors tokenizer" in str(error.value)
    with pytest.raises(FileNotFoundError, match="no folder or file models/mine"):
        open_judge("pickscore=models/mine/")
    # Weights without a tokenizer.
    shutil.copytree(clip[1], tmp_path / "bare", ignore=shutil.ignore_patterns("*token*", "vocab*", "merges*"))
    with pytest.raises(
        FileNotFoundError, match=r"bare needs tokenizer\.json or vocab\.json beside it, but .*bare has none"
    ) as error:
        open_judge(f"pickscore={tmp_path}/bare")
    assert "of laion/CLIP-ViT-H-14-laion2B-s32B-b79K there" in str(error.value)
    # No whole CLIP.
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text('{"model_type": "clip_text_model"}')
    (tmp_path / "text" / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"text/config\.json does not describe a whole CLIP"):
        open_judge(f"pickscore={tmp_path}/text")
    with pytest.raises(ValueError, match=r"is a folder; name the \.safetensors file"):
        open_judge(f"aesthetic={tmp_path}")


def test_weights_that_are_not_the_model_are_named(hps: Path, tmp_path: Path) -> None:
    shutil.copytree(hps.parent, tmp_path / "hps")
    file = tmp_path / "hps" / hps.name
    state = load_file(file)
    del state["visual.ln_pre.bias"]
    state["visual.proj"] = state["visual.proj"][:, :5].contiguous()
    save_file(state | {"visual.attn_pool.query": torch.zeros(3)}, file)
    with pytest.raises(
        ValueError, match=r"1 missing: vision_model\.pre_layrnorm\.bias; 1 unexpected: visual\.attn_pool"
    ):
        open_judge(f"hpsv2={file}")
