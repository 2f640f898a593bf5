"""Properties of the training step, on the small denoiser."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax.diffusion.densities import even_shares
from dpo_jax.methods import METHODS
from dpo_jax.methods.metrics import pair_metrics
from dpo_jax.training.micro_batches import split_micro_batches
from dpo_jax.training.step import TrainState, make_compare, make_train_step, prompt_weights

from ..small_denoiser import SCHEDULE, denoise, encode, frozen_like, make_batch, perturbed

DPO = METHODS["dpo"].objective({"loss.beta": 500.0, "loss.label_smoothing": 0.0})
SFT = METHODS["sft"].objective({})
KTO = METHODS["kto"].objective({"loss.beta": 500.0})
PLACKETT_LUCE = METHODS["plackett_luce"].objective({"loss.beta": 500.0})


def with_images(batch, images_BKHWC):
    return batch._replace(inputs=batch.inputs._replace(images_BKHWC=images_BKHWC))


def run(params, batch, *, objective=DPO, accumulation=1, reference=None, steps=1, optimizer=None):
    optimizer = optimizer or optax.sgd(1e-2)
    compute = make_compare(encode, denoise, SCHEDULE, objective, seed=3)
    step = jax.jit(make_train_step(compute, objective, optimizer, accumulation=accumulation))
    state = TrainState(jnp.int32(0), params, optimizer.init(params), {})
    for _ in range(steps):
        state, metrics = step(state, frozen_like(reference or params), batch)
    return state, jax.device_get(metrics)


def test_policy_equal_to_reference_has_loss_log_2(params):
    _, metrics = run(params, make_batch())
    assert metrics["train/loss"] == pytest.approx(np.log(2), abs=1e-12)


def test_only_training_offsets_noise_perturbs_inputs_draws_by_log_snr_and_inverts(params):
    plain = make_compare(encode, denoise, SCHEDULE, DPO, seed=3)
    log_ratios = {"plain": plain(perturbed(params), frozen_like(params), make_batch(), jnp.int32(0), training=True)}
    changes = {
        "noise_offset": 0.1,
        "input_perturbation": 0.1,
        "shares": even_shares(SCHEDULE, 10),
        "inversion_steps": 4,
    }
    for name, value in changes.items():
        compute = make_compare(encode, denoise, SCHEDULE, DPO, seed=3, **{name: value})
        held_out = compute(perturbed(params), frozen_like(params), make_batch(), jnp.int32(0))
        np.testing.assert_array_equal(held_out.error_BK, log_ratios["plain"].error_BK)
        log_ratios[name] = compute(perturbed(params), frozen_like(params), make_batch(), jnp.int32(0), training=True)
        same = compute(params, frozen_like(params), make_batch(), jnp.int32(0), training=True)
        np.testing.assert_allclose(same.log_ratio_BK, 0, atol=1e-12)
    errors = [np.asarray(one.error_BK) for one in log_ratios.values()]
    assert not any(np.allclose(errors[i], errors[j]) for i in range(5) for j in range(i))


def test_swapped_candidates_negate_the_margin(params):
    batch = make_batch()
    swapped = with_images(batch, batch.inputs.images_BKHWC[:, ::-1])

    def without_posterior_noise(encoders, batch, keys_B):  # which an image would lose to the other by the swap
        pixels = jnp.asarray(batch.inputs.images_BKHWC).astype(jnp.float64) / 127.5 - 1
        return jnp.repeat(pixels[..., :1], 4, axis=-1), encode(encoders, batch, keys_B)[1]

    compute = make_compare(without_posterior_noise, denoise, SCHEDULE, DPO, seed=3)
    margins = [
        pair_metrics(compute(perturbed(params), frozen_like(params), b, jnp.int32(0)))["reward/margin"]
        for b in (batch, swapped)
    ]
    np.testing.assert_allclose(margins[0], -margins[1], rtol=1e-9)
    assert np.abs(margins[0]).min() > 0


def test_weight_zero_gives_no_gradient(params):
    batch = make_batch()
    _, metrics = run(params, batch._replace(weight_B=np.zeros(8, np.float32)), reference=perturbed(params))
    assert metrics["train/gradient_norm"] == 0
    some = np.float32([1, 1, 1, 1, 0, 0, 0, 0])
    half, _ = run(params, batch._replace(weight_B=some), reference=perturbed(params))
    first = jax.tree.map(lambda x: x[:4], batch)
    expected, _ = run(params, first, reference=perturbed(params))
    for name in params:
        np.testing.assert_allclose(half.params[name], expected.params[name], rtol=1e-10)
        assert not np.allclose(half.params[name], params[name], rtol=1e-9)


def test_sft_trains_on_single_images_and_dpo_does_not(params):
    """Of a single image, the second candidate is padding."""
    batch = make_batch()
    singles = batch._replace(valid_BK=np.tile([True, False], (8, 1)))
    of_pairs, of_singles = (run(params, b, objective=SFT)[0] for b in (batch, singles))
    jax.tree.map(np.testing.assert_array_equal, of_pairs.params, of_singles.params)
    assert not np.array_equal(of_singles.params["in"], params["in"])
    of_dpo, _ = run(params, singles, reference=perturbed(params))
    jax.tree.map(np.testing.assert_array_equal, of_dpo.params, params)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_batch_without_weight_is_no_update(params, accumulation):
    """Weights, their average, momentum and the optimizer's counts stay as they are."""
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    compute = make_compare(encode, denoise, SCHEDULE, DPO, seed=3)
    step = jax.jit(make_train_step(compute, DPO, optimizer, accumulation=accumulation, ema_decay=0.5))
    frozen, batch = frozen_like(perturbed(params)), make_batch()
    state = TrainState(jnp.int32(0), params, optimizer.init(params), params)
    for _ in range(3):
        state, _ = step(state, frozen, batch)

    after, metrics = step(state, frozen, batch._replace(weight_B=np.zeros(8, np.float32)))

    assert after.step == 4
    jax.tree.map(np.testing.assert_array_equal, after[1:], state[1:])
    assert metrics["train/update_norm"] == 0
    assert any(not np.allclose(state.ema[name], state.params[name]) for name in params)
    weighed, metrics = step(state, frozen, batch._replace(weight_B=np.float32([0, 0, 0, 0, 0, 0, 0, 1])))
    assert metrics["train/update_norm"] > 0
    assert not np.allclose(weighed.params["in"], state.params["in"])


