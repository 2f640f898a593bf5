"""Losses against the formulas of the official Diffusion-DPO code, written out in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dpo_jax.batch import LossInputs
from dpo_jax.methods.dpo import dpo
from dpo_jax.methods.sft import sft
from dpo_jax.objectives.preferences import implicit_accuracy, margin

WINNER = np.array([[1.0, 0.0]] * 5)


def inputs_of(error_BK: np.ndarray, reference_error_BK: np.ndarray) -> LossInputs:
    error_BK, reference_error_BK = jnp.asarray(error_BK), jnp.asarray(reference_error_BK)
    return LossInputs(
        -(error_BK - reference_error_BK) / 2,
        jnp.asarray(WINNER[: len(error_BK)]),
        error_BK=error_BK,
        reference_error_BK=reference_error_BK,
    )


def random_errors() -> np.ndarray:
    return 0.1 + 1e-3 * np.random.default_rng(0).normal(size=(2, 5, 2))


def test_dpo_is_the_official_formula(x64):
    error_BK, reference_error_BK = random_errors()
    model, reference = torch.from_numpy(error_BK), torch.from_numpy(reference_error_BK)
    beta = 5000
    inside = -0.5 * beta * ((model[:, 0] - model[:, 1]) - (reference[:, 0] - reference[:, 1]))
    expected = -torch.nn.functional.logsigmoid(inside)
    expected_accuracy = np.mean(inside.numpy() > 0)

    inputs = inputs_of(error_BK, reference_error_BK)

    np.testing.assert_allclose(dpo(inputs, beta=beta), expected, rtol=1e-9)
    np.testing.assert_allclose(beta * margin(inputs.log_ratio_BK), inside, rtol=1e-9)
    assert implicit_accuracy(inputs.log_ratio_BK).mean() == expected_accuracy


def test_soft_preferences_mix_both_directions(x64):
    inputs = inputs_of(*random_errors())
    p = np.array([1.0, 0.9, 0.5, 0.25, 0.0])
    z = 5000 * np.asarray(margin(inputs.log_ratio_BK))
    expected = p * np.log1p(np.exp(-z)) + (1 - p) * np.log1p(np.exp(z))

    np.testing.assert_allclose(
        dpo(inputs._replace(preference_BK=jnp.stack([p, 1 - p], axis=1)), beta=5000), expected, rtol=1e-9
    )


def test_policy_equal_to_reference_gives_log_2():
    error_BK, _ = random_errors()
    inputs = inputs_of(error_BK, error_BK)

    np.testing.assert_array_equal(dpo(inputs, beta=5000), np.full(5, np.log(np.float32(2))))
    np.testing.assert_array_equal(implicit_accuracy(inputs.log_ratio_BK), np.full(5, 0.5))


def test_swapping_the_candidates_negates_the_margin():
    inputs = inputs_of(*random_errors())
    swapped = jax.tree.map(lambda field_BK: field_BK[:, ::-1], inputs)

    np.testing.assert_array_equal(margin(swapped.log_ratio_BK), -margin(inputs.log_ratio_BK))
    np.testing.assert_array_equal(implicit_accuracy(swapped.log_ratio_BK), 1 - implicit_accuracy(inputs.log_ratio_BK))
    np.testing.assert_array_equal(dpo(swapped, beta=5000), dpo(inputs, beta=5000))


def test_a_hopeless_pair_still_has_a_finite_loss():
    inputs = inputs_of(np.array([[9e3, 0.0]]), np.zeros((1, 2)))

    np.testing.assert_allclose(dpo(inputs, beta=5000), 2.25e7)


def test_sft_is_the_winners_error():
    error_BK, _ = random_errors()

    np.testing.assert_array_equal(sft(inputs_of(error_BK, error_BK)), error_BK[:, 0].astype(np.float32))


def test_more_than_two_candidates_are_refused():
    with pytest.raises(ValueError, match="the batch has 3 candidates per prompt, but a loss of pairs needs 2"):
        margin(jnp.zeros((4, 3)))


def test_label_smoothing_is_the_soft_label_of_a_hard_one(x64):
    inputs = inputs_of(*random_errors())
    soft = inputs._replace(preference_BK=jnp.array([[0.9, 0.1]] * 5))

    np.testing.assert_allclose(dpo(inputs, beta=5000, label_smoothing=0.1), dpo(soft, beta=5000), rtol=1e-9)
