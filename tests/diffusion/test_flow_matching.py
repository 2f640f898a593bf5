"""Flow matching compared with diffusers' FlowMatchEulerDiscreteScheduler and the pipelines that drive it."""

import json
import re

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux.pipeline_flux_img2img import FluxImg2ImgPipeline
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas

from dpo_jax.diffusion.flow_matching import sampling_sigmas
from dpo_jax.diffusion.samplers import FLOW_SAMPLERS, SAMPLERS, make_table, own_sampler
from dpo_jax.diffusion.schedule import add_noise, log_snr, make_schedule, network_times, training_target
from dpo_jax.diffusion.steps import sample, starting_latents, step_noise

CLASS = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
SD3 = {"num_train_timesteps": 1000, "shift": 3.0}
FLUX = {
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
CONFIGS = {
    "SD3": SD3,
    "FLUX.1-dev": FLUX,
    "FLUX.1-schnell": FLUX | {"shift": 1.0, "use_dynamic_shifting": False},
    "linear": FLUX | {"time_shift_type": "linear"},
    "terminal": FLUX | {"shift_terminal": 0.02},
    "karras": SD3 | {"use_karras_sigmas": True},
    "exponential": FLUX | {"use_exponential_sigmas": True},
    "beta": SD3 | {"use_beta_sigmas": True},
    "short": {"num_train_timesteps": 37, "shift": 1.7},
}
BELOW_ZERO = FLUX | {"time_shift_type": "linear", "base_shift": -3.0}
for_configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def flow(config, **options):
    return make_schedule(CLASS | config, **options)


def oracle(config, num_steps, *, spacing="", image_tokens=1024, sigmas=None):
    """diffusers' scheduler as a pipeline sets it up."""
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    fields = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(image_tokens, *(scheduler.config[field] for field in fields))
    if spacing == "trailing":  # as FluxPipeline does
        sigmas = np.linspace(1.0, 1 / num_steps, num_steps) if sigmas is None else sigmas
    scheduler.set_timesteps(num_steps, sigmas=sigmas, mu=mu)
    return scheduler


@for_configs
def test_tables_are_those_of_diffusers_turned_around(config):
    theirs, schedule = FlowMatchEulerDiscreteScheduler(**config), flow(config)

    np.testing.assert_array_equal(schedule.noise_T[::-1], theirs.sigmas.numpy())
    np.testing.assert_array_equal(schedule.signal_T, 1 - schedule.noise_T)
    np.testing.assert_array_equal(schedule.t_T[::-1], theirs.timesteps.numpy())
    assert (schedule.target_x0_T == -1).all()
    assert (schedule.target_noise_T == 1).all()
    assert schedule.is_flow
    t_N = jnp.array([0, 5, config["num_train_timesteps"] - 1])
    np.testing.assert_array_equal(network_times(schedule, t_N), theirs.timesteps.numpy()[::-1][np.asarray(t_N)])
    assert np.isneginf(log_snr(schedule, t_N)[-1])


def test_what_diffusers_saves_is_read(tmp_path):
    for config in CONFIGS.values():
        FlowMatchEulerDiscreteScheduler(**config).save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "scheduler_config.json").read_text())
        np.testing.assert_array_equal(make_schedule(saved).noise_T, flow(config).noise_T)
        assert make_schedule(saved).sampler_fields == flow(config).sampler_fields


def test_noise_and_target_match_diffusers(x64):
    schedule, theirs = flow(SD3), FlowMatchEulerDiscreteScheduler(**SD3)
    x0_NHWC, noise_NHWC = np.random.default_rng(0).normal(size=(2, 3, 2, 2, 4))
    t_N = np.array([0, 500, 999])
    timesteps = torch.from_numpy(schedule.t_T[t_N]).float()

    ours = add_noise(schedule, jnp.asarray(x0_NHWC), jnp.asarray(noise_NHWC), jnp.asarray(t_N))

    expected = theirs.scale_noise(torch.from_numpy(x0_NHWC), timesteps, torch.from_numpy(noise_NHWC))
    np.testing.assert_allclose(ours, expected, rtol=1e-14, atol=1e-14)
    target = training_target(schedule, jnp.asarray(x0_NHWC), jnp.asarray(noise_NHWC), jnp.asarray(t_N))
    np.testing.assert_array_equal(target, noise_NHWC - x0_NHWC)


