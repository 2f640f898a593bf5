"""Twenty optimizer steps of flow_grpo's DPO on Stable Diffusion 3 in PyTorch, and ours, in float64.

S steps, B pairs, K = 2 candidates, H x W latent cells, C channels, L tokens, D context width, P pooled width.
"""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling

from dpo_jax.batch import Conditioning, PreferenceBatch, Raw
from dpo_jax.diffusion.schedule import make_schedule
from dpo_jax.methods.dpo import dpo
from dpo_jax.methods.method import Objective
from dpo_jax.models.lora import Adapters, add_lora, find_targets, lora_specs
from dpo_jax.models.network import Network
from dpo_jax.models.sd3_transformer import SD3Transformer2DModel, SD3TransformerConfig
from dpo_jax.objectives.denoising import compare_denoising
from dpo_jax.training.optim import learning_rate_schedule, make_optimizer
from dpo_jax.training.step import Frozen, TrainState, make_train_step, with_batch
from dpo_jax.weights.layout import Params, Specs, from_torch, torch_name

from ..models.torch_parity import FAST, double_diffusers, our_params, with_random_vectors

TRANSFORMER = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 6,
    "pos_embed_max_size": 6,
    "qk_norm": "rms_norm",
    "dual_attention_layers": [0],
}
SCHEDULER = {"num_train_timesteps": 1000, "shift": 3.0}
S, B, K, H, W, C, L, D, P = 20, 2, 2, 8, 8, 4, 3, 12, 6
BETA, WEIGHT_DECAY, CLIP_NORM = 100.0, 1e-4, 1.0  # config/base.py and config/dpo.py; its learning rate is 3e-4
RATES = {"full": 1e-4, "lora": 3e-3}  # of so few steps
RANK, ALPHA = 2, 4
TARGETS = ["add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v"]


class Inputs(NamedTuple):
    """The same pairs at every step, with new noise and timesteps."""

    latents_BKHWC: np.ndarray
    noise_SBHWC: np.ndarray
    index_SB: np.ndarray
    """Indices of diffusers' tables, which begin with pure noise."""
    conditioning: Conditioning


def make_inputs() -> Inputs:
    rng = np.random.default_rng(0)
    u = compute_density_for_timestep_sampling(
        weighting_scheme="logit_normal",
        batch_size=S * B,
        logit_mean=0,
        logit_std=1,
        mode_scale=1.29,
        generator=torch.Generator().manual_seed(0),
    )
    return Inputs(
        rng.normal(size=(B, K, H, W, C)),
        rng.normal(size=(S, B, H, W, C)),
        (u * SCHEDULER["num_train_timesteps"]).long().numpy().reshape(S, B),
        Conditioning(rng.normal(size=(B, L, D)), rng.normal(size=(B, P))),
    )


def torch_transformer(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    transformer = with_random_vectors(diffusers.SD3Transformer2DModel.from_config(TRANSFORMER))
    if kind == "lora":
        transformer.requires_grad_(False)
        names = [f"attn.{name}" for name in TARGETS]
        lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights="gaussian", target_modules=names)
        transformer = peft.get_peft_model(transformer, lora).double()
    return transformer


