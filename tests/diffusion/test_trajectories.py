"""Trajectories compared with DDIM's formulas (arXiv 2010.02502, equations 12 and 16) in PyTorch."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.stats import norm

from dpo_jax.diffusion.samplers import make_table
from dpo_jax.diffusion.schedule import make_schedule
from dpo_jax.diffusion.steps import sample, step_noise
from dpo_jax.diffusion.trajectories import (
    Trajectory,
    branch,
    explore,
    kl_divergence,
    log_prob,
    random_steps,
    sample_trajectory,
    see_images,
    see_log_ratios,
    steps_at,
    transition_mean,
    transitions_at,
)

SD15 = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "set_alpha_to_one": False,
}
TO_ONE = SD15 | {"steps_offset": 0, "set_alpha_to_one": True}
VELOCITY = SD15 | {"prediction_type": "v_prediction"}
N, H, W, C, S = 3, 3, 5, 4, 20


def toy(x, t, sin):
    """A toy prediction that depends on x and t and works with the arrays of both frameworks."""
    return 0.95 * x + 0.05 * sin(1.7 * x + 0.003 * t)


def denoise(x_NHWC, t_N):
    return toy(x_NHWC, t_N.astype(x_NHWC.dtype)[:, None, None, None], jnp.sin)


def start(dtype=np.float64):
    return np.random.default_rng(0).normal(size=(N, H, W, C)).astype(dtype), jax.random.split(jax.random.key(3), N)


def torch_transition(config, step, eta, x, next_x=None, noise=None, num_steps=S):
    """Return the published step of x and its log-probability, with the published variable names and alphas."""
    schedule = make_schedule(config)
    alphas_cumprod = torch.from_numpy(schedule.signal_T**2)
    stride = 1000 // num_steps
    t = (num_steps - 1 - step) * stride + config["steps_offset"]
    final = torch.tensor(1.0 if config["set_alpha_to_one"] else alphas_cumprod[0].item(), dtype=torch.float64)
    alpha_t, alpha_prev = alphas_cumprod[t], alphas_cumprod[t - stride] if t >= stride else final
    prediction = toy(x, float(t), torch.sin)
    if config.get("prediction_type") == "v_prediction":
        prediction = alpha_t.sqrt() * prediction + (1 - alpha_t).sqrt() * x
    variance = eta**2 * (1 - alpha_prev) / (1 - alpha_t) * (1 - alpha_t / alpha_prev)
    pred_original_sample = (x - (1 - alpha_t).sqrt() * prediction) / alpha_t.sqrt()
    mean = alpha_prev.sqrt() * pred_original_sample + (1 - alpha_prev - variance).sqrt() * prediction
    if next_x is None:
        next_x = mean + variance.sqrt() * noise
    if variance == 0:
        return next_x, None
    return next_x, torch.distributions.Normal(mean, variance.sqrt()).log_prob(next_x).mean(dim=(1, 2, 3))


@pytest.mark.parametrize("eta", [1.0, 0.3])
@pytest.mark.parametrize("config", [SD15, TO_ONE, VELOCITY], ids=["sd15", "to one", "velocity"])
def test_a_trajectory_and_its_log_probabilities_are_the_published_ones(x64, config, eta):
    x_T, keys_N = start()
    trajectory = sample_trajectory(
        denoise, make_table("ddim", make_schedule(config), S, eta=eta), jnp.asarray(x_T), keys_N
    )

    assert trajectory.latents_VNHWC.shape == (S + 1, N, H, W, C)
    assert trajectory.log_prob_SN.shape == (S, N)
    x = torch.from_numpy(x_T)
    for step in range(S):
        np.testing.assert_allclose(trajectory.latents_VNHWC[step], x, rtol=1e-9, atol=1e-9)
        noise = torch.from_numpy(np.array(step_noise(keys_N, step, jnp.asarray(x_T))))
        x, expected = torch_transition(config, step, eta, x, noise=noise)
        if expected is None:
            assert step == S - 1
            assert config is TO_ONE
            np.testing.assert_array_equal(trajectory.log_prob_SN[step], np.zeros(N))
        else:
            np.testing.assert_allclose(trajectory.log_prob_SN[step], expected, rtol=1e-8)
    np.testing.assert_allclose(trajectory.latents_VNHWC[-1], x, rtol=1e-9, atol=1e-9)


def test_log_probabilities_in_float32_are_those_of_float64():
    x_T, keys_N = start(np.float32)
    table = make_table("ddim", make_schedule(SD15), S, eta=1.0)
    trajectory = jax.jit(lambda x, keys: sample_trajectory(denoise, table, x, keys))(x_T, keys_N)

    assert trajectory.log_prob_SN.dtype == jnp.float32
    latents = torch.from_numpy(np.array(trajectory.latents_VNHWC)).double()
    for step in range(S):
        _, expected = torch_transition(SD15, step, 1.0, latents[step], latents[step + 1])
        np.testing.assert_allclose(trajectory.log_prob_SN[step], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral", "lcm"])
def test_log_probabilities_are_those_of_the_noise_that_was_drawn(x64, sampler):
    """For every sampler, `log N(x'; mean, d^2)` is the log-density of z minus log d."""
    x_T, keys_N = start()
    table = make_table(sampler, make_schedule(SD15), 6, eta=1.0 if sampler == "ddim" else 0.0)
    trajectory = sample_trajectory(denoise, table, jnp.asarray(x_T), keys_N)

    for step in random_steps(table).tolist():
        density = norm.logpdf(step_noise(keys_N, step, jnp.asarray(x_T))).mean(axis=(1, 2, 3))
        np.testing.assert_allclose(trajectory.log_prob_SN[step], density - np.log(table.steps.d[step]), rtol=1e-8)


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral", "lcm"])
def test_keeping_the_way_changes_nothing_of_the_image(sampler):
    x_T, keys_N = map(jnp.asarray, start(np.float32))
    table = make_table(sampler, make_schedule(SD15), 6, eta=1.0 if sampler == "ddim" else 0.0)

    kept = sample_trajectory(denoise, table, x_T, keys_N).latents_VNHWC[-1]

    # To the last bit but for how the compiler fuses the two programs.
    np.testing.assert_allclose(kept, sample(denoise, table, x_T, keys_N), atol=1e-6)


@pytest.mark.parametrize("config", [SD15, TO_ONE], ids=["sd15", "to one"])
def test_a_recomputed_transition_has_the_probability_it_was_sampled_with(config):
    table = make_table("ddim", make_schedule(config), S, eta=1.0)
    x_T, keys_N = start(np.float32)
    trajectory = jax.jit(lambda x, keys: sample_trajectory(denoise, table, x, keys))(x_T, keys_N)

    @jax.jit
    def recomputed(x_NHWC, next_x_NHWC, step_N):
        step = steps_at(table, step_N, x_NHWC)
        return log_prob(step, transition_mean(step, x_NHWC, denoise(x_NHWC, step.t)), next_x_NHWC)

    for index in range(S):
        x_NHWC, next_x_NHWC = trajectory.latents_VNHWC[index : index + 2]
        again_N = recomputed(x_NHWC, next_x_NHWC, jnp.full(N, index))
        assert np.abs(again_N - trajectory.log_prob_SN[index]).max() <= 1e-6


def test_steps_without_noise_have_no_probability_and_no_gradient():
    table = make_table("ddim", make_schedule(TO_ONE), S, eta=1.0)
    mean_NHWC, next_x_NHWC = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, H, W, C)), jnp.float32)
    step = steps_at(table, jnp.array([S - 1, 0]), mean_NHWC)
    np.testing.assert_array_equal(random_steps(table), np.arange(S - 1))

    for of_two in (log_prob, kl_divergence):
        value_N = of_two(step, mean_NHWC, next_x_NHWC)
        gradient_NHWC = jax.grad(lambda mean, of_two=of_two: of_two(step, mean, next_x_NHWC).sum())(mean_NHWC)
        assert value_N[0] == 0
        assert not gradient_NHWC[0].any()
        assert value_N[1] != 0
        assert gradient_NHWC[1].all()


def test_every_step_of_sd15_is_random():
    np.testing.assert_array_equal(random_steps(make_table("ddim", make_schedule(SD15), S, eta=1.0)), np.arange(S))


def test_the_divergence_is_that_of_two_gaussians(x64):
    table = make_table("ddim", make_schedule(SD15), S, eta=1.0)
    mean_NHWC, other_NHWC = np.random.default_rng(0).normal(size=(2, N, H, W, C))
    step_N = np.array([0, 7, 19])
    means = (torch.from_numpy(mean) for mean in (mean_NHWC, other_NHWC))
    deviation = torch.from_numpy(table.steps.d[step_N])[:, None, None, None]
    expected = torch.distributions.kl_divergence(*(torch.distributions.Normal(mean, deviation) for mean in means))

    mean_NHWC, other_NHWC = jnp.asarray(mean_NHWC), jnp.asarray(other_NHWC)
    divergence = kl_divergence(steps_at(table, jnp.asarray(step_N), mean_NHWC), mean_NHWC, other_NHWC)

    np.testing.assert_allclose(divergence, expected.mean(dim=(1, 2, 3)), rtol=1e-9)


def test_transitions_of_each_prompts_own_step():
    B, K = 2, 3
    latents = np.random.default_rng(0).normal(size=(S + 1, B * K, H, W, C))
    log_probs = np.random.default_rng(1).normal(size=(S, B * K))
    step_B = jnp.array([4, 19])

    transitions = transitions_at(Trajectory(jnp.asarray(latents), jnp.asarray(log_probs)), step_B)

    for b, step in enumerate([4, 19]):
        for k in range(K):
            n = b * K + k
            np.testing.assert_array_equal(transitions.x_BKHWC[b, k], latents[step, n].astype(np.float32))
            np.testing.assert_array_equal(transitions.next_x_BKHWC[b, k], latents[step + 1, n].astype(np.float32))
            assert transitions.log_prob_BK[b, k] == log_probs[step, n].astype(np.float32)
    np.testing.assert_array_equal(transitions.step_B, step_B)


def test_candidates_begin_alike_and_then_part():
    K = 4
    x_T, keys = start(np.float32)
    x_NHWC, keys_N = branch(jnp.asarray(x_T), keys, K)
    table = make_table("ddim", make_schedule(SD15), S, eta=1.0)
    latents = sample_trajectory(denoise, table, x_NHWC, keys_N).latents_VNHWC.reshape(S + 1, N, K, H, W, C)

    for k in range(K):
        np.testing.assert_array_equal(latents[0, :, k], x_T)
        for other in range(k):
            difference = latents[1, :, k] - latents[1, :, other]
            assert np.abs(difference).mean() > 0.1 * table.steps.d[0]
    assert len(np.unique(jax.random.key_data(keys_N), axis=0)) == N * K
    _, fewer_N = branch(jnp.asarray(x_T), keys, 2)
    assert np.all(fewer_N.reshape(N, 2) == keys_N.reshape(N, K)[:, :2])


@pytest.mark.parametrize(("sampler", "num_steps"), [("ddim", 4), ("euler", 4), ("dpmsolver++", 4), ("lcm", 1)])
def test_a_sampler_without_noise_is_refused(sampler, num_steps):
    table = make_table(sampler, make_schedule(SD15), num_steps)

    with pytest.raises(ValueError, match="adds no noise"):
        sample_trajectory(denoise, table, *map(jnp.asarray, start(np.float32)))


@pytest.mark.parametrize("config", [SD15, TO_ONE], ids=["sd15", "to one"])
def test_exploring_is_a_loop_over_steps_prompts_and_candidates(x64, config):
    K, num_steps = 3, 5
    x_T, keys = start()
    table = make_table("ddim", make_schedule(config), num_steps, eta=1.0)

    found = explore(denoise, table, jnp.asarray(x_T), keys, K, see_images(denoise))

    assert found.next_x_SBKHWC.shape == found.seen_SBK.shape == (num_steps, N, K, H, W, C)
    of_steps = [type(table.steps)(*(values_S[s] for values_S in table.steps)) for s in range(num_steps)]
    close = {"rtol": 1e-9, "atol": 1e-9}
    for b in range(N):
        x = x_T[b]
        for s, step in enumerate(of_steps):
            np.testing.assert_allclose(found.x_SBHWC[s, b], x, **close)
            mean = step.a * x + step.b * (step.p * x + step.q * toy(x, float(step.t), np.sin))
            step_key, choice_key = (jax.random.fold_in(keys[b], 2 * s + j) for j in range(2))
            candidates = []
            for k in range(K):
                noise = jax.random.normal(jax.random.fold_in(jax.random.fold_in(step_key, k), 0), x.shape, np.float64)
                next_x = mean + step.d * np.asarray(noise)
                np.testing.assert_allclose(found.next_x_SBKHWC[s, b, k], next_x, **close)
                seen = next_x
                if s + 1 < num_steps:
                    after = of_steps[s + 1]
                    seen = after.p * next_x + after.q * toy(next_x, float(after.t), np.sin)
                np.testing.assert_allclose(found.seen_SBK[s, b, k], seen, **close)
                density = norm.logpdf(next_x, mean, step.d).mean() if step.d else 0
                np.testing.assert_allclose(found.log_prob_SBK[s, b, k], density, rtol=1e-8)
                candidates.append(next_x)
            x = candidates[int(jax.random.randint(choice_key, (), 0, K))]
        np.testing.assert_allclose(found.x0_BHWC[b], x, **close)


def see_nothing(step, after, x_BHWC, next_x_BKHWC):
    return jnp.zeros(next_x_BKHWC.shape[:2])


def test_the_way_of_exploring_has_the_law_of_sampling():
    """With a linear network the result is a known Gaussian: 20,000 trajectories match it, as those of `sample` do."""
    B, K, num_steps, slope = 20_000, 4, 6, 0.3
    table = make_table("ddim", make_schedule(SD15), num_steps, eta=1.0)
    x_BHWC, keys_B = jnp.full((B, 1, 1, 1), 2.0), jax.random.split(jax.random.key(1), B)

    def linear(x_NHWC, t_N):
        return slope * x_NHWC

    explored = explore(linear, table, x_BHWC, keys_B, K, see_nothing)
    sampled = sample_trajectory(linear, table, x_BHWC, keys_B).latents_VNHWC

    mean, variance = 2.0, 0.0
    ways_VB = np.concatenate([explored.x_SBHWC, explored.x0_BHWC[None]])[..., 0, 0, 0]
    for s in range(num_steps):
        a, b, p, q, d = (getattr(table.steps, name)[s] for name in "abpqd")
        factor = a + b * (p + q * slope)
        mean, variance = factor * mean, factor**2 * variance + d**2
        for x_B in (ways_VB[s + 1], np.asarray(sampled[s + 1, :, 0, 0, 0])):
            assert abs(x_B.mean() - mean) < 5 * np.sqrt(variance / B)
            assert abs(x_B.var() / variance - 1) < 5 * np.sqrt(2 / B)


def test_which_candidate_goes_on_is_a_fair_draw_and_the_same_whatever_they_look_like():
    B, K, num_steps = 500, 4, 6
    table = make_table("ddim", make_schedule(SD15), num_steps, eta=1.0)
    keys_B = jax.random.split(jax.random.key(1), B)

    def chosen(denoise, x_BHWC):
        found = explore(denoise, table, x_BHWC, keys_B, K, see_nothing)
        after_SBHWC = jnp.concatenate([found.x_SBHWC[1:], found.x0_BHWC[None]])
        same_SBK = (found.next_x_SBKHWC == after_SBHWC[:, :, None]).all(axis=(3, 4, 5))
        assert (same_SBK.sum(axis=2) == 1).all()
        return same_SBK.argmax(axis=2)

    one_SB = chosen(denoise, jnp.ones((B, 2, 2, 1)))
    other_SB = chosen(lambda x, t: 0.1 * x, jnp.full((B, 2, 2, 1), -3.0))

    np.testing.assert_array_equal(one_SB, other_SB)
    expected = one_SB.size / K
    assert ((np.bincount(one_SB.ravel(), minlength=K) - expected) ** 2 / expected).sum() < 16.3  # chi squared, 0.1%


def test_steps_before_the_first_branch_go_the_same_way_unseen():
    table, keys = make_table("ddim", make_schedule(SD15), 4, eta=1.0), jax.random.split(jax.random.key(1), 2)
    calls = []

    def denoise(x_NHWC, t_N):
        jax.debug.callback(lambda: calls.append(len(x_NHWC)))
        return jnp.sin(x_NHWC)

    found = [explore(denoise, table, jnp.ones((2, 2, 2, 1)), keys, 3, see_images(denoise), first) for first in (0, 2)]
    jax.effects_barrier()

    assert sorted(calls) == [2] * 8 + [6] * (4 + 2)
    np.testing.assert_array_equal(found[1].seen_SBK[:2], 0)
    np.testing.assert_allclose(found[1].seen_SBK[2:], found[0].seen_SBK[2:], atol=1e-6)
    np.testing.assert_allclose(found[1].next_x_SBKHWC, found[0].next_x_SBKHWC, atol=1e-6)


def test_the_implicit_reward_of_a_step_is_the_ratio_of_its_probabilities(x64):
    K, num_steps = 3, 4
    x_T, keys = start()
    table = make_table("ddim", make_schedule(TO_ONE), num_steps, eta=1.0)

    def tuned(x_NHWC, t_N):
        return 0.9 * denoise(x_NHWC, t_N) + 0.1

    found = explore(denoise, table, jnp.asarray(x_T), keys, K, see_log_ratios(tuned, denoise))

    for s, (b, k) in itertools.product(range(num_steps), np.ndindex(N, K)):
        step = type(table.steps)(*(values_S[s] for values_S in table.steps))
        x, next_x = (np.asarray(x) for x in (found.x_SBHWC[s, b], found.next_x_SBKHWC[s, b, k]))
        prediction = toy(x, float(step.t), np.sin)
        means = (step.a * x + step.b * (step.p * x + step.q * e) for e in (0.9 * prediction + 0.1, prediction))
        of_tuned, of_other = (norm.logpdf(next_x, mean, step.d).mean() if step.d else 0 for mean in means)
        np.testing.assert_allclose(found.seen_SBK[s, b, k], of_tuned - of_other, rtol=1e-7, atol=1e-9)
