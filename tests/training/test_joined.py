"""Parameters that are joined within the step train as separate ones do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax.cli import replaced
from dpo_jax.methods import METHODS
from dpo_jax.training.config import resolve
from dpo_jax.training.experiment import compose
from dpo_jax.training.joined import ELEMENTWISE, Joining
from dpo_jax.training.model import make_placement, open_model
from dpo_jax.training.optim import make_optimizer
from dpo_jax.training.step import TrainState, make_compare, make_train_step
from dpo_jax.weights.layout import ParamSpec

from ..small_denoiser import SCHEDULE, denoise, encode, frozen_like, make_batch

GROUPS = {"down.attn.to_q.kernel": "in", "mid.conv.kernel": "out"}
"""The small denoiser's two parameters under names of two groups."""
DPO = METHODS["dpo"].objective({"loss.beta": 500.0, "loss.label_smoothing": 0.0})
KTO = METHODS["kto"].objective({"loss.beta": 500.0})


@pytest.fixture
def named(params):
    return {name: params[own] for name, own in GROUPS.items()} | {"up.attn2.to_k.kernel": params["in"][:2] / 3}


def denoise_named(params, x_NHWC, t_N, conditioning):
    first, second, third = params.values()
    return denoise({"in": first.at[:2].add(third), "out": second}, x_NHWC, t_N, conditioning)


def specs_of(params):
    return {name: ParamSpec(x.shape, tuple(range(x.ndim))) for name, x in params.items()}


@pytest.mark.parametrize(
    ("optimizer", "objective", "accumulation"), list(zip(ELEMENTWISE, (DPO, DPO, KTO), (1, 4, 2), strict=True))
)
def test_joined_parameters_train_as_separate_ones(named, optimizer, objective, accumulation):
    optimizer = make_optimizer(optimizer, optax.constant_schedule(1e-2), specs_of(named), clip_norm=0.1)
    compare = make_compare(encode, denoise_named, SCHEDULE, objective, seed=3)
    joining = Joining(specs_of(named))

    def make(compare):
        return make_train_step(compare, objective, optimizer, accumulation=accumulation, ema_decay=0.5)

    start = TrainState(jnp.int32(0), named, optimizer.init(named), named)
    separate, joined = jax.jit(make(compare)), jax.jit(joining.around(make(joining.within(compare))))
    states = [start, start]
    for number in range(4):
        batch = make_batch(start=8 * number)
        if number == 2:  # changes nothing
            batch = batch._replace(weight_B=jnp.zeros(8))
        states, metrics = zip(
            *[step(state, frozen_like(named), batch) for step, state in zip((separate, joined), states, strict=True)],
            strict=True,
        )

    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    assert list(states[1].params) == list(named)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12), *states)
    assert metrics[0].keys() == metrics[1].keys() >= {"gradient_norm/attention", "gradient_norm/convolutions"}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12), *metrics)
    assert all(np.any(states[1].params[name] != x) for name, x in named.items())


def test_joined_parameters_have_one_square_root_a_group(named):
    """Which is what the optimizer's denominators take: one kernel for all parameters, not one for each."""
    optimizer = make_optimizer("adamw", optax.constant_schedule(1e-2), specs_of(named))
    joining = Joining(specs_of(named))

    def roots(params, cut=lambda tree: tree):
        jaxpr = jax.make_jaxpr(lambda p: cut(optimizer.update(p, optimizer.init(p), p)))(params)
        return sum(
            equation.primitive.name == "sqrt" and equation.outvars[0].aval.shape != () for equation in jaxpr.eqns
        )

    assert (roots(named), roots(joining.join(named), joining.cut)) == (3, 2)


def test_only_a_lora_on_one_device_is_joined(tiny_config, tmp_path):
    """And only for optimizers, and with rates, that treat all numbers alike."""
    config = tiny_config("sd15", **{"lora.rank": 4})

    def joins(**fields):
        changed = replaced(config, {name.replace("__", "."): value for name, value in fields.items()})
        pipeline = open_model(changed, tmp_path)
        derived = resolve(changed, device_count=1, process_count=1)
        return compose(changed, derived, pipeline, make_placement(changed)).joins

    assert joins()
    assert joins(optimizer__name="lion")
    assert not joins(lora__rank=0)
    assert not joins(optimizer__name="adafactor")
    assert not joins(optimizer__rates=((r"lora_B", 2.0),))
    assert not joins(moving_reference__every=10)
