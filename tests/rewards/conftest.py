"""Small random judges in the layouts of the published ones."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from ..conftest import ROOT

TOKENIZER = ROOT / "dpo_jax" / "tiny" / "model" / "tokenizer"
IMAGE_SIZE = 28
CAPTIONS = ["a red circle", "a blue square at the top left", "a red circle", "", "of of of of of of of of of of of of"]


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Make all weights random, also those that transformers initialises with ones and zeros."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def small_clip(hidden_act: str) -> CLIPModel:
    """A CLIP with two layers per encoder, for the ids of the tiny tokenizer."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": hidden_act}
    text = layers | {"hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 16, "projection_dim": 12}
    text |= {"vocab_size": len(tokenizer), "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}
    vision = layers | {"hidden_size": 32, "intermediate_size": 40, "image_size": IMAGE_SIZE, "patch_size": 7}
    torch.manual_seed(0)
    return randomised(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)))


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[CLIPModel, Path]:
    """A small CLIP, and the folder that transformers writes for it, with its tokenizer."""
    folder = tmp_path_factory.mktemp("judges") / "clip"
    model = small_clip("gelu")
    model.save_pretrained(folder)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, folder)
    return model, folder


@pytest.fixture
def images() -> list[np.ndarray]:
    """One image per caption of CAPTIONS, in odd shapes, with structure that cropping and scaling change."""
    rng = np.random.default_rng(0)
    shapes = [(37, 53), (200, 30), (28, 28), (5, 9), (64, 47)]
    return [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
