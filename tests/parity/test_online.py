"""Sampling, log-probabilities, losses and gradients of online learning, as D3PO's scripts compute them in PyTorch.

The embedded model stands on both sides. B prompts, K candidates, N = B * K images, H x W latent cells, C channels, S
sampling steps, L tokens, D context width, P pooled width.
"""

import functools
import itertools
import json
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dpo_jax.batch import Conditioning
from dpo_jax.diffusion.guidance import with_guidance
from dpo_jax.diffusion.samplers import make_table
from dpo_jax.diffusion.schedule import make_schedule
from dpo_jax.diffusion.steps import step_noise
from dpo_jax.diffusion.trajectories import Trajectory, branch, sample_trajectory, transitions_at
from dpo_jax.methods.d3po import d3po
from dpo_jax.methods.ddpo import ddpo
from dpo_jax.methods.dpok import dpok
from dpo_jax.models.network import Network
from dpo_jax.models.unet import UNet2DConditionModel
from dpo_jax.models.unet_config import UNetConfig
from dpo_jax.objectives.transitions import compare_transitions
from dpo_jax.weights.layout import from_torch, torch_name

FOLDER = "dpo_jax/tiny/model"
B, K, H, W, C, S, L, D, P = 2, 3, 8, 8, 4, 20, 5, 96, 64
GUIDANCE, ETA, BETA, CLIP = 5.0, 1.0, 0.1, 0.1
MOVED = 0.3  # of each weight's spread, so that some ratios are clamped and some are not
STEPS = ((3, 17), (19, 0))  # of the two prompts, one after the other
REWARD_BK = np.array([[0.3, 0.1, 0.3], [1.0, 2.0, 4.0]])
ADVANTAGE_BK = np.array([[0.5, -7.0, 0.5], [-1.0, 0.1, 1.3]])


