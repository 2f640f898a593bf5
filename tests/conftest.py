"""Shared fixtures."""

from collections.abc import Iterator

import dpo_jax  # noqa: F401  sets XLA_FLAGS before JAX starts
import jax
import pytest


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision inside the test."""
    with jax.enable_x64(True):
        yield
