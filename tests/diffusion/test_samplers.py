"""DDIM against diffusers' DDIMScheduler, with a toy denoiser that both can evaluate."""

import itertools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dpo_jax.batch import Conditioning
from dpo_jax.diffusion.samplers import classifier_free_guidance, ddim, sampling_timesteps
from dpo_jax.diffusion.schedule import make_schedule

BETAS = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FAMILIES = {
    "sd15": BETAS | {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False},
    "sd2": BETAS
    | {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False, "prediction_type": "v_prediction"},
    "turbo": BETAS | {"timestep_spacing": "trailing", "clip_sample": False},
    "linspace": BETAS | {"timestep_spacing": "linspace", "clip_sample": False},
    "zero snr": BETAS
    | {
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
    },
}


def toy(x, t, sin):
    """Something that depends on x and t and runs on either framework's arrays."""
    return sin(1.7 * x + 0.003 * t) - 0.2 * x


def oracle_ddim(config, x, num_steps, eta, noises):
    scheduler, schedule = diffusers.DDIMScheduler(**config), make_schedule(config)
    # Its coefficients are float32 scalars, whose rounding would be all that is seen at 1e-9.
    scheduler.alphas_cumprod = torch.from_numpy(schedule.signal_T**2)
    if not config.get("set_alpha_to_one", True):
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(num_steps)
    for t, noise in zip(scheduler.timesteps, noises, strict=True):
        x = scheduler.step(toy(x, float(t), torch.sin), t, x, eta=eta, variance_noise=noise).prev_sample
    return x


@pytest.mark.parametrize("num_steps", [1, 7])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_ddim_matches_diffusers(x64, config, eta, num_steps):
    key = jax.random.key(3)
    x_NHWC = np.random.default_rng(0).normal(size=(2, 3, 3, 4))
    noises = [np.array(jax.random.normal(jax.random.fold_in(key, i), x_NHWC.shape)) for i in range(num_steps)]
    expected = oracle_ddim(config, torch.from_numpy(x_NHWC), num_steps, eta, map(torch.from_numpy, noises))

    def denoise(x, t):
        return toy(x, t[:, None, None, None], jnp.sin)

    x0 = ddim(denoise, make_schedule(config), jnp.asarray(x_NHWC), num_steps=num_steps, eta=eta, key=key)

    assert np.abs(x0 - expected.numpy()).max() < 1e-9 * np.abs(expected.numpy()).max()


@pytest.mark.parametrize("num_steps", [1, 3, 20, 30, 999, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_match_diffusers(spacing, num_steps):
    scheduler = diffusers.DDIMScheduler(**BETAS, timestep_spacing=spacing)
    scheduler.set_timesteps(num_steps)

    t_S = sampling_timesteps(make_schedule(BETAS | {"timestep_spacing": spacing}), num_steps)

    np.testing.assert_array_equal(t_S, scheduler.timesteps)


def test_the_network_is_traced_once_whatever_the_number_of_steps():
    traces = []

    def denoise(x, t):
        traces.append(t)
        return x

    ddim(denoise, make_schedule(BETAS), jnp.ones((1, 2, 2, 4)), num_steps=50)

    assert len(traces) == 1


def test_a_bfloat16_network_does_not_round_the_latents():
    x0 = ddim(lambda x, t: x.astype(jnp.bfloat16), make_schedule(BETAS), jnp.ones((1, 2, 2, 4)), num_steps=2)

    assert x0.dtype == jnp.float32


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (BETAS, {"num_steps": 0}, "num_steps=0"),
        (BETAS, {"num_steps": 1001}, "num_steps=1001"),
        (BETAS | {"steps_offset": 1}, {"num_steps": 1000}, "past the last timestep"),
        (BETAS, {"num_steps": 4, "eta": 1.0}, "needs a key"),
        (BETAS | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, {"num_steps": 4}, "zero signal"),
    ],
)
def test_what_cannot_be_sampled_is_an_error(config, options, message):
    with pytest.raises(ValueError, match=message):
        ddim(lambda x, t: x, make_schedule(config), jnp.ones((1, 2, 2, 4)), **options)


def test_guidance_extrapolates_each_image_with_its_own_conditioning():
    conditioning, unconditional = Conditioning(jnp.array([1.0, 2.0, 3.0])), Conditioning(jnp.array([0.5, 0.5, 0.0]))
    x_NHWC, t_N = jnp.arange(3.0).reshape(3, 1, 1, 1), jnp.array([10, 20, 30])

    def denoise(x, t, c):
        return x + t[:, None, None, None] + c.context_NLD[:, None, None, None]

    guided = classifier_free_guidance(denoise, conditioning, unconditional, 5.0)
    plain = classifier_free_guidance(denoise, conditioning, unconditional, 1.0)

    u, c = denoise(x_NHWC, t_N, unconditional), denoise(x_NHWC, t_N, conditioning)
    np.testing.assert_allclose(guided(x_NHWC, t_N), u + 5.0 * (c - u), rtol=1e-6)
    np.testing.assert_array_equal(plain(x_NHWC, t_N), c)


def test_a_flow_is_only_another_schedule(x64):
    """Rectified flow (arXiv 2209.03003): with its tables DDIM takes Euler's steps along the velocity."""
    noise_T = np.arange(1, 1001) / 1000
    ones = np.ones(1000)
    flow = make_schedule(FAMILIES["turbo"])._replace(
        signal_T=1 - noise_T, noise_T=noise_T, target_x0_T=-ones, target_noise_T=ones
    )
    x = expected = np.random.default_rng(0).normal(size=(2, 4, 4, 3))
    ours = ddim(lambda x, t: toy(x, t[:, None, None, None], jnp.sin), flow, jnp.asarray(x), num_steps=8)
    times = np.linspace(1, 0, 9)
    for now, after in itertools.pairwise(times):
        expected = expected + (after - now) * toy(expected, round(1000 * now) - 1, np.sin)
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9)