def double_sinusoids(timesteps: torch.Tensor, embedding_dim: int, **_: Any) -> torch.Tensor:
    """What diffusers computes in float32 whatever the model's dtype."""
    half = embedding_dim // 2
    angles = timesteps.double()[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@pytest.fixture(params=[np.float64, pytest.param(np.float32, marks=pytest.mark.slow)])
def dtype(request, monkeypatch):
    if request.param == np.float64:
        monkeypatch.setattr("diffusers.models.embeddings.get_timestep_embedding", double_sinusoids)
    with jax.enable_x64(request.param == np.float64):
        yield request.param


def conditionings(dtype):
    """One row a prompt: its caption, and the empty one."""
    rng = np.random.default_rng(0)
    sizes = np.array([[64, 48, 3, 0, 64, 64], [80, 64, 0, 7, 64, 64]], dtype)
    return tuple(
        Conditioning(rng.normal(size=(B, L, D)).astype(dtype), rng.normal(size=(B, P)).astype(dtype), sizes)
        for _ in range(2)
    )


class Torch:
    """The released scripts' way: two networks, a batch of negative and then positive captions, one pair at a time."""

    def __init__(self, dtype):
        self.dtype = torch.from_numpy(np.zeros(1, dtype)).dtype
        self.reference = self._unet().requires_grad_(False)
        self.policy = self._unet()
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in self.policy.parameters():
                # So that ratios are moved, some of them beyond the clamp.
                parameter += MOVED * parameter.std().nan_to_num() * torch.randn(parameter.shape).to(self.dtype)
        scheduler = diffusers.DDIMScheduler.from_pretrained(FOLDER, subfolder="scheduler")
        scheduler.set_timesteps(S)
        self.timesteps, self.final = scheduler.timesteps, scheduler.final_alpha_cumprod
        self.alphas_cumprod = scheduler.alphas_cumprod.double()

    def _unet(self):
        return diffusers.UNet2DConditionModel.from_pretrained(FOLDER, subfolder="unet", torch_dtype=self.dtype)

    def step(self, unet, x, steps, conditioning, unconditional, next_x=None, noise=None):
        """(next_x, log-probability, mean, deviation) of images in NCHW at rows of the sampler's table."""
        timesteps = self.timesteps[torch.as_tensor(steps)]
        context, pooled, time_ids = (
            torch.cat([torch.from_numpy(u), torch.from_numpy(c)])
            for u, c in zip(unconditional[:3], conditioning[:3], strict=True)
        )
        added = {"text_embeds": pooled, "time_ids": time_ids}
        both = unet(torch.cat([x, x]), torch.cat([timesteps, timesteps]), context, added_cond_kwargs=added).sample
        uncond, text = both.chunk(2)
        epsilon = uncond + GUIDANCE * (text - uncond)

        before = timesteps - 1000 // S
        alpha_t = self.alphas_cumprod[timesteps]
        alpha_prev = torch.where(before >= 0, self.alphas_cumprod[before.clamp(0)], self.final.double())
        variance = ETA**2 * (1 - alpha_prev) / (1 - alpha_t) * (1 - alpha_t / alpha_prev)
        alpha_t, alpha_prev, variance = (v.to(self.dtype)[:, None, None, None] for v in (alpha_t, alpha_prev, variance))
        pred_original_sample = (x - (1 - alpha_t).sqrt() * epsilon) / alpha_t.sqrt()
        mean = alpha_prev.sqrt() * pred_original_sample + (1 - alpha_prev - variance).sqrt() * epsilon
        deviation = variance.sqrt()
        if next_x is None:
            next_x = mean + deviation * noise
        log_prob = torch.distributions.Normal(mean, deviation).log_prob(next_x).mean(dim=(1, 2, 3))
        return next_x, log_prob, mean, deviation

    def candidate(self, unet, trajectory, steps, k, captions):
        """(log-probability, mean, deviation) of candidate k of each prompt, out of a trajectory in NumPy."""
        latents = np.asarray(trajectory.latents_VNHWC).reshape(S + 1, B, K, H, W, C)
        x, next_x = (
            torch.from_numpy(np.stack([latents[step + i, b, k] for b, step in enumerate(steps)])).permute(0, 3, 1, 2)
            for i in range(2)
        )
        return self.step(unet, x, steps, *captions, next_x)[1:]

    def gradients(self, loss):
        names = dict(self.policy.named_parameters())
        grads = torch.autograd.grad(loss, list(names.values()))
        return {name: grad.numpy() for name, grad in zip(names, grads, strict=True)}


def ours(models, dtype):
    with open(f"{FOLDER}/unet/config.json") as file:
        config = UNetConfig.from_dict(json.load(file), "config.json")
    network = Network.build(lambda rngs: UNet2DConditionModel(config, dtype=jnp.dtype(dtype), rngs=rngs), config)
    with open(f"{FOLDER}/scheduler/scheduler_config.json") as file:
        table = make_table("ddim", make_schedule(json.load(file)), S, eta=ETA)
    params = []
    for unet in (models.policy, models.reference):
        arrays = unet.state_dict()
        params.append(
            {
                name: jnp.asarray(from_torch(arrays[torch_name(name)].numpy(), spec))
                for name, spec in network.specs.items()
            }
        )
    return network, table, *params


def sampled(network, table, params, captions, dtype):
    """By our sampler, the candidates of a prompt from the same noise."""
    x_T = np.random.default_rng(1).normal(size=(B, H, W, C)).astype(dtype)
    x_NHWC, keys_N = branch(jnp.asarray(x_T), jax.random.split(jax.random.key(5), B), K)
    each = jax.tree.map(lambda rows: jnp.repeat(rows, K, axis=0), captions)
    denoise = with_guidance(network, GUIDANCE)

    @jax.jit
    def run(params, x_NHWC, keys_N):
        return sample_trajectory(lambda x, t: denoise(params, x, t, each), table, x_NHWC, keys_N)

    return run(params, x_NHWC, keys_N), keys_N


def relative_error(actual, expected):
    return float(np.linalg.norm(np.ravel(actual) - np.ravel(expected)) / np.linalg.norm(np.ravel(expected)))


def test_a_trajectory_is_that_of_pytorch_and_is_found_again(dtype):
    models, captions = Torch(dtype), conditionings(dtype)
    network, table, _, reference = ours(models, dtype)
    trajectory, keys_N = sampled(network, table, reference, captions, dtype)

    of_each = tuple(Conditioning(*(np.repeat(rows, K, axis=0) for rows in caption)) for caption in captions)
    x = torch.from_numpy(np.array(trajectory.latents_VNHWC[0])).permute(0, 3, 1, 2)
    tolerance = 1e-9 if dtype == np.float64 else 1e-4  # twenty guided steps, one after the other
    for step in range(S):
        noise_NHWC = np.array(step_noise(keys_N, step, trajectory.latents_VNHWC[0]))
        noise = torch.from_numpy(noise_NHWC).permute(0, 3, 1, 2)
        with torch.no_grad():
            x, expected, *_ = models.step(models.reference, x, [step] * (B * K), *of_each, noise=noise)
        log_prob_N = trajectory.log_prob_SN[step]
        assert log_prob_N.dtype == dtype
        np.testing.assert_allclose(log_prob_N, expected, rtol=1e-9 if dtype == np.float64 else 1e-5, atol=1e-5)
        assert relative_error(trajectory.latents_VNHWC[step + 1], x.permute(0, 2, 3, 1)) < tolerance

    @jax.jit
    def again(params, step_B):
        transitions = transitions_at(trajectory, step_B)
        return compare_transitions(
            with_guidance(network, GUIDANCE), params, None, table, transitions, captions
        ).log_prob_BK

    worst = max(
        float(np.abs(again(reference, jnp.full(B, step)).reshape(-1) - trajectory.log_prob_SN[step]).max())
        for step in range(S)
    )
    assert worst <= 1e-6


def torch_d3po(models, trajectory, captions):
    """Of both steps; for each pair both of its images are recomputed. And the ratios before the clamp."""
    total, ratios = torch.zeros((), dtype=models.dtype), []
    for steps, (i, j) in itertools.product(STEPS, itertools.combinations(range(K), 2)):
        clamped = []
        for k in (i, j):
            log_prob, *_ = models.candidate(models.policy, trajectory, steps, k, captions)
            with torch.no_grad():
                log_prob_ref, *_ = models.candidate(models.reference, trajectory, steps, k, captions)
            ratio = torch.exp(log_prob - log_prob_ref)
            ratios.append(ratio.detach().numpy())
            clamped.append(torch.clamp(ratio, 1 - CLIP, 1 + CLIP))
        prefer = torch.from_numpy(np.sign(REWARD_BK[:, i] - REWARD_BK[:, j])).to(models.dtype)
        inside = BETA * torch.log(clamped[0]) * prefer - BETA * torch.log(clamped[1]) * prefer
        total = total + torch.where(prefer == 0, 0, -torch.log(torch.sigmoid(inside))).sum()
    return total, np.array(ratios)


def torch_policy_gradient(models, trajectory, captions, kl_weight):
    total = torch.zeros((), dtype=models.dtype)
    old = np.asarray(trajectory.log_prob_SN).reshape(S, B, K)
    for steps, k in itertools.product(STEPS, range(K)):
        log_prob, mean, deviation = models.candidate(models.policy, trajectory, steps, k, captions)
        with torch.no_grad():
            _, mean_ref, _ = models.candidate(models.reference, trajectory, steps, k, captions)
        old_log_prob = torch.from_numpy(np.array([old[step, b, k] for b, step in enumerate(steps)]))
        advantages = torch.clamp(torch.from_numpy(ADVANTAGE_BK[:, k]).to(models.dtype), -5, 5)
        ratio = torch.exp(log_prob - old_log_prob)
        loss = torch.maximum(-advantages * ratio, -advantages * torch.clamp(ratio, 0.95, 1.05))
        policy, pretrained = (torch.distributions.Normal(m, deviation) for m in (mean, mean_ref))
        divergence = torch.distributions.kl_divergence(policy, pretrained).mean(dim=(1, 2, 3))
        total = total + (loss + kl_weight * divergence).sum() / K
    return total


LOSSES = {
    "d3po": functools.partial(d3po, beta=BETA),
    "ddpo": functools.partial(ddpo, clip=0.05),
    "dpok": functools.partial(dpok, kl_weight=0.5, clip=0.05),
}


def test_losses_and_their_gradients_are_those_of_pytorch(dtype):
    models, captions = Torch(dtype), conditionings(dtype)
    network, table, policy, reference = ours(models, dtype)
    trajectory, _ = sampled(network, table, reference, captions, dtype)
    trajectory = Trajectory(*(np.array(array) for array in trajectory))
    d3po_loss, ratios = torch_d3po(models, trajectory, captions)
    assert 0.2 < np.mean(np.abs(ratios - 1) > CLIP) < 0.8, "some are clamped and some are not"
    expected_losses = {"d3po": d3po_loss} | {
        name: torch_policy_gradient(models, trajectory, captions, kl_weight)
        for name, kl_weight in (("ddpo", 0.0), ("dpok", 0.5))
    }

    # Both steps in one batch, and both networks run once for all losses.
    in_turn = [transitions_at(jax.tree.map(jnp.asarray, trajectory), jnp.array(steps)) for steps in STEPS]
    transitions, captions = (
        jax.tree.map(lambda *rows: jnp.concatenate(rows), *parts) for parts in (in_turn, (captions, captions))
    )
    advantage_BK, reward_BK = (jnp.asarray(np.tile(x, (2, 1)), dtype) for x in (ADVANTAGE_BK, REWARD_BK))

    @jax.jit
    @functools.partial(jax.jacrev, has_aux=True)
    def gradients_and_losses(params):
        denoise = with_guidance(network, GUIDANCE)
        inputs = compare_transitions(denoise, params, reference, table, transitions, captions, clip=CLIP)
        inputs = inputs._replace(preference_BK=reward_BK, advantage_BK=advantage_BK)
        losses = {name: loss(inputs).sum() for name, loss in LOSSES.items()}
        return losses, losses

    gradients, losses = gradients_and_losses(policy)
    tolerance = 1e-8 if dtype == np.float64 else 1e-5
    for name, gradient in gradients.items():
        np.testing.assert_allclose(losses[name], expected_losses[name].item(), rtol=tolerance)
        expected = models.gradients(expected_losses[name])
        expected = {key: from_torch(expected[torch_name(key)], spec) for key, spec in network.specs.items()}
        flat, expected_flat = (np.concatenate([np.ravel(g[key]) for key in gradient]) for g in (gradient, expected))
        assert relative_error(flat, expected_flat) < tolerance
