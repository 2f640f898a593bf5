"""Moments in 8 bits equal bitsandbytes' scheme; those in bfloat16 keep their mean."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.sharding import AbstractMesh

from dpo_jax.models.layers import CONV_AXES, LINEAR_AXES
from dpo_jax.sharding import AXES, Placement
from dpo_jax.training.moments import (
    Codes,
    block_axis,
    from_codes,
    magnitude,
    magnitude_code,
    to_codes,
    with_stored_moments,
)
from dpo_jax.training.optim import make_optimizer
from dpo_jax.weights.layout import ParamSpec


def published_map(signed: bool) -> torch.Tensor:
    """The 256 values of bitsandbytes' `create_dynamic_map`, ascending."""
    values = [0.0, 1.0]
    for decade in range(7):
        boundaries = torch.linspace(0.1, 1, 2 ** (decade + (0 if signed else 1)) + 1, dtype=torch.float32)
        centres = 10.0 ** (decade - 6) * (boundaries[:-1] + boundaries[1:]) / 2
        values += centres.tolist() + (-centres).tolist() * signed
    assert len(values) == 256
    return torch.tensor(sorted(values))


def nearest(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return (x.reshape(-1, 1).double() - values.double()).abs().argmin(dim=1).reshape(x.shape)


@pytest.mark.parametrize("signed", [True, False])
def test_the_codes_are_those_of_bitsandbytes(signed):
    values = published_map(signed)
    positive = values[127:] if signed else values
    codes = jnp.arange(len(positive))
    np.testing.assert_allclose(magnitude(codes, signed=signed), positive, rtol=5e-7)
    np.testing.assert_array_equal(magnitude_code(jnp.asarray(positive.numpy()), signed=signed), codes)

    middles = (positive[1:].double() + positive[:-1].double()) / 2
    random = 10 ** (-7.5 * torch.rand(20_000, dtype=torch.float64, generator=torch.manual_seed(0)))
    x = torch.cat([middles * (1 - 1e-5), middles * (1 + 1e-5), random]).float()
    np.testing.assert_array_equal(magnitude_code(jnp.asarray(x.numpy()), signed=signed), nearest(x, positive))


@pytest.mark.parametrize("signed", [True, False])
def test_blocks_lie_along_the_input_features_and_have_scales_of_their_own(signed):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 3, 320, 4)) * 10.0 ** rng.uniform(-6, 2, size=(3, 3, 2, 1, 4)).repeat(160, 3).reshape(
        3, 3, 320, 4
    )
    x = jnp.asarray(x if signed else np.abs(x), jnp.float32).at[0, 0, :160, 0].set(0)
    axis = block_axis(CONV_AXES, x.shape)
    stored = to_codes(x, axis, signed=signed)
    assert (stored.codes.dtype, stored.codes.shape) == (jnp.uint8, x.shape)
    assert stored.scales.shape == (3, 3, 2, 4)  # two blocks of 160

    blocks = x.reshape(3, 3, 2, 160, 4)
    scales = jnp.abs(blocks).max(3)
    np.testing.assert_array_equal(stored.scales, scales)
    values = published_map(signed)
    relative = torch.tensor(np.asarray(blocks / np.where(scales > 0, scales, 1)[:, :, :, None]))
    expected = values[nearest(relative, values)].numpy().reshape(3, 3, 2, 160, 4) * scales[:, :, :, None]
    np.testing.assert_allclose(from_codes(stored, axis, signed=signed), expected.reshape(x.shape), rtol=1e-6)