def make_lists():
    """Lists of one to three candidates, with ties; padding is noise."""
    ranked = np.float32([[2, 1, 0], [3, 3, 0], [2, 1, 1], [1, 0, 0], [2, 1, 0], [1, 1, 1], [1, 0, 0], [2, 1, 0]])
    number_B = np.array([3, 3, 3, 2, 3, 3, 1, 3])
    return make_batch(K=3)._replace(
        preference_BK=ranked / ranked.sum(axis=1, keepdims=True), valid_BK=np.arange(3) < number_B[:, None]
    )


@pytest.mark.parametrize(
    ("accumulation", "objective"),
    [(2, DPO), (8, DPO), (2, SFT), (8, SFT), (4, PLACKETT_LUCE)],
    ids=["dpo-2", "dpo-8", "sft-2", "sft-8", "plackett_luce-4"],
)
def test_accumulation_equals_the_large_batch(params, accumulation, objective):
    batch = make_lists() if objective is PLACKETT_LUCE else make_batch()
    batch = batch._replace(weight_B=np.float32([1, 2, 0, 1, 1, 0.5, 1, 1]))
    whole, metrics = run(params, batch, reference=perturbed(params), objective=objective, steps=2)
    parts, metrics_of_parts = run(
        params, batch, reference=perturbed(params), objective=objective, steps=2, accumulation=accumulation
    )
    for name in params:
        np.testing.assert_allclose(parts.params[name], whole.params[name], rtol=1e-10)
        assert not np.allclose(whole.params[name], params[name], rtol=1e-6)
    for name in metrics:
        np.testing.assert_allclose(metrics_of_parts[name], metrics[name], rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("accumulation", [2, 8])
def test_the_mean_of_kto_is_over_all_micro_batches(params, accumulation):
    batch = make_batch(K=1)._replace(
        preference_BK=np.float32([[1], [1], [0], [1], [0], [1], [0.5], [1]]),
        weight_B=np.float32([1, 2, 0, 1, 1, 0.5, 1, 1]),
    )
    baselines = []
    for policy, reference in ((params, perturbed(params)), (perturbed(params), params)):
        whole, metrics = run(policy, batch, reference=reference, objective=KTO)
        parts, metrics_of_parts = run(policy, batch, reference=reference, objective=KTO, accumulation=accumulation)
        for name in params:
            np.testing.assert_allclose(parts.params[name], whole.params[name], rtol=1e-10)
            assert not np.array_equal(whole.params[name], policy[name])
        for name in metrics:
            np.testing.assert_allclose(metrics_of_parts[name], metrics[name], rtol=1e-9, err_msg=name)
        baselines.append(metrics["reward/baseline"])
    assert max(baselines) > 0


def test_weights_of_cells_reach_every_micro_batch(params):
    """They change the update, in the same way with accumulation; a loss of winners reads those of winners."""
    batch, reference = make_batch(), perturbed(params)
    weight_BKhw = np.random.default_rng(1).uniform(size=(8, 2, 8, 8))
    weight_BKhw /= weight_BKhw.mean(axis=(2, 3), keepdims=True)
    weighted = batch._replace(cell_weight_BKhw=jnp.asarray(weight_BKhw))
    of_plain, of_weighted = (run(params, b, reference=reference)[0].params for b in (batch, weighted))
    of_parts = run(params, weighted, reference=reference, accumulation=2)[0].params
    for name in params:
        np.testing.assert_allclose(of_parts[name], of_weighted[name], rtol=1e-10)
        assert not np.allclose(of_weighted[name], of_plain[name], rtol=1e-6)
    compute = make_compare(encode, denoise, SCHEDULE, SFT, seed=3)
    best = compute(params, frozen_like(params), weighted, jnp.int32(0)).cell_weight_BKHW
    np.testing.assert_array_equal(best, weighted.cell_weight_BKhw[:, :1])


def test_draws_depend_on_the_sample_and_not_on_its_row(params):
    batch = make_batch()
    order = np.array([3, 1, 0, 2, 7, 6, 5, 4])
    shuffled = jax.tree.map(lambda x: x[order], batch)
    compute = make_compare(encode, denoise, SCHEDULE, DPO, 3)
    a, b = (compute(perturbed(params), frozen_like(params), x, jnp.int32(5)).error_BK for x in (batch, shuffled))
    np.testing.assert_allclose(np.asarray(a)[order], b, rtol=1e-12)
    later = compute(perturbed(params), frozen_like(params), batch, jnp.int32(6)).error_BK
    assert not np.allclose(a, later)


def test_sft_looks_at_the_winner_only(params):
    batch = make_batch()
    images_BKHWC = batch.inputs.images_BKHWC
    other_losers = with_images(batch, np.concatenate([images_BKHWC[:, :1], 255 - images_BKHWC[:, 1:]], 1))
    a, _ = run(params, batch, objective=SFT)
    b, _ = run(params, other_losers, objective=SFT)
    np.testing.assert_array_equal(a.params["in"], b.params["in"])


@pytest.mark.parametrize("objective", [DPO, SFT], ids=["dpo", "sft"])
def test_a_caption_for_each_candidate(params, objective):
    """One caption for both candidates equals a caption of the prompt; another one for the loser changes its error."""
    batch = make_batch()
    doubled = jnp.repeat(batch.inputs.token_ids_BML, 2, axis=1)
    other = doubled.at[:, 1].set((doubled[:, 1] + 1) % 5)
    one, same, different = (
        run(params, batch._replace(inputs=batch.inputs._replace(token_ids_BML=ids)), objective=objective)[0].params
        for ids in (batch.inputs.token_ids_BML, doubled, other)
    )
    for name in params:
        np.testing.assert_allclose(same[name], one[name], rtol=1e-12)
        assert np.allclose(different[name], one[name], rtol=1e-9) == (objective is SFT)


def test_padding_and_lists_of_one_have_no_part_in_a_step(params):
    batch = make_lists()
    images_BKHWC = np.array(batch.inputs.images_BKHWC)
    images_BKHWC[~batch.valid_BK] = 255 - images_BKHWC[~batch.valid_BK]
    images_BKHWC[6] = 0
    one, metrics = run(params, batch, reference=perturbed(params), objective=PLACKETT_LUCE)
    same, metrics_of_same = run(
        params, with_images(batch, images_BKHWC), reference=perturbed(params), objective=PLACKETT_LUCE
    )
    jax.tree.map(np.testing.assert_array_equal, one.params, same.params)
    jax.tree.map(np.testing.assert_array_equal, metrics, metrics_of_same)
    assert not np.array_equal(one.params["in"], params["in"])
    np.testing.assert_array_equal(prompt_weights(batch), [1, 1, 1, 1, 1, 1, 0, 1])
    np.testing.assert_array_equal(prompt_weights(batch, 1), np.ones(8))


def test_micro_batches_take_rows_by_stride():
    x = np.arange(6)
    np.testing.assert_array_equal(split_micro_batches(x, 2), [[0, 2, 4], [1, 3, 5]])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_weights_are_rounded_once_and_gradients_summed_wide(params, accumulation):
    """Layers see rounded weights; the trained ones, and what is added to them, keep their dtype."""
    seen: list[set[jnp.dtype]] = []

    def compute(params, *args, **kwargs):
        seen.append({x.dtype for x in params.values()})
        return make_compare(encode, denoise, SCHEDULE, DPO, seed=3)(params, *args, **kwargs)

    optimizer = optax.sgd(1e-2)
    step = make_train_step(compute, DPO, optimizer, compute_dtype=jnp.bfloat16, accumulation=accumulation)
    wide = {name: x.astype(jnp.float32) for name, x in params.items()}
    state, _ = jax.jit(step)(TrainState(jnp.int32(0), wide, optimizer.init(wide), {}), frozen_like(wide), make_batch())
    assert all(dtypes == {jnp.dtype("bfloat16")} for dtypes in seen)
    assert {x.dtype for x in state.params.values()} == {jnp.dtype("float32")}
    assert any((state.params[name] != x).any() for name, x in wide.items())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_weights_in_bfloat16_move_by_updates_below_their_last_bit(params, accumulation):
    """Rounded to the nearest, they would stay where they are."""
    optimizer = optax.GradientTransformation(
        lambda params: (), lambda grads, state, params: (jax.tree.map(lambda x: jnp.full(x.shape, 1e-3), grads), state)
    )
    compute = make_compare(encode, denoise, SCHEDULE, DPO, seed=3)
    step = jax.jit(make_train_step(compute, DPO, optimizer, accumulation=accumulation, seed=1))
    start = {name: jnp.ones(x.shape, jnp.bfloat16) for name, x in params.items()}
    state = TrainState(jnp.int32(0), start, (), {})
    for _ in range(30):
        state, _ = step(state, frozen_like(start), make_batch())
    for name, x in state.params.items():
        assert x.dtype == jnp.bfloat16
        assert float(x.astype(jnp.float32).mean()) - 1 == pytest.approx(0.03, abs=0.01), name
