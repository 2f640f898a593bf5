"""Every loss on pairs and lists: its published formula in PyTorch, and properties that hold for any errors."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid, softplus

from dpo_jax.batch import LossInputs
from dpo_jax.errors import UserError
from dpo_jax.methods import METHODS
from dpo_jax.methods.stability import PAIR_FIELDS
from dpo_jax.training.config import check_values
from dpo_jax.training.defaults import choose_method, default_config

B = 5
PAIRS = [name for name, method in METHODS.items() if method.learns_from == "pairs"]
COMPARED = [name for name in PAIRS if METHODS[name].needs_reference]
for_pairs = pytest.mark.parametrize("name", PAIRS)
for_compared = pytest.mark.parametrize("name", COMPARED)
OFF = {f"loss.{name}": field.default for name, field in PAIR_FIELDS.items()} | {"loss.safeguard": "none"}
"""Fields of the plug-ins, with which a loss is the method's own."""
examples = settings(max_examples=30, deadline=None, derandomize=True, database=None)


def published_ipo(e_w, e_l, ref_w, ref_l, b=2500.0):
    d = (ref_w - e_w) - (ref_l - e_l)
    return (d - 1 / (2 * b)) ** 2


def published_dmpo(e_w, e_l, ref_w, ref_l, b=2000.0, a=0.01):
    inside = -0.5 * b * ((e_w - e_l) - (ref_w - ref_l))
    p, log_p, log_not_p = torch.sigmoid(inside), -softplus(-inside), -softplus(inside)
    return p * (log_p - math.log(1 - a)) + (1 - p) * (log_not_p - math.log(a))


def published_linear_dpo(e_w, e_l, ref_w, ref_l, b=500.0, eta=0.0):
    inside = -0.5 * b * ((e_w - e_l) - (ref_w - ref_l))
    weight = (0.5 - 0.4 * inside).clamp(eta, 1 - eta).detach()
    return weight * (e_w - e_l)


def published_mapo(e_w, e_l, ref_w, ref_l, beta=0.1, s=0.5, timesteps=1000):
    odds_w, odds_l = (s * e / (torch.exp(s * e) - 1) for e in (e_w, e_l))
    return e_w - beta * logsigmoid(timesteps * (odds_w - odds_l))


PUBLISHED = {
    "dpo": lambda e_w, e_l, ref_w, ref_l: -logsigmoid(-0.5 * 5000 * ((e_w - e_l) - (ref_w - ref_l))),
    "inpo": lambda e_w, e_l, ref_w, ref_l: -logsigmoid(-0.5 * 2000 * ((e_w - e_l) - (ref_w - ref_l))),
    "ipo": lambda *errors: 2500**2 * published_ipo(*errors),  # see its docstring
    "hinge": lambda e_w, e_l, ref_w, ref_l: torch.relu(1 - 2500 * ((ref_w - e_w) - (ref_l - e_l))),
    "dmpo": published_dmpo,
    "linear_dpo": published_linear_dpo,
    "mapo": published_mapo,
}
"""Of hard labels, by method. SmPO's formula takes a soft one."""


def inputs_of(error_BK, reference_error_BK, preference_BK) -> LossInputs:
    return LossInputs(
        -(error_BK - reference_error_BK) / 2,
        preference_BK=jnp.asarray(preference_BK, error_BK.dtype),
        valid_BK=jnp.ones(error_BK.shape, bool),
        error_BK=error_BK,
        reference_error_BK=reference_error_BK,
    )


@functools.cache
def compiled(name, **fields):
    chosen = OFF | {f"loss.{field}": value for field, value in fields.items()}
    loss = METHODS[name].objective(chosen).loss

    def total(error_BK, *others):
        loss_B = loss(inputs_of(error_BK, *others))
        return loss_B.sum(), loss_B

    return jax.jit(jax.grad(total, has_aux=True))


def value_and_gradient(name, error_BK, reference_error_BK, preference_BK, **fields):
    """Return the loss of each prompt and its gradient by the policy's errors."""
    gradient_BK, loss_B = compiled(name, **fields)(error_BK, reference_error_BK, preference_BK)
    return np.asarray(loss_B), np.asarray(gradient_BK)


