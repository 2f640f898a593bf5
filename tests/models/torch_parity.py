"""Comparison of our networks with PyTorch's: the same weights, the same inputs, and the distance of the results."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dpo_jax.models.network import Network
from dpo_jax.weights.layout import Params, from_torch, torch_name

FAST = {"xla_backend_optimization_level": 0}  # compiles twice as fast, and running takes no time


def with_random_vectors(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model in float64, with norms and biases away from their trivial initial values."""
    model = model.double().eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def our_params(network: Network, arrays: dict[str, torch.Tensor]) -> Params:
    """Return PyTorch's arrays under our names."""
    return {
        name: jnp.asarray(from_torch(arrays[torch_name(name)].detach().numpy(), spec))
        for name, spec in network.specs.items()
    }


def run(network: Network, params: Params, *inputs: Any) -> jax.Array:
    return jax.jit(lambda params, *inputs: network(params, *inputs), compiler_options=FAST)(params, *inputs)


def relative_error(ours: Any, oracle: Any) -> float:
    ours, oracle = (np.asarray(x, np.float64) for x in (ours, oracle))
    assert ours.shape == oracle.shape
    return float(np.linalg.norm(ours - oracle) / np.linalg.norm(oracle))


def double_sinusoids(timesteps: torch.Tensor, embedding_dim: int, **_: Any) -> torch.Tensor:
    half = embedding_dim // 2
    angles = timesteps.double()[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def double_rms_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)


@contextmanager
def double_diffusers() -> Iterator[None]:
    """Let diffusers compute in float64 what it computes in float32 whatever the model's dtype."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.models.embeddings.get_timestep_embedding", double_sinusoids)
        patch.setattr("diffusers.models.normalization.RMSNorm.forward", double_rms_norm)
        yield


@contextmanager
def double_transformers() -> Iterator[None]:
    """Let transformers compute in float64 what it computes in float32 whatever the model's dtype."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield
