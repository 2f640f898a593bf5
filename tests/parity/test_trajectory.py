"""Twenty optimiser steps of the official Diffusion-DPO formula in PyTorch, and ours, in float64.

B pairs, K = 2 candidates, H x W latent cells, C channels, L tokens, D context width, P pooled width.
"""

from typing import Any, NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from transformers import Adafactor

from dpo_jax.batch import Conditioning, PreferenceBatch, Raw
from dpo_jax.diffusion.schedule import make_schedule
from dpo_jax.methods.dpo import dpo
from dpo_jax.methods.method import Objective
from dpo_jax.models.lora import add_lora, find_targets, init_lora, lora_specs
from dpo_jax.models.network import Network
from dpo_jax.models.unet import UNet2DConditionModel
from dpo_jax.models.unet_config import UNetConfig
from dpo_jax.objectives.denoising import compare_denoising
from dpo_jax.training.config import default_config
from dpo_jax.training.optim import learning_rate_schedule, make_optimizer
from dpo_jax.training.step import Frozen, TrainState, make_train_step, with_batch
from dpo_jax.weights.layout import Params, from_torch, torch_name

UNET = {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 12,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 + 6 * 4,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
}
B, K, H, W, C, L, D, P = 2, 2, 8, 8, 4, 3, 12, 6
STEPS, WARMUP, BETA = 20, 3, 5000.0
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-6, 1e-2, 1.0


class Inputs(NamedTuple):
    """The same pairs, noise and timesteps at every step, so that the loss falls."""

    latents_BKHWC: np.ndarray
    noise_BHWC: np.ndarray
    t_B: np.ndarray
    conditioning: Conditioning


def make_inputs() -> Inputs:
    rng = np.random.default_rng(0)
    sizes = [[64, 48, 3, 0, 64, 64], [80, 64, 0, 7, 64, 64]]
    conditioning = Conditioning(rng.normal(size=(B, L, D)), rng.normal(size=(B, P)), np.array(sizes, np.float64))
    return Inputs(
        rng.normal(size=(B, K, H, W, C)),
        rng.normal(size=(B, H, W, C)),
        rng.integers(0, 1000, size=B).astype(np.int32),
        conditioning,
    )


def double_sinusoids(timesteps: torch.Tensor, embedding_dim: int, **_: Any) -> torch.Tensor:
    """What diffusers computes in float32 whatever the model's dtype."""
    half = embedding_dim // 2
    angles = timesteps.double()[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def torch_unet() -> diffusers.UNet2DConditionModel:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel.from_config(UNET).double()


def torch_trajectory(inputs: Inputs, name: str) -> tuple[list[float], dict[str, np.ndarray]]:
    """The training loop of the official train.py: winners and losers as the two halves of one batch."""
    policy, reference = torch_unet(), torch_unet().requires_grad_(False)
    scheduler = diffusers.DDPMScheduler(**SCHEDULER)
    if name == "adamw":
        optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    else:
        optimizer = Adafactor(
            policy.parameters(),
            lr=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            scale_parameter=False,
            relative_step=False,
        )
    schedule = diffusers.optimization.get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=WARMUP)
    latents = torch.from_numpy(np.concatenate([inputs.latents_BKHWC[:, 0], inputs.latents_BKHWC[:, 1]]))
    latents = latents.permute(0, 3, 1, 2)
    context, pooled, time_ids = (
        torch.from_numpy(array).repeat(2, *[1] * (array.ndim - 1)) for array in inputs.conditioning[:3]
    )
    noise = torch.from_numpy(inputs.noise_BHWC).permute(0, 3, 1, 2).repeat(2, 1, 1, 1)
    timesteps = torch.from_numpy(inputs.t_B).long().repeat(2)
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)

    def errors(unet: torch.nn.Module) -> torch.Tensor:
        added = {"text_embeds": pooled, "time_ids": time_ids}
        prediction = unet(noisy_latents, timesteps, context, added_cond_kwargs=added).sample
        return (prediction - noise).pow(2).mean(dim=[1, 2, 3])

    losses = []
    for _ in range(STEPS):
        model_losses_w, model_losses_l = errors(policy).chunk(2)
        with torch.no_grad():
            ref_losses_w, ref_losses_l = errors(reference).chunk(2)
        inside = -0.5 * BETA * ((model_losses_w - model_losses_l) - (ref_losses_w - ref_losses_l))
        loss = -torch.nn.functional.logsigmoid(inside).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {key: value.numpy() for key, value in policy.state_dict().items()}


