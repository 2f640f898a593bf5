"""DiffusionNFT's and DGPO's losses, against their released code in PyTorch, and what they read of drawn images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dpo_jax.batch import Conditioning, LossInputs
from dpo_jax.diffusion.samplers import make_table
from dpo_jax.diffusion.schedule import add_noise, make_schedule, training_target
from dpo_jax.methods.dgpo import dgpo
from dpo_jax.methods.dpo import dpo
from dpo_jax.methods.nft import NFT, nft, old_decay
from dpo_jax.objectives.drawn import compare_predictions

SHAPE = (3, 4, 5, 6, 2)
"""B, K, H, W, C."""
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULES = {
    "flow": (FLOW, "flow_euler"),
    "epsilon": ({**BETAS, "prediction_type": "epsilon"}, "ddim"),
    "v": ({**BETAS, "prediction_type": "v_prediction"}, "ddim"),
}


@pytest.fixture
def inputs(x64: None) -> LossInputs:
    rng = np.random.default_rng(0)
    policy, old, reference, target = (jnp.asarray(rng.normal(size=SHAPE)) for _ in range(4))
    return LossInputs(
        jnp.zeros(SHAPE[:2]),
        advantage_BK=jnp.asarray(4 * rng.normal(size=SHAPE[:2])),
        error_BK=jnp.square(policy - target).mean(axis=(2, 3, 4)),
        prediction_BKHWC=policy,
        old_prediction_BKHWC=old,
        reference_prediction_BKHWC=reference,
        target_BKHWC=target,
        x0_per_prediction_B=-jnp.asarray(rng.uniform(0.1, 0.9, SHAPE[0])),
    )


def released(
    prediction: torch.Tensor, inputs: LossInputs, noise: np.ndarray, b: float, C: float, kl_weight: float
) -> torch.Tensor:
    """The loss of scripts/train_nft_sd3.py (https://github.com/NVlabs/DiffusionNFT) of each prompt, for flow models."""
    old, reference, target, advantage = (
        torch.from_numpy(np.array(x))
        for x in (
            inputs.old_prediction_BKHWC,
            inputs.reference_prediction_BKHWC,
            inputs.target_BKHWC,
            inputs.advantage_BK,
        )
    )
    t = torch.from_numpy(-np.array(inputs.x0_per_prediction_B)).reshape(-1, 1, 1, 1, 1)
    noise = torch.from_numpy(noise)
    x0 = noise - target  # a flow's target is noise - x0
    xt = (1 - t) * x0 + t * noise
    r = torch.clamp((torch.clamp(advantage, -C, C) / C) / 2 + 0.5, 0, 1)
    positive = b * prediction + (1 - b) * old
    negative = (1 + b) * old - b * prediction
    losses = []
    for guess in (positive, negative):
        x0_guess = xt - t * guess
        with torch.no_grad():
            weight = torch.abs(x0_guess.double() - x0.double()).mean(dim=(2, 3, 4), keepdim=True).clip(min=1e-5)
        losses.append(((x0_guess - x0) ** 2 / weight).mean(dim=(2, 3, 4)))
    policy_loss = (r * losses[0] / b + (1 - r) * losses[1] / b) * C
    return (policy_loss + kl_weight * ((prediction - reference) ** 2).mean(dim=(2, 3, 4))).mean(dim=1)


@pytest.mark.parametrize(("b", "C", "kl_weight"), [(1.0, 5.0, 1e-4), (0.1, 2.0, 0.3)])
def test_the_loss_and_its_gradient_are_those_of_the_released_code(inputs, b, C, kl_weight) -> None:
    prediction = torch.from_numpy(np.array(inputs.prediction_BKHWC)).requires_grad_()
    oracle = released(prediction, inputs, np.random.default_rng(1).normal(size=SHAPE), b, C, kl_weight)
    oracle.sum().backward()

    def loss_B(prediction_BKHWC):
        values = {"strength": b, "advantage_clip": C, "kl_weight": kl_weight}
        return nft(inputs._replace(prediction_BKHWC=prediction_BKHWC), **values)

    np.testing.assert_allclose(loss_B(inputs.prediction_BKHWC), oracle.detach().numpy(), rtol=1e-10)
    gradient = jax.grad(lambda p: loss_B(p).sum())(inputs.prediction_BKHWC)
    np.testing.assert_allclose(gradient, prediction.grad.numpy(), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("b", [0.1, 1.0, 3.0])
def test_while_the_policy_is_the_one_that_drew_it_follows_the_advantage(inputs, b) -> None:
    """The gradient is that of the advantage times the error, whatever the strength; equal rewards teach nothing."""
    at_old = inputs._replace(old_prediction_BKHWC=inputs.prediction_BKHWC)

    def loss(prediction_BKHWC, advantage_BK):
        changed = at_old._replace(prediction_BKHWC=prediction_BKHWC, advantage_BK=advantage_BK)
        return nft(changed, strength=b, advantage_clip=5.0, kl_weight=0.0).sum()

    def weighted(prediction_BKHWC):
        apart = inputs.x0_per_prediction_B[:, None, None, None, None] * (prediction_BKHWC - inputs.target_BKHWC)
        size = jax.lax.stop_gradient(jnp.abs(apart).mean(axis=(2, 3, 4)))
        error_BK = jnp.square(apart).mean(axis=(2, 3, 4)) / size
        return (jnp.clip(inputs.advantage_BK, -5, 5) * error_BK).mean(axis=1).sum()

    found = jax.grad(loss)(inputs.prediction_BKHWC, inputs.advantage_BK)
    np.testing.assert_allclose(found, jax.grad(weighted)(inputs.prediction_BKHWC), rtol=1e-9, atol=1e-15)
    nothing = jax.grad(loss)(inputs.prediction_BKHWC, jnp.zeros(SHAPE[:2]))
    np.testing.assert_allclose(nothing, 0, atol=1e-15)


@pytest.mark.parametrize(("beta", "clip", "kl_weight"), [(100.0, 0.01, 0.0), (0.5, 0.02, 0.3)])
def test_dgpos_gradient_is_that_of_the_released_code(inputs, beta, clip, kl_weight) -> None:
    """Of scripts/train_sd3_dgpo.py (https://github.com/Luo-Yihong/DGPO): the sigmoid of the group is a weight."""
    near = inputs.prediction_BKHWC + 0.05 * (inputs.old_prediction_BKHWC - inputs.prediction_BKHWC)
    inputs = inputs._replace(old_prediction_BKHWC=near)
    old, reference, target, advantage = (
        torch.from_numpy(np.array(x))
        for x in (near, inputs.reference_prediction_BKHWC, inputs.target_BKHWC, inputs.advantage_BK)
    )
    prediction = torch.from_numpy(np.array(inputs.prediction_BKHWC)).requires_grad_()
    error, old_error, reference_error = (((x - target) ** 2).mean(dim=(2, 3, 4)) for x in (prediction, old, reference))
    advantage = torch.clamp(advantage, -5, 5)
    group = (advantage * beta * (error - reference_error)).mean(dim=1, keepdim=True)
    ratio = torch.exp(old_error - error).detach()
    dropped = ((advantage > 0) & (ratio > 1 + clip)) | ((advantage < 0) & (ratio < 1 - clip))
    assert 0 < dropped.sum() < dropped.numel()
    loss = torch.sigmoid(group).detach() * torch.where(dropped, error.detach(), error) * advantage
    distance = ((prediction - reference) ** 2).mean(dim=(2, 3, 4))
    (loss + kl_weight * distance).mean(dim=1).sum().backward()

    def total(prediction_BKHWC):
        error_BK = jnp.square(prediction_BKHWC - inputs.target_BKHWC).mean(axis=(2, 3, 4))
        changed = inputs._replace(prediction_BKHWC=prediction_BKHWC, error_BK=error_BK)
        return dgpo(changed, beta=beta, advantage_clip=5.0, clip=clip, kl_weight=kl_weight).sum()

    found = jax.grad(total)(inputs.prediction_BKHWC)
    np.testing.assert_allclose(found, prediction.grad.numpy(), rtol=1e-9, atol=1e-15)


def test_dgpo_of_a_winner_and_a_loser_is_dpo(inputs) -> None:
    two = jax.tree.map(lambda x: x[:, :2] if x.ndim > 1 else x, inputs)
    reference_error_BK = jnp.square(two.reference_prediction_BKHWC - two.target_BKHWC).mean(axis=(2, 3, 4))
    two = two._replace(
        advantage_BK=jnp.tile(jnp.array([1.0, -1.0]), (SHAPE[0], 1)),
        preference_BK=jnp.tile(jnp.array([1.0, 0.0]), (SHAPE[0], 1)),
        old_prediction_BKHWC=two.prediction_BKHWC,
        log_ratio_BK=-(two.error_BK - reference_error_BK) / 2,
    )
    expected_B = dpo(two, beta=3.0, label_smoothing=0.0)
    found_B = dgpo(two, beta=3.0, advantage_clip=5.0, clip=0.01, kl_weight=0.0)
    np.testing.assert_allclose(3.0 * found_B, expected_B, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", SCHEDULES)
def test_drawn_images_are_looked_at_as_in_training(name) -> None:
    """Noisy latents and target are those of the forward process; the image follows from the target exactly."""
    fields, sampler = SCHEDULES[name]
    schedule = make_schedule(fields)
    table = make_table(sampler, schedule, 6, eta=0.0)
    rng = np.random.default_rng(2)
    x0, noise = jnp.asarray(rng.normal(size=SHAPE)), jnp.asarray(rng.normal(size=SHAPE))
    step_B = jnp.asarray([0, 3, 5])
    seen = []

    def denoise(params, x_NHWC, t_N, conditioning):
        seen.append((x_NHWC, t_N))
        return params * x_NHWC

    found = compare_predictions(denoise, 1.5, 2.5, None, table, x0, noise, step_B, Conditioning(jnp.zeros((3, 1, 1))))
    x_BKHWC, t_B = seen[0][0].reshape(SHAPE), seen[0][1].reshape(SHAPE[:2])
    level_B = np.asarray(table.steps.t)[step_B]
    np.testing.assert_array_equal(t_B, np.repeat(level_B[:, None], SHAPE[1], axis=1))
    nearest_B = np.abs(schedule.t_T[:, None] - level_B).argmin(axis=0)
    for b, t in enumerate(nearest_B):
        at = jnp.full(SHAPE[1], t)
        tolerance = 2e-3 if name == "flow" else 1e-9  # a sampler's levels lie between those of training
        np.testing.assert_allclose(x_BKHWC[b], add_noise(schedule, x0[b], noise[b], at), atol=tolerance)
        np.testing.assert_allclose(
            found.target_BKHWC[b], training_target(schedule, x0[b], noise[b], at), atol=tolerance
        )
    np.testing.assert_allclose(found.prediction_BKHWC, 1.5 * x_BKHWC, rtol=1e-12)
    np.testing.assert_allclose(found.old_prediction_BKHWC, 2.5 * x_BKHWC, rtol=1e-12)
    p_B, q_B = np.asarray(table.steps.p)[step_B], found.x0_per_prediction_B
    x0_again = (p_B * jnp.moveaxis(x_BKHWC, 0, -1) + q_B * jnp.moveaxis(found.target_BKHWC, 0, -1)).T
    np.testing.assert_allclose(x0_again, x0.transpose(0, 4, 3, 2, 1), atol=1e-9)


@pytest.mark.parametrize(
    ("changed", "updates", "expected"),
    [
        ({}, 100, 0.1),
        ({}, 10_000, 0.5),
        ({"loss.old_decay_from": 75, "loss.old_decay_rate": 0.0075, "loss.old_decay_most": 0.999}, 75, 0.0),
        ({"loss.old_decay_from": 75, "loss.old_decay_rate": 0.0075, "loss.old_decay_most": 0.999}, 175, 0.75),
    ],
)
def test_what_remains_of_the_policy_that_draws(changed, updates, expected) -> None:
    """Both published schedules."""
    config = {f"loss.{name}": field.default for name, field in NFT.fields.items()} | changed
    assert float(old_decay(config, jnp.int32(updates))) == pytest.approx(expected)


def test_the_reference_is_kept_only_where_the_loss_reads_it() -> None:
    config = {f"loss.{name}": field.default for name, field in NFT.fields.items()}
    assert NFT.keeps_reference(config)
    assert not NFT.keeps_reference(config | {"loss.kl_weight": 0.0})
