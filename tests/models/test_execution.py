"""Rematerialization and loops change memory and compiled programs, but not the result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.batch import Conditioning
from dpo_jax.models.execution import POLICIES, Execution
from dpo_jax.models.network import Network, init_params
from dpo_jax.models.random_model import UNET_SDXL
from dpo_jax.models.unet import UNet2DConditionModel
from dpo_jax.models.unet_config import UNetConfig
from dpo_jax.training.defaults import FIELDS

CONFIG = UNetConfig.from_dict(UNET_SDXL, "config.json")
CONDITIONING = Conditioning(jnp.ones((2, 5, 80)), jnp.ones((2, 40)), jnp.ones((2, 6)))
X_NHWC = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 4)))


def mean_square(execution: Execution):
    def make(rngs):
        return UNet2DConditionModel(CONFIG, execution=execution, dtype=jnp.float64, rngs=rngs)

    unet = Network.build(make, CONFIG)
    return lambda params: jnp.square(unet(params, X_NHWC, jnp.array([3, 500]), CONDITIONING)).mean()


def kept_bytes(policy: str, params) -> int:
    _, pullback = jax.eval_shape(lambda params: jax.vjp(mean_square(Execution(policy)), params), params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pullback))


@pytest.fixture(scope="module")
def random_params():
    with jax.enable_x64(True):
        params = init_params(lambda rngs: UNet2DConditionModel(CONFIG, dtype=jnp.float64, rngs=rngs), seed=0)
        return {name: value.astype(jnp.float64) for name, value in params.items()}


@pytest.fixture
def params(x64, random_params):
    return random_params


@pytest.fixture(scope="module")
def expected(random_params):
    """Return the gradients by plain autodiff."""
    with jax.enable_x64(True):
        return jax.jit(jax.grad(mean_square(Execution())))(random_params)


@pytest.mark.parametrize(
    "execution",
    [
        Execution("block", True),
        *(pytest.param(Execution(name), marks=pytest.mark.slow) for name in ("dots", "attention", "block")),
        pytest.param(Execution(scan=True), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradients_are_those_of_plain_autodiff(params, expected, execution: Execution) -> None:
    for name, grad in jax.jit(jax.grad(mean_square(execution)))(params).items():
        np.testing.assert_allclose(grad, expected[name], rtol=1e-9, atol=1e-14, err_msg=name)


def test_each_policy_keeps_less_than_the_one_before(params) -> None:
    weights = sum(value.nbytes for value in params.values())
    kept = [kept_bytes(policy, params) - weights for policy in ("none", "dots", "attention", "block")]
    assert kept == sorted(kept, reverse=True)
    assert kept[1] < 0.65 * kept[0]
    assert kept[3] < 0.5 * kept[1]
    assert kept[2] > 1.05 * kept[3]


def test_the_config_offers_these_policies() -> None:
    assert FIELDS["remat"].choices == (*POLICIES, "auto")


def test_in_a_loop_equal_blocks_are_traced_once(params) -> None:
    """There are two blocks each at the second level, in the middle, and above."""

    def products(scan: bool) -> int:
        text = str(jax.make_jaxpr(mean_square(Execution(scan=scan)))(params))
        return text.count("dot_general")

    assert products(True) < 0.75 * products(False)
