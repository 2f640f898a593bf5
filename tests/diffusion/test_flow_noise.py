"""Flow-GRPO's SDE steps and coefficients-preserving sampling, against the formulas of released code in PyTorch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dpo_jax.diffusion.flow_matching import sampling_sigmas
from dpo_jax.diffusion.samplers import make_table
from dpo_jax.diffusion.schedule import make_schedule
from dpo_jax.diffusion.steps import Steps, sample
from dpo_jax.diffusion.trajectories import log_prob, random_steps, sample_trajectory, transition_mean

CLASS = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
SD3 = make_schedule(CLASS | {"shift": 3.0})
FLUX = make_schedule(CLASS | {"use_dynamic_shifting": True}, timestep_spacing="trailing")
PLAIN = make_schedule(CLASS, timestep_spacing="trailing")
TOKENS, S = 1024, 10
LEVELS = {"flow_sde": 0.7, "flow_cps": 0.8}
for_samplers = pytest.mark.parametrize("sampler", LEVELS)


def released(sampler, sigmas, i, level, model_output, sample):
    """Return mean and standard deviation of step i, with the variable names of flow_grpo's `sde_step_with_logprob`."""
    sigma, sigma_prev = sigmas[i], sigmas[i + 1]
    if sampler == "flow_sde":
        dt = sigma_prev - sigma
        std_dev_t = torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigmas[1], sigma))) * level
        mean = sample * (1 + std_dev_t**2 / (2 * sigma) * dt)
        mean = mean + model_output * (1 + std_dev_t**2 * (1 - sigma) / (2 * sigma)) * dt
        return mean, std_dev_t * torch.sqrt(-dt)
    std_dev_t = sigma_prev * math.sin(level * math.pi / 2)
    pred_original_sample = sample - sigma * model_output
    noise_estimate = sample + model_output * (1 - sigma)
    return pred_original_sample * (1 - sigma_prev) + noise_estimate * torch.sqrt(
        sigma_prev**2 - std_dev_t**2
    ), std_dev_t


