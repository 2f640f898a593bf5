"""Diffusion-KTO against the formula of its released code, written out in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dpo_jax.batch import LossInputs
from dpo_jax.methods.kto import KTO, kto, vote_metrics

LIKED = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])


def inputs_of(error_B, reference_B, liked_B=LIKED, weight_B=None) -> LossInputs:
    error_BK, reference_BK = jnp.asarray(error_B)[:, None], jnp.asarray(reference_B)[:, None]
    return LossInputs(
        -(error_BK - reference_BK) / 2,
        jnp.asarray(liked_B)[:, None],
        weight_B=jnp.ones(len(error_B)) if weight_B is None else jnp.asarray(weight_B),
        error_BK=error_BK,
        reference_error_BK=reference_BK,
    )


@pytest.mark.parametrize("shift", [-1e-3, 1e-3], ids=["z0 is clamped", "z0 is positive"])
def test_value_and_gradient_are_the_released_formula(x64, shift: float) -> None:
    rng = np.random.default_rng(0)
    error_B = 0.1 + 1e-3 * rng.normal(size=6)
    reference_B = error_B + shift + 5e-4 * rng.normal(size=6)
    model = torch.tensor(error_B, requires_grad=True)
    gain = torch.tensor(reference_B) - model
    z0 = gain.mean().clamp(min=0).detach()
    sign = torch.tensor(2 * LIKED - 1)
    expected = 1 - torch.sigmoid(sign * 1000 * (gain - z0))
    expected.mean().backward()

    def loss(error_B):
        return kto(inputs_of(error_B, reference_B), beta=2000.0)

    np.testing.assert_allclose(loss(jnp.asarray(error_B)), expected.detach(), rtol=1e-9)
    slope_B = jax.grad(lambda error_B: loss(error_B).mean())(jnp.asarray(error_B))
    np.testing.assert_allclose(slope_B, model.grad, rtol=1e-9)
    assert (float(z0) > 0) == (shift > 0)
    assert KTO.fields["beta"].default == 2000


def test_padding_has_no_part_in_the_mean(x64) -> None:
    reference_B = 0.1 + np.arange(6) * 1e-4
    whole = kto(inputs_of(np.full(6, 0.1), reference_B, weight_B=[1.0, 1, 1, 1, 0, 0]), beta=500.0)
    part = kto(inputs_of(np.full(4, 0.1), reference_B[:4], LIKED[:4]), beta=500.0)
    np.testing.assert_allclose(whole[:4], part, rtol=1e-12)


def test_accuracy_is_the_agreement_with_the_vote() -> None:
    inputs = inputs_of(np.full(6, 0.5), np.array([0.6, 0.6, 0.4, 0.5, 0.4, 0.6]))
    assert vote_metrics(inputs)["vote/accuracy"].tolist() == [1, 0, 0, 0.5, 1, 1]
