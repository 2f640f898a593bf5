"""Shared fixtures."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Most of the suite's time is compilation; what must be tested as users run it clears XLA_FLAGS in a subprocess.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
# Everything is tested on CPUs; a compiler for GPUs is offered without one only to those who say so.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiled functions are kept beside pytest's own cache, for tests in this and in other processes.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))

import jax
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from PIL import Image

from dpo_jax.cli import load_config
from dpo_jax.data import builder
from dpo_jax.data.sources import SOURCES

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)  # the models are tiny, and more threads only wait for each other


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision inside the test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., ConfigDict]:
    """`tiny_config("sd15", steps=2, **{"loss.beta": 1.0})`: the `:tiny` variant of a config with fields replaced."""

    def make(name: str, **fields: object) -> ConfigDict:
        config = load_config(f"{ROOT}/configs/{name}.py:tiny")
        config.validation.every = config.sample.every = 0
        with config.unlocked():
            for path, value in fields.items():
                *parents, leaf = path.split(".")
                node = config
                for parent in parents:
                    node = node[parent]
                node[leaf] = value
        return config

    return make


@pytest.fixture
def mixed_pairs(tmp_path: Path) -> Path:
    """Prepared: 12 pairs of 14 images in several shapes, under 9 captions, two of which are of single images."""
    rng = np.random.default_rng(0)
    for i in range(14):
        height, width = rng.choice([32, 40, 64], 2)
        noise = np.clip(rng.integers(256, size=3) + rng.normal(0, 30, (height, width, 3)), 0, 255)
        Image.fromarray(noise.astype(np.uint8)).save(tmp_path / f"{i}.png")
    rows = [{"prompt": f"prompt {i % 5}", "images": [f"{i}.png", f"{(i + 5) % 14}.png"]} for i in range(11)]
    rows.append({"prompt": "both", "images": ["11.png", "12.png"], "captions": ["mine", "yours"]})
    lines = [json.dumps(row | {"preferred": 0}) for row in rows]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    builder.prepare(SOURCES["jsonl"], [tmp_path / "pairs.jsonl"], tmp_path / "data", workers=0, validation_fraction=0.2)
    return tmp_path / "data"
