"""Log-ratios of candidates, compared with a loop over single images in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.batch import Conditioning
from dpo_jax.cli import flatten
from dpo_jax.diffusion.densities import even_shares
from dpo_jax.diffusion.schedule import make_schedule
from dpo_jax.methods import find_method
from dpo_jax.methods.dpo import dpo
from dpo_jax.methods.metrics import sums_by_noise
from dpo_jax.objectives.denoising import compare_denoising, draw, keys_for, perturb
from dpo_jax.training.defaults import default_config, with_fields

SCHEDULE = make_schedule(
    {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
)
FLOW = make_schedule({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0})
B, K, H, W, C = 3, 2, 4, 5, 4


def denoise(params, x_NHWC, t_N, conditioning):
    """A network whose output shows that each image got its own timestep, caption and size."""
    shift_N = params["t"] * t_N + conditioning.context_NLD[:, 0, 0] + conditioning.time_ids_NT[:, 0]
    return params["x"] * x_NHWC + shift_N[:, None, None, None]


def inputs():
    rng = np.random.default_rng(0)
    arrays = (
        rng.normal(size=(B, K, H, W, C)),
        rng.normal(size=(B, H, W, C)),
        np.array([1, 500, 999]),
        Conditioning(rng.normal(size=(B, 1, 1)), None, rng.normal(size=(B * K, 1))),
    )
    return jax.tree.map(jnp.asarray, arrays)


EXTRAS = {
    "loss.timestep_weights": "min_snr",
    "loss.auto_beta": True,
    "loss.winner_penalty": 0.5,
    "loss.anchor": 0.1,
    "loss.pair_clip": 1.5,
}
POLICY, REFERENCE = {"x": jnp.array(0.9), "t": jnp.array(1e-3)}, {"x": jnp.array(1.1), "t": jnp.array(2e-3)}


@pytest.mark.parametrize("schedule", [SCHEDULE, FLOW], ids=["noise", "flow"])
def test_each_candidate_is_scored_with_its_prompts_noise_time_and_caption(x64, schedule):
    latents_BKHWC, noise_BHWC, t_B, conditioning = inputs()
    expected = {}
    for name, params in (("policy", POLICY), ("reference", REFERENCE)):
        expected[name] = np.zeros((B, K))
        for b in range(B):
            for k in range(K):
                x0, noise, level = latents_BKHWC[b, k], noise_BHWC[b], schedule.noise_T[t_B[b]]
                x, target, time = schedule.signal_T[t_B[b]] * x0 + level * noise, noise, t_B[b]
                if schedule is FLOW:
                    x, target, time = (
                        (1 - level) * x0 + level * noise,
                        noise - x0,
                        float(np.float32(1000) * np.float32(level)),
                    )
                shift = params["t"] * time + conditioning.context_NLD[b, 0, 0] + conditioning.time_ids_NT[b * K + k, 0]
                expected[name][b, k] = np.mean((params["x"] * x + shift - target) ** 2)

    log_ratios = compare_denoising(denoise, POLICY, REFERENCE, schedule, *inputs())

    np.testing.assert_allclose(log_ratios.error_BK, expected["policy"], rtol=1e-9)
    np.testing.assert_allclose(log_ratios.reference_error_BK, expected["reference"], rtol=1e-9)
    np.testing.assert_allclose(log_ratios.log_ratio_BK, (expected["reference"] - expected["policy"]) / 2, rtol=1e-9)


@pytest.mark.parametrize("name", ["dpo", "sft", "linear_dpo"])
def test_pure_noise_of_a_flow_has_finite_losses_gradients_and_metrics(name):
    """Its log-SNR is minus infinity."""
    latents_BKHWC, noise_BHWC, _, conditioning = inputs()
    objective = find_method(name).objective(
        flatten(with_fields(default_config(), {"loss.name": name} | ({} if name == "sft" else EXTRAS)))
    )
    batch = {"preference_BK": jnp.array([[1.0, 0.0]] * B), "valid_BK": jnp.ones((B, K), bool), "weight_B": jnp.ones(B)}

    def loss(policy):
        t_B = jnp.array([0, 998, 999])
        found = compare_denoising(denoise, policy, REFERENCE, FLOW, latents_BKHWC, noise_BHWC, t_B, conditioning)
        found = found._replace(**batch, running={"reference_error": jnp.ones(()), "abs_margin": jnp.ones(())})
        metrics = objective.metrics(found)
        return objective.loss(found).sum(), (found.log_snr_B, metrics, sums_by_noise(metrics, found))

    (value, (log_snr_B, *metrics)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(POLICY)
    assert np.isneginf(log_snr_B[2])
    assert np.all(np.isfinite(log_snr_B[:2]))
    for number in jax.tree.leaves((value, metrics, gradient)):
        assert np.all(np.isfinite(number))
    np.testing.assert_array_equal(metrics[1]["weight/by_noise"], [1, 0, 0, 2])


def test_equal_weights_give_a_loss_of_log_2_to_the_last_bit_in_bfloat16():
    """The policy has float32 masters, and the reference is stored in bfloat16."""
    policy = {name: jnp.asarray(x, jnp.float32) for name, x in POLICY.items()}
    reference = {name: x.astype(jnp.bfloat16) for name, x in policy.items()}

    def network(params, x_NHWC, t_N, conditioning):
        rounded = {name: x.astype(jnp.bfloat16) for name, x in params.items()}
        return denoise(rounded, x_NHWC.astype(jnp.bfloat16), t_N, conditioning).astype(jnp.bfloat16)

    latents_BKHWC, noise_BHWC, t_B, conditioning = inputs()
    found = compare_denoising(network, policy, reference, FLOW, latents_BKHWC, noise_BHWC, t_B, conditioning)
    loss_B = dpo(found._replace(preference_BK=jnp.array([[1.0, 0.0]] * B)), beta=2000.0)
    np.testing.assert_array_equal(loss_B, np.full(B, np.log(np.float32(2))))


def test_a_small_difference_is_not_lost_in_the_rounding_of_two_errors():
    """In float32, two errors near 1 are known to 1e-7, and beta multiplies that."""
    moved = 2.0**-20  # exact in float32, with which the rest is made
    latents_BKHWC, noise_BHWC, t_B, conditioning = inputs()

    def log_ratios(dtype):
        arrays = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float32), dtype), (latents_BKHWC, noise_BHWC))

        def constant(params, x_NHWC, t_N, conditioning):
            return jnp.full_like(x_NHWC, params)

        policy, reference = jnp.asarray(0.5 + moved, dtype), jnp.asarray(0.5, dtype)
        return np.asarray(
            compare_denoising(constant, policy, reference, SCHEDULE, *arrays, t_B, conditioning).log_ratio_BK
        )

    with jax.enable_x64(True):
        expected = log_ratios(jnp.float64)
    assert 1e-8 < np.abs(expected).min() < np.abs(expected).max() < 1e-5
    np.testing.assert_allclose(log_ratios(jnp.float32), expected, rtol=1e-4)


def test_without_a_reference_only_the_policy_is_run():
    runs = []

    def counting(*args):
        runs.append(args)
        return denoise(*args)

    log_ratios = compare_denoising(counting, POLICY, None, SCHEDULE, *inputs())

    assert len(runs) == 1
    assert log_ratios.reference_error_BK is None
    np.testing.assert_array_equal(log_ratios.log_ratio_BK, -log_ratios.error_BK / 2)


def test_policy_equal_to_reference_gives_a_log_ratio_of_zero():
    log_ratios = compare_denoising(denoise, POLICY, POLICY, SCHEDULE, *inputs())

    np.testing.assert_array_equal(log_ratios.log_ratio_BK, np.zeros((B, K)))


def test_no_gradient_reaches_the_reference():
    def total(policy, reference):
        return compare_denoising(denoise, policy, reference, SCHEDULE, *inputs()).log_ratio_BK.sum()

    policy_grads, reference_grads = jax.grad(total, argnums=(0, 1))(POLICY, REFERENCE)

    assert all(grad != 0 for grad in policy_grads.values())
    assert all(grad == 0 for grad in reference_grads.values())


def test_errors_of_a_bfloat16_network_are_reduced_in_float32():
    def rounded(*args):
        return denoise(*args).astype(jnp.bfloat16)

    log_ratios = compare_denoising(rounded, POLICY, REFERENCE, SCHEDULE, *inputs())
    exact = compare_denoising(denoise, POLICY, REFERENCE, SCHEDULE, *inputs())

    assert log_ratios.error_BK.dtype == jnp.float32
    np.testing.assert_allclose(log_ratios.error_BK, exact.error_BK, rtol=2e-3)


def test_draws_depend_on_the_sample_not_on_its_place_in_the_batch():
    drawn = jax.jit(lambda index_B: draw(jax.random.key(0), index_B, SCHEDULE, (4, 4, 2)))

    t_B, noise_BHWC = drawn(jnp.array([7, 8, 9, 10]))
    t_part, noise_part = drawn(jnp.array([10, 8]))

    np.testing.assert_array_equal(t_part, t_B[np.array([3, 1])])
    np.testing.assert_array_equal(noise_part, noise_BHWC[np.array([3, 1])])
    assert len(np.unique(noise_BHWC[:, 0, 0, 0])) == 4


def test_offset_noise_adds_one_number_for_all_cells_of_a_channel():
    plain, offset = (
        jax.jit(lambda index_B, size=size: draw(jax.random.key(0), index_B, SCHEDULE, (4, 4, 2), offset=size))(
            jnp.arange(2000)
        )
        for size in (0.0, 0.25)
    )
    np.testing.assert_array_equal(plain[0], offset[0])
    added_BHWC = np.asarray(offset[1] - plain[1])
    np.testing.assert_allclose(added_BHWC, np.broadcast_to(added_BHWC[:, :1, :1], added_BHWC.shape), atol=1e-6)
    assert added_BHWC[:, 0, 0].std() == pytest.approx(0.25, rel=0.05)
    assert abs(np.corrcoef(added_BHWC[:, 0, 0].T)[0, 1]) < 0.08
    assert abs(np.corrcoef(added_BHWC[:, 0, 0, 0], plain[1][:, 0, 0, 0])[0, 1]) < 0.08


def test_a_perturbed_input_is_noisier_than_what_is_to_be_predicted(x64):
    """x_t is made with `noise + size * draw` for all candidates of a prompt; the target is `noise`."""
    latents_BKHWC, noise_BHWC, t_B, _ = inputs()
    perturbed_BHWC = perturb(jax.random.key(1), jnp.arange(B), noise_BHWC, 0.1)
    drawn_BHWC = (perturbed_BHWC - noise_BHWC) / 0.1
    assert drawn_BHWC.std() == pytest.approx(1, abs=0.2)
    signal_BK, spread_BK = (x_T[t_B][:, None, None, None, None] for x_T in (SCHEDULE.signal_T, SCHEDULE.noise_T))
    x_BKHWC = signal_BK * latents_BKHWC + spread_BK * (noise_BHWC + 0.1 * drawn_BHWC)[:, None]
    expected_BK = jnp.square(x_BKHWC - noise_BHWC[:, None]).mean(axis=(2, 3, 4))

    log_ratios = compare_denoising(
        lambda params, x_NHWC, *_: x_NHWC, {}, None, SCHEDULE, *inputs(), perturbed_noise_BHWC=perturbed_BHWC
    )

    np.testing.assert_allclose(log_ratios.error_BK, expected_BK, rtol=1e-6)


def test_draws_are_uniform_over_the_training_timesteps_and_standard_normal():
    schedule = SCHEDULE._replace(training_timesteps=np.array([249, 499, 749, 999], np.int32))

    t_B, noise_BHWC = jax.jit(lambda index_B: draw(jax.random.key(0), index_B, schedule, (2, 2, 2)))(jnp.arange(4000))

    timesteps, counts = np.unique(t_B, return_counts=True)
    np.testing.assert_array_equal(timesteps, schedule.training_timesteps)
    assert t_B.dtype == jnp.int32
    assert np.abs(counts - 1000).max() < 110  # four standard deviations
    assert abs(np.mean(noise_BHWC)) < 0.03
    assert abs(np.std(noise_BHWC) - 1) < 0.02


def test_another_key_gives_other_draws():
    first, second = (keys_for(jax.random.key(seed), jnp.arange(3)) for seed in (0, 1))

    assert not np.any(jax.random.key_data(first) == jax.random.key_data(second))


def test_noise_has_the_asked_dtype():
    drawn = jax.eval_shape(lambda: draw(jax.random.key(0), jnp.arange(2), SCHEDULE, (2, 2, 2), jnp.bfloat16))

    assert drawn[1].dtype == jnp.bfloat16


def test_timesteps_are_drawn_with_their_shares_and_the_noise_stays():
    schedule = SCHEDULE._replace(training_timesteps=np.array([249, 499, 749, 999], np.int32))
    shares = np.array([0.1, 0.2, 0.3, 0.4])
    plain, drawn = (
        jax.jit(lambda index_B, p=p: draw(jax.random.key(0), index_B, schedule, (2, 2, 2), shares=p))(jnp.arange(4000))
        for p in (None, shares)
    )
    np.testing.assert_array_equal(plain[1], drawn[1])
    t_key, _ = jax.random.split(jax.random.fold_in(jax.random.key(0), 7))
    assert plain[0][7] == jax.random.choice(t_key, schedule.training_timesteps)  # as in all earlier versions
    timesteps, counts = np.unique(drawn[0], return_counts=True)
    np.testing.assert_array_equal(timesteps, schedule.training_timesteps)
    assert (np.abs(counts - 4000 * shares) < 4 * np.sqrt(4000 * shares * (1 - shares))).all()
    t_B, _ = draw(jax.random.key(0), jnp.array([3999, 5]), schedule, (2, 2, 2), shares=shares)
    np.testing.assert_array_equal(t_B, drawn[0][jnp.array([3999, 5])])


def test_every_noise_level_is_drawn_equally_often():
    """A histogram of log-SNR is flat, though only 3 of the 1000 timesteps are in the bucket with the least noise."""
    index_B = jnp.arange(20_000)
    t_B, _ = draw(jax.random.key(1), index_B, SCHEDULE, (1, 1, 1), shares=even_shares(SCHEDULE, 10))
    log_snr_T = 2 * np.log(SCHEDULE.signal_T / SCHEDULE.noise_T)
    counts, _ = np.histogram(log_snr_T[np.asarray(t_B)], bins=10, range=(log_snr_T[-1], log_snr_T[0]))
    assert np.abs(counts - 2000).max() < 4 * np.sqrt(20_000 * 0.1 * 0.9)


def random_weights():
    weight_BKHW = np.random.default_rng(1).uniform(size=(B, K, H, W)) ** 3
    return weight_BKHW / weight_BKHW.mean(axis=(2, 3), keepdims=True)


def test_weights_of_cells_are_those_of_the_masked_loss(x64):
    """Errors are sum(mask * squared error) / sum(mask) over all elements; so are log-ratio, drift and gradient."""
    latents_BKHWC, noise_BHWC, t_B = (np.asarray(x) for x in inputs()[:3])
    conditioning, mask_BKHW = inputs()[3], 0.3 * random_weights()
    times = (np.asarray(x_T)[t_B] for x_T in (SCHEDULE.signal_T, SCHEDULE.noise_T))
    signal_B, spread_B = (x_B[:, None, None, None, None] for x_B in times)
    x_BKHWC = signal_B * latents_BKHWC + spread_B * noise_BHWC[:, None]
    shift_BK = (np.asarray(conditioning.context_NLD)[:, 0] + np.asarray(conditioning.time_ids_NT).reshape(B, K))[
        ..., None, None, None
    ]
    mask_BKHWC = np.broadcast_to(mask_BKHW[..., None], x_BKHWC.shape)
    apart, squared = [], []
    for params in (POLICY, REFERENCE):
        own = float(params["x"]) * x_BKHWC + float(params["t"]) * t_B[:, None, None, None, None] + shift_BK
        apart.append(own)
        squared.append(np.square(own - noise_BHWC[:, None]))

    def masked(values_BKHWC):
        return (mask_BKHWC * values_BKHWC).sum(axis=(2, 3, 4)) / mask_BKHWC.sum(axis=(2, 3, 4))

    weights_BKHW = jnp.asarray(random_weights())
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), POLICY)

    def compared(policy):
        return compare_denoising(denoise, policy, REFERENCE, SCHEDULE, *inputs(), cell_weight_BKHW=weights_BKHW)

    found = compared(wide)
    np.testing.assert_allclose(found.error_BK, masked(squared[0]), rtol=1e-9)
    np.testing.assert_allclose(found.reference_error_BK, masked(squared[1]), rtol=1e-9)
    np.testing.assert_allclose(found.log_ratio_BK, masked(squared[1] - squared[0]) / 2, rtol=1e-9)
    np.testing.assert_allclose(found.drift_BK, masked(np.square(apart[0] - apart[1])), rtol=1e-9)
    slope = jax.grad(lambda policy: compared(policy).log_ratio_BK.sum())(wide)
    residual_BKHWC = apart[0] - noise_BHWC[:, None]
    np.testing.assert_allclose(slope["x"], -masked(residual_BKHWC * x_BKHWC).sum(), rtol=1e-9)
    np.testing.assert_allclose(slope["t"], -masked(residual_BKHWC * t_B[:, None, None, None, None]).sum(), rtol=1e-9)


def test_equal_weights_change_nothing():
    plain = compare_denoising(denoise, POLICY, REFERENCE, SCHEDULE, *inputs())

    ones = compare_denoising(denoise, POLICY, REFERENCE, SCHEDULE, *inputs(), cell_weight_BKHW=jnp.ones((B, K, H, W)))

    for name in ("error_BK", "reference_error_BK", "log_ratio_BK", "drift_BK"):
        np.testing.assert_array_equal(getattr(ones, name), getattr(plain, name))


def test_weights_keep_the_errors_of_a_prediction_in_the_masked_part_only():
    """What the network predicts where the weight is 0 neither changes the errors nor has a gradient."""
    weights_BKHW = np.zeros((B, K, H, W), np.float32)
    weights_BKHW[:, :, :2] = 2

    def error(change_NHWC):
        compared = compare_denoising(
            lambda params, *args: denoise(params, *args) + change_NHWC,
            POLICY,
            REFERENCE,
            SCHEDULE,
            *inputs(),
            cell_weight_BKHW=jnp.asarray(weights_BKHW),
        )
        return compared.error_BK.sum()

    slope_NHWC = jax.grad(error)(jnp.zeros((B * K, H, W, C)))
    assert (np.asarray(slope_NHWC)[:, :2] != 0).all()
    assert (np.asarray(slope_NHWC)[:, 2:] == 0).all()
