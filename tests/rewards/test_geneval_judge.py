"""GenEval's networks: small random ones of transformers' classes, and what is made of their outputs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
)

from dpo_jax.errors import UserError
from dpo_jax.rewards import Settings, geneval_judge, open_judge
from dpo_jax.rewards.geneval import CLASSES, Detection, Task, check
from dpo_jax.rewards.geneval_judge import (
    COLORS,
    DEVICE,
    ColorNamer,
    Detector,
    GenEval,
    detector_input,
    open_geneval_partial,
    segment,
)

from .conftest import randomised

CPU = torch.device("cpu")
COCO = {number: name.removeprefix("computer ") for number, name in enumerate(CLASSES)}
"""The labels of published detectors: COCO's own."""
DOG, BENCH = CLASSES.index("dog"), CLASSES.index("bench")
PROMPT = "a photo of a dog left of a bench"
METADATA = {
    "tag": "position",
    "include": [{"class": "bench", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
    "prompt": PROMPT,
}


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> tuple[Mask2FormerForUniversalSegmentation, Path]:
    """A small Mask2Former of COCO's classes, and the folder that transformers writes for it."""
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, out_features=stages)
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=12,
        id2label=COCO,
        label2id={label: number for number, label in COCO.items()},
    )
    torch.manual_seed(0)
    model = randomised(Mask2FormerForUniversalSegmentation(config))
    with torch.no_grad():
        model.class_predictor.weight *= 30  # some of the classes become likely
    folder = tmp_path_factory.mktemp("detector")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    (tmp_path / "metadata.jsonl").write_text(json.dumps(METADATA))
    return tmp_path / "metadata.jsonl"


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("size", [(512, 512), (1024, 1024), (300, 420), (768, 1344), (100, 400), (9, 5)])
def test_the_detector_sees_what_transformers_would_show_it(size: tuple[int, int]) -> None:
    processor = Mask2FormerImageProcessorPil(size={"shortest_edge": 800, "longest_edge": 1333}, size_divisor=32)
    expected = processor(noise(*size), return_tensors="np")["pixel_values"][0]
    ours = detector_input(noise(*size))
    assert (ours.dtype, ours.shape) == (np.float32, expected.shape)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_detections_of_a_network_are_those_of_transformers(detector: tuple[Any, Path]) -> None:
    """At 384 x 384, where transformers scales no mask twice."""
    model, folder = detector
    image = noise(384, 384)
    with torch.inference_mode():
        outputs = model(pixel_values=torch.from_numpy(detector_input(image))[None])
    (expected,) = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        outputs, threshold=0.3, target_sizes=[(384, 384)], return_binary_maps=True
    )
    found = sorted(Detector(str(folder), CPU)(image), key=lambda each: each.score)
    order = np.argsort([segment["score"] for segment in expected["segments_info"]])
    assert len(found) == len(order) > 3
    for ours, number in zip(found, order, strict=True):
        info, mask = expected["segments_info"][number], expected["segmentation"][number].numpy()
        assert ours.label == CLASSES[info["label_id"]]
        assert ours.score == pytest.approx(info["score"], abs=2e-6)  # theirs is rounded to 6 digits
        assert ours.mask_HW.dtype == bool
        np.testing.assert_array_equal(ours.mask_HW, mask == 1)