def trained_weights(transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the trained weights under diffusers' names."""
    names = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    return {
        name.removeprefix("base_model.model.").replace(".default.", "."): p.detach().clone()
        for name, p in names.items()
    }


def get_sigmas(scheduler: Any, timesteps: torch.Tensor, n_dim: int = 4, dtype: torch.dtype = torch.float64) -> Any:
    """As in scripts/train_sd3_dpo.py."""
    sigmas = scheduler.sigmas.to(dtype=dtype)
    step_indices = [(scheduler.timesteps == t).nonzero().item() for t in timesteps]
    sigma = sigmas[step_indices].flatten()
    while len(sigma.shape) < n_dim:
        sigma = sigma.unsqueeze(-1)
    return sigma


def torch_trajectory(inputs: Inputs, kind: str, transformer: torch.nn.Module) -> list[float]:
    """The inner loop of scripts/train_sd3_dpo.py of yifan123/flow_grpo: winners and losers as the halves of a batch."""
    reference = copy.deepcopy(transformer).requires_grad_(False)  # there an adapter, with the same values
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    trained = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATES[kind], weight_decay=WEIGHT_DECAY)
    latents = torch.from_numpy(np.concatenate([inputs.latents_BKHWC[:, 0], inputs.latents_BKHWC[:, 1]]))
    model_input = latents.permute(0, 3, 1, 2)
    embeds, pooled_embeds = (torch.from_numpy(x).repeat(2, *[1] * (x.ndim - 1)) for x in inputs.conditioning[:2])
    losses = []
    for noise_BHWC, index_B in zip(inputs.noise_SBHWC, inputs.index_SB, strict=True):
        noise = torch.from_numpy(noise_BHWC).permute(0, 3, 1, 2)
        noise = torch.cat([noise, noise], dim=0)
        timesteps = scheduler.timesteps[torch.from_numpy(index_B)]
        timesteps = torch.cat([timesteps, timesteps], dim=0)
        sigmas = get_sigmas(scheduler, timesteps)
        noisy_model_input = (1.0 - sigmas) * model_input + sigmas * noise

        def predict(transformer: Any, *inputs: torch.Tensor) -> torch.Tensor:
            names = ("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections")
            return transformer(**dict(zip(names, inputs, strict=True)), return_dict=False)[0]

        model_pred = predict(transformer, noisy_model_input, timesteps, embeds, pooled_embeds)
        with torch.no_grad():
            model_pred_ref = predict(reference, noisy_model_input, timesteps, embeds, pooled_embeds)
        target = noise - model_input
        theta_mse = ((model_pred - target) ** 2).reshape(target.shape[0], -1).mean(dim=1)
        ref_mse = ((model_pred_ref - target) ** 2).reshape(target.shape[0], -1).mean(dim=1)
        w_diff, l_diff = (theta_mse - ref_mse)[:B], (theta_mse - ref_mse)[B:]
        inside_term = -0.5 * BETA * (w_diff - l_diff)
        loss = torch.mean(-torch.nn.functional.logsigmoid(inside_term))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def our_trajectory(
    inputs: Inputs, kind: str, denoise: Any, specs: Specs, params: Params, frozen: Frozen
) -> tuple[list[float], Params]:
    latents_BKHWC, noise_SBHWC, index_SB, conditioning = jax.tree.map(jnp.asarray, inputs)
    schedule = make_schedule({"_class_name": "FlowMatchEulerDiscreteScheduler"} | SCHEDULER)
    t_SB = len(schedule.t_T) - 1 - index_SB

    def score(params, frozen, batch, step, training):
        return with_batch(
            compare_denoising(
                denoise,
                frozen.policy(params),
                frozen.whole_reference(),
                schedule,
                latents_BKHWC,
                noise_SBHWC[step],
                t_SB[step],
                conditioning,
            ),
            batch,
        )

    rate = learning_rate_schedule("constant", RATES[kind], warmup_steps=0, total_steps=S)
    optimizer = make_optimizer("adamw", rate, specs, weight_decay=WEIGHT_DECAY, clip_norm=CLIP_NORM)
    step = make_train_step(score, Objective(loss=lambda inputs: dpo(inputs, beta=BETA)), optimizer)
    step = jax.jit(step, compiler_options=FAST)
    batch = PreferenceBatch(
        Raw(jnp.zeros((B, K, 1, 1, 3)), jnp.zeros((B, K), bool), jnp.zeros((B, 1, L), jnp.int32)),  # latents are given
        size_cond_BK6=jnp.zeros((B, K, 6)),
        preference_BK=jnp.array([[1.0, 0.0]] * B),
        valid_BK=jnp.ones((B, K), bool),
        weight_B=jnp.ones(B),
        index_B=jnp.arange(B),
    )
    state, losses = TrainState(jnp.int32(0), params, optimizer.init(params), {}), []
    for _ in range(S):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["train/loss"]))
    return losses, state.params


