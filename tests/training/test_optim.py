"""Optimizers equal those of PyTorch or NumPy versions of the published ones; schedules those of diffusers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers.optimization import get_scheduler
from jax.sharding import AbstractMesh
from transformers import Adafactor

from dpo_jax.models.layers import CONV_AXES, LINEAR_AXES
from dpo_jax.sharding import AXES, SMALL, Placement
from dpo_jax.training.config import FALLING
from dpo_jax.training.optim import OPTIMIZERS, equal_shapes, learning_rate_schedule, make_optimizer, orthogonalize
from dpo_jax.weights.layout import ParamSpec

SPECS = {
    "conv.kernel": ParamSpec((3, 2, 5, 4), CONV_AXES),  # factored over height and width, which differ here
    "conv1x1.kernel": ParamSpec((1, 1, 5, 4), CONV_AXES),
    "linear.kernel": ParamSpec((6, 3), LINEAR_AXES),
    "linear2.kernel": ParamSpec((6, 3), LINEAR_AXES),
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


def our_params(run: Run, name: str, clip_norm: float, schedule: str, dtype=None, **options) -> dict[str, jax.Array]:
    rate = learning_rate_schedule(schedule, 0.1, warmup_steps=3, total_steps=STEPS)
    optimizer = make_optimizer(name, rate, SPECS, weight_decay=0.2, clip_norm=clip_norm, **options)
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


RATES = np.minimum(1, np.arange(STEPS) / 3) * 0.1
"""The learning rates of a warmup of three steps."""


def clipped(grads: dict[str, np.ndarray], clip_norm: float) -> dict[str, np.ndarray]:
    norm = np.sqrt(sum(np.square(grad).sum() for grad in grads.values()))
    return {name: grad * min(1, clip_norm / (norm + 1e-6)) for name, grad in grads.items()}


def assert_close(params: dict[str, jax.Array], expected: dict[str, np.ndarray], run: Run) -> None:
    for name, value in expected.items():
        moved = np.linalg.norm(value - run.params[name])
        assert moved > 1e-3, name
        assert np.linalg.norm(params[name] - value) < 1e-9 * moved, name


@pytest.mark.parametrize(("options", "beta2"), [({}, 0.99), ({"beta1": 0.95, "beta2": 0.98}, 0.98)])
def test_lion_is_the_published_algorithm(x64, run, options, beta2):
    """Algorithm 2 of arXiv 2302.06675."""
    beta1 = options.get("beta1", 0.9)
    params, momentum = dict(run.params), dict.fromkeys(SPECS, 0.0)
    for rate, grads in zip(RATES, run.grads, strict=True):
        for name, grad in clipped(grads, 1.0).items():
            direction = np.sign(beta1 * momentum[name] + (1 - beta1) * grad)
            params[name] = params[name] - rate * (direction + 0.2 * params[name])
            momentum[name] = beta2 * momentum[name] + (1 - beta2) * grad

    assert_close(our_params(run, "lion", 1.0, "constant_with_warmup", **options), params, run)


def newton_schulz(x: np.ndarray) -> np.ndarray:
    """`torch.optim._muon._zeropower_via_newtonschulz`, which rounds to bfloat16."""
    wide = x.T if x.shape[0] > x.shape[1] else x
    wide = wide / max(np.linalg.norm(wide), 1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide.T if x.shape[0] > x.shape[1] else wide


def test_muon_is_that_of_pytorch_for_linear_layers_and_adamw_for_the_rest(x64, run):
    expected = torch_params(run, "adamw", 1.0, "constant_with_warmup")
    for name in ("linear.kernel", "linear2.kernel"):
        kernel, momentum = run.params[name].T, 0.0  # PyTorch's layout: (out, in)
        for rate, grads in zip(RATES, run.grads, strict=True):
            grad = clipped(grads, 1.0)[name].T
            momentum = 0.95 * momentum + 0.05 * grad
            update = newton_schulz(0.95 * momentum + 0.05 * grad)
            kernel = kernel - rate * (0.2 * np.sqrt(max(grad.shape)) * update + 0.2 * kernel)
        expected[name] = kernel.T

    assert_close(our_params(run, "muon", 1.0, "constant_with_warmup"), expected, run)


def test_muon_matches_pytorch_up_to_its_bfloat16(run):
    kernel = torch.tensor(run.params["linear.kernel"].T.copy(), requires_grad=True)
    optimizer = torch.optim.Muon([kernel], lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    for rate, grads in zip(RATES, run.grads, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        kernel.grad = torch.tensor(grads["linear.kernel"].T)
        optimizer.step()

    ours = our_params(run, "muon", float("inf"), "constant_with_warmup")["linear.kernel"]

    np.testing.assert_allclose(ours, kernel.detach().numpy().T, atol=0.02)


def test_orthogonalized_matrices_have_equal_singular_values_and_zeros_stay(x64):
    x = np.random.default_rng(0).normal(size=(2, 8, 5)) * np.logspace(-1, 1, 5)
    assert np.linalg.cond(x).min() > 50
    values = np.linalg.svd(orthogonalize(jnp.asarray(x)), compute_uv=False)
    assert 0.6 < values.min() < values.max() < 1.3
    zeros = jnp.zeros((1, 3, 2))  # such as the gradient of a LoRA's first factor before its first update
    np.testing.assert_array_equal(orthogonalize(zeros), 0)


def test_matrices_of_one_shape_are_orthogonalized_together_up_to_a_size():
    params = {name: jnp.zeros((2, 3)) for name in "abcde"} | {"x": jnp.zeros((3, 2)), "y": jnp.zeros((100, 100))}
    assert equal_shapes(params, 12) == [["a", "b"], ["c", "d"], ["e"], ["x"], ["y"]]


@pytest.mark.parametrize("warmup_steps", [0, 2])
def test_prodigy_is_that_of_its_authors(x64, run, warmup_steps):
    """Algorithm 4 of arXiv 2306.06101, as in github.com/konstmish/prodigy; nothing happens before there is a rate."""
    steps, decay, beta1, beta2, epsilon = 40, 0.2, 0.9, 0.999, 1e-8
    rates = np.minimum(1, np.arange(steps) / warmup_steps) if warmup_steps else np.ones(steps)
    grads = [{name: x + 0.1 * np.cos(step) for name, x in run.grads[0].items()} for step in range(steps)]
    d = d0 = 1e-6
    numerator, begun, params = 0.0, 0, dict(run.params)
    mean, square, s = (dict.fromkeys(SPECS, 0.0) for _ in range(3))
    for rate, each in zip(rates, grads, strict=True):
        if rate == 0:
            continue
        begun += 1
        step_size = d * rate * np.sqrt(1 - beta2**begun) / (1 - beta1**begun)
        numerator *= np.sqrt(beta2)
        for name, grad in each.items():
            numerator += d / d0 * step_size * np.sum(grad * (run.params[name] - params[name]))
            mean[name] = beta1 * mean[name] + (1 - beta1) * d * grad
            square[name] = beta2 * square[name] + (1 - beta2) * np.square(d * grad)
            s[name] = np.sqrt(beta2) * s[name] + d / d0 * step_size * grad
        d = max(d, numerator / sum(np.abs(x).sum() for x in s.values()))
        for name in params:
            direction = mean[name] / (np.sqrt(square[name]) + d * epsilon)
            params[name] = params[name] - step_size * (direction + decay * params[name])
    assert d > 100 * d0

    schedule = learning_rate_schedule("constant_with_warmup", 1.0, warmup_steps=warmup_steps, total_steps=steps)
    optimizer = make_optimizer("prodigy", schedule, SPECS, weight_decay=decay, clip_norm=float("inf"))
    ours = {name: jnp.asarray(value) for name, value in run.params.items()}
    state, update = optimizer.init(ours), jax.jit(optimizer.update)
    for each in grads:
        updates, state = update(jax.tree.map(jnp.asarray, each), state, ours)
        ours = optax.apply_updates(ours, updates)

    assert_close(ours, params, run)


def test_prodigy_has_a_copy_of_the_initial_parameters(run):
    optimizer = make_optimizer("prodigy", optax.constant_schedule(1.0), SPECS)
    params = {name: jnp.asarray(value, jnp.float32) for name, value in run.params.items()}
    state = optimizer.init(params)
    for param in params.values():
        param.delete()  # as a step does with a donated one
    for name, value in state[1].start.items():
        np.testing.assert_array_equal(value, run.params[name].astype(np.float32))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_state_array_has_its_parameters_name_and_rank(run, name):
    optimizer = make_optimizer(name, optax.constant_schedule(0.1), SPECS)

    state = optimizer.init({key: jnp.asarray(value) for key, value in run.params.items()})

    leaves = [(path[-1], leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state) if leaf.ndim]
    assert {key.key for key, _ in leaves} == SPECS.keys()
    assert all(leaf.ndim == len(SPECS[key.key].shape) for key, leaf in leaves)


@pytest.mark.parametrize(("name", "large"), {"adamw": 4, "adafactor": 0, "lion": 2, "muon": 3, "prodigy": 8}.items())
def test_large_state_arrays_are_split_over_all_devices(name, large):
    specs = {
        "conv.kernel": ParamSpec((3, 3, 64, 128), CONV_AXES),
        "linear.kernel": ParamSpec((512, 256), LINEAR_AXES),
    }
    params = {key: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for key, spec in specs.items()}
    state = jax.eval_shape(make_optimizer(name, optax.constant_schedule(0.1), specs).init, params)

    shardings = Placement(AbstractMesh((2, 4, 1), AXES)).state(specs, state, over_data=True)

    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True)
    shares = [math.prod(place.shard_shape(leaf.shape)) / leaf.size for leaf, place in pairs if leaf.size >= SMALL]
    assert shares == [1 / 8] * large


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