@for_configs
@pytest.mark.parametrize("spacing", ["", "trailing"])
@pytest.mark.parametrize("num_steps", [2, 10, 28, 36])
def test_levels_and_timesteps_are_those_of_diffusers(config, spacing, num_steps):
    theirs = oracle(config, num_steps, spacing=spacing)
    schedule = flow(config, timestep_spacing=spacing)

    sigma_V = sampling_sigmas(schedule.sampler_fields, schedule.timestep_spacing, num_steps, 1024)
    steps = make_table("flow_euler", schedule, num_steps, image_tokens=1024).steps

    np.testing.assert_array_equal(sigma_V, theirs.sigmas.numpy())
    assert sigma_V.dtype == np.float32
    np.testing.assert_array_equal(steps.t, theirs.timesteps.numpy())
    np.testing.assert_array_equal(steps.noise, theirs.sigmas.numpy()[:-1])


@pytest.mark.parametrize("image_tokens", [256, 1024, 4096, 6144])
def test_the_number_of_image_tokens_shifts_the_levels(image_tokens):
    theirs = oracle(FLUX, 28, spacing="trailing", image_tokens=image_tokens)

    steps = make_table("", flow(FLUX, timestep_spacing="trailing"), 28, image_tokens=image_tokens).steps

    np.testing.assert_array_equal(steps.noise, theirs.sigmas.numpy()[:-1])


def test_sd3_shifts_twice():
    sigma_V = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089]
    np.testing.assert_allclose(make_table("", flow(SD3), 10).steps.noise, sigma_V, atol=5e-5)


@pytest.mark.parametrize("num_steps", [8, 9, 28, 50])
def test_z_image_spaces_as_flux_up_to_the_last_bit(num_steps):
    theirs = oracle(SD3, num_steps, sigmas=get_default_z_image_sigmas(num_steps))

    noise_S = make_table("", flow(SD3, timestep_spacing="trailing"), num_steps).steps.noise

    np.testing.assert_allclose(noise_S, theirs.sigmas[:-1], rtol=2**-22, atol=0)


def toy(x, t, sin):
    return 0.4 * x + 0.1 * sin(1.7 * x + 0.003 * t)


def denoise(x, t):
    return toy(x, t.astype(x.dtype)[:, None, None, None], jnp.sin)


def in_double_precision(monkeypatch):
    """Let diffusers' step, which converts to float32, keep float64."""

    class Double:
        float32 = torch.float64

        def __getattr__(self, name):
            return getattr(torch, name)

    monkeypatch.setattr("diffusers.schedulers.scheduling_flow_match_euler_discrete.torch", Double())


@pytest.mark.parametrize("name", ["SD3", "FLUX.1-dev"])
@pytest.mark.parametrize("stochastic", [False, True], ids=["ode", "stochastic"])
def test_a_trajectory_is_that_of_diffusers(x64, monkeypatch, name, stochastic):
    config = CONFIGS[name] | {"stochastic_sampling": stochastic}
    x_T = np.random.default_rng(0).normal(size=(2, 3, 3, 4))
    keys = jax.random.split(jax.random.key(3), 2)
    theirs = oracle(config, 10)
    theirs.sigmas = theirs.sigmas.double()
    in_double_precision(monkeypatch)
    noises = iter([torch.from_numpy(np.array(step_noise(keys, i, jnp.asarray(x_T)))) for i in range(10)])
    path = "diffusers.schedulers.scheduling_flow_match_euler_discrete.randn_tensor"
    monkeypatch.setattr(path, lambda *_, **__: next(noises))
    expected = torch.from_numpy(x_T)
    for t in theirs.timesteps:
        expected = theirs.step(toy(expected, t.double(), torch.sin), t, expected).prev_sample
    assert expected.dtype == torch.float64

    table = make_table("", flow(config), 10, image_tokens=1024)
    x = sample(denoise, table, starting_latents(table, jnp.asarray(x_T)), keys if stochastic else None)

    np.testing.assert_allclose(x, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("strength", "spacing"), [(0.6, ""), *((strength, "trailing") for strength in (1.0, 0.95, 0.6, 0.29, 0.01))]
)
def test_from_an_image_the_last_steps_are_those_of_diffusers_pipelines(x64, monkeypatch, strength, spacing):
    x0, noise = np.random.default_rng(0).normal(size=(2, 2, 3, 3, 4))
    theirs = oracle(FLUX, 20, spacing=spacing)
    pipeline = FluxImg2ImgPipeline.__new__(FluxImg2ImgPipeline)
    pipeline.scheduler = theirs
    timesteps, _ = pipeline.get_timesteps(20, strength, "cpu")
    theirs.sigmas = theirs.sigmas.double()
    in_double_precision(monkeypatch)
    x = theirs.scale_noise(torch.from_numpy(x0), timesteps[:1].repeat(2), torch.from_numpy(noise))
    for t in timesteps:
        x = theirs.step(toy(x, t.double(), torch.sin), t, x).prev_sample

    table = make_table("", flow(FLUX, timestep_spacing=spacing), 20, strength=strength, image_tokens=1024)
    ours = sample(denoise, table, starting_latents(table, jnp.asarray(noise), jnp.asarray(x0)))

    assert len(table.steps.t) == len(timesteps)
    np.testing.assert_allclose(ours, x, rtol=1e-12, atol=1e-12)


