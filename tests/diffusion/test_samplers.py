"""Samplers compared with diffusers' schedulers of the same name, on a toy denoiser that both can evaluate."""

import itertools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg

from dpo_jax.batch import Conditioning
from dpo_jax.diffusion.guidance import classifier_free_guidance, with_guidance
from dpo_jax.diffusion.samplers import FLOW_SAMPLERS, SAMPLER_OF_CLASS, SAMPLERS, make_table, own_sampler
from dpo_jax.diffusion.schedule import add_noise, make_schedule, training_target
from dpo_jax.diffusion.steps import sample, starting_latents, step_mean, step_noise

BETAS = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SPACINGS = {
    "leading": {"timestep_spacing": "leading"},
    "offset": {"timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
    "unsaid": {},
}
TARGETS = {
    "epsilon": {},
    "velocity": {"prediction_type": "v_prediction"},
    "zero snr": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}
CLASSES = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "dpmsolver++": diffusers.DPMSolverMultistepScheduler,
    "lcm": diffusers.LCMScheduler,
}


def tolerance(sampler, config):
    """diffusers computes all but DDIM in float32, with numbers up to 4096 times the image's at zero signal."""
    return 1e-9 if sampler == "ddim" else 2e-4 if config.get("rescale_betas_zero_snr") else 1e-5


def toy(x, t, sin):
    """A toy prediction that depends on x and t and works with the arrays of both frameworks."""
    return 0.95 * x + 0.05 * sin(1.7 * x + 0.003 * t)


def denoise(x, t):
    return toy(x, t.astype(x.dtype)[:, None, None, None], jnp.sin)


def ours(sampler, config, x_T, keys, *, num_steps, x0=None, **options):
    table = make_table(sampler, make_schedule(config), num_steps, **options)
    x0 = None if x0 is None else jnp.asarray(x0)
    return np.asarray(sample(denoise, table, starting_latents(table, jnp.asarray(x_T), x0), keys))


