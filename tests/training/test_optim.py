"""Optimizers equal torch.optim.AdamW and transformers.Adafactor; schedules equal diffusers.optimization."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers.optimization import get_scheduler
from transformers import Adafactor

from dpo_jax.models.layers import CONV_AXES, LINEAR_AXES
from dpo_jax.training.config import FALLING
from dpo_jax.training.optim import learning_rate_schedule, make_optimizer
from dpo_jax.weights.layout import ParamSpec

SPECS = {
    "conv.kernel": ParamSpec((3, 2, 5, 4), CONV_AXES),  # factored over height and width, which differ here
    "conv1x1.kernel": ParamSpec((1, 1, 5, 4), CONV_AXES),
    "linear.kernel": ParamSpec((6, 3), LINEAR_AXES),
    "table.embedding": ParamSpec((7, 3), (0, 1)),
    "norm.scale": ParamSpec((6,), (0,)),
}
STEPS = 10


@dataclasses.dataclass
class Run:
    """Return parameters and gradients in our layout; gradient sizes differ widely, also between steps."""

    params: dict[str, np.ndarray]
    grads: list[dict[str, np.ndarray]]


@pytest.fixture
def run() -> Run:
    rng = np.random.default_rng(0)
    normal = {name: lambda spec=spec: rng.normal(size=spec.shape) for name, spec in SPECS.items()}
    grads = [{name: 10.0 ** rng.uniform(-3, 1) * draw() for name, draw in normal.items()} for _ in range(STEPS)]
    return Run({name: draw() for name, draw in normal.items()}, grads)


def torch_params(run: Run, name: str, clip_norm: float, schedule: str) -> dict[str, np.ndarray]:
    """Return the final parameters of the PyTorch optimizer, in our layout."""
    params = {key: torch.tensor(run.params[key].transpose(SPECS[key].torch_axes)) for key in SPECS}
    for param in params.values():
        param.requires_grad_()
    if name == "adamw":
        optimizer = torch.optim.AdamW(params.values(), lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.2)
    else:
        optimizer = Adafactor(params.values(), lr=0.1, weight_decay=0.2, scale_parameter=False, relative_step=False)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=3, num_training_steps=STEPS)
    for grads in run.grads:
        for key, param in params.items():
            param.grad = torch.tensor(grads[key].transpose(SPECS[key].torch_axes))
        torch.nn.utils.clip_grad_norm_(params.values(), clip_norm)
        optimizer.step()
        scheduler.step()
    return {key: param.detach().numpy().transpose(np.argsort(SPECS[key].torch_axes)) for key, param in params.items()}


def our_params(run: Run, name: str, clip_norm: float, schedule: str, dtype=None) -> dict[str, jax.Array]:
    rate = learning_rate_schedule(schedule, 0.1, warmup_steps=3, total_steps=STEPS)
    optimizer = make_optimizer(name, rate, SPECS, weight_decay=0.2, clip_norm=clip_norm)
    params = {key: jnp.asarray(value, dtype) for key, value in run.params.items()}
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for grads in run.grads:
        updates, state = update({key: jnp.asarray(value, dtype) for key, value in grads.items()}, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("clip_norm", [1.0, 30.0, float("inf")], ids=["always", "sometimes", "never clipped"])
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_ten_steps_match_pytorch(x64, run, name, clip_norm):
    expected = torch_params(run, name, clip_norm, "constant_with_warmup")

    params = our_params(run, name, clip_norm, "constant_with_warmup")

    for key, value in expected.items():
        moved = np.linalg.norm(value - run.params[key])
        assert moved > 0.1, key
        assert np.linalg.norm(params[key] - value) < 1e-9 * moved, key


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_float32_stays_float32_and_close(run, name):
    expected = torch_params(run, name, 1.0, "cosine")

    params = our_params(run, name, 1.0, "cosine", jnp.float32)

    for key, value in expected.items():
        assert params[key].dtype == jnp.float32
        np.testing.assert_allclose(params[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_every_state_array_has_its_parameters_name_and_rank(run, name):
    optimizer = make_optimizer(name, optax.constant_schedule(0.1), SPECS)

    state = optimizer.init({key: jnp.asarray(value) for key, value in run.params.items()})

    leaves = [(path[-1], leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state) if leaf.ndim]
    assert {key.key for key, _ in leaves} == SPECS.keys()
    assert all(leaf.ndim == len(SPECS[key.key].shape) for key, leaf in leaves)


def test_adafactor_state_is_a_fraction_of_the_linear_layers(run):
    optimizer = make_optimizer("adafactor", optax.constant_schedule(0.1), SPECS)

    state = optimizer.init({key: jnp.asarray(value) for key, value in run.params.items()})[1]

    assert state.row["linear.kernel"].shape == (1, 3)  # ours (in, out): the mean over torch's last axis, in
    assert state.col["linear.kernel"].shape == (6, 1)
    assert state.row["conv.kernel"].shape == (3, 1, 5, 4)  # over width
    assert state.col["conv.kernel"].shape == (1, 2, 5, 4)  # over height
    assert state.full.keys() == {"norm.scale"}


@pytest.mark.parametrize("warmup_steps", [0, 3])
@pytest.mark.parametrize(
    ("name", "cycles", "power"),
    [
        *((name, 1, 1.0) for name in ("constant", "constant_with_warmup", *FALLING)),
        ("cosine_with_restarts", 3, 1.0),
        ("polynomial", 1, 2.5),
        ("polynomial", 1, 0.5),
    ],
)
def test_learning_rates_match_diffusers(x64, name, cycles, power, warmup_steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-5)
    scheduler = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=STEPS,
        num_cycles=cycles,
        power=power,
    )
    schedule = learning_rate_schedule(
        name, 2e-5, warmup_steps=warmup_steps, total_steps=STEPS, cycles=cycles, power=power
    )

    for step in range(STEPS + 1):
        np.testing.assert_allclose(schedule(jnp.int32(step)), scheduler.get_last_lr()[0], rtol=1e-12, atol=1e-20)
        optimizer.step()
        scheduler.step()


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match=r"is not an? .*; choose one of "):
        learning_rate_schedule("cosin", 1e-5, warmup_steps=0, total_steps=1)
    with pytest.raises(ValueError, match=r"is not an? .*; choose one of "):
        make_optimizer("adam", optax.constant_schedule(0.1), SPECS)
