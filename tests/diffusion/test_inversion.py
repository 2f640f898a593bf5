"""Inverted DDIM, compared with diffusers' scheduler, a loop over single images, and the noise that is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler

from dpo_jax.batch import Conditioning
from dpo_jax.diffusion.inversion import invert
from dpo_jax.diffusion.schedule import add_noise, make_schedule, training_target
from dpo_jax.objectives.denoising import compare_denoising

BETAS = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
KINDS = {
    "epsilon": {},
    "velocity": {"prediction_type": "v_prediction"},
    "zero snr": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}
for_kinds = pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
FLOW = make_schedule({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0})
N, SHAPE = 6, (2, 3, 4)


def images(seed=0):
    return np.random.default_rng(seed).normal(size=(N, *SHAPE))


def denoise(x_NHWC, t_N):
    """A nonlinear toy network that depends on time; for arrays of any library."""
    return x_NHWC / (1 + x_NHWC**2) + 0.3 * (t_N * 1e-3).reshape(-1, 1, 1, 1)


@for_kinds
def test_at_the_ends_of_steps_it_is_diffusers_inverse_scheduler(x64, fields):
    schedule = make_schedule(BETAS | fields)
    theirs = DDIMInverseScheduler(**BETAS, **fields, clip_sample=False, timestep_spacing="trailing")
    theirs.alphas_cumprod = torch.from_numpy(schedule.signal_T**2)
    theirs.set_timesteps(10)
    x = torch.from_numpy(images())
    for t in theirs.timesteps:
        x = theirs.step(denoise(x, torch.full((N,), float(t), dtype=torch.float64)), int(t), x).prev_sample
        t_N = jnp.full(N, int(t), jnp.int32)
        noise_NHWC = invert(denoise, schedule, jnp.asarray(images()), t_N, 10)
        ours = add_noise(schedule, jnp.asarray(images()), noise_NHWC, t_N)
        np.testing.assert_allclose(ours, x, rtol=1e-9, atol=1e-9, err_msg=f"t = {t}")


@for_kinds
def test_each_image_ends_at_its_own_timestep(x64, fields):
    """A loop over single images: steps of 250, the last one only as far as t."""
    schedule = make_schedule(BETAS | fields)
    t_N = np.array([0, 100, 249, 250, 998, 999])
    expected = np.zeros_like(images())
    for n, t in enumerate(t_N):
        x0 = x = images()[n : n + 1]
        signal, noise = 1.0, 0.0
        for end in (*(end for end in (249, 499, 749, 999) if end < t), t):
            prediction = denoise(x, np.array([end]))
            image, eps = (
                (x - noise * prediction) / signal if not fields else signal * x - noise * prediction,
                prediction,
            )
            eps = eps if not fields else signal * prediction + noise * x
            signal, noise = schedule.signal_T[end], schedule.noise_T[end]
            x = signal * image + noise * eps
        expected[n] = ((x - signal * x0) / noise)[0]
    ours = jax.jit(lambda *args: invert(denoise, schedule, *args, 4))(jnp.asarray(images()), jnp.asarray(t_N))
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9)


@for_kinds
@pytest.mark.parametrize("num_steps", [1, 3, 10])
def test_a_perfect_network_gives_the_noise_that_is_known(x64, fields, num_steps):
    schedule = make_schedule(BETAS | fields)
    x0, noise = jnp.asarray(images()), jnp.asarray(images(1))
    t_N = jnp.array([0, 50, 150, 333, 399, 999])

    def perfect(x_NHWC, end_N):
        """The target at the level that x_NHWC has, which is known only from the steps before."""
        starts = np.round(np.arange(num_steps) * 1000 / num_steps).astype(int) - 1
        now_N = jnp.asarray(starts)[jnp.searchsorted(jnp.asarray(starts), end_N, side="left") - 1]
        at_level = training_target(schedule, x0, noise, jnp.maximum(now_N, 0))
        clean = noise  # both kinds of target are the noise where there is none
        return jnp.where((now_N < 0).reshape(-1, 1, 1, 1), clean, at_level)

    np.testing.assert_allclose(invert(perfect, schedule, x0, t_N, num_steps), noise, rtol=1e-7, atol=1e-8)


def test_a_flow_is_inverted_along_its_velocity(x64):
    """A loop over single images: Euler's steps from level 0, the last one only as far as t."""
    t_N = np.array([0, 100, 249, 250, 998, 999])
    expected = np.zeros_like(images())
    for n, t in enumerate(t_N):
        x0 = x = images()[n : n + 1]
        now = 0.0
        for end in (*(end for end in (249, 499, 749, 999) if end < t), t):
            sigma = FLOW.noise_T[end]
            x, now = x + (sigma - now) * denoise(x, np.array([1000 * sigma])), sigma
        expected[n] = ((x - (1 - now) * x0) / now)[0]

    ours = invert(denoise, FLOW, jnp.asarray(images()), jnp.asarray(t_N), 4)

    np.testing.assert_allclose(ours, expected, rtol=1e-7, atol=1e-9)


def test_a_perfect_flow_gives_the_noise_that_is_known(x64):
    x0, noise = jnp.asarray(images()), jnp.asarray(images(1))
    t_N = jnp.array([0, 50, 150, 333, 399, 999])
    found = invert(lambda x_NHWC, t_N: noise - x0, FLOW, x0, t_N, 3)
    np.testing.assert_allclose(found, noise, rtol=1e-7, atol=1e-8)


def test_log_ratios_are_of_the_noise_that_the_policy_finds_and_no_gradient_passes_through_it(x64):
    schedule = make_schedule(BETAS)

    def network(params, x_NHWC, t_N, conditioning):
        return params["scale"] * denoise(x_NHWC, t_N) + conditioning.context_NLD.mean(axis=(1, 2))[:, None, None, None]

    latents_BKHWC, noise_BHWC = jnp.asarray(images().reshape(3, 2, *SHAPE)), jnp.asarray(images(1)[:3])
    t_B, conditioning = jnp.array([10, 420, 990]), Conditioning(jnp.asarray(images(2)[:3, :, :, 0]))
    policy, reference = {"scale": jnp.float64(1.1)}, {"scale": jnp.float64(0.9)}

    def inputs_of(policy, noise_BHWC=noise_BHWC, **fields):
        return compare_denoising(
            network, policy, reference, schedule, latents_BKHWC, noise_BHWC, t_B, conditioning, **fields
        )

    found = inputs_of(policy, inversion_steps=5)
    t_N, of_all = jnp.repeat(t_B, 2), Conditioning(jnp.repeat(conditioning.context_NLD, 2, axis=0))
    x0_NHWC = latents_BKHWC.reshape(N, *SHAPE)
    own_NHWC = invert(lambda x, t: network(policy, x, t, of_all), schedule, x0_NHWC, t_N, 5)

    def winners(policy, *noise, **fields):
        return inputs_of(policy, *noise, **fields).log_ratio_BK[:, 0].sum()

    for k in range(2):  # with that noise given, to both candidates
        given = inputs_of(policy, own_NHWC.reshape(3, 2, *SHAPE)[:, k])
        np.testing.assert_allclose(found.log_ratio_BK[:, k], given.log_ratio_BK[:, k], rtol=1e-9)
    given = jax.grad(winners)(policy, own_NHWC.reshape(3, 2, *SHAPE)[:, 0])
    np.testing.assert_allclose(jax.grad(winners)(policy, inversion_steps=5)["scale"], given["scale"], rtol=1e-9)
    assert not np.allclose(found.error_BK, inputs_of(policy).error_BK, rtol=1e-2)
