"""Probabilities of timesteps: against their definition, and against what diffusers' training scripts draw."""

import math

import numpy as np
import pytest
import scipy.integrate
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.diffusion.densities import density_shares, even_shares
from dpo_jax.diffusion.schedule import make_schedule
from dpo_jax.errors import UserError
from dpo_jax.training.config import default_config
from dpo_jax.training.timesteps import timestep_shares

SD15 = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CONFIGS = {
    "sd15": SD15,
    "cosine": SD15 | {"beta_schedule": "squaredcos_cap_v2"},
    "short": SD15 | {"num_train_timesteps": 37},
    "zero snr": SD15 | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "flow": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
}
VP, ZERO_SNR, SD3 = (make_schedule(CONFIGS[name]) for name in ("sd15", "zero snr", "flow"))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("buckets", [1, 4, 10, 1000])
def test_buckets_of_log_snr_have_equal_shares(config, buckets):
    schedule = make_schedule(config)
    shares = even_shares(schedule, buckets)
    with np.errstate(divide="ignore"):
        log_snr_T = np.log(schedule.signal_T**2 / schedule.noise_T**2)
    finite = log_snr_T[np.isfinite(log_snr_T)]
    edges = np.linspace(finite.min(), finite.max(), buckets + 1)
    expected, filled = np.zeros(len(log_snr_T)), 0
    for b in range(buckets):
        is_in = (log_snr_T >= (edges[b] if b else -np.inf)) & (log_snr_T < edges[b + 1] if b + 1 < buckets else True)
        expected += is_in / max(is_in.sum(), 1)
        filled += is_in.any()
    if buckets <= 10:  # more buckets have edges that rounding moves over a timestep
        np.testing.assert_allclose(shares, expected / filled, rtol=1e-9)
    assert shares.min() > 0
    assert shares.sum() == pytest.approx(1, abs=1e-12)
    if buckets == 1:
        np.testing.assert_allclose(shares, 1 / len(log_snr_T), rtol=1e-12)


def test_few_training_timesteps_have_shares_too():
    """SDXL-Turbo trains on four timesteps, of which the last is pure noise and counts to the one before."""
    turbo = make_schedule(SD15, training_timesteps=(249, 499, 749, 999), zero_terminal_snr=True)
    np.testing.assert_allclose(even_shares(turbo, 10), [1 / 3, 1 / 3, 1 / 6, 1 / 6])
    refiner = make_schedule(SD15, training_timesteps=range(200))
    log_snr_T = np.log(refiner.signal_T[:200] ** 2 / refiner.noise_T[:200] ** 2)
    counts, _ = np.histogram(log_snr_T, bins=2)
    np.testing.assert_allclose(even_shares(refiner, 2)[[0, 199]], 0.5 / counts[::-1])
    for one in (0, 999):
        assert even_shares(make_schedule(SD15, training_timesteps=[one], zero_terminal_snr=True), 10) == [1]


@given(timesteps=st.lists(st.integers(0, 999), min_size=1, max_size=50, unique=True), buckets=st.integers(1, 1000))
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
def test_shares_are_probabilities(timesteps, buckets):
    schedule = ZERO_SNR._replace(training_timesteps=np.asarray(timesteps, np.int32))
    shares = even_shares(schedule, buckets)
    assert shares.sum() == pytest.approx(1, abs=1e-12)
    assert shares.min() >= 1 / (buckets * len(timesteps)) - 1e-12
    assert shares.max() <= 1


def logit_normal(u, mean, std):
    """arXiv 2403.03206, equation 19."""
    spread = (math.log(u / (1 - u)) - mean) / std
    return math.exp(-(spread**2) / 2) / (std * math.sqrt(2 * math.pi) * u * (1 - u))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7), (1.0, 2.0)])
def test_shares_of_logit_normal_are_integrals_of_its_density(mean, std):
    shares = density_shares(SD3, "logit_normal", mean=mean, std=std)
    for k in (0, 1, 20, 400, 500, 998, 999):  # timestep 999 is pure noise, where u is 0
        place = 999 - k
        expected, _ = scipy.integrate.quad(logit_normal, place / 1000, (place + 1) / 1000, (mean, std), epsabs=1e-12)
        assert shares[k] == pytest.approx(expected, rel=1e-6, abs=1e-11)
    assert shares.sum() == pytest.approx(1, abs=1e-12)