@for_samplers
@pytest.mark.parametrize("schedule", [SD3, FLUX], ids=["SD3", "FLUX"])
@pytest.mark.parametrize("level", [0.0, 0.35])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_mean_deviation_and_log_probability_are_the_released_ones(x64, sampler, schedule, level, dtype, tolerance):
    """With the gradient of the log-probability with respect to what the network predicts."""
    table = make_table(sampler, schedule, S, noise_level=level, image_tokens=TOKENS)
    sigmas_V = sampling_sigmas(schedule.sampler_fields, schedule.timestep_spacing, S, TOKENS)
    assert sigmas_V[0] == 1
    sigmas = torch.from_numpy(sigmas_V).double()
    x, velocity, noise = np.random.default_rng(0).normal(size=(3, 2, 3, 4, 5)).astype(dtype)
    for i in range(S):
        prediction = torch.from_numpy(velocity).double().requires_grad_()
        mean, deviation = released(
            sampler, sigmas, i, level or LEVELS[sampler], prediction, torch.from_numpy(x).double()
        )
        next_x = mean.detach() + deviation * torch.from_numpy(noise).double()

        step = Steps(*(jnp.asarray(values_S[i], dtype) for values_S in table.steps))
        ours = transition_mean(step, jnp.asarray(x), jnp.asarray(velocity))
        np.testing.assert_allclose(ours, mean.detach(), rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(table.steps.d[i], deviation, rtol=1e-12)
        if deviation == 0:
            assert (sampler, i) == ("flow_cps", S - 1)
            continue
        log_density = torch.distributions.Normal(mean, deviation).log_prob(next_x).mean(dim=(1, 2, 3))
        if sampler == "flow_cps":  # the released code drops what does not depend on the mean
            constant = 2 * deviation**2 * (deviation.log() + math.log(2 * math.pi) / 2)
            log_density = -((next_x - mean) ** 2).mean(dim=(1, 2, 3)) - constant
        log_density.sum().backward()

        reached = jnp.asarray(next_x.numpy(), dtype)

        def total(velocity, step=step, reached=reached):
            log_prob_N = log_prob(step, transition_mean(step, jnp.asarray(x), velocity), reached)
            return log_prob_N.sum(), log_prob_N

        gradient, log_prob_N = jax.grad(total, has_aux=True)(jnp.asarray(velocity))
        # Rounding of x and the mean counts in units of the deviation, which is least in the last steps.
        least = tolerance * max(1.0, 1 / deviation.item())
        np.testing.assert_allclose(log_prob_N, log_density.detach(), rtol=least, atol=least)
        np.testing.assert_allclose(gradient, prediction.grad, rtol=least, atol=least * np.abs(gradient).max())


@for_samplers
def test_without_noise_all_steps_are_those_of_euler(x64, sampler):
    ours, euler = (
        make_table(name, SD3, S, **options).steps
        for name, options in ((sampler, {"noise_level": 1e-9}), ("flow_euler", {}))
    )
    for values_S, expected_S in zip(ours._replace(w=euler.w), euler, strict=True):
        np.testing.assert_allclose(values_S, expected_S, rtol=1e-12, atol=1e-8)


def test_which_steps_add_noise():
    np.testing.assert_array_equal(random_steps(make_table("flow_sde", SD3, S)), np.arange(S))
    np.testing.assert_array_equal(random_steps(make_table("flow_cps", SD3, S)), np.arange(S - 1))
    stochastic = make_schedule(CLASS | {"shift": 3.0, "stochastic_sampling": True})
    for sampler in LEVELS:  # what the scheduler's file says of flow_euler does not reach these
        for ours_S, expected_S in zip(
            make_table(sampler, stochastic, S).steps, make_table(sampler, SD3, S).steps, strict=True
        ):
            np.testing.assert_array_equal(ours_S, expected_S)


def velocity_of_gaussian(x_NHWC, t_N, mean, deviation):
    """The exact velocity of data N(mean, deviation^2): E[noise - x0 | x]."""
    sigma = t_N.astype(x_NHWC.dtype)[:, None, None, None] / 1000
    variance = ((1 - sigma) * deviation) ** 2 + sigma**2
    return (sigma - (1 - sigma) * deviation**2) / variance * (x_NHWC - (1 - sigma) * mean) - mean


@pytest.mark.parametrize(
    ("sampler", "deviation", "num_steps", "tolerance"),
    # The SDE is exact for small steps; CPS for any, where the image is certain.
    [("flow_sde", 0.5, 200, 0.02), ("flow_euler", 0.5, 200, 0.02), ("flow_cps", 0.0, 10, 1e-5)],
)
def test_samples_have_the_distribution_of_the_data(sampler, deviation, num_steps, tolerance):
    table, N = make_table(sampler, PLAIN, num_steps), 4
    x_T = jax.random.normal(jax.random.key(0), (N, 32, 32, 4))
    keys_N = jax.random.split(jax.random.key(1), N)

    x0 = sample(lambda x, t: velocity_of_gaussian(x, t, 2.0, deviation), table, x_T, keys_N)

    last = table.steps.d[-1]  # what the last step of the SDE leaves in the image
    np.testing.assert_allclose(x0.mean(), 2.0, atol=tolerance)
    np.testing.assert_allclose(x0.std(), np.hypot(deviation, last), atol=tolerance)


def test_latents_of_cps_have_the_levels_that_the_network_expects():
    """Those of the SDE have more noise in few steps, which is what CPS is for."""
    x_T = jax.random.normal(jax.random.key(0), (8, 32, 32, 4))
    excess = {}
    for sampler in LEVELS:
        table = make_table(sampler, PLAIN, S)
        keys_N = jax.random.split(jax.random.key(1), 8)
        latents_VNHWC = sample_trajectory(
            lambda x, t: velocity_of_gaussian(x, t, 2.0, 0.0), table, x_T, keys_N
        ).latents_VNHWC
        level_V = np.append(table.steps.noise, 0)
        np.testing.assert_allclose(latents_VNHWC.mean(axis=(1, 2, 3, 4)), 2 * (1 - level_V), atol=0.03)
        excess[sampler] = np.asarray(latents_VNHWC.std(axis=(1, 2, 3, 4))) - level_V
    np.testing.assert_allclose(excess["flow_cps"], np.zeros(S + 1), atol=0.01)
    assert excess["flow_sde"][-1] > 0.05


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        ("flow_euler", {"noise_level": 0.5}, "noise_level=0.5 goes with the samplers flow_sde and flow_cps, but"),
        ("flow_cps", {"noise_level": 1.1}, "noise_level=1.1 of the sampler flow_cps .* set it to at most 1"),
        ("flow_sde", {"eta": 1.0}, "eta=1.0 goes with the sampler ddim, but the sampler is flow_sde"),
    ],
)
def test_what_does_not_go_together_is_told(sampler, options, message):
    with pytest.raises(ValueError, match=message):
        make_table(sampler, SD3, S, **options)
