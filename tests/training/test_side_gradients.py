"""Norms of the loss's gradient by the predictions of winners and losers, against NumPy and against autodiff."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax.batch import LossInputs
from dpo_jax.methods import METHODS
from dpo_jax.methods.metrics import BY_NOISE
from dpo_jax.methods.stability import PAIR_FIELDS
from dpo_jax.training.figures import figures_of
from dpo_jax.training.side_gradients import SIDES, gradient_of_error, side_norms, squares_of_loss
from dpo_jax.training.step import TrainState, make_compare, make_train_step

from ..loss_inputs import loss_inputs
from ..small_denoiser import SCHEDULE, denoise, encode, frozen_like, make_batch, perturbed

B, BETA, WEIGHT_B = 5, 50.0, np.array([1.0, 0.5, 0.0, 2.0, 1.0])
LOG_SNR_B = np.array([4.0, 2.0, 0.0, -2.5, -np.inf])
OFF = {f"loss.{name}": field.default for name, field in PAIR_FIELDS.items()} | {"loss.safeguard": "none"}
CELLS = 3 * 3 * 4


def arrays(K=2):
    rng = np.random.default_rng(0)
    target = rng.normal(size=(B, K, 3, 3, 4))
    shared, own, of_reference = (rng.normal(size=(B, n, 3, 3, 4)) for n in (1, K, K))
    return target + 0.4 * shared + 0.3 * own, target + 0.5 * of_reference, target


def inputs_of(policy, reference, target, valid_BK=None) -> LossInputs:
    K = target.shape[1]
    return loss_inputs(
        policy,
        reference,
        target,
        preference_BK=jnp.tile(jnp.arange(K, 0, -1.0) / (K * (K + 1) / 2), (B, 1)),
        valid_BK=jnp.ones((B, K), bool) if valid_BK is None else valid_BK,
        weight_B=jnp.asarray(WEIGHT_B),
        log_snr_B=jnp.asarray(LOG_SNR_B),
        running={"abs_margin": jnp.asarray(0.02), "reference_error": jnp.asarray(0.2)},
    )


def summed(objective):
    return lambda inputs: jnp.sum(objective.loss(inputs) * inputs.weight_B)


def squares(objective, *predictions, **fields):
    return jax.jit(lambda *p: squares_of_loss(summed(objective), inputs_of(*p, **fields)))(*predictions)


def test_dpo_is_its_closed_form(x64) -> None:
    policy, reference, target = arrays()
    e_B2, r_B2 = (np.square(x - target).mean(axis=(2, 3, 4)) for x in (policy, reference))
    margin_B = -(e_B2[:, 0] - e_B2[:, 1] - r_B2[:, 0] + r_B2[:, 1]) / 2
    p_B = 2 / 3  # of `inputs_of`
    slope_B = -BETA * (p_B / (1 + np.exp(BETA * margin_B)) - (1 - p_B) / (1 + np.exp(-BETA * margin_B)))
    square_B2 = (WEIGHT_B * slope_B / CELLS)[:, None] ** 2 * np.square(policy - target).sum(axis=(2, 3, 4))

    found = squares(METHODS["dpo"].objective(OFF | {"loss.beta": BETA}), policy, reference, target)

    levels = [[0, 1, 2], [], [3], [4]]
    for side, name in enumerate(SIDES):
        np.testing.assert_allclose(found[name], square_B2[:, side].sum(), rtol=1e-9)
        by_noise = [square_B2[rows, side].sum() for rows in levels]
        np.testing.assert_allclose(found[f"{name}{BY_NOISE}"], by_noise, rtol=1e-9)
    assert found[SIDES[0]] != found[SIDES[1]]


CASES = [(name, {}) for name, method in METHODS.items() if method.learns_from == "pairs"] + [
    ("dpo", {"safeguard": "pair"}),
    ("dpo", {"safeguard": "batch", "pair_clip": 0.5, "loser_weight": 0.3}),
    ("ipo", {"anchor": 0.7, "winner_weight": 0.5, "winner_penalty": 2.0}),
    ("dpo", {"auto_beta": True, "timestep_weights": "min_snr", "anchor": 0.1, "safeguard": "pair"}),
]


@pytest.mark.parametrize(("name", "plugins"), CASES)
def test_every_method_and_plug_in_is_as_autodiff_has_it(x64, name, plugins) -> None:
    policy, reference, target = arrays()
    fields = OFF | {f"loss.{field}": value for field, value in plugins.items()}
    if "beta" in METHODS[name].fields and name != "mapo":
        fields["loss.beta"] = BETA
    objective = METHODS[name].objective(fields)
    total = summed(objective)

    @jax.jit
    def both(policy, reference, target):
        gradient = jax.grad(lambda p: total(inputs_of(p, reference, target)))(policy)
        return jnp.square(gradient).sum(axis=(0, 2, 3, 4)), squares_of_loss(total, inputs_of(policy, reference, target))

    expected, found = both(policy, reference, target)

    assert (expected > 0).all()
    np.testing.assert_allclose([found[side] for side in SIDES], expected, rtol=1e-9)


def test_weights_of_cells_weigh_the_gradient(x64) -> None:
    policy, reference, target = map(jnp.asarray, arrays())
    weight_BKHW, slope_BK = jnp.asarray(np.random.default_rng(1).uniform(size=(B, 2, 3, 3))), jnp.ones((B, 2))

    def total(policy):
        return (slope_BK * (weight_BKHW[..., None] * jnp.square(policy - target)).mean(axis=(2, 3, 4))).sum()

    inputs = inputs_of(policy, reference, target)._replace(cell_weight_BKHW=weight_BKHW)
    np.testing.assert_allclose(gradient_of_error(slope_BK, inputs), jax.grad(total)(policy), rtol=1e-9)


def test_of_a_list_the_sides_are_the_best_and_the_worst_that_are_no_padding(x64) -> None:
    policy, reference, target = arrays(K=4)
    number_B = np.array([4, 3, 2, 2, 4])
    valid_BK = jnp.arange(4) < number_B[:, None]
    objective = METHODS["plackett_luce"].objective({"loss.beta": BETA})
    total = summed(objective)
    gradient = jax.jit(jax.grad(lambda p: total(inputs_of(p, reference, target, valid_BK))))(policy)
    square_BK = np.square(gradient).sum(axis=(2, 3, 4))

    found = squares(objective, policy, reference, target, valid_BK=valid_BK)

    np.testing.assert_allclose(found[SIDES[0]], square_BK[:, 0].sum(), rtol=1e-9)
    np.testing.assert_allclose(found[SIDES[1]], square_BK[np.arange(B), number_B - 1].sum(), rtol=1e-9)


def test_the_norm_is_that_of_the_mean_loss_and_of_the_mean_loss_of_a_noise_level() -> None:
    means = {
        SIDES[0]: jnp.float32(36 / 4),
        f"{SIDES[0]}{BY_NOISE}": jnp.float32([16, 0, 20, 0]) / 4,
        "pair/accuracy": 1,
    }
    norms = side_norms(means, jnp.float32(4))
    assert norms.keys() == {SIDES[0], f"{SIDES[0]}{BY_NOISE}"}
    assert norms[SIDES[0]] == pytest.approx(6 / 4)
    figures = figures_of(norms | {f"weight{BY_NOISE}": np.array([1, 0, 3, 0]) / 4})
    assert figures[f"{SIDES[0]}/noise_1"] == pytest.approx(4 / 1)
    assert figures[f"{SIDES[0]}/noise_3"] == pytest.approx(20**0.5 / 3)


def metrics_of_step(method, params, batch, accumulation=1):
    objective = method.objective(OFF | {"loss.beta": 500.0})
    compare = make_compare(encode, denoise, SCHEDULE, objective, seed=3)
    optimizer = optax.sgd(1e-2)
    step = jax.jit(make_train_step(compare, objective, optimizer, accumulation=accumulation))
    state = TrainState(jnp.int32(0), params, optimizer.init(params), {})
    return jax.device_get(step(state, frozen_like(perturbed(params)), batch)[1])


def test_micro_batches_of_a_loss_over_the_whole_batch_add_up(params) -> None:
    """Losses of single pairs are in `test_accumulation_equals_the_large_batch`."""
    batch = make_batch()._replace(weight_B=np.float32([1, 2, 0, 1, 1, 0.5, 1, 1]))
    whole = metrics_of_step(METHODS["dpo"], params, batch)
    parts = metrics_of_step(dataclasses.replace(METHODS["dpo"], over_whole_batch=True), params, batch, accumulation=4)
    for name in (name for name in whole if name.startswith(SIDES)):
        assert np.max(whole[name]) > 0
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("name", ["sft", "kto"])
def test_methods_without_pairs_have_no_sides(name) -> None:
    inputs = jax.eval_shape(lambda *p: inputs_of(*p), *(jnp.asarray(x[:, :1]) for x in arrays()))
    assert jax.eval_shape(lambda i: squares_of_loss(summed(METHODS[name].objective({})), i), inputs) == {}


def test_images_that_the_model_drew_have_no_sides() -> None:
    assert squares_of_loss(pytest.fail, LossInputs(jnp.zeros((1, 2)), weight_B=jnp.ones(1))) == {}


def test_the_cost_is_some_operations_per_latent_cell_and_no_network() -> None:
    objective = METHODS["dpo"].objective({})  # with the safeguard, which reads predictions, too
    shapes = [jax.ShapeDtypeStruct((B, 2, 16, 16, 4), jnp.float32)] * 3

    def operations(with_norms):
        def step(policy, reference, target):
            inputs = inputs_of(policy, reference, target)
            return jax.grad(lambda p: summed(objective)(inputs_of(p, reference, target)))(policy), (
                squares_of_loss(summed(objective), inputs) if with_norms else {}
            )

        return jax.jit(step).lower(*shapes).cost_analysis()["flops"]

    assert 0 < operations(True) - operations(False) < 20 * B * 2 * 16 * 16 * 4
