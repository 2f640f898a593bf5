"""ImageReward agrees with PyTorch on a small random model in the published file's layout."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import BertTokenizer

from dpo_jax.models.clip_vision import IMAGE_MEAN, IMAGE_STD
from dpo_jax.rewards import Settings, open_judge
from dpo_jax.rewards.image_reward import open_image_reward

from ..models.test_blip import SMALL, TorchImageReward, randomised
from .conftest import CAPTIONS

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "square", "at", "the", "top", "of"]
WORDS += ["le", "##ft", "cafe", "##s", "!", "fish"]
LONG = "of " * 50
HARD = ["A Red CAFÉS!", "left fish", LONG, "", "a\tred\u00a0circle"]


def published_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of github.com/THUDM/ImageReward's classes (models/BLIP/vit.py, med.py), with unused tensors."""
    result = {}
    for name, tensor in state.items():
        name = re.sub(r"^vision_model\.encoder\.layers\.", "blip.visual_encoder.blocks.", name)
        name = name.replace("self_attn.projection", "attn.proj").replace("self_attn.qkv", "attn.qkv")
        name = re.sub(r"(blocks\.\d+)\.layer_norm", r"\1.norm", name)
        name = name.replace("vision_model.post_layernorm", "blip.visual_encoder.norm")
        name = name.replace("vision_model.embeddings.class_embedding", "blip.visual_encoder.cls_token")
        name = name.replace("vision_model.embeddings.position_embedding", "blip.visual_encoder.pos_embed")
        name = name.replace("vision_model.embeddings.patch_embedding", "blip.visual_encoder.patch_embed.proj")
        result[re.sub(r"^text_encoder\.", "blip.text_encoder.", name)] = tensor.contiguous()
    for part, width in (("vision", 32), ("text", 24)):
        result[f"blip.{part}_proj.weight"], result[f"blip.{part}_proj.bias"] = torch.zeros(8, width), torch.zeros(8)
    result["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    return result


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[TorchImageReward, Path]:
    folder = tmp_path_factory.mktemp("imagereward")
    torch.manual_seed(0)
    model = randomised(TorchImageReward(SMALL), 0.2)
    assert isinstance(model, TorchImageReward)
    save_file(published_names(model.state_dict()), folder / "ImageReward.safetensors")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return model, folder / "ImageReward.safetensors"


def expected(model: TorchImageReward, vocabulary: Path, images: list[np.ndarray], captions: list[str]) -> np.ndarray:
    """`ImageReward.score`: Resize, CenterCrop, ToTensor and Normalize of torchvision; 35 tokens."""
    pixels = []
    for image in images:
        height, width, size = *image.shape[:2], SMALL.vision.image_size
        new = [int(size * side / min(height, width)) for side in (width, height)]
        left, top = (round((side - size) / 2.0) for side in new)
        box = (left, top, left + size, top + size)
        image = Image.fromarray(image).resize(tuple(new), Image.Resampling.BICUBIC).crop(box)
        pixels.append((np.asarray(image) / 255 - IMAGE_MEAN) / IMAGE_STD)
    tokenizer = BertTokenizer(str(vocabulary))
    text = tokenizer(captions, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    pixels_NCHW = torch.from_numpy(np.stack(pixels)).float().permute(0, 3, 1, 2)
    return model(pixels_NCHW, text.input_ids, text.attention_mask).numpy()


@pytest.mark.parametrize("captions", [CAPTIONS, HARD], ids=["plain", "hard"])
def test_rewards_agree_with_pytorch(
    published: tuple[TorchImageReward, Path], images: list[np.ndarray], captions: list[str]
) -> None:
    model, file = published
    theirs = expected(model, file.parent / "vocab.txt", images, captions)
    assert np.ptp(theirs) > 0.1 * np.abs(theirs).max()
    score = open_image_reward(str(file), Settings(batch_size=2), SMALL)
    np.testing.assert_allclose(score(images, captions), theirs, atol=1e-4 * np.abs(theirs).max())


def test_the_published_size_is_what_is_opened(published: tuple[TorchImageReward, Path], tmp_path: Path) -> None:
    _, file = published
    with pytest.raises(
        ValueError, match=r"ImageReward\.safetensors does not hold the model .*: 524 missing: text_encoder"
    ):
        open_judge(f"imagereward={file}")
    with pytest.raises(FileNotFoundError, match=r"no folder or file .*/nothing\.safetensors"):
        open_judge(f"imagereward={tmp_path}/nothing.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("[CLS]", "cls"), r"lacks \[CLS\]"),
        (lambda text: text + "fish\n", "has 21 tokens, 20 of them distinct"),
        (lambda text: text + "\n".join(f"w{i}" for i in range(1000)), "has 1020 tokens"),
        (lambda text: text.replace("[PAD]", "pad"), r"lacks \[PAD\]"),
    ],
)
def test_a_vocabulary_that_does_not_fit(
    published: tuple[TorchImageReward, Path], tmp_path: Path, change: Any, message: str
) -> None:
    file = tmp_path / "ImageReward.safetensors"
    shutil.copy(published[1], file)
    (tmp_path / "vocab.txt").write_text(change((published[1].parent / "vocab.txt").read_text()))
    with pytest.raises(ValueError, match=rf"vocab.txt is not BERT's vocabulary .*: it {message}"):
        open_image_reward(str(file), Settings(), SMALL)
