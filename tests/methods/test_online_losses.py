"""Losses of transitions, with their gradients, against the formulas of D3PO's released code in PyTorch."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dpo_jax.batch import LossInputs
from dpo_jax.methods.d3po import d3po
from dpo_jax.methods.ddpo import ddpo
from dpo_jax.methods.dpok import dpok
from dpo_jax.objectives.preferences import clamp, is_preferred

B, K, BETA = 5, 7, 0.1
PAIRS = list(itertools.combinations(range(K), 2))


def random_rewards(dtype=np.float64, spread=0.05):
    """Return log-ratios, some of them at the clamp, and rewards with ties."""
    rng = np.random.default_rng(0)
    ratio_BK = np.clip(rng.normal(size=(B, K)) * spread, np.log(0.9), np.log(1.1)).astype(dtype)
    return ratio_BK, rng.integers(0, 4, (B, K)).astype(dtype)


def torch_pair_loss(ratio_0, ratio_1, reward_0, reward_1):
    """The published loss of log-ratios [B]; the signs are 1 and -1 for better and worse, 0 for both in a tie."""
    prefer_0 = (reward_0 > reward_1).to(ratio_0.dtype) - (reward_0 < reward_1).to(ratio_0.dtype)
    return -torch.log(torch.sigmoid(BETA * ratio_0 * prefer_0 - BETA * ratio_1 * prefer_0))


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-9), (np.float32, 1e-5)])
def test_d3po_is_the_sum_of_the_published_loss_over_all_pairs(x64, dtype, rtol):
    ratio_BK, reward_BK = random_rewards(dtype)
    ratio, reward = torch.from_numpy(ratio_BK).requires_grad_(), torch.from_numpy(reward_BK)
    expected = torch.zeros(B, dtype=ratio.dtype)
    assert len(PAIRS) == 21
    for i, j in PAIRS:
        loss = torch_pair_loss(ratio[:, i], ratio[:, j], reward[:, i], reward[:, j])
        expected = expected + torch.where(reward[:, i] == reward[:, j], 0, loss)
    expected.sum().backward()

    def total(ratio_BK):
        loss_B = d3po(LossInputs(ratio_BK, jnp.asarray(reward_BK)), beta=BETA)
        return loss_B.sum(), loss_B

    gradient_BK, loss_B = jax.grad(total, has_aux=True)(jnp.asarray(ratio_BK))
    assert loss_B.dtype == dtype
    np.testing.assert_allclose(loss_B, expected.detach(), rtol=rtol)
    np.testing.assert_allclose(gradient_BK, ratio.grad, rtol=rtol, atol=1e-7)


def test_d3po_of_two_candidates_is_the_pair_loss(x64):
    ratio_BK = random_rewards()[0][:, :2]
    ratio = torch.from_numpy(ratio_BK)
    better = torch.ones(B)
    expected = torch_pair_loss(ratio[:, 0], ratio[:, 1], better, 0 * better)

    loss_B = d3po(LossInputs(ratio_BK, jnp.array([[1.0, 0.0]] * B)), beta=BETA)

    np.testing.assert_allclose(loss_B, expected, rtol=1e-7)


def test_d3po_knows_no_order_of_the_candidates(x64):
    ratio_BK, reward_BK = random_rewards()
    order = np.random.default_rng(1).permutation(K)

    loss_B = d3po(LossInputs(ratio_BK, jnp.asarray(reward_BK)), beta=BETA)

    shuffled_B = d3po(LossInputs(ratio_BK[:, order], jnp.asarray(reward_BK[:, order])), beta=BETA)
    np.testing.assert_allclose(shuffled_B, loss_B, rtol=1e-9)


def test_swapped_preferences_turn_the_gradient_of_equal_candidates_around(x64):
    _, reward_BK = random_rewards()
    ratio_BK = jnp.zeros((B, K))

    def gradient_BK(reward_BK):
        return jax.grad(lambda ratio_BK: d3po(LossInputs(ratio_BK, jnp.asarray(reward_BK)), beta=BETA).sum())(ratio_BK)

    np.testing.assert_allclose(gradient_BK(-jnp.asarray(reward_BK)), -gradient_BK(jnp.asarray(reward_BK)), atol=1e-12)
    # At ratio 1 each pair pulls by beta / 2: as many wins less losses as a candidate has.
    wins_BK = np.array([[sum(np.sign(own - row)) for own in row] for row in reward_BK])
    np.testing.assert_allclose(gradient_BK(jnp.asarray(reward_BK)), -BETA / 2 * wins_BK, atol=1e-12)


def test_swapping_a_pair_and_its_preference_changes_nothing():
    ratio_BK = random_rewards(np.float32)[0][:, :2]
    reward_BK = jnp.array([[2.0, 5.0]] * B)

    loss_B = d3po(LossInputs(ratio_BK, jnp.asarray(reward_BK)), beta=BETA)

    np.testing.assert_array_equal(d3po(LossInputs(ratio_BK[:, ::-1], reward_BK[:, ::-1]), beta=BETA), loss_B)
    assert np.all(d3po(LossInputs(ratio_BK, reward_BK[:, ::-1]), beta=BETA) != loss_B)


@pytest.mark.parametrize("reward", [0.5, np.nan])
def test_ties_and_candidates_without_a_score_have_neither_loss_nor_gradient(reward):
    ratio_BK, _ = random_rewards(np.float32)
    reward_BK = jnp.full((B, K), reward).at[0, :2].set(jnp.array([1.0, 0.0]))

    def total(ratio_BK):
        loss_B = d3po(LossInputs(ratio_BK, jnp.asarray(reward_BK)), beta=BETA)
        return loss_B.sum(), loss_B

    gradient_BK, loss_B = jax.grad(total, has_aux=True)(jnp.asarray(ratio_BK))

    assert loss_B[0] > 0
    assert gradient_BK[0, :2].all()
    np.testing.assert_array_equal(loss_B[1:], np.zeros(B - 1))
    np.testing.assert_array_equal(gradient_BK[1:], np.zeros((B - 1, K)))


def test_vectors_of_rewards_compare_by_dominance():
    rng = np.random.default_rng(0)
    reward_BKR = rng.integers(0, 3, (B, K, 3))
    beats_BKK = np.asarray(is_preferred(jnp.asarray(reward_BKR)))
    kinds = set()
    for b, i, j in itertools.product(range(B), range(K), range(K)):
        one, other = reward_BKR[b, i], reward_BKR[b, j]
        expected = all(one >= other) and any(one > other)
        assert beats_BKK[b, i, j] == expected
        kinds.add((expected, beats_BKK[b, j, i]))
    assert kinds == {(True, False), (False, True), (False, False)}


def test_one_reward_orders_the_candidates():
    reward_BK = jnp.asarray(random_rewards()[1])

    expected = np.asarray(reward_BK)[:, :, None] > np.asarray(reward_BK)[:, None]
    np.testing.assert_array_equal(is_preferred(reward_BK), expected)
    np.testing.assert_array_equal(is_preferred(reward_BK[..., None]), expected)


def policy_inputs(dtype):
    """Return log-probabilities, old ones, advantages and divergences, inside the clips and beyond them."""
    rng = np.random.default_rng(2)
    old_BK = rng.normal(size=(B, K)) - 1
    moved_BK = rng.normal(size=(B, K)) * 1e-4
    arrays = old_BK + moved_BK, old_BK, rng.normal(size=(B, K)) * 4, rng.exponential(size=(B, K))
    return [array.astype(dtype) for array in arrays]


@pytest.mark.parametrize("kl_weight", [None, 0.01, 0.5])
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-9), (np.float32, 1e-5)])
def test_policy_gradients_are_the_published_ones(x64, dtype, rtol, kl_weight):
    log_prob_BK, old_BK, advantage_BK, kl_BK = policy_inputs(dtype)
    log_prob, kl = (torch.from_numpy(x).requires_grad_() for x in (log_prob_BK, kl_BK))
    advantages = torch.clamp(torch.from_numpy(advantage_BK), -5, 5)
    ratio = torch.exp(log_prob - torch.from_numpy(old_BK))
    unclipped, clipped = -advantages * ratio, -advantages * torch.clamp(ratio, 1 - 1e-4, 1 + 1e-4)
    expected = torch.mean(torch.maximum(unclipped, clipped), dim=1)
    if kl_weight is not None:
        expected = expected + kl_weight * kl.mean(dim=1)
    expected.sum().backward()
    assert 0.1 < np.mean(np.abs(ratio.detach().numpy() - 1) > 1e-4) < 0.9
    assert np.any(np.abs(advantage_BK) > 5)

    def total(log_prob_BK, kl_BK):
        ignored = jnp.full((B, K), jnp.nan)
        inputs = LossInputs(
            jnp.zeros((B, K)),
            ignored,
            log_prob_BK=log_prob_BK,
            old_log_prob_BK=old_BK,
            advantage_BK=advantage_BK,
            kl_BK=kl_BK,
        )
        loss_B = ddpo(inputs) if kl_weight is None else dpok(inputs, kl_weight=kl_weight)
        return loss_B.sum(), loss_B

    gradients, loss_B = jax.grad(total, argnums=(0, 1), has_aux=True)(jnp.asarray(log_prob_BK), jnp.asarray(kl_BK))
    assert loss_B.dtype == dtype
    np.testing.assert_allclose(loss_B, expected.detach(), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(gradients[0], log_prob.grad, rtol=rtol, atol=rtol)
    assert np.any(gradients[0] == 0)
    assert np.any(gradients[0])
    if kl_weight is not None:
        np.testing.assert_allclose(gradients[1], kl.grad, rtol=rtol)


def test_on_the_bounds_a_clamp_has_the_gradient_of_pytorch():
    values = np.array([0.8, 0.9, 1.0, 1.1, 1.2], np.float32)
    x = torch.from_numpy(values).requires_grad_()
    clamped = torch.clamp(x, 0.9, 1.1)
    clamped.sum().backward()

    np.testing.assert_array_equal(clamp(jnp.asarray(values), 0.9, 1.1), clamped.detach())
    np.testing.assert_array_equal(jax.grad(lambda x: clamp(x, 0.9, 1.1).sum())(values), x.grad)
    np.testing.assert_array_equal(x.grad, [0, 1, 1, 1, 0])


def test_a_policy_that_has_not_moved_follows_the_advantages():
    _, old_BK, advantage_BK, _ = policy_inputs(np.float32)

    def total(log_prob_BK):
        inputs = LossInputs(old_BK, log_prob_BK=log_prob_BK, old_log_prob_BK=old_BK, advantage_BK=advantage_BK)
        return ddpo(inputs).sum()

    np.testing.assert_allclose(jax.grad(total)(jnp.asarray(old_BK)), -np.clip(advantage_BK, -5, 5) / K, rtol=1e-6)


def test_the_divergence_counts_for_a_single_image_too():
    """The divergence of the released code is 0 for one image."""
    zero = jnp.zeros((1, 1))
    inputs = LossInputs(zero, log_prob_BK=zero, old_log_prob_BK=zero, advantage_BK=zero, kl_BK=zero + 3)

    np.testing.assert_allclose(dpok(inputs), [0.03], rtol=1e-6)
