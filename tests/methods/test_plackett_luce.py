"""Plackett-Luce over lists, with ties and padding, against sums over competitors written out in PyTorch."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.batch import LossInputs
from dpo_jax.cli import flatten
from dpo_jax.errors import UserError
from dpo_jax.methods import METHODS
from dpo_jax.methods.dpo import dpo
from dpo_jax.methods.metrics import list_metrics, pair_metrics
from dpo_jax.methods.plackett_luce import plackett_luce
from dpo_jax.training.config import check_values
from dpo_jax.training.defaults import choose_method, default_config, with_fields

BETA = 500.0
RANKED = np.array(
    [[0.5, 1 / 3, 1 / 6, 0], [0.4, 0.4, 0.2, 0], [0.5, 0.5, 0, 0], [1, 0, 0, 0], [0.25] * 4, [1, 0, 0, 0]]
)
"""Without ties, tied best ones, tied best and worst ones, only the best known, all tied, and a pair."""
NUMBER = np.array([4, 4, 4, 4, 4, 2])
VALID = np.arange(4) < NUMBER[:, None]
examples = settings(max_examples=30, deadline=None, derandomize=True, database=None)


def inputs_of(log_ratio_BK, preference_BK=RANKED, valid_BK=VALID) -> LossInputs:
    log_ratio_BK = jnp.asarray(log_ratio_BK)
    return LossInputs(
        log_ratio_BK,
        preference_BK=jnp.asarray(preference_BK, log_ratio_BK.dtype),
        valid_BK=jnp.asarray(valid_BK),
        error_BK=0.2 - 2 * log_ratio_BK,
        reference_error_BK=jnp.full_like(log_ratio_BK, 0.2),
        drift_BK=jnp.square(log_ratio_BK),
    )


@functools.partial(jax.jit, static_argnums=0)
def compiled(loss, inputs: LossInputs):
    def total(log_ratio_BK):
        loss_B = loss(inputs._replace(log_ratio_BK=log_ratio_BK), beta=BETA)
        return loss_B.sum(), loss_B

    return jax.grad(total, has_aux=True)(inputs.log_ratio_BK)


def value_and_gradient(inputs: LossInputs, loss=plackett_luce) -> tuple[np.ndarray, np.ndarray]:
    """Return the loss of each prompt and its gradient by the log-ratios."""
    gradient_BK, loss_B = compiled(loss, inputs)
    return np.asarray(loss_B), np.asarray(gradient_BK)


def random_log_ratios() -> np.ndarray:
    """Log-ratios on the scale of 1 / beta, some far beyond; those of padding too."""
    return np.random.default_rng(0).normal(size=(6, 4)) * np.array([1e-3, 1e-3, 4e-3, 2e-2, 1e-3, 1e-3])[:, None]


def expected_of(log_ratio_K, preference_K, number) -> torch.Tensor:
    total = torch.zeros(())
    for k in range(number):
        competitors = [k] + [j for j in range(number) if preference_K[k] > preference_K[j]]
        total = total - (BETA * log_ratio_K[k] - torch.logsumexp(BETA * log_ratio_K[competitors], dim=0))
    return total


def test_value_and_gradient_are_those_of_each_against_the_strictly_worse(x64) -> None:
    log_ratio = torch.from_numpy(random_log_ratios()).requires_grad_()
    expected = torch.stack([expected_of(*row) for row in zip(log_ratio, RANKED, NUMBER, strict=True)])
    (slope,) = torch.autograd.grad(expected.sum(), log_ratio)

    loss_B, gradient_BK = value_and_gradient(inputs_of(random_log_ratios()))

    np.testing.assert_allclose(loss_B, expected.detach(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(gradient_BK, slope, rtol=1e-9, atol=1e-9)
    assert np.any(gradient_BK[:4], axis=1).all()
    assert not np.any(gradient_BK[4]), "where all are tied there is nothing to learn"
    assert not np.any(gradient_BK[5, 2:]), "padding takes no part"


def test_without_ties_it_is_the_published_formula_in_our_unit(x64) -> None:
    """The published one has beta times the gain: its 250 is our 500. The sum over the positions, not their mean."""
    gain = 2 * torch.from_numpy(random_log_ratios()[:1])
    rest = torch.logcumsumexp(250 * gain.flip(1), dim=1).flip(1)
    expected = -(250 * gain - rest).sum(dim=1)
    loss_B, _ = value_and_gradient(inputs_of(random_log_ratios()))
    np.testing.assert_allclose(loss_B[:1], expected, rtol=1e-9)


def test_two_candidates_are_dpo_to_the_last_bit() -> None:
    log_ratio_BK = np.float32(np.random.default_rng(1).normal(size=(50, 2)) * 10.0 ** np.linspace(-6, 1, 50)[:, None])
    pairs = inputs_of(log_ratio_BK, np.tile([1.0, 0.0], (50, 1)), np.ones((50, 2), bool))
    (ours_B, ours_BK), (dpo_B, dpo_BK) = value_and_gradient(pairs), value_and_gradient(pairs, dpo)
    np.testing.assert_array_equal(ours_B, dpo_B)
    np.testing.assert_allclose(ours_BK, dpo_BK, rtol=1e-6)
    metrics = [jax.device_get(jax.jit(metrics)(pairs)) for metrics in (list_metrics, pair_metrics)]
    assert metrics[0].keys() == metrics[1].keys()
    jax.tree.map(np.testing.assert_array_equal, *metrics)


def test_the_policy_equal_to_the_reference_counts_rankings(x64) -> None:
    loss_B, _ = value_and_gradient(inputs_of(np.zeros((6, 4))))
    expected = [math.log(24), math.log(3 * 3 * 2), 2 * math.log(3), math.log(4), 0, math.log(2)]
    np.testing.assert_allclose(loss_B, expected, rtol=1e-12)


lists = st.lists(st.floats(-0.02, 0.02), min_size=4, max_size=4)
ranks = st.lists(st.integers(0, 3), min_size=4, max_size=4)


def one_list(log_ratio_K, preference_K, number=4) -> LossInputs:
    return inputs_of(np.array([log_ratio_K]), np.array([preference_K], float), np.arange(4)[None] < number)


@examples
@given(lists, ranks, st.permutations(range(4)))
def test_the_order_of_the_batch_does_not_matter(log_ratio_K, preference_K, order) -> None:
    """Tied candidates included: only preferences say who competes with whom."""
    with jax.enable_x64(True):
        loss_B, gradient_BK = value_and_gradient(one_list(log_ratio_K, preference_K))
        permuted = one_list([log_ratio_K[k] for k in order], [preference_K[k] for k in order])
        permuted_B, permuted_BK = value_and_gradient(permuted)
    np.testing.assert_allclose(permuted_B, loss_B, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(permuted_BK[0], gradient_BK[0, list(order)], rtol=1e-9, atol=1e-9)


@examples
@given(lists, ranks, st.integers(1, 4), st.floats(-1, 1), st.floats(-1e3, 1e3))
def test_shifts_and_padding_change_nothing(log_ratio_K, preference_K, number, shift, padding) -> None:
    with jax.enable_x64(True):
        loss_B, gradient_BK = value_and_gradient(one_list(log_ratio_K, preference_K, number))
        shifted = [x + shift if k < number else padding for k, x in enumerate(log_ratio_K)]
        shifted_B, shifted_BK = value_and_gradient(one_list(shifted, preference_K, number))
    np.testing.assert_allclose(shifted_B, loss_B, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(shifted_BK, gradient_BK, rtol=1e-8, atol=1e-7)
    np.testing.assert_allclose(np.sum(gradient_BK), 0, atol=1e-9)
    assert not np.any(gradient_BK[0, number:])


@examples
@given(lists, ranks)
def test_the_best_are_pulled_up_and_the_worst_down(log_ratio_K, preference_K) -> None:
    with jax.enable_x64(True):
        loss_B, gradient_BK = value_and_gradient(one_list(log_ratio_K, preference_K))
    best = np.array(preference_K) == max(preference_K)
    worst = np.array(preference_K) == min(preference_K)
    if max(preference_K) == min(preference_K):
        assert loss_B[0] == 0
    else:
        assert loss_B[0] > 0
        assert np.all(gradient_BK[0][best] < 0)
        assert np.all(gradient_BK[0][worst] > 0)


@pytest.mark.parametrize("far", [9e3, -9e3, 0.0], ids=["hopeless", "learned", "zero"])
def test_value_and_gradient_are_finite_in_float32(far: float) -> None:
    loss_B, gradient_BK = value_and_gradient(inputs_of(np.float32(far) * np.tile(np.float32([-1, 0, 1, 2]), (6, 1))))
    assert loss_B.dtype == np.float32
    assert np.isfinite(loss_B).all()
    assert np.isfinite(gradient_BK).all()
    assert far >= 0 or not np.any(loss_B[:1]), "a list that is learned has no loss"


def test_metrics_are_of_the_best_the_worst_and_all_ordered_pairs() -> None:
    log_ratio_BK = np.float32([[3, 1, 2, 0], [1, 3, 2, 0], [1, 2, 3, 0], [0, 1, 2, 0], [3, 2, 1, 0], [1, 2, 9, 9]])
    inputs = inputs_of(log_ratio_BK)
    objective = METHODS["plackett_luce"].objective({})
    assert objective.held_out_metrics is list_metrics
    found = jax.device_get(jax.jit(objective.metrics)(inputs))
    np.testing.assert_allclose(found["pair/accuracy"], [5 / 6, 4 / 5, 1 / 2, 1 / 6, 1 / 2, 0])
    np.testing.assert_allclose(found["reward/margin"], [3, 1, 1, 0, 3, -1])
    last = np.array([3, 3, 3, 3, 3, 1])
    np.testing.assert_array_equal(found["error/winner"], inputs.error_BK[:, 0])
    np.testing.assert_array_equal(found["error/loser"], np.asarray(inputs.error_BK)[np.arange(6), last])
    np.testing.assert_array_equal(found["error/reference_loser"], np.full(6, np.float32(0.2)))
    np.testing.assert_allclose(found["error/drift"], [3.5, 3.5, 3.5, 1.25, 3.5, 2.5])


def test_it_has_the_number_of_candidates_and_none_of_the_plug_ins_of_pairs() -> None:
    config = default_config()
    assert "candidates" not in config.data
    choose_method(config, "plackett_luce")
    assert config.data.candidates == 4
    assert "safeguard" not in config.loss
    check_values(config)
    with pytest.raises(UserError, match=r"config\.data\.candidates=1 must be at least 2 and at most 256"):
        check_values(with_fields(config, {"data.candidates": 1}))
    images = {
        name: METHODS[name].images_per_example(flatten(config)) for name in ("plackett_luce", "dpo", "sft", "kto")
    }
    assert images == {"plackett_luce": 4, "dpo": 2, "sft": 2, "kto": 1}
    assert METHODS["plackett_luce"].objective({}).loss_at_reference() is None, "it depends on the lengths of the lists"