def build(dtype: Any, adapters: Adapters | None = None) -> Network:
    config = SD3TransformerConfig.from_dict(TRANSFORMER, "TRANSFORMER")

    def make(rngs: Any) -> SD3Transformer2DModel:
        module = SD3Transformer2DModel(config, dtype=dtype, rngs=rngs)
        add_lora(module, adapters or {}, 0.0, rngs)
        return module

    return Network.build(make, config)


@pytest.fixture
def double(x64: None) -> Iterator[None]:
    with double_diffusers():
        yield


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("kind", RATES)
def test_twenty_steps_of_flow_grpo(kind: str) -> None:
    plain, inputs = build(jnp.float64), make_inputs()
    transformer = torch_transformer(kind)
    before = trained_weights(transformer)
    weights = our_params(plain, torch_transformer("full").state_dict())
    adapted, specs = plain, {name: spec for name, spec in plain.specs.items() if spec.is_trainable}
    base = {name: weights[name] for name in weights.keys() - specs.keys()}  # the table of positions
    frozen = Frozen(base=base, reference=weights)
    if kind == "lora":
        adapters = find_targets(plain, rf"\battn\.({'|'.join(TARGETS)})$", rank=RANK, alpha=ALPHA)
        adapted = build(jnp.float64, adapters)
        specs, frozen = lora_specs(adapted), Frozen(base=weights)
    assert before.keys() == {torch_name(name) for name in specs}
    params = {name: jnp.asarray(from_torch(before[torch_name(name)].numpy(), spec)) for name, spec in specs.items()}

    def denoise(params: Params, *inputs: Any) -> jax.Array:
        return (adapted if params.keys() > weights.keys() else plain)(params, *inputs)

    expected_losses = torch_trajectory(inputs, kind, transformer)
    expected = trained_weights(transformer)
    losses, trained = our_trajectory(inputs, kind, denoise, specs, params, frozen)

    np.testing.assert_allclose(losses, expected_losses, rtol=1e-9)
    assert losses[0] == np.log(2)
    assert np.abs(np.array(losses[1:]) - np.log(2)).max() > 0.05
    for name, spec in specs.items():
        expected_update = from_torch((expected[torch_name(name)] - before[torch_name(name)]).numpy(), spec)
        distance = np.linalg.norm(trained[name] - params[name] - expected_update)
        assert distance <= 1e-6 * np.linalg.norm(expected_update), name  # both 0 for what the last block does not use


def test_a_run_begins_at_log_2_to_the_last_bit_in_bfloat16() -> None:
    """The policy has float32 masters, and the reference is stored in bfloat16."""
    network, inputs = build(jnp.bfloat16), jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), make_inputs())
    policy = our_params(network, torch_transformer("full").float().state_dict())
    reference = {name: x.astype(jnp.bfloat16) for name, x in policy.items()}
    schedule = make_schedule({"_class_name": "FlowMatchEulerDiscreteScheduler"} | SCHEDULER)

    @jax.jit
    def losses(policy: Params, reference: Params) -> jax.Array:
        def denoise(params: Params, *inputs: Any) -> jax.Array:
            return network({name: x.astype(jnp.bfloat16) for name, x in params.items()}, *inputs)

        pairs = compare_denoising(
            denoise,
            policy,
            reference,
            schedule,
            inputs.latents_BKHWC,
            inputs.noise_SBHWC[0],
            jnp.array([333, 999]),
            inputs.conditioning,
        )
        return dpo(pairs._replace(preference_BK=jnp.array([[1.0, 0.0]] * B)), beta=BETA)

    np.testing.assert_array_equal(losses(policy, reference), np.full(B, np.log(np.float32(2))))