def random_errors(K=2):
    """Errors of policy and reference, whose differences are on the scale of 1 / beta, some far beyond."""
    rng = np.random.default_rng(0)
    return 0.15 + np.array([2e-4, 2e-4, 1e-3, 1e-3, 4e-3])[:, None] * rng.normal(size=(2, B, K))


def expected_of(name, error_BK, reference_error_BK, p_B):
    """Return loss and gradient of the published formula; the expectation over the order of a pair if p is not 1."""
    error = torch.from_numpy(error_BK).requires_grad_()
    reference, p = torch.from_numpy(reference_error_BK), torch.from_numpy(p_B)
    (e_w, e_l), (ref_w, ref_l) = error.T, reference.T
    if name == "smpo":
        loss = -logsigmoid(-0.5 * 2000 * ((e_w - e_l) - (ref_w - ref_l)) * 10 * (2 * p - 1))
    else:
        loss = p * PUBLISHED[name](e_w, e_l, ref_w, ref_l) + (1 - p) * PUBLISHED[name](e_l, e_w, ref_l, ref_w)
    (gradient,) = torch.autograd.grad(loss.sum(), error)
    loss = loss.detach()
    if name == "linear_dpo":  # ours subtracts the errors of the reference, with the same weights
        loss = loss - (gradient * reference).sum(dim=1)
    return loss.numpy(), gradient.numpy()