def our_trajectory(
    inputs: Inputs, name: str, network: Network, params: dict[str, jax.Array]
) -> tuple[list[float], dict[str, jax.Array]]:
    latents_BKHWC, noise_BHWC, t_B, conditioning = jax.tree.map(jnp.asarray, inputs)
    schedule = make_schedule(SCHEDULER)

    def score(params, frozen, batch, step, training):
        return with_batch(
            compare_denoising(
                network, params, frozen.whole_reference(), schedule, latents_BKHWC, noise_BHWC, t_B, conditioning
            ),
            batch,
        )

    optimizer = make_optimizer(
        name,
        learning_rate_schedule("constant_with_warmup", LEARNING_RATE, warmup_steps=WARMUP, total_steps=STEPS),
        network.specs,
        weight_decay=WEIGHT_DECAY,
        clip_norm=CLIP_NORM,
    )
    objective = Objective(loss=lambda inputs: dpo(inputs, beta=BETA))
    step = jax.jit(make_train_step(score, objective, optimizer))
    batch = PreferenceBatch(
        inputs=Raw(
            jnp.zeros((B, K, 1, 1, 3)), jnp.zeros((B, K), bool), jnp.zeros((B, 1, L), jnp.int32)
        ),  # latents are given
        size_cond_BK6=jnp.zeros((B, K, 6)),
        preference_BK=jnp.array([[1.0, 0.0]] * B),
        valid_BK=jnp.ones((B, K), bool),
        weight_B=jnp.ones(B),
        index_B=jnp.arange(B),
    )
    state = TrainState(jnp.int32(0), params, optimizer.init(params), {})
    losses = []
    for _ in range(STEPS):
        state, metrics = step(state, Frozen(reference=params), batch)
        losses.append(float(metrics["train/loss"]))
    return losses, state.params


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["adamw", pytest.param("adafactor", marks=pytest.mark.slow)])
def test_twenty_steps_of_the_official_formula(name, monkeypatch):
    monkeypatch.setattr("diffusers.models.embeddings.get_timestep_embedding", double_sinusoids)
    config = UNetConfig.from_dict(UNET, "UNET")
    network = Network.build(lambda rngs: UNet2DConditionModel(config, dtype=jnp.float64, rngs=rngs), config)
    before = {key: value.numpy() for key, value in torch_unet().state_dict().items()}
    params = {key: jnp.asarray(from_torch(before[torch_name(key)], spec)) for key, spec in network.specs.items()}
    inputs = make_inputs()

    expected_losses, expected = torch_trajectory(inputs, name)
    losses, trained = our_trajectory(inputs, name, network, params)

    np.testing.assert_allclose(losses, expected_losses, rtol=1e-9)
    assert losses[0] == pytest.approx(np.log(2), rel=1e-12)
    assert losses[-1] < 0.9 * losses[0]
    for key, spec in network.specs.items():
        update = trained[key] - params[key]
        expected_update = from_torch(expected[torch_name(key)] - before[torch_name(key)], spec)
        difference = np.linalg.norm(update - expected_update) / np.linalg.norm(expected_update)
        assert difference < 1e-6, f"{key}: {difference:.1e}"
    ranks = {len(spec.shape) for spec in network.specs.values()}
    assert ranks == {1, 2, 4}, "Adafactor should meet factored matrices and convolutions, and plain vectors"


LORA_RANK, LORA_BETA, LORA_RATE, LORA_STEPS = 2, 2500.0, 1e-3, 10  # a rank at which draws of the two kinds differ


