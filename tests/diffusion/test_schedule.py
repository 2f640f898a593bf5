"""Schedules compared with diffusers' DDPMScheduler."""

import json

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dpo_jax.diffusion.schedule import add_noise, make_schedule, training_target
from dpo_jax.diffusion.variance_preserving import VARIANCE_PRESERVING

SD15 = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CONFIGS = {
    "sd15": SD15,
    "linear": SD15 | {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine": SD15 | {"beta_schedule": "squaredcos_cap_v2"},
    "short": SD15 | {"num_train_timesteps": 37},
    "sd2": SD15 | {"prediction_type": "v_prediction"},
    "zero snr": SD15 | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_tables_are_those_of_diffusers(config):
    alphas_bar_T = diffusers.DDPMScheduler(**config).alphas_cumprod.double().numpy()

    schedule = make_schedule(config)

    # Bit for bit, but for the float32 square root inside the rescaling, which PyTorch rounds as the machine likes.
    rtol = 1e-5 if "rescale_betas_zero_snr" in config else 0
    np.testing.assert_allclose(schedule.signal_T, np.sqrt(alphas_bar_T), rtol=rtol, atol=0)
    np.testing.assert_allclose(schedule.noise_T, np.sqrt(1 - alphas_bar_T), rtol=rtol, atol=0)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_noise_and_target_match_diffusers(x64, config):
    rng = np.random.default_rng(0)
    x0_NHWC, noise_NHWC = rng.normal(size=(2, 5, 3, 4, 2))
    last = config["num_train_timesteps"] - 1
    t_N = np.array([0, 1, last // 2, last - 1, last])
    schedule = make_schedule(config)
    oracle = diffusers.DDPMScheduler(**config)
    oracle.alphas_cumprod = torch.from_numpy(schedule.signal_T**2)
    x0, noise, t = map(torch.from_numpy, (x0_NHWC, noise_NHWC, t_N))
    target = oracle.get_velocity(x0, noise, t) if "prediction_type" in config else noise

    arrays = jnp.asarray(x0_NHWC), jnp.asarray(noise_NHWC), jnp.asarray(t_N)

    np.testing.assert_allclose(add_noise(schedule, *arrays), oracle.add_noise(x0, noise, t), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(training_target(schedule, *arrays), target, rtol=1e-12, atol=1e-12)


def test_zero_terminal_snr_can_be_asked_for():
    rescaled = make_schedule(SD15, zero_terminal_snr=True)

    np.testing.assert_array_equal(rescaled.signal_T, make_schedule(SD15 | {"rescale_betas_zero_snr": True}).signal_T)
    assert rescaled.signal_T[-1] == 0
    assert rescaled.signal_T[0] == make_schedule(SD15).signal_T[0]


def test_bfloat16_latents_are_noised_in_float32():
    x0_NHWC = jnp.ones((1, 2, 2, 4), jnp.bfloat16)

    assert add_noise(make_schedule(SD15), x0_NHWC, x0_NHWC, jnp.asarray([500])).dtype == jnp.float32


@pytest.mark.parametrize("name", ["PNDM", "EulerDiscrete", "DDIM", "EulerAncestralDiscrete", "DDPM", "LMSDiscrete"])
def test_every_sampler_class_of_published_folders_is_read(name):
    """Every field that the class saves is read, also with its default; only clipping is ignored."""
    saved = json.loads(getattr(diffusers, f"{name}Scheduler")(**SD15).to_json_string()) | {"clip_sample": False}

    np.testing.assert_array_equal(make_schedule(saved).signal_T, make_schedule(SD15).signal_T)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"_class_name": "FlowMatchHeunDiscreteScheduler"},
            "the scheduler FlowMatchHeun.* is not supported; supported are .*DDIMScheduler.*FlowMatchEulerDiscrete",
        ),
        (
            {"trained_betas": [0.1, 0.2]},
            "trained_betas has 2 numbers, but num_train_timesteps is 1000; they must be equal",
        ),
        ({"trained_betas": [0.1, "0.2"]}, "trained_betas.1: input should be a valid number, not '0.2'"),
        ({"timestep_type": "continuous"}, "timestep_type: input should be 'discrete', not 'continuous'"),
        ({"shift": 3.0}, "unknown fields shift"),
        ({"prediction_type": "sample"}, "prediction_type: input should be 'epsilon' or 'v_prediction', not 'sample'"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule: input should be 'linear', .*, not 'sigmoid'"),
        ({"timestep_spacing": "karras"}, "timestep_spacing: .* not 'karras'"),
        ({"beta_start": "0.00085"}, "beta_start: input should be a valid number, not '0.00085'"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps: input should be less than or equal to 100000"),
        ({"beta_end": float("nan")}, "beta_end: "),
        ({"_class_name": ["x", "DDIMScheduler"]}, r"the scheduler \['x', 'DDIMScheduler'\] is not supported"),
    ],
)
def test_a_field_that_would_change_the_computation_is_an_error(change, named):
    with pytest.raises(ValueError, match=named):
        make_schedule(SD15 | change)


@pytest.mark.parametrize(
    "change",
    [
        {"clip_sample": True, "clip_sample_range": 1.0, "_class_name": "DDPMScheduler"},
        {"thresholding": True, "dynamic_thresholding_ratio": 0.9},
        {"use_karras_sigmas": True, "_class_name": "DPMSolverMultistepScheduler"},
        {"_use_default_values": ["sample_max_value"], "_name_or_path": "somewhere"},
        {"rescale_betas_zero_snr": None, "timestep_spacing": None},
    ],
)
def test_fields_that_steer_sampling_alone_change_nothing(change):
    np.testing.assert_array_equal(make_schedule(SD15 | change).signal_T, make_schedule(SD15).signal_T)


def test_trained_betas_are_the_betas():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas_bar_T = diffusers.DDPMScheduler(trained_betas=betas.tolist()).alphas_cumprod.double().numpy()

    schedule = make_schedule(SD15 | {"beta_end": 0.5, "trained_betas": betas.tolist()})

    np.testing.assert_array_equal(schedule.signal_T, np.sqrt(alphas_bar_T))


def test_the_class_of_the_file_and_its_fields_are_there_for_samplers():
    saved = json.loads(diffusers.DPMSolverMultistepScheduler(**SD15, final_sigmas_type="sigma_min").to_json_string())

    schedule = make_schedule(saved)

    assert schedule.class_name == "DPMSolverMultistepScheduler"
    assert schedule.sampler_fields["final_sigmas_type"] == "sigma_min"
    assert make_schedule(SD15 | {"_class_name": "FlaxPNDMScheduler"}).class_name == "PNDMScheduler"


def test_a_missing_field_is_an_error():
    with pytest.raises(ValueError, match="beta_start: field required; beta_end: field required"):
        make_schedule({"num_train_timesteps": 1000, "beta_schedule": "linear"})


def test_training_timesteps_must_exist():
    with pytest.raises(ValueError, match="1000"):
        make_schedule(SD15, training_timesteps=[249, 1000])


@pytest.mark.parametrize("name", sorted(VARIANCE_PRESERVING - {"DPMSolverSDEScheduler"}))  # which needs torchsde
def test_what_each_known_scheduler_saves_is_read(name, tmp_path):
    getattr(diffusers, name).from_config(SD15 | {"clip_sample": False}).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    np.testing.assert_array_equal(make_schedule(saved).signal_T, make_schedule(SD15).signal_T)
