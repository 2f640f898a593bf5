"""Plug-ins of losses on pairs, against the released formulas in PyTorch or by hand."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from dpo_jax.cli import flatten, load_config
from dpo_jax.errors import UserError
from dpo_jax.methods import METHODS
from dpo_jax.methods.stability import LARGEST, PAIR_FIELDS, SMALLEST, loser_gradient
from dpo_jax.training.config import check_same_experiment, default_config
from dpo_jax.training.step import TrainState, make_compare, make_train_step

from ..loss_inputs import loss_inputs
from ..small_denoiser import SCHEDULE, denoise, encode, frozen_like, make_batch, perturbed

B, BETA = 5, 50.0
OFF = {f"loss.{name}": field.default for name, field in PAIR_FIELDS.items()} | {"loss.safeguard": "none"}


def objective(**fields):
    values = OFF | {"loss.beta": BETA, "loss.label_smoothing": 0.0}
    return METHODS["dpo"].objective(values | {f"loss.{name}": value for name, value in fields.items()})


def arrays():
    rng = np.random.default_rng(0)
    target, noise = rng.normal(size=(2, B, 2, 3, 3, 4))
    policy = target + 0.3 * noise + 0.4 * rng.normal(size=(B, 1, 3, 3, 4))
    return policy, target + 0.5 * rng.normal(size=target.shape), target


def inputs_of(policy, reference, target, **more):
    return loss_inputs(
        policy,
        reference,
        target,
        preference_BK=jnp.tile(jnp.array([1.0, 0.0], policy.dtype), (B, 1)),
        weight_B=jnp.ones(B),
        log_snr_B=jnp.array([4.0, 2.0, 0.0, -2.0, -jnp.inf]),
        **more,
    )


def value_and_gradient(chosen, **more):
    policy, reference, target = map(jnp.asarray, arrays())
    return jax.value_and_grad(lambda p: chosen.loss(inputs_of(p, reference, target, **more)).mean())(policy)


def test_the_safeguard_compares_gradients_of_the_weighted_errors(x64):
    policy, reference, target = map(jnp.asarray, arrays())
    weight = np.random.default_rng(1).uniform(size=policy.shape[:-1])
    weight = jnp.asarray(weight / weight.mean(axis=(2, 3), keepdims=True))

    def errors(policy):
        return (weight[..., None] * jnp.square(policy - target)).mean(axis=(2, 3, 4))

    winner, loser = (jax.grad(lambda p, k=k: errors(p)[:, k].sum())(policy)[:, k] for k in (0, 1))
    common = (winner * loser).sum(axis=(1, 2, 3))
    expected = jnp.where(common > 0, jnp.clip(0.4 * (winner**2).sum(axis=(1, 2, 3)) / common, 0, 1), 1.0)

    inputs = inputs_of(policy, reference, target, cell_weight_BKHW=weight)

    np.testing.assert_allclose(loser_gradient(inputs, 0.6, "pair"), expected, rtol=1e-9)
    plain = loser_gradient(inputs._replace(cell_weight_BKHW=None), 0.6, "pair")
    assert np.abs(plain - expected).max() > 1e-2


@pytest.mark.parametrize("over", ["pair", "batch"])
def test_the_safeguard_is_the_released_one(x64, over):
    policy, reference, target = map(torch.from_numpy, arrays())
    policy.requires_grad_()
    error, reference_error = (((x - target) ** 2).mean(dim=(2, 3, 4)) for x in (policy, reference))
    winner, loser = ((policy - target).detach()[:, k] for k in (0, 1))
    axes = (0, 1, 2, 3) if over == "batch" else (1, 2, 3)
    common = (winner * loser).sum(dim=axes)
    scale = torch.where(common > 0, ((1 - 0.6) * (winner**2).sum(dim=axes) / common).clamp(0, 1), 1.0)
    scaled = scale * error[:, 1] + ((1 - scale) * error[:, 1]).detach()
    inside = -BETA / 2 * ((error[:, 0] - scaled) - (reference_error[:, 0] - reference_error[:, 1]))
    loss = -torch.nn.functional.logsigmoid(inside).mean()
    loss.backward()
    plain, _ = value_and_gradient(objective())

    value, gradient = value_and_gradient(objective(safeguard=over, safeguard_margin=0.6))

    assert 0 < float(scale.min()) < 1
    np.testing.assert_allclose(value, loss.item(), rtol=1e-12)
    np.testing.assert_allclose(value, plain, rtol=1e-12)
    np.testing.assert_allclose(gradient, policy.grad, rtol=1e-9, atol=1e-15)


def test_what_is_off_changes_nothing(x64):
    value, gradient = value_and_gradient(objective())
    policy, reference, target = map(jnp.asarray, arrays())
    plain = METHODS["dpo"].loss
    expected, expected_gradient = jax.value_and_grad(
        lambda p: plain(inputs_of(p, reference, target), beta=BETA, label_smoothing=0.0).mean()
    )(policy)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(gradient, expected_gradient)


def test_weights_of_winner_and_loser_by_hand(x64):
    policy, reference, target = map(jnp.asarray, arrays())
    inputs = inputs_of(policy, reference, target)
    winner_B, loser_B = np.asarray(inputs.log_ratio_BK).T
    assert (winner_B < 0).any()
    assert (winner_B > 0).any()

    def dpo(z_B):
        return np.log1p(np.exp(-BETA * z_B))

    np.testing.assert_allclose(objective(loser_weight=0.25).loss(inputs), dpo(winner_B - 0.25 * loser_B), rtol=1e-12)
    own_B = winner_B - 3 * np.maximum(-winner_B, 0)
    np.testing.assert_allclose(objective(winner_penalty=3.0).loss(inputs), dpo(own_B - loser_B), rtol=1e-12)
    np.testing.assert_allclose(
        objective(winner_weight=0.5).loss(inputs), dpo(winner_B - loser_B) - 0.5 * BETA * winner_B, rtol=1e-12
    )
    apart_B = np.square(policy - reference).mean(axis=(2, 3, 4)).sum(axis=1)
    np.testing.assert_allclose(
        objective(anchor=0.1).loss(inputs), dpo(winner_B - loser_B) + 0.1 * BETA / 2 * apart_B, rtol=1e-12
    )
    weight_B = np.minimum(1, 5 * np.exp(-np.array([4.0, 2.0, 0.0, -2.0, -np.inf])))
    np.testing.assert_allclose(
        objective(timestep_weights="min_snr").loss(inputs), weight_B * dpo(winner_B - loser_B), rtol=1e-12
    )


def test_a_pair_with_a_large_error_is_scaled_down(x64):
    _, plain = value_and_gradient(objective())
    _, clipped = value_and_gradient(objective(pair_clip=0.5))
    policy, reference, target = map(jnp.asarray, arrays())
    inputs = inputs_of(policy, reference, target)
    share_B = np.minimum(1, 0.5 * inputs.reference_error_BK / inputs.error_BK).min(axis=1)
    assert (share_B < 1).any()
    np.testing.assert_allclose(clipped, plain * share_B[:, None, None, None, None], rtol=1e-9)


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_auto_beta_has_no_unit_and_is_bounded(x64, unit):
    """Errors in another unit, such as sums over an image of another size, change nothing after the first step."""
    chosen = objective(auto_beta=True)
    policy, reference, target = (jnp.sqrt(unit) * x for x in map(jnp.asarray, arrays()))

    def betas(margin, error):
        running = {"abs_margin": jnp.asarray(margin * unit), "reference_error": jnp.asarray(error * unit)}
        return np.asarray(chosen.metrics(inputs_of(policy, reference, target, running=running))["pair/beta"]) * unit

    np.testing.assert_allclose(betas(0.001, 0.2), np.log(4) / 0.001, rtol=1e-9)
    np.testing.assert_allclose(betas(1e-9, 0.2), LARGEST / 0.2, rtol=1e-9)
    np.testing.assert_allclose(betas(10.0, 0.2), SMALLEST / 0.2, rtol=1e-9)
    np.testing.assert_allclose(betas(0.0, 0.0), BETA * unit, rtol=1e-9)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_running_means_follow_the_steps_whatever_the_micro_batches(params, accumulation):
    chosen = objective(auto_beta=True)
    optimizer = optax.sgd(1e-2)
    step = jax.jit(
        make_train_step(
            make_compare(encode, denoise, SCHEDULE, chosen, seed=3), chosen, optimizer, accumulation=accumulation
        )
    )
    running = {name: (jnp.zeros(()), jnp.zeros(())) for name in chosen.running}
    state = TrainState(jnp.int32(0), params, optimizer.init(params), {}, running)
    margins, betas, total = [], [], 0.0
    for _ in range(3):
        state, metrics = step(state, frozen_like(perturbed(params)), make_batch())
        margins.append(float(state.running["abs_margin"][0] / state.running["abs_margin"][1]))
        betas.append(float(metrics["pair/beta"]))
        error = (metrics["error/reference_winner"] + metrics["error/reference_loser"]) / 2
        total = 0.99 * total + 0.01 * error
        np.testing.assert_allclose(state.running["reference_error"][0], total, rtol=1e-9)
    assert betas[0] == BETA
    assert betas[1] != BETA
    weights = np.array([0.99**2, 0.99, 1]) * 0.01
    np.testing.assert_allclose(state.running["abs_margin"][1], weights.sum(), rtol=1e-9)
    assert len(set(margins)) == 3
    idle, _ = step(state, frozen_like(perturbed(params)), make_batch()._replace(weight_B=np.zeros(8, np.float32)))
    jax.tree.map(np.testing.assert_array_equal, idle.running, state.running)


def test_what_is_off_is_not_computed():
    """The compiled loss without plug-ins reads no predictions; SDPO adds few operations per element of them."""

    def operations(chosen):
        shape = jax.ShapeDtypeStruct((B, 2, 8, 8, 4), jnp.float32)

        def loss(policy, reference, target):
            return chosen.loss(inputs_of(policy, reference, target)).mean()

        return jax.jit(jax.grad(loss)).lower(shape, shape, shape).compile().cost_analysis()["flops"]

    plain, guarded = operations(objective()), operations(objective(safeguard="pair"))
    assert plain < guarded < plain + 12 * B * 2 * 8 * 8 * 4


@pytest.mark.parametrize("fields", [{"auto_beta": True}, {"safeguard": "pair", "pair_clip": 2.0, "anchor": 0.5}])
def test_the_first_loss_is_log_2_whatever_is_on(fields):
    assert objective(**fields).loss_at_reference() == pytest.approx(np.log(2))


def test_a_run_plans_with_all_plug_ins_on(tiny_config):
    from dpo_jax.planning.estimate import measure_work

    fields = {"loss.auto_beta": True, "loss.safeguard": "pair", "loss.anchor": 0.1, "loss.winner_penalty": 1.0}
    plain, guarded = (measure_work(tiny_config("sd15", **chosen), "gpu") for chosen in ({}, fields))
    assert guarded.flops == plain.flops  # these are products and convolutions


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sdxl_turbo", "sdxl:lora"])
def test_the_default_is_safe_and_published_is_as_published(name):
    default, published = load_config(name), load_config(f"{name}{',' if ':' in name else ':'}published")
    assert default.loss.safeguard == "pair"
    changed = {path for path, value in flatten(default).items() if value != flatten(published)[path]}
    assert changed == {"loss.safeguard"}
    assert published.loss.safeguard == "none"


def test_a_run_older_than_the_safeguard_does_not_go_on_with_it():
    config = load_config("sd15")
    new = {f"loss.{name}" for name in PAIR_FIELDS}
    saved = json.loads(json.dumps({path: value for path, value in flatten(config).items() if path not in new}))
    with pytest.raises(UserError, match=r"loss\.safeguard was 'none', now 'pair'"):
        check_same_experiment(flatten(config), saved, "runs/old", default_config())
    check_same_experiment(flatten(load_config("sd15:published")), saved, "runs/old", default_config())


def test_neither_a_clip_of_no_error_nor_padding_makes_a_difference(x64):
    zero = jnp.zeros((B, 2, 3, 3, 4))
    clipped = objective(pair_clip=1.0).loss(inputs_of(zero, zero, zero))
    np.testing.assert_allclose(clipped, np.log(2), rtol=1e-9)
    policy, reference, target = map(jnp.asarray, arrays())
    inputs = inputs_of(policy, reference, target)
    rest = jax.tree.map(lambda x_B: x_B[1:], inputs)
    padded = inputs._replace(weight_B=jnp.ones(B).at[0].set(0))
    np.testing.assert_allclose(loser_gradient(padded, 0.6, "batch")[1:], loser_gradient(rest, 0.6, "batch"), rtol=1e-12)


def test_a_loss_over_the_whole_batch_has_no_plug_ins():
    whole = dataclasses.replace(METHODS["dpo"], over_whole_batch=True)
    assert not whole.takes_pair_fields
    assert METHODS["dpo"].takes_pair_fields