def torch_lora_trajectory(inputs: Inputs) -> tuple[list[float], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The training loop of diffusers' train_diffusion_dpo.py: losses, and its LoRA before and after."""
    unet = torch_unet().requires_grad_(False)
    torch.manual_seed(1)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(
        peft.LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, init_lora_weights="gaussian", target_modules=targets)
    )
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    for p in trained.values():
        p.data = p.data.double()

    def state() -> dict[str, np.ndarray]:
        return {name.replace(".default.", "."): p.detach().numpy().copy() for name, p in trained.items()}

    before = state()
    optimizer = torch.optim.AdamW(trained.values(), lr=LORA_RATE, weight_decay=WEIGHT_DECAY)
    latents = torch.from_numpy(np.concatenate([inputs.latents_BKHWC[:, 0], inputs.latents_BKHWC[:, 1]]))
    latents = latents.permute(0, 3, 1, 2)
    context, pooled, time_ids = (
        torch.from_numpy(array).repeat(2, *[1] * (array.ndim - 1)) for array in inputs.conditioning[:3]
    )
    noise = torch.from_numpy(inputs.noise_BHWC).permute(0, 3, 1, 2).repeat(2, 1, 1, 1)
    timesteps = torch.from_numpy(inputs.t_B).long().repeat(2)
    noisy_latents = diffusers.DDPMScheduler(**SCHEDULER).add_noise(latents, noise, timesteps)

    def difference() -> torch.Tensor:
        added = {"text_embeds": pooled, "time_ids": time_ids}
        prediction = unet(noisy_latents, timesteps, context, added_cond_kwargs=added).sample
        losses_w, losses_l = (prediction - noise).pow(2).mean(dim=[1, 2, 3]).chunk(2)
        return losses_w - losses_l

    losses = []
    for _ in range(LORA_STEPS):
        model_diff = difference()
        unet.disable_adapters()
        with torch.no_grad():
            ref_diff = difference()
        unet.enable_adapters()
        loss = -torch.nn.functional.logsigmoid(LORA_BETA * (ref_diff - model_diff)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, before, state()


def moved(adapter: Params) -> float:
    """The norm of what an adapter adds to all kernels."""
    products = [adapter[name] @ adapter[name.replace("lora_A", "lora_B")] for name in adapter if "lora_A" in name]
    return float(np.sqrt(sum(np.square(product).sum() for product in products)))


@pytest.mark.usefixtures("x64")
def test_a_lora_moves_as_in_the_script_of_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps from the script's own draw, and from ours: one is the same run, the other goes as far."""
    monkeypatch.setattr("diffusers.models.embeddings.get_timestep_embedding", double_sinusoids)
    config = UNetConfig.from_dict(UNET, "UNET")
    plain = Network.build(lambda rngs: UNet2DConditionModel(config, dtype=jnp.float64, rngs=rngs), config)
    adapters = find_targets(plain, default_config().lora.targets, rank=LORA_RANK, alpha=LORA_RANK)

    def make(rngs: Any) -> UNet2DConditionModel:
        unet = UNet2DConditionModel(config, dtype=jnp.float64, rngs=rngs)
        add_lora(unet, adapters, 0.0, rngs)
        return unet

    adapted = Network.build(make, config)
    specs = lora_specs(adapted)
    weights = {key: value.numpy() for key, value in torch_unet().state_dict().items()}
    base = {key: jnp.asarray(from_torch(weights[torch_name(key)], spec)) for key, spec in plain.specs.items()}
    inputs = make_inputs()
    latents_BKHWC, noise_BHWC, t_B, conditioning = jax.tree.map(jnp.asarray, inputs)
    schedule = make_schedule(SCHEDULER)

    def score(params, frozen, batch, step, training):
        return with_batch(
            compare_denoising(
                lambda params, *inputs: (adapted if params.keys() > base.keys() else plain)(params, *inputs),
                frozen.policy(params),
                frozen.whole_reference(),
                schedule,
                latents_BKHWC,
                noise_BHWC,
                t_B,
                conditioning,
            ),
            batch,
        )

    optimizer = make_optimizer(
        "adamw",
        learning_rate_schedule("constant", LORA_RATE, warmup_steps=0, total_steps=LORA_STEPS),
        specs,
        weight_decay=WEIGHT_DECAY,
        clip_norm=CLIP_NORM,
    )
    objective = Objective(loss=lambda inputs: dpo(inputs, beta=2 * LORA_BETA))
    step = jax.jit(make_train_step(score, objective, optimizer))
    batch = PreferenceBatch(
        Raw(jnp.zeros((B, K, 1, 1, 3)), jnp.zeros((B, K), bool), jnp.zeros((B, 1, L), jnp.int32)),
        size_cond_BK6=jnp.zeros((B, K, 6)),
        preference_BK=jnp.array([[1.0, 0.0]] * B),
        valid_BK=jnp.ones((B, K), bool),
        weight_B=jnp.ones(B),
        index_B=jnp.arange(B),
    )

    def train(adapter: Params) -> tuple[list[float], Params]:
        state, losses = TrainState(jnp.int32(0), adapter, optimizer.init(adapter), {}), []
        for _ in range(LORA_STEPS):
            state, metrics = step(state, Frozen(base=base), batch)
            losses.append(float(metrics["train/loss"]))
        return losses, state.params

    expected_losses, before, expected = torch_lora_trajectory(inputs)
    losses, trained = train({key: jnp.asarray(from_torch(before[torch_name(key)], specs[key])) for key in specs})
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-8)
    assert losses[-1] < 0.9 * losses[0]
    for key, spec in specs.items():
        np.testing.assert_allclose(trained[key], from_torch(expected[torch_name(key)], spec), rtol=1e-6, atol=1e-9)

    def from_our_draws(initializer: str) -> float:
        drawn = [init_lora(specs, seed, initializer) for seed in range(3)]
        return float(np.mean([moved(train(jax.tree.map(jnp.float64, adapter))[1]) for adapter in drawn]))

    assert from_our_draws("gaussian") == pytest.approx(moved(trained), rel=0.05)
    assert from_our_draws("kaiming") < 0.5 * moved(trained)