def test_quantiles_are_those_of_the_training_scripts_of_diffusers():
    """Sigma of SD3, shift 3: as published, and as many draws of diffusers have it."""
    quantiles = [0.05, 0.25, 0.5, 0.75, 0.95]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    for mean, std, published in ((0.0, 1.0, [0.37, 0.61, 0.75, 0.86, 0.94]), (0.8, 0.5, None)):
        ours = np.cumsum(density_shares(SD3, "logit_normal", mean=mean, std=std))
        found = SD3.noise_T[np.searchsorted(ours, quantiles)]
        if published:
            np.testing.assert_allclose(found, published, atol=0.006)
        u = compute_density_for_timestep_sampling(
            "logit_normal", 400_000, logit_mean=mean, logit_std=std, generator=torch.Generator().manual_seed(0)
        )
        sigma = scheduler.sigmas[(u * 1000).long()].numpy()
        np.testing.assert_allclose(found, np.quantile(sigma, quantiles), atol=0.003)


@pytest.mark.parametrize("density", ["uniform", "logit_normal"])
@pytest.mark.parametrize("shift", [0.4, 3.16])
def test_a_shift_of_the_draws_is_a_shift_of_the_table(density, shift):
    """Draws from FLUX's table that are shifted by s have the sigmas of draws from a table that is shifted by s."""
    plain, shifted = (make_schedule(CONFIGS["flow"] | {"shift": table_shift}) for table_shift in (1.0, shift))
    below = np.cumsum(density_shares(plain, density, shift=shift))
    expected = np.cumsum(density_shares(shifted, density))
    # Timestep k is drawn for what lies between levels k - 1 and k.
    np.testing.assert_allclose(np.interp(shifted.noise_T, [0, *plain.noise_T], [0, *below]), expected, atol=2e-4)
    assert not np.allclose(np.cumsum(density_shares(plain, density)), below, atol=1e-2)


def test_without_a_shift_uniform_shares_are_equal_and_with_one_noise_is_more_likely():
    np.testing.assert_allclose(density_shares(SD3, "uniform"), 1 / 1000, rtol=1e-9)
    assert np.all(np.diff(density_shares(VP, "uniform", shift=2.0)) > 0)


def test_shares_follow_the_training_timesteps():
    schedule = VP._replace(training_timesteps=np.array([999, 249, 749, 499], np.int32))
    shares = density_shares(schedule, "logit_normal", mean=-1.0)
    assert shares.sum() == pytest.approx(1)
    assert np.all(np.diff(shares[[1, 3, 2]]) > 0)
    np.testing.assert_allclose(
        shares[[1, 3, 2, 0]],
        density_shares(
            schedule._replace(training_timesteps=np.array([249, 499, 749, 999], np.int32)), "logit_normal", mean=-1.0
        ),
    )


def loss(**fields):
    config = default_config()
    config.loss.update(fields)
    return config.loss


def test_by_default_flow_models_draw_logit_normal_and_all_others_uniformly():
    assert timestep_shares(loss(), VP) is None
    assert timestep_shares(loss(timestep_density="uniform"), SD3) is None
    normal = density_shares(SD3, "logit_normal")
    np.testing.assert_array_equal(timestep_shares(loss(), SD3), normal)
    np.testing.assert_array_equal(timestep_shares(loss(timestep_density="logit_normal"), VP), normal)
    np.testing.assert_array_equal(timestep_shares(loss(log_snr_buckets=10), SD3), even_shares(SD3, 10))
    other = timestep_shares(loss(timestep_mean=0.5, timestep_std=0.7, timestep_shift=3.0), SD3)
    np.testing.assert_array_equal(other, density_shares(SD3, "logit_normal", mean=0.5, std=0.7, shift=3.0))


@pytest.mark.parametrize(
    ("schedule", "fields", "message"),
    [
        (SD3, {"log_snr_buckets": 10, "timestep_shift": 3.0}, "log_snr_buckets=10 and config.loss.timestep_shift=3.0"),
        (VP, {"timestep_std": 0.5}, 'timestep_std=0.5 has no effect.*drawn uniformly; .*density="logit_normal"'),
        (SD3, {"timestep_density": "uniform", "timestep_mean": 0.5}, "timestep_mean=0.5 has no effect"),
    ],
)
def test_fields_that_contradict_each_other_are_an_error(schedule, fields, message):
    with pytest.raises(UserError, match=message):
        timestep_shares(loss(**fields), schedule)