def test_8_bit_adamw_equals_bitsandbytes_scheme_in_pytorch():
    """bitsandbytes has PyTorch's layout and blocks of 256 in a row: here they lie along the 256 inputs."""
    rng = np.random.default_rng(0)
    rate, beta1, beta2, epsilon, decay = 1e-2, 0.9, 0.999, 1e-8, 0.1
    weights = torch.tensor(rng.normal(size=(16, 256)), dtype=torch.float32)
    spec = ParamSpec((256, 16), LINEAR_AXES)
    optimizer = make_optimizer(
        "adamw",
        optax.constant_schedule(rate),
        {"kernel": spec},
        weight_decay=decay,
        clip_norm=np.inf,
        moments="int8",
    )
    params = {"kernel": jnp.asarray(weights.numpy().T)}
    state = optimizer.init(params)
    maps = published_map(True), published_map(False)
    stored = [(torch.zeros(16, 256, dtype=torch.long), torch.zeros(16, 1)) for _ in maps]
    for number, code in enumerate((127, 0)):
        stored[number][0].fill_(code)

    update = jax.jit(optimizer.update)
    for step in range(1, 31):
        grad = torch.tensor(10 ** rng.uniform(-5, 0) * rng.normal(size=(16, 256)), dtype=torch.float32)
        mean, square = (values[codes] * scale for values, (codes, scale) in zip(maps, stored, strict=True))
        mean = beta1 * mean + (1 - beta1) * grad
        square = beta2 * square + (1 - beta2) * grad**2
        denominator = square.sqrt() / (1 - beta2**step) ** 0.5 + epsilon
        weights = weights - rate * (mean / (1 - beta1**step) / denominator + decay * weights)
        scales = [x.abs().amax(dim=1, keepdim=True) for x in (mean, square)]
        stored = [
            (nearest(x / scale, values), scale) for x, scale, values in zip((mean, square), scales, maps, strict=True)
        ]
        updates, state = update({"kernel": jnp.asarray(grad.numpy().T)}, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["kernel"].T, weights, atol=2e-5)
    leaves = [x for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Codes)) if isinstance(x, Codes)]
    assert len(leaves) == 2
    same = [np.mean(np.asarray(x.codes.T) == codes.numpy()) for x, (codes, _) in zip(leaves, stored, strict=True)]
    assert min(same) > 0.999  # all but ties, and what these lead to


def test_small_parameters_and_vectors_keep_float32():
    specs = {
        "large.kernel": ParamSpec((64, 64), LINEAR_AXES),
        "small.kernel": ParamSpec((63, 64), LINEAR_AXES),
        "bias": ParamSpec((10_000,), (0,)),
    }
    optimizer = make_optimizer("adamw", optax.constant_schedule(1.0), specs, moments="int8")
    state = jax.eval_shape(optimizer.init, {name: jnp.zeros(spec.shape, jnp.bfloat16) for name, spec in specs.items()})
    dtypes = {
        (key.key, x.dtype.name)
        for path, x in jax.tree_util.tree_leaves_with_path(state)
        for key in path
        if isinstance(key, jax.tree_util.DictKey)
    }
    expected = {("large.kernel", "uint8"), ("large.kernel", "float32")}
    assert dtypes == expected | {("small.kernel", "float32"), ("bias", "float32")}


def test_bfloat16_moments_follow_means_that_move_by_less_than_their_last_bit():
    """Rounded to the nearest, a mean over a thousand steps would stay where it is."""
    specs = {"kernel": ParamSpec((64, 64), LINEAR_AXES)}
    optimizer = with_stored_moments(optax.scale_by_adam(0.9, 0.999), specs, "bfloat16", seed=0)
    params = {"kernel": jnp.zeros((64, 64), jnp.float32)}
    state = optimizer.init(params)

    def step(state, size):
        _, state = optimizer.update({"kernel": jnp.full((64, 64), size)}, state)
        return state, None

    state, _ = jax.lax.scan(step, state, jnp.full(300, 1.0))
    square = state[1].nu["kernel"]
    assert square.dtype == jnp.bfloat16
    expected = 1 - 0.999**300
    assert abs(float(square.astype(float).mean()) / expected - 1) < 0.01
    again, _ = jax.lax.scan(step, optimizer.init(params), jnp.full(300, 1.0))
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), state, again))


def test_scales_are_split_as_their_parameter_where_their_axes_divide():
    spec = ParamSpec((1280, 640), LINEAR_AXES)  # 5 blocks of inputs
    optimizer = make_optimizer("adamw", optax.constant_schedule(1.0), {"kernel": spec}, moments="int8")
    state = jax.eval_shape(optimizer.init, {"kernel": jnp.zeros(spec.shape)})
    for rule, codes, scales in [
        ((None, None), (None, "fsdp"), (None, "fsdp")),
        (("tensor", None), ("tensor", "fsdp"), (None, "fsdp")),
    ]:
        placement = Placement(AbstractMesh((1, 4, 2), AXES), [("kernel", rule)])
        places = jax.tree.leaves(placement.state({"kernel": spec}, state))
        shapes = jax.tree.leaves(state)
        found = {x.shape: tuple(place.spec) for x, place in zip(shapes, places, strict=True) if x.ndim == 2}
        assert found == {(1280, 640): codes, (5, 640): scales}
