"""Shared fixtures."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Most of the suite's time is compilation; what must be tested as users run it clears XLA_FLAGS in a subprocess.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
# Compiled functions are kept beside pytest's own cache, for tests in this and in other processes.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))

import jax
import pytest
import torch
from ml_collections import ConfigDict

from dpo_jax.cli import load_config

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