def test_the_image_is_read_off_the_velocity(x64):
    x0, noise = np.random.default_rng(1).normal(size=(2, 5))
    steps = make_table("", flow(SD3), 7).steps
    for signal, level, p, q in zip(steps.signal, steps.noise, steps.p, steps.q, strict=True):
        np.testing.assert_allclose(p * (signal * x0 + level * noise) + q * (noise - x0), x0, rtol=1e-12, atol=1e-12)


def test_flow_samplers_and_no_others_sample_flow_models():
    vp = make_schedule(json.loads(diffusers.EulerDiscreteScheduler().to_json_string()))
    assert own_sampler(flow(SD3)) == "flow_euler"
    assert own_sampler(flow(CONFIGS["karras"])) == "flow_euler"
    for name in SAMPLERS:
        wrong, message = (vp, "is for flow models, but the model's scheduler is EulerDiscreteScheduler.*example euler")
        if name not in FLOW_SAMPLERS:
            wrong = flow(SD3)
            message = rf"the sampler {re.escape(name)} does not sample flow models; choose one of flow_euler, flow_sde,"
        with pytest.raises(ValueError, match=message):
            make_table(name, wrong, 5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"invert_sigmas": True}, "invert_sigmas: input should be False, not True"),
        ({"beta_start": 0.1}, "unknown fields beta_start"),
        ({"time_shift_type": "sine"}, "time_shift_type: input should be 'exponential' or 'linear', not 'sine'"),
        ({"shift": 0}, "shift: input should be greater than 0"),
        ({"base_shift": None}, "base_shift: input should be a valid number, not None"),
        ({"max_image_seq_len": 256}, "base_image_seq_len=256 must be below max_image_seq_len=256"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "only one of use_karras_sigmas"),
    ],
)
def test_a_file_that_is_not_supported_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        flow(FLUX | fields)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (FLUX, {}, "use_dynamic_shifting=True; it needs the number of tokens"),
        (SD3 | {"shift_terminal": 0.1}, {"num_steps": 1}, "num_steps=1 .* gives noise levels from nan to nan"),
        (BELOW_ZERO, {"image_tokens": 256}, "must fall from at most 1"),
        (BELOW_ZERO | {"use_exponential_sigmas": True}, {"image_tokens": 256}, "must fall from at most 1"),
        (BELOW_ZERO | {"use_karras_sigmas": True}, {"image_tokens": 256}, "must fall from at most 1"),
        (SD3, {"eta": 0.5}, "eta=0.5 goes with the sampler ddim, but the sampler is flow_euler"),
        (SD3, {"num_steps": 1001}, "num_steps=1001"),
        (SD3, {"strength": 1e-30}, "less than one step"),
    ],
)
def test_what_cannot_be_sampled_is_an_error(config, options, message):
    with pytest.raises(ValueError, match=message):
        make_table("", flow(config), **({"num_steps": 10} | options))
