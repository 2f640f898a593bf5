"""Flow-GRPO's loss and its gradient, from the latents of a step, against the released formulas in PyTorch."""

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

    def ours(self, **fields):
        """Return loss_B, and the gradient of its sum with respect to the velocities."""
        objective = FLOW_GRPO.objective({f"loss.{name}": value for name, value in fields.items()})
        as_jax = {
            name: jnp.asarray(np.asarray(getattr(self, name)), self.dtype) for name in set(self.__dict__) - {"dtype"}
        }
        transitions = Transitions(as_jax["x"], as_jax["next_x"], jnp.asarray(STEP_B), as_jax["old_log_prob"])

        def total(velocity):
            reference = as_jax["reference"] if fields["kl_weight"] else None
            inputs = compare_transitions(denoise, velocity, reference, TABLE, transitions, {})
            loss_B = objective.loss(inputs._replace(advantage_BK=as_jax["advantage"]))
            return loss_B.sum(), loss_B

        gradient, loss_B = jax.grad(total, has_aux=True)(as_jax["moved"])
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
    np.testing.assert_allclose(gradient, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