def oracle(monkeypatch, sampler, config, x_T, keys, *, num_steps, x0=None, eta=0.0, strength=1.0):
    """The loop of diffusers' pipelines with the noise of dpo_jax; it begins with an image if one is given."""
    extra = {"clip_sample": False} if sampler == "ddim" else {}
    scheduler, schedule = CLASSES[sampler](**config | extra), make_schedule(config)
    if sampler == "ddim":
        # Its coefficients are float32 scalars, whose rounding would be all that is seen at 1e-9.
        scheduler.alphas_cumprod = torch.from_numpy(schedule.signal_T**2)
        scheduler.final_alpha_cumprod = torch.tensor(schedule.final_signal**2, dtype=torch.float64)
    noises = (torch.from_numpy(np.array(step_noise(keys, i, jnp.asarray(x_T)))) for i in itertools.count())
    for module in ("euler_ancestral_discrete", "lcm", "ddim"):
        monkeypatch.setattr(f"diffusers.schedulers.scheduling_{module}.randn_tensor", lambda *_, **__: next(noises))
    scheduler.set_timesteps(num_steps)
    skipped = num_steps - int(num_steps * strength)
    timesteps = scheduler.timesteps[skipped:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    x = torch.from_numpy(x_T) * scheduler.init_noise_sigma
    if x0 is not None:
        x = scheduler.add_noise(torch.from_numpy(x0), torch.from_numpy(x_T), timesteps[:1].repeat(len(x_T)))
    for t in timesteps:
        prediction = toy(scheduler.scale_model_input(x, t), float(t), torch.sin)
        x = scheduler.step(prediction, t, x, **({"eta": eta} if eta else {})).prev_sample
    return x.numpy()


def noise_and_keys(shape=(2, 3, 3, 4)):
    return np.random.default_rng(0).normal(size=shape), jax.random.split(jax.random.key(3), shape[0])


@pytest.mark.parametrize(
    ("num_steps", "spacing", "target"),
    [*itertools.product([4, 20], SPACINGS, TARGETS), *itertools.product([1, 50], ["offset", "trailing"], ["epsilon"])],
)
@pytest.mark.parametrize("sampler", CLASSES)
def test_a_trajectory_is_that_of_diffusers(x64, monkeypatch, sampler, spacing, target, num_steps):
    config = BETAS | SPACINGS[spacing] | TARGETS[target]
    x_T, keys = noise_and_keys()

    expected = oracle(monkeypatch, sampler, config, x_T, keys, num_steps=num_steps)

    difference = np.abs(ours(sampler, config, x_T, keys, num_steps=num_steps) - expected)
    assert difference.max() < tolerance(sampler, config) * np.abs(expected).max()


@pytest.mark.parametrize(
    ("sampler", "fields", "options"),
    [
        ("ddim", {"set_alpha_to_one": False}, {"num_steps": 7}),
        ("ddim", {"steps_offset": 1, "set_alpha_to_one": False}, {"num_steps": 7, "eta": 1.0}),
        ("ddim", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, {"num_steps": 7, "eta": 0.4}),
        ("euler", {"final_sigmas_type": "sigma_min"}, {"num_steps": 7}),
        ("euler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, {"num_steps": 7}),
        ("dpmsolver++", {"final_sigmas_type": "sigma_min"}, {"num_steps": 7}),
        ("dpmsolver++", {"final_sigmas_type": "sigma_min"}, {"num_steps": 20}),
        ("dpmsolver++", {"final_sigmas_type": "sigma_min", "euler_at_final": True}, {"num_steps": 20}),
        ("dpmsolver++", {"final_sigmas_type": "sigma_min", "lower_order_final": False}, {"num_steps": 7}),
        ("dpmsolver++", {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "leading"}, {"num_steps": 9}),
        ("lcm", {"original_inference_steps": 100, "timestep_scaling": 5.0}, {"num_steps": 6}),
    ],
)
def test_what_the_scheduler_s_file_says_counts(x64, monkeypatch, sampler, fields, options):
    config = BETAS | fields
    x_T, keys = noise_and_keys()

    expected = oracle(monkeypatch, sampler, config, x_T, keys, **options)

    difference = np.abs(ours(sampler, config, x_T, keys, **options) - expected)
    assert difference.max() < tolerance(sampler, config) * np.abs(expected).max()


@pytest.mark.parametrize("strength", [1.0, 0.6, 0.29])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("sampler", CLASSES)
def test_the_last_steps_from_an_image_are_those_of_diffusers(x64, monkeypatch, sampler, spacing, strength):
    config = BETAS | {"timestep_spacing": spacing}
    x_T, keys = noise_and_keys()
    options = {"num_steps": 20, "strength": strength, "x0": np.random.default_rng(1).normal(size=x_T.shape)}

    expected = oracle(monkeypatch, sampler, config, x_T, keys, **options)

    difference = np.abs(ours(sampler, config, x_T, keys, **options) - expected)
    assert difference.max() < tolerance(sampler, config) * np.abs(expected).max()


@pytest.mark.parametrize("num_steps", [1, 3, 20, 30, 61, 998])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmsolver++"])
def test_timesteps_are_those_of_diffusers(sampler, spacing, num_steps):
    scheduler = CLASSES[sampler](**BETAS, timestep_spacing=spacing)
    scheduler.set_timesteps(num_steps)

    t = make_table(sampler, make_schedule(BETAS | {"timestep_spacing": spacing}), num_steps).steps.t

    np.testing.assert_array_equal(t, scheduler.timesteps[:num_steps])  # of 61 trailing steps diffusers makes 62
    assert len(t) == num_steps


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_the_image_is_read_off_the_target(x64, sampler, target, spacing):
    """The prediction of an exact network, which knows the velocity at levels between timesteps, too."""
    schedule = make_schedule(BETAS | target | {"timestep_spacing": spacing})
    x0_NHWC, noise_NHWC = jnp.asarray(np.random.default_rng(1).normal(size=(2, 1, 2, 2, 4)))
    for step in zip(*make_table(sampler, schedule, 13).steps, strict=True):
        t, signal, noise, p, q = step[:5]
        prediction_NHWC = signal * noise_NHWC - noise * x0_NHWC if target else noise_NHWC
        np.testing.assert_allclose(
            p * (signal * x0_NHWC + noise * noise_NHWC) + q * prediction_NHWC, x0_NHWC, rtol=1e-9, atol=1e-9
        )
        if t == int(t) and signal > 0.01:  # then it is a timestep of training
            t_N = jnp.array([int(t)])
            np.testing.assert_allclose(training_target(schedule, x0_NHWC, noise_NHWC, t_N), prediction_NHWC, rtol=1e-9)
            np.testing.assert_allclose(
                add_noise(schedule, x0_NHWC, noise_NHWC, t_N), signal * x0_NHWC + noise * noise_NHWC, rtol=1e-9
            )


def test_the_default_is_the_sampler_that_the_file_means():
    euler = make_schedule(BETAS | {"_class_name": "EulerDiscreteScheduler"})

    np.testing.assert_array_equal(make_table("", euler, 5).steps.t, make_table("euler", euler, 5).steps.t)
    assert make_table("ddim", euler, 5).steps.t[0] != make_table("", euler, 5).steps.t[0]
    assert CLASSES.keys() | set(FLOW_SAMPLERS) == SAMPLERS.keys()
    for name, theirs in CLASSES.items():
        assert own_sampler(make_schedule(BETAS | {"_class_name": theirs.__name__})) == name
    assert own_sampler(make_schedule(BETAS | {"_class_name": "PNDMScheduler"})) == "ddim"


@pytest.mark.parametrize("sampler", CLASSES)
def test_a_step_is_its_mean_and_so_much_noise(x64, sampler):
    x_T, keys = noise_and_keys()
    table = make_table(sampler, make_schedule(BETAS | {"timestep_spacing": "trailing"}), 4)
    x = starting_latents(table, jnp.asarray(x_T))
    x0_before = jnp.zeros_like(x)
    for i, numbers in enumerate(zip(*table.steps, strict=True)):
        step = type(table.steps)(*numbers)
        x0 = step.p * x + step.q * toy(x, float(step.t), jnp.sin)
        x = step_mean(step, x, x0, x0_before) + step.d * step_noise(keys, i, x)
        x0_before = x0
    options = {"num_steps": 4}
    np.testing.assert_allclose(ours(sampler, BETAS | {"timestep_spacing": "trailing"}, x_T, keys, **options), x)


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral", "lcm"])
def test_noise_is_the_image_s_own(sampler):
    """The result depends neither on the batch nor on the place of an image in it."""
    x_T, keys = noise_and_keys((8, 3, 3, 4))
    x_T = jnp.asarray(x_T)
    options = {"num_steps": 5, "eta": 1.0} if sampler == "ddim" else {"num_steps": 5}
    together = ours(sampler, BETAS, x_T, keys, **options)
    for n in (0, 5):
        alone = slice(n, n + 1)
        np.testing.assert_array_equal(step_noise(keys, 3, x_T)[alone], step_noise(keys[alone], 3, x_T[alone]))
        np.testing.assert_allclose(ours(sampler, BETAS, x_T[alone], keys[alone], **options), together[alone], rtol=2e-5)
    np.testing.assert_allclose(
        ours(sampler, BETAS, x_T[::-1], keys[::-1], **options), together[::-1], rtol=2e-5, atol=1e-6
    )
    assert abs(np.corrcoef(np.ravel(step_noise(keys, 3, x_T)), np.ravel(step_noise(keys, 4, x_T)))[0, 1]) < 0.2
    other = ours(sampler, BETAS, x_T, keys[::-1], **options)
    assert np.abs(other - together).max() > 0.1  # there was noise


def test_the_network_is_traced_once_whatever_the_number_of_steps():
    traces = []

    def traced(x, t):
        traces.append(t)
        return x

    sample(traced, make_table("ddim", make_schedule(BETAS), 50), jnp.ones((1, 2, 2, 4)))

    assert len(traces) == 1


def test_a_bfloat16_network_does_not_round_the_latents():
    table = make_table("ddim", make_schedule(BETAS), 2)

    assert sample(lambda x, t: x.astype(jnp.bfloat16), table, jnp.ones((1, 2, 2, 4))).dtype == jnp.float32


@pytest.mark.parametrize(
    ("sampler", "fields", "options", "message"),
    [
        ("ddim", {}, {"num_steps": 0}, "num_steps=0"),
        ("ddim", {}, {"num_steps": 1001}, "num_steps=1001"),
        ("ddim", {"steps_offset": 1}, {"num_steps": 1000}, "begins after the last timestep; take fewer steps"),
        (
            "ddim",
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            {"num_steps": 4},
            "zero signal",
        ),
        (
            "heun",
            {},
            {"num_steps": 4},
            "there is no sampler 'heun'; choose one of ddim, euler, euler_ancestral, dpmsolver",
        ),
        (
            "euler",
            {},
            {"num_steps": 4, "eta": 0.5},
            "eta=0.5 goes with the sampler ddim, but the sampler is euler; set eta to 0",
        ),
        ("euler", {"use_karras_sigmas": True}, {"num_steps": 4}, "use_karras_sigmas=True"),
        ("euler", {"final_sigmas_type": "half"}, {"num_steps": 4}, "final_sigmas_type='half'"),
        ("dpmsolver++", {"solver_order": 3}, {"num_steps": 4}, "solver_order=3"),
        ("dpmsolver++", {"timestep_spacing": "leading"}, {"num_steps": 1000}, "too many"),
        ("lcm", {}, {"num_steps": 51}, "at most 50 steps"),
        ("ddim", {}, {"num_steps": 4, "strength": 0.0}, "strength=0.0"),
        ("ddim", {}, {"num_steps": 4, "strength": 1.1}, "strength=1.1"),
        ("ddim", {}, {"num_steps": 4, "strength": 0.2}, "less than one"),
    ],
)
def test_what_cannot_be_sampled_is_an_error(sampler, fields, options, message):
    with pytest.raises(ValueError, match=message):
        make_table(sampler, make_schedule(BETAS | fields), **options)


def test_noise_needs_keys():
    with pytest.raises(ValueError, match="needs keys_N, one key per image"):
        sample(lambda x, t: x, make_table("ddim", make_schedule(BETAS), 4, eta=1.0), jnp.ones((1, 2, 2, 4)))


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


def test_guidance_of_a_network_with_weights():
    def network(params, x, t, conditioning):
        return params * x + t[:, None, None, None] + conditioning[:, None, None, None]

    x, t = jnp.arange(3.0).reshape(3, 1, 1, 1), jnp.array([10, 20, 30])
    c, u = jnp.array([1.0, 2.0, 3.0]), jnp.array([0.5, 0.5, 0.0])

    guided = with_guidance(network, 5.0)(2.0, x, t, (c, u))
    plain = with_guidance(network, 1.0)(2.0, x, t, (c, None))

    of_u, of_c = network(2.0, x, t, u), network(2.0, x, t, c)
    np.testing.assert_allclose(guided, of_u + 5.0 * (of_c - of_u), rtol=1e-6)
    np.testing.assert_array_equal(plain, of_c)


def test_guidance_is_rescaled_as_in_diffusers():
    u, c = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 2)).astype(np.float32)
    predictions = np.stack([u, c], axis=1).reshape(6, 4, 4, 2)
    x_NHWC, t_N = jnp.zeros((3, 4, 4, 2)), jnp.zeros(3)

    guided = classifier_free_guidance(lambda *_: jnp.asarray(predictions), t_N, t_N, 5.0, rescale=0.7)(x_NHWC, t_N)

    expected = rescale_noise_cfg(torch.from_numpy(u + 5.0 * (c - u)), torch.from_numpy(c), guidance_rescale=0.7)
    np.testing.assert_allclose(guided, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "fields", "own"),
    [
        ("DPMSolverMultistepScheduler", {}, "dpmsolver++"),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "ddim"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "ddim"),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": None}, "dpmsolver++"),
        ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}, "ddim"),
        ("EulerAncestralDiscreteScheduler", {"use_karras_sigmas": True}, "euler_ancestral"),
        ("DDPMScheduler", {"clip_sample": True, "thresholding": True}, "ddim"),
    ],
)
def test_a_scheduler_that_no_sampler_here_computes_means_ddim(name, fields, own):
    schedule = make_schedule(BETAS | {"_class_name": name} | fields)

    assert own_sampler(schedule) == own
    make_table("", schedule, 5)
    other = SAMPLER_OF_CLASS.get(name, "ddim")
    if own != other:
        with pytest.raises(
            ValueError, match=rf"scheduler has {next(iter(fields))}=.*; choose another sampler, for example ddim"
        ):
            make_table(other, schedule, 5)
