"""Log-ratios of transitions against a loop over single images with SciPy's normal density."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from dpo_jax.batch import Conditioning, LossInputs
from dpo_jax.diffusion.guidance import with_guidance
from dpo_jax.diffusion.samplers import make_table
from dpo_jax.diffusion.schedule import make_schedule
from dpo_jax.diffusion.trajectories import branch, sample_trajectory, transitions_at
from dpo_jax.objectives.transitions import (
    beyond_ratio_to_sampled,
    compare_transitions,
    transition_metrics,
)

SCHEDULE = make_schedule(
    {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
)
TABLE = make_table("ddim", SCHEDULE, 20, eta=1.0)
LAST = 19  # ends in the image itself: d is 0
B, K, H, W, C = 3, 4, 4, 5, 4
POLICY, REFERENCE = {"x": jnp.array(0.9), "t": jnp.array(1e-3)}, {"x": jnp.array(0.91), "t": jnp.array(1.1e-3)}


def denoise(params, x_NHWC, t_N, conditioning):
    """A network whose output shows that each image got its own timestep and caption."""
    shift_N = params["t"] * t_N + conditioning.context_NLD[:, 0, 0] + conditioning.time_ids_NT[:, 0]
    return params["x"] * x_NHWC + shift_N[:, None, None, None]


def inputs(step_B=(0, 11, 18)):
    """Transitions of a walk with the policy, so that the log-probabilities have their usual size."""
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(B, H, W, C)), Conditioning(rng.normal(size=(B, 1, 1)), None, rng.normal(size=(B * K, 1)))
    x_BHWC, conditioning = jax.tree.map(jnp.asarray, arrays)
    each = conditioning._replace(context_NLD=jnp.repeat(conditioning.context_NLD, K, axis=0))
    start = branch(x_BHWC, jax.random.split(jax.random.key(0), B), K)
    trajectory = sample_trajectory(lambda x, t: denoise(POLICY, x, t, each), TABLE, *start)
    return transitions_at(trajectory, jnp.array(step_B)), conditioning


def expected(params, transitions, conditioning):
    """Return log-probabilities, means and standard deviations, computed one by one."""
    log_prob_BK, mean_BKHWC = np.zeros((B, K)), np.zeros((B, K, H, W, C))
    deviation_B = TABLE.steps.d[np.array(transitions.step_B)]
    for b in range(B):
        step = type(TABLE.steps)(*(values_S[transitions.step_B[b]] for values_S in TABLE.steps))
        for k in range(K):
            x = np.asarray(transitions.x_BKHWC[b, k])
            shift = params["t"] * step.t + conditioning.context_NLD[b, 0, 0] + conditioning.time_ids_NT[b * K + k, 0]
            x0 = step.p * x + step.q * (params["x"] * x + shift)
            mean_BKHWC[b, k] = step.a * x + step.b * x0
            log_prob_BK[b, k] = norm.logpdf(transitions.next_x_BKHWC[b, k], mean_BKHWC[b, k], step.d).mean()
    return log_prob_BK, mean_BKHWC, deviation_B[:, None]


def test_each_candidate_is_scored_at_its_prompts_step_with_its_own_conditioning(x64):
    transitions, conditioning = inputs()
    log_prob_BK, mean_BKHWC, deviation_B1 = expected(POLICY, transitions, conditioning)
    reference_BK, reference_mean_BKHWC, _ = expected(REFERENCE, transitions, conditioning)

    log_ratios = compare_transitions(denoise, POLICY, REFERENCE, TABLE, transitions, conditioning, clip=0.9)

    np.testing.assert_allclose(log_ratios.log_prob_BK, log_prob_BK, rtol=1e-7)
    np.testing.assert_allclose(log_ratios.log_ratio_BK, log_prob_BK - reference_BK, rtol=1e-7, atol=1e-9)
    divergence_BK = np.square(mean_BKHWC - reference_mean_BKHWC).mean(axis=(2, 3, 4)) / (2 * deviation_B1**2)
    np.testing.assert_allclose(log_ratios.kl_BK, divergence_BK, rtol=1e-7)
    np.testing.assert_array_equal(log_ratios.old_log_prob_BK, transitions.log_prob_BK)
    for params, expected_BK in ((POLICY, log_prob_BK), (REFERENCE, reference_BK)):
        alone_BK = compare_transitions(denoise, params, None, TABLE, transitions, conditioning).log_prob_BK
        np.testing.assert_allclose(alone_BK, expected_BK, rtol=1e-7)


def test_the_policy_that_sampled_has_ratio_1():
    transitions, conditioning = inputs()
    log_ratios = compare_transitions(denoise, POLICY, POLICY, TABLE, transitions, conditioning)

    assert log_ratios.log_prob_BK.dtype == jnp.float32
    np.testing.assert_array_equal(log_ratios.log_ratio_BK, np.zeros((B, K)))
    np.testing.assert_array_equal(log_ratios.kl_BK, np.zeros((B, K)))
    assert np.abs(log_ratios.log_prob_BK - log_ratios.old_log_prob_BK).max() <= 1e-6


def test_without_a_reference_the_weights_that_sampled_are_it():
    transitions, conditioning = inputs()
    runs = []

    def counting(*args):
        runs.append(args)
        return denoise(*args)

    log_ratios = compare_transitions(counting, REFERENCE, None, TABLE, transitions, conditioning, clip=0.9)

    assert len(runs) == 1
    assert log_ratios.kl_BK is None
    both = compare_transitions(denoise, REFERENCE, POLICY, TABLE, transitions, conditioning, clip=0.9)
    np.testing.assert_allclose(log_ratios.log_ratio_BK, both.log_ratio_BK, atol=1e-6)


def test_each_candidate_is_evaluated_once_by_each_network():
    transitions, conditioning = inputs()
    rows = []

    def counting(params, x_NHWC, *args):
        rows.append(len(x_NHWC))
        return denoise(params, x_NHWC, *args)

    compare_transitions(counting, POLICY, REFERENCE, TABLE, transitions, conditioning)

    assert rows == [B * K, B * K]


def test_no_gradient_reaches_the_reference():
    transitions, conditioning = inputs()

    def total(policy, reference):
        log_ratios = compare_transitions(denoise, policy, reference, TABLE, transitions, conditioning, clip=0.9)
        return log_ratios.log_ratio_BK.sum() + log_ratios.kl_BK.sum()

    policy_grads, reference_grads = jax.grad(total, argnums=(0, 1))(POLICY, REFERENCE)

    assert all(grad != 0 for grad in policy_grads.values())
    assert all(grad == 0 for grad in reference_grads.values())


def test_each_candidate_is_clamped_by_itself_and_then_has_no_gradient(x64):
    transitions, conditioning = inputs()
    moved_BK = np.linspace(-0.3, 0.3, B * K).reshape(B, K)
    # Whatever the weights do, as if sampling had been so much less or more likely.
    now_BK = compare_transitions(denoise, POLICY, None, TABLE, transitions, conditioning).log_prob_BK
    transitions = transitions._replace(log_prob_BK=now_BK - moved_BK)

    def log_ratio_BK(shift_BK):
        def shifted(*args):
            return denoise(*args) + shift_BK.reshape(-1, 1, 1, 1)

        return compare_transitions(shifted, POLICY, None, TABLE, transitions, conditioning, clip=0.1).log_ratio_BK

    still_BK = jnp.zeros((B, K))
    np.testing.assert_allclose(log_ratio_BK(still_BK), np.log(np.clip(np.exp(moved_BK), 0.9, 1.1)), rtol=1e-9)
    gradient_BK = jax.grad(lambda shift_BK: log_ratio_BK(shift_BK).sum())(still_BK)
    inside_BK = (np.exp(moved_BK) > 0.9) & (np.exp(moved_BK) < 1.1)
    assert 2 < inside_BK.sum() < B * K - 2
    np.testing.assert_array_equal(gradient_BK != 0, inside_BK)


def test_a_step_without_noise_has_ratio_1_and_no_gradient():
    transitions, conditioning = inputs((LAST, 3, LAST))

    def log_ratios(policy):
        return compare_transitions(denoise, policy, REFERENCE, TABLE, transitions, conditioning)

    def total(policy, row):
        return sum(x_BK[row].sum() for x_BK in (log_ratios(policy).log_ratio_BK, log_ratios(policy).kl_BK))

    for row, is_random in enumerate([False, True, False]):
        assert all(bool(grad != 0) == is_random for grad in jax.grad(total)(POLICY, row).values())
        assert bool(np.any(log_ratios(POLICY).log_ratio_BK[row])) == is_random
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(log_ratios(POLICY)))


def test_guidance_is_that_of_sampling():
    """Each image gets its own pair of captions, and the ratio of the policy that sampled is 1."""
    rng = np.random.default_rng(1)
    sizes_N1 = jnp.asarray(rng.normal(size=(B * K, 1)), jnp.float32)
    prompts = Conditioning(jnp.asarray(rng.normal(size=(B, 1, 1)), jnp.float32), None, sizes_N1)
    empty = Conditioning(jnp.zeros((B, 1, 1)), None, sizes_N1)
    guided = with_guidance(denoise, 5.0)
    each = tuple(c._replace(context_NLD=jnp.repeat(c.context_NLD, K, axis=0)) for c in (prompts, empty))
    x_BHWC = jnp.asarray(rng.normal(size=(B, H, W, C)), jnp.float32)
    start = branch(x_BHWC, jax.random.split(jax.random.key(0), B), K)
    trajectory = sample_trajectory(lambda x, t: guided(POLICY, x, t, each), TABLE, *start)
    transitions = transitions_at(trajectory, jnp.array([0, 11, 18]))

    again_BK = compare_transitions(guided, POLICY, None, TABLE, transitions, (prompts, empty)).log_prob_BK
    unguided_BK = compare_transitions(denoise, POLICY, None, TABLE, transitions, prompts).log_prob_BK

    np.testing.assert_allclose(again_BK, transitions.log_prob_BK, atol=2e-6)
    assert np.all(unguided_BK < again_BK - 1e-3)


def test_a_bfloat16_network_is_scored_in_float32():
    transitions, conditioning = inputs()

    def rounded(*args):
        return denoise(*args).astype(jnp.bfloat16)

    log_ratios = compare_transitions(rounded, POLICY, REFERENCE, TABLE, transitions, conditioning)

    assert {x.dtype for x in jax.tree.leaves(log_ratios)} == {jnp.dtype(bool), jnp.dtype(jnp.float32)}


def test_metrics_by_hand():
    reward_BK = jnp.array([[3, 1, 2], [5, 5, 5], [np.nan, 1, 2], [1, 1, 0]], jnp.float32)
    log_ratio_BK = np.array([[0.3, 0.1, 0.2], [0.1, 0.2, 0.3], [9, 0.5, 0.1], [0.1, 0.2, 0.1]], np.float32)
    change_BK = np.array([[0.3, -0.3, 0], [0, 0, 0], [0.1, 0.2, -0.3], [1, 1, 1]], np.float32)
    inputs = LossInputs(
        log_ratio_BK, reward_BK, log_prob_BK=change_BK - 2, old_log_prob_BK=np.full((4, 3), -2, np.float32)
    )

    clipped_BK = beyond_ratio_to_sampled(inputs, clip=0.3)
    metrics = transition_metrics(inputs, clipped_BK)

    expected = {
        "pair/count": [3, 0, 1, 2],
        "pair/accuracy": [1, 0.5, 0, 0.75],  # a tied ratio is half right
        "reward/margin": [0.4 / 3, 0, -0.4, 0.05],
        "policy/change": [0.2, 0, 0.2, 1],
        "policy/kl": [0.03, 0, 0.14 / 6, 0.5],
        "policy/clipped": [1 / 3, 0, 0, 1],  # exp(-0.3) is 0.74, exp(0.3) 1.35
    }
    assert metrics.keys() == expected.keys()
    for name, values_B in expected.items():
        np.testing.assert_allclose(metrics[name], values_B, atol=1e-6, err_msg=name)
    with_kl = transition_metrics(inputs._replace(kl_BK=np.arange(12.0).reshape(4, 3)), clipped_BK)
    assert with_kl.keys() - metrics.keys() == {"policy/reference_kl"}
    np.testing.assert_allclose(with_kl["policy/reference_kl"], [1, 4, 7, 10])


@pytest.mark.parametrize(
    ("rewards_KR", "pairs"),
    [([[1, 0], [0, 1]], 0), ([[1, 1], [0, 1]], 1), ([[1, 1], [1, 1]], 0), ([[2, 1], [1, 0]], 1)],
)
def test_metrics_count_the_pairs_that_judges_agree_on(rewards_KR, pairs):
    zero, rewards_1KR = jnp.zeros((1, 2)), jnp.asarray(rewards_KR, jnp.float32)[None]
    inputs = LossInputs(zero, rewards_1KR, log_prob_BK=zero, old_log_prob_BK=zero)
    metrics = transition_metrics(inputs, zero.astype(bool))
    assert metrics["pair/count"] == pairs
    assert metrics["policy/clipped"] == 0


def test_clamped_ratios_are_told_from_others():
    transitions, conditioning = inputs()
    free, clamped = (
        compare_transitions(denoise, POLICY, REFERENCE, TABLE, transitions, conditioning, clip=clip)
        for clip in (0.9, 0.01)
    )
    ratio_BK = np.exp(np.asarray(free.log_ratio_BK))
    expected = np.abs(ratio_BK - 1) > 0.01
    assert 0 < expected.sum() < expected.size
    np.testing.assert_array_equal(clamped.is_clamped_BK, expected)
    assert not free.is_clamped_BK.any()