def planted(*objects: tuple[int, float, tuple[slice, slice]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs of a detector that sees (class, logit of the class, cells of a grid of 40 x 20 cells)."""
    class_logits_QL = torch.full((len(objects) + 2, len(CLASSES) + 1), -9.0)
    class_logits_QL[:, -1] = 0
    mask_logits_Qhw = torch.full((len(objects) + 2, 40, 20), -20.0)
    for query, (label, logit, cells) in enumerate(objects):
        class_logits_QL[query, label] = logit
        mask_logits_Qhw[query][cells] = 20.0
    class_logits_QL[-1, DOG] = 5.0  # a dog without pixels
    return class_logits_QL, mask_logits_Qhw


def test_masks_and_boxes_have_the_size_of_the_image() -> None:
    dog, bench = (slice(10, 20), slice(0, 4)), (slice(10, 20), slice(12, 20))
    outputs = planted((DOG, 5.0, dog), (BENCH, 4.0, bench), (BENCH, -1.0, dog))  # the last is 27% sure
    found = {each.label: each for each in segment(*outputs, (160, 80))}
    assert [(each.label, each.box) for each in found.values()] == [
        ("dog", (0, 40, 16, 80)),
        ("bench", (48, 40, 80, 80)),
    ]
    assert found["dog"].mask_HW.shape == (160, 80)
    assert found["dog"].mask_HW.sum() == 40 * 16 - 2  # interpolation rounds the two corners inside the image
    assert found["dog"].score == pytest.approx(
        1 / (1 + np.exp(-5)), abs=0.02
    )  # the mask is a little unsure at its edge
    task = Task.model_validate(METADATA)
    for moved, reason in ((outputs, ""), (planted((BENCH, 5.0, dog), (DOG, 4.0, bench)), "dog is not left of bench, ")):
        verdict = check(segment(*moved, (160, 80)), task, lambda label, objects: [])
        assert (verdict.is_correct, verdict.reason[: len(reason)]) == (not reason, reason)


def test_half_precision_outputs_are_scored_in_float32() -> None:
    class_logits_QL, mask_logits_Qhw = planted((DOG, 1.2345, (slice(0, 40), slice(0, 20))))
    (found,) = segment(class_logits_QL.bfloat16(), mask_logits_Qhw.bfloat16(), (8, 8))
    logit = float(torch.tensor(1.2345).bfloat16())
    assert found.score == pytest.approx(np.exp(logit) / (1 + np.exp(logit) + 79 * np.exp(-9)), abs=1e-6)
    assert found.box == (0, 0, 8, 8)


def test_colours_are_those_of_transformers_clip(clip: tuple[CLIPModel, Path]) -> None:
    """The image features of each cut-out, on grey, against the mean of three texts' features per colour."""
    model, folder = clip
    namer, tokenizer = ColorNamer(str(folder), CPU), CLIPTokenizer.from_pretrained(folder)
    size = model.config.vision_config.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size)
    texts = [
        text
        for color in COLORS
        for text in (f"a photo of a {color} dog", f"a photo of a {color}-colored dog", f"a photo of a {color} object")
    ]
    tokens = tokenizer(texts, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    expected = []
    for seed in range(12):
        image, mask = noise(60, 80, seed), np.zeros((60, 80), bool)
        mask[10:50, 20:60] = np.add.outer(np.arange(40), np.arange(40)) < 60
        cut_out = np.full_like(image, 0x99)
        cut_out[mask] = image[mask]
        pixels = processor(cut_out[10:50, 20:60], return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            outputs = model(input_ids=tokens["input_ids"], pixel_values=pixels)  # its features have unit length
        of_color = outputs.text_embeds.reshape(10, 3, -1).mean(1)
        of_color /= of_color.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(namer.text_features("dog"), of_color)
        expected.append(COLORS[int((outputs.image_embeds @ of_color.T).argmax())])
        assert namer(image, "dog", [Detection("dog", 1.0, (20, 10, 60, 50), mask)]) == expected[-1:]
    assert len(set(expected)) > 1


def test_the_judge_scores_images_of_any_size(
    detector: tuple[Any, Path], clip: tuple[Any, Path], metadata: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(geneval_judge, "SHORT_SIDE", 128)  # time; what the detector sees has a test of its own
    source = f"{metadata}:{detector[1]}:{clip[1]}"
    judge = open_judge(f"geneval={source}")
    assert judge.is_outside
    images = [noise(64, 96), noise(128, 64)]
    scores = judge.score(images, [PROMPT, f" {PROMPT}"])
    verdicts = GenEval(source).verdicts(images, [PROMPT] * 2)
    assert scores.tolist() == [float(verdict.is_correct) for verdict in verdicts]
    partial = open_geneval_partial(source, Settings())(images, [PROMPT] * 2)
    assert partial.tolist() == pytest.approx([verdict.partial for verdict in verdicts])
    with pytest.raises(UserError, match=r"metadata\.jsonl has no line with the prompt 'a photo of a cat', so GenEval "):
        judge.score(images, [PROMPT, "a photo of a cat"])


def other_classes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {number: f"class {number}" for number in range(80)}
    (folder / "config.json").write_text(json.dumps(config))


def with_class_predictor(change: Callable[[torch.Tensor], torch.Tensor] | None) -> Callable[[Path], None]:
    """Return what changes a weight in a folder, or removes it."""

    def harm(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weight = weights.pop("class_predictor.weight")
        if change:
            weights["class_predictor.weight"] = change(weight)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return harm


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (other_classes, "is not a detector of COCO's 80 classes, person to toothbrush: it has 80 classes, class 0 to "),
        (
            with_class_predictor(None),
            r"the weights class_predictor\.weight in .* are missing, NaN or infin",
        ),
        (
            with_class_predictor(lambda weight: weight / 0),
            r"class_predictor\.weight in .* are missing, NaN or infin",
        ),
        (with_class_predictor(lambda weight: weight[:9].clone()), r"the weights in .* do not fit its config\.json"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), r"model\.safetensors is empty"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "detr"}'),
            "of the type 'detr', and 'mask2f",
        ),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "has no model.safetensors; .*Mask2FormerForUniversalS",
        ),
    ],
)
def test_folders_without_such_a_detector_are_refused(
    detector: tuple[Any, Path], tmp_path: Path, harm: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "detector"
    shutil.copytree(detector[1], folder)
    harm(folder)
    with pytest.raises(UserError, match=message):
        Detector(str(folder), CPU)


@pytest.mark.parametrize("source", ["a.jsonl:b:c:d", "a.jsonl::c", ":b"])
def test_sources_of_another_form_are_refused(source: str) -> None:
    with pytest.raises(UserError, match="should be METADATA, METADATA:DETECTOR or METADATA:DETECTOR:CLIP"):
        GenEval(source)


def test_a_device_that_is_not_there_is_told(metadata: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("graphics", "cuda:9"):
        monkeypatch.setenv(DEVICE, name)
        with pytest.raises(
            UserError, match=rf"^DPO_JAX_TORCH_DEVICE={name} is not a device of PyTorch here \(.*\); set"
        ):
            GenEval(str(metadata))