@for_pairs
@pytest.mark.parametrize("label", ["hard", "soft"])
def test_value_and_gradient_are_published(x64, name, label):
    error_BK, reference_error_BK = random_errors()
    p_B = np.array([1.0, 0.9, 0.6, 0.5, 0.25]) if label == "soft" else np.ones(B)
    expected_B, expected_BK = expected_of(name, error_BK, reference_error_BK, p_B)

    loss_B, gradient_BK = value_and_gradient(name, error_BK, reference_error_BK, np.stack([p_B, 1 - p_B], axis=1))

    np.testing.assert_allclose(loss_B, expected_B, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(gradient_BK, expected_BK, rtol=1e-9, atol=1e-12)
    assert np.any(gradient_BK)


errors = st.floats(0.0, 2.0, width=32)
shifts = st.floats(-0.005, 0.005)
shares = st.floats(0.0, 1.0)


def one_pair(e_w, e_l, ref_w, ref_l, p=1.0):
    return np.array([[e_w, e_l]]), np.array([[ref_w, ref_l]]), np.array([[p, 1 - p]])


@for_pairs
@examples
@given(errors, shifts, errors, shifts, shares)
def test_swapping_candidates_and_preference_changes_nothing(name, reference_w, by_w, reference_l, by_l, p):
    pair = one_pair(reference_w + by_w, reference_l + by_l, reference_w, reference_l, p)
    with jax.enable_x64(True):
        loss_B, gradient_BK = value_and_gradient(name, *pair)
        swapped_B, swapped_BK = value_and_gradient(name, *(x_BK[:, ::-1] for x_BK in pair))
    np.testing.assert_allclose(swapped_B, loss_B, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(swapped_BK[:, ::-1], gradient_BK, rtol=1e-9, atol=1e-12)


AT_REFERENCE = {
    "dpo": math.log(2),
    "inpo": math.log(2),
    "ipo": 0.25,
    "hinge": 1.0,
    "dmpo": 0.5 * math.log(0.25 / (0.01 * 0.99)),
    "linear_dpo": 0.0,
    "smpo": math.log(2),
}


@for_compared
@examples
@given(errors, errors, shares)
def test_a_policy_equal_to_the_reference_has_one_loss_whatever_the_pair(name, e_w, e_l, p):
    loss_B, gradient_BK = value_and_gradient(name, *one_pair(e_w, e_l, e_w, e_l, p))
    np.testing.assert_allclose(loss_B, AT_REFERENCE[name], rtol=1e-6)
    assert np.sign(gradient_BK[0, 0]) == np.sign(np.float32(p) - np.float32(1 - p)) == -np.sign(gradient_BK[0, 1])


@for_compared
def test_the_loss_that_a_run_announces_before_its_first_step(name):
    assert METHODS[name].objective(OFF).loss_at_reference() == pytest.approx(AT_REFERENCE[name], rel=1e-6)


@for_compared
@examples
@given(errors, errors, shifts, shifts, shifts)
def test_what_both_candidates_or_both_networks_share_does_not_matter(name, ref_w, ref_l, by_w, by_l, shift):
    with jax.enable_x64(True):
        loss_B, gradient_BK = value_and_gradient(name, *one_pair(ref_w + by_w, ref_l + by_l, ref_w, ref_l))
        for pair in (
            one_pair(ref_w + by_w + shift, ref_l + by_l + shift, ref_w, ref_l),
            one_pair(ref_w + by_w + shift, ref_l + by_l, ref_w + shift, ref_l),
        ):
            shifted_B, shifted_BK = value_and_gradient(name, *pair)
            np.testing.assert_allclose(shifted_B, loss_B, rtol=1e-6, atol=1e-8)
            np.testing.assert_allclose(shifted_BK, gradient_BK, rtol=1e-6, atol=1e-6)


@for_pairs
@examples
@given(st.floats(0.01, 2), st.floats(0, 5e-4), st.floats(0.01, 2), st.floats(0, 5e-4))
def test_a_pair_that_is_not_learned_pushes_the_winner_down_and_the_loser_up(name, ref_w, by_w, ref_l, by_l):
    """By gradient descent on the errors, of a policy that is not yet better at the winner than at the loser."""
    pair = one_pair(ref_w + by_w, ref_l - by_l, ref_w, ref_l)
    with jax.enable_x64(True):
        _, gradient_BK = value_and_gradient(name, *pair)
    assert gradient_BK[0, 0] > 0
    if name != "mapo" or abs(ref_w - ref_l) < 0.1:  # whose temperature saturates beyond
        assert gradient_BK[0, 1] < 0


@for_pairs
@pytest.mark.parametrize("pair", [(9e3, 0.0), (0.0, 9e3), (0.0, 0.0)], ids=["hopeless", "learned", "zero"])
def test_value_and_gradient_are_finite_in_float32(name, pair):
    loss_B, gradient_BK = value_and_gradient(
        name, np.float32([pair]), np.zeros((1, 2), np.float32), np.float32([[1, 0]])
    )
    assert loss_B.dtype == np.float32
    assert np.isfinite(loss_B).all()
    assert np.isfinite(gradient_BK).all()


@for_pairs
def test_a_tie_with_equal_shares_pulls_no_side(name):
    loss_B, gradient_BK = value_and_gradient(name, *one_pair(0.1501, 0.1501, 0.15, 0.15, p=0.5))
    assert np.isfinite(loss_B).all()
    np.testing.assert_allclose(gradient_BK[0, 0], gradient_BK[0, 1], atol=1e-6)


PUBLISHED_BETAS = {"dpo": 5000, "inpo": 2000, "dmpo": 2000, "linear_dpo": 500, "smpo": 2000, "ipo": 2500, "hinge": 2500}


@pytest.mark.parametrize(("name", "published"), PUBLISHED_BETAS.items())
def test_published_betas_are_the_defaults_in_the_unit_of_a_halved_difference(name, published):
    """Codes without the factor 1/2 have half of our beta; the test of formulas above holds at the defaults."""
    has_half = name not in ("ipo", "hinge")
    assert METHODS[name].fields["beta"].default == (published if has_half else 2 * published)


def test_smpo_weighs_by_how_clear_a_label_is():
    pair = random_errors()
    _, unsure_BK = value_and_gradient("smpo", *pair, np.tile([0.505, 0.495], (B, 1)))
    _, tie_BK = value_and_gradient("smpo", *pair, np.full((B, 2), 0.5))
    _, dpo_BK = value_and_gradient("dpo", *pair, np.tile([1.0, 0.0], (B, 1)), beta=2000 * 10 * 0.01)
    np.testing.assert_allclose(unsure_BK, dpo_BK, rtol=1e-4)
    assert not np.any(tie_BK)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("labels", "hard", r"data\.labels='hard' leaves none\. Set data\.labels=\"soft\", or loss\.name=\"dpo\""),
        ("judges", ("pickscore",), r"data\.judges=\('pickscore',\) only order images\. Set data\.judges=\(\)"),
    ],
)
def test_smpo_asks_for_shares_of_votes(field, value, message):
    config = default_config()
    choose_method(config, "smpo")
    assert config.data.labels == "soft"
    check_values(config)
    config.data[field] = value
    with pytest.raises(UserError, match=message):
        check_values(config)
