"""Flow-GRPO's loss and its gradient, from the latents of a step, against the released formulas in PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dpo_jax.batch import Transitions
from dpo_jax.diffusion.flow_matching import sampling_sigmas
from dpo_jax.diffusion.samplers import make_table
from dpo_jax.diffusion.schedule import make_schedule
from dpo_jax.methods.flow_grpo import FLOW_GRPO
from dpo_jax.objectives.transitions import compare_transitions

SCHEDULE = make_schedule({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0})
B, K, S, LEVEL = 4, 5, 10, 0.7
STEP_B = np.array([0, 3, 6, 8])
TABLE = make_table("flow_sde", SCHEDULE, S, noise_level=LEVEL)
SHAPE = (B, K, 2, 3, 4)


def denoise(velocity, x_NHWC, t_N, conditioning):
    """A network that predicts the velocities that it is given."""
    return velocity.reshape(x_NHWC.shape)


class Case:
    """Latents, velocities and advantages; `old`, `moved` and `reference` are the velocities of three policies."""

    def __init__(self, dtype=np.float64, size=1e-3):
        rng = np.random.default_rng(0)
        self.x, self.old, change, apart, noise = (rng.normal(size=SHAPE) for _ in range(5))
        self.moved, self.reference = self.old + size * change, self.old + 0.1 * apart
        sigmas = sampling_sigmas(SCHEDULE.sampler_fields, "", S).astype(np.float64)
        sigma, sigma_prev = (torch.from_numpy(sigmas[STEP_B + i]).view(B, 1, 1, 1, 1) for i in range(2))
        self.dt = sigma_prev - sigma
        self.std_dev_t = torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigmas[1], sigma))) * LEVEL
        self.sigma, self.k = sigma, self.std_dev_t * torch.sqrt(-self.dt)
        self.old_mean = self.mean(torch.from_numpy(self.old))
        self.next_x = self.old_mean + self.k * torch.from_numpy(noise)
        self.old_log_prob = self.log_prob(self.old_mean)
        self.advantage = 4 * rng.normal(size=(B, K))
        self.dtype = dtype

    def mean(self, velocity):
        sigma, std_dev_t, dt, x = self.sigma, self.std_dev_t, self.dt, torch.from_numpy(self.x)
        drift = velocity * (1 + std_dev_t**2 * (1 - sigma) / (2 * sigma)) * dt
        return x * (1 + std_dev_t**2 / (2 * sigma) * dt) + drift

    def log_prob(self, mean):
        return torch.distributions.Normal(mean, self.k).log_prob(self.next_x).mean(dim=(2, 3, 4))

    @functools.cached_property
    def as_jax(self):
        names = ("x", "next_x", "old_log_prob", "old_mean", "moved", "reference", "advantage")
        return {name: jnp.asarray(np.asarray(getattr(self, name)), self.dtype) for name in names}

    def inputs(self, velocity, *, kl_weight, ratio="clip", **fields):
        given = self.as_jax
        old_mean = given["old_mean"] if ratio != "clip" else None
        transitions = Transitions(given["x"], given["next_x"], jnp.asarray(STEP_B), given["old_log_prob"], old_mean)
        reference = given["reference"] if kl_weight else None
        inputs = compare_transitions(denoise, velocity, reference, TABLE, transitions, {})
        return inputs._replace(advantage_BK=given["advantage"], preference_BK=given["advantage"])

    def ours(self, **fields):
        """Return loss_B, and the gradient of its sum with respect to the velocities."""
        objective = FLOW_GRPO.objective({f"loss.{name}": value for name, value in fields.items()})

        def total(velocity):
            loss_B = objective.loss(self.inputs(velocity, **fields))
            return loss_B.sum(), loss_B

        gradient, loss_B = jax.grad(total, has_aux=True)(self.as_jax["moved"])
        return loss_B, gradient

    def theirs(self, loss_BK):
        """Return the same of `loss_BK(mean)` in PyTorch."""
        velocity = torch.from_numpy(self.moved).requires_grad_()
        loss_B = loss_BK(self.mean(velocity)).mean(dim=1)
        loss_B.sum().backward()
        return loss_B.detach(), velocity.grad


@pytest.mark.parametrize(
    ("kl_weight", "divergence"),
    [(0.0, "exact"), (0.04, "released"), (0.04, "exact")],
    ids=["no kl", "released", "exact"],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-9), (np.float32, 1e-4)])
def test_value_and_gradient_are_the_released_ones(x64, kl_weight, divergence, dtype, tolerance):
    case = Case(dtype)
    reference_mean = case.mean(torch.from_numpy(case.reference))
    variance = case.std_dev_t**2 if divergence == "released" else case.k**2

    def loss_BK(mean):
        ratio = torch.exp(case.log_prob(mean) - case.old_log_prob)
        advantages = torch.clamp(torch.from_numpy(case.advantage), -5, 5)
        clipped = -advantages * torch.clamp(ratio, 1 - 1e-4, 1 + 1e-4)
        kl_loss = (((mean - reference_mean) ** 2) / (2 * variance)).mean(dim=(2, 3, 4))
        assert 0.1 < ((ratio - 1).abs() > 1e-4).double().mean() < 0.9
        return torch.maximum(-advantages * ratio, clipped) + kl_weight * kl_loss

    (loss_B, gradient), (expected_B, expected) = (
        case.ours(kl_weight=kl_weight, divergence=divergence),
        case.theirs(loss_BK),
    )
    np.testing.assert_allclose(loss_B, expected_B, rtol=tolerance, atol=tolerance)
    expected = expected.numpy()
    np.testing.assert_allclose(gradient, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def guard(case, mean):
    """As in `train_sd3_GRPO_Guard.py` of the released code, for each image by itself."""
    std, dt = case.k.view(B, 1), case.dt.view(B, 1)
    ratio_mean_bias = ((mean - case.old_mean) ** 2).mean(dim=(2, 3, 4)) / (2 * std**2)
    ratio = torch.exp((case.log_prob(mean) - case.old_log_prob + ratio_mean_bias) * std)
    advantages = torch.clamp(torch.from_numpy(case.advantage), -5, 5)
    clipped = -advantages * torch.clamp(ratio, 1 - 2e-5, 1 + 2e-5)
    return torch.maximum(-advantages * ratio, clipped) / -dt, (ratio - 1).abs() > 2e-5


def mask(case, mean):
    """As in Flow-DPPO."""
    kl = ((mean - case.old_mean) ** 2).mean(dim=(2, 3, 4)) / (2 * case.k.view(B, 1) ** 2)
    ratio = torch.exp(case.log_prob(mean) - case.old_log_prob)
    advantages = torch.clamp(torch.from_numpy(case.advantage), -5, 5)
    outwards = torch.where(advantages > 0, ratio > 1, ratio < 1)
    masked = (kl >= 1e-7) & outwards
    return torch.where(masked, 0, -advantages * ratio), masked


@pytest.mark.parametrize("rule", [guard, mask])
def test_rules_for_the_ratio_are_the_released_ones(x64, rule):
    case, stopped = Case(), []

    def loss_BK(mean):
        loss_BK, stopped_BK = rule(case, mean)
        stopped.append(stopped_BK)
        return loss_BK

    fields = {"kl_weight": 0.0, "ratio": rule.__name__, "clip": 2e-5, "drift": 1e-7}
    (loss_B, gradient), (expected_B, expected) = case.ours(**fields), case.theirs(loss_BK)
    np.testing.assert_allclose(loss_B, expected_B, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(gradient, expected.numpy(), rtol=1e-9, atol=1e-9 * np.abs(expected.numpy()).max())
    assert 0.1 < stopped[0].double().mean() < 0.9
    found = case.inputs(case.as_jax["moved"], **fields)
    clipped_B = FLOW_GRPO.objective({f"loss.{name}": value for name, value in fields.items()}).metrics(found)
    np.testing.assert_allclose(clipped_B["policy/clipped"], stopped[0].double().mean(dim=1))
