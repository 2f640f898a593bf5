"""The CLIP judges on small random models against transformers."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from dpo_jax.rewards import open_judge
from dpo_jax.sharding import Placement, make_mesh

from .conftest import CAPTIONS, IMAGE_SIZE

Clip = tuple[CLIPModel, Path]


def unit(features: torch.Tensor) -> torch.Tensor:
    return features / features.norm(dim=-1, keepdim=True)


def image_features(model: CLIPModel, pictures: list[np.ndarray]) -> torch.Tensor:
    processor = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    pixels = [processor(picture, return_tensors="pt")["pixel_values"] for picture in pictures]
    with torch.no_grad():
        return unit(model.get_image_features(torch.cat(pixels)).pooler_output)


def cosines(model: CLIPModel, folder: Path, pictures: list[np.ndarray], captions: list[str]) -> np.ndarray:
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    inputs = tokenizer(captions, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        text = unit(model.get_text_features(**inputs).pooler_output)
    return (image_features(model, pictures) * text).sum(-1).numpy()


def test_scores_agree_with_transformers(clip: Clip, pictures: list[np.ndarray]) -> None:
    model, folder = clip
    expected = cosines(model, folder, pictures, CAPTIONS)
    assert np.ptp(expected) > 0.05
    for captions in (CAPTIONS, CAPTIONS[::-1]):
        expected = cosines(model, folder, pictures, captions)
        judge = open_judge(f"clipscore={folder}", batch_size=2)
        np.testing.assert_allclose(judge.score(pictures, captions), 100 * expected.clip(0), atol=1e-3)
        scores = open_judge(f"pickscore={folder}", batch_size=3).score(pictures, captions)
        np.testing.assert_allclose(scores, model.logit_scale.exp().item() * expected, atol=1e-4)
        assert scores.dtype == np.float32
    assert judge.name == "clipscore"
