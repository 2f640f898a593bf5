"""Factors of the learning rate multiply updates; frozen parameters neither change nor have an optimizer state."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax.cli import flatten, load_config, replaced
from dpo_jax.methods import METHODS
from dpo_jax.planning.estimate import measure_holdings
from dpo_jax.planning.model_shapes import open_structure
from dpo_jax.streams import warn
from dpo_jax.training.announce import warn_of_rate
from dpo_jax.training.checkpoint import Checkpoints, restore
from dpo_jax.training.config import check_same_experiment, default_config
from dpo_jax.training.optim import OPTIMIZERS, learning_rate_schedule, make_optimizer
from dpo_jax.training.rates import rate_factors, with_factors
from dpo_jax.training.step import TrainState, make_compare, make_train_step
from dpo_jax.weights.layout import ParamSpec

from ..small_denoiser import SCHEDULE, denoise, encode, frozen_like, make_batch, perturbed

NAMES = ["conv_in.kernel", "down.attn1.to_q.kernel", "down.attn1.to_k.kernel", "down.norm1.scale"]


def test_the_first_pattern_that_is_found_counts():
    factors = rate_factors((("to_q", 2), (r"attn\d", 0.5), (r"\.scale$", 0)), NAMES)
    assert factors == dict(zip(NAMES, (1.0, 2.0, 0.5, 0.0), strict=True))
    assert set(rate_factors((), NAMES).values()) == {1.0}


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ([("atn1.to_k", 0.1)], r"'atn1.to_k' .* matches none of the 4 .* nearest to it are down.attn1.to_k.kernel, "),
        ([(r"^\.norm", 0.1)], r"nearest to it are down.norm1.scale, "),
        ([("attn", 0.1), ("to_q", 1)], r"'to_q' .* has no effect: earlier patterns match all of its 1 .* to the front"),
        ([("norm", 0), ("", 0)], r"rates freezes all 4 parameters.*Give some of them a factor above 0"),
    ],
)
def test_patterns_without_effect_and_nothing_to_train_are_refused(rates, message):
    with pytest.raises(ValueError, match=message):
        rate_factors(rates, NAMES)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_multiplied_and_frozen_parameters_are_as_if_they_were_not_there(x64, name):
    specs = {f"{part}.kernel": ParamSpec((6, 3), (1, 0)) for part in "abc"}
    rng = np.random.default_rng(0)
    params, grads = ({key: jnp.asarray(rng.normal(size=(6, 3))) for key in specs} for _ in range(2))
    plain = make_optimizer(name, optax.constant_schedule(0.1), specs, weight_decay=0.2)
    scaled = with_factors(plain, {"a.kernel": 0.25, "b.kernel": 1.0, "c.kernel": 0.0})
    trained = [{key: tree[key] for key in ("a.kernel", "b.kernel")} for tree in (grads, params)]
    state, expected_state = scaled.init(params), plain.init(trained[1])

    for _ in range(3):
        updates, state = scaled.update(grads, state, params)
        expected, expected_state = plain.update(trained[0], expected_state, trained[1])
        assert updates.keys() == expected.keys()
        np.testing.assert_allclose(updates["a.kernel"], 0.25 * expected["a.kernel"], rtol=1e-12)
        np.testing.assert_array_equal(updates["b.kernel"], expected["b.kernel"])
    jax.tree.map(np.testing.assert_array_equal, state, expected_state)
    assert "c.kernel" not in str(jax.tree.structure(state))


@pytest.mark.parametrize(("method", "accumulation"), [("dpo", 1), ("kto", 2)])
def test_a_step_leaves_frozen_parameters_as_they_are_and_counts_no_gradient_of_theirs(params, method, accumulation):
    objective = METHODS[method].objective({"loss.beta": 500.0, "loss.label_smoothing": 0.0})
    compare = make_compare(encode, denoise, SCHEDULE, objective, seed=3)
    start = perturbed(params) | {"in": perturbed(params)["in"].at[0, 0].set(-0.0)}
    optimizer = with_factors(optax.sgd(1e-2), {"in": 0.0, "out": 1.0})
    step = make_train_step(compare, objective, optimizer, accumulation=accumulation, frozen_names={"in"})
    state = TrainState(jnp.int32(0), start, optimizer.init(start), {})

    state, metrics = jax.jit(step)(state, frozen_like(params), make_batch())

    assert state.params["in"].tobytes() == start["in"].tobytes()
    change = np.linalg.norm(state.params["out"] - start["out"])
    assert change > 0
    assert metrics["train/gradient_norm"] == pytest.approx(change / 1e-2)


def test_plans_count_neither_gradients_nor_state_of_frozen_parameters():
    config = load_config("sd15:tiny")
    pipeline = open_structure(config)

    def held(**fields):
        return measure_holdings(
            replaced(config, {f"optimizer.{name}": value for name, value in fields.items()}), pipeline, 1
        )

    whole, part = held(), held(rates=((r"attentions\.", 0.5), ("", 0)))
    assert part.trained == whole.trained == whole.gradients
    assert 0 < part.gradients < whole.gradients / 2
    assert part.optimizer == pytest.approx(2 * part.gradients, rel=1e-3)
    copies = {name: held(name=name).optimizer / whole.trained for name in ("lion", "muon", "prodigy")}
    assert copies == pytest.approx({"lion": 1, "muon": copies["muon"], "prodigy": 4}, rel=1e-3)
    assert 1 < copies["muon"] < 2  # one of matrices, two of the rest


@pytest.mark.parametrize("name", ["lion", "muon", "prodigy"])
def test_a_state_that_was_saved_goes_on_bit_for_bit(tmp_path, name):
    specs = {f"{part}.kernel": ParamSpec((6, 3), (1, 0)) for part in "abc"} | {"norm.scale": ParamSpec((6,), (0,))}
    schedule = learning_rate_schedule("constant_with_warmup", 1.0, warmup_steps=2, total_steps=6)
    factors = {key: 0.0 if key == "c.kernel" else 0.5 for key in specs}
    optimizer = with_factors(make_optimizer(name, schedule, specs), factors)
    params = {key: jnp.ones(spec.shape) for key, spec in specs.items()}
    state = TrainState(jnp.int32(0), params, jax.jit(optimizer.init)(params), {})
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        grads = {key: x + jnp.cos(state.step) for key, x in state.params.items()}
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        changed = optax.apply_updates({key: state.params[key] for key in updates}, updates)
        return state._replace(step=state.step + 1, params=state.params | changed, opt_state=opt_state)

    for _ in range(3):
        state = step(state)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state, {"position": 3})
    checkpoints.close()
    found = restore(tmp_path, abstract)
    assert found is not None
    for _ in range(3):
        state, found = step(state), (step(found[0]), None)
    jax.tree.map(np.testing.assert_array_equal, state, found[0])
    moved = {key: bool(np.any(value != 1)) for key, value in state.params.items()}
    assert moved == {key: key != "c.kernel" for key in specs}


@pytest.mark.parametrize(
    ("name", "rate", "warned"), [("prodigy", 1.0, False), ("prodigy", 1e-5, True), ("adamw", 1e-5, False)]
)
def test_a_rate_far_from_1_is_warned_of_with_prodigy(capsys, name, rate, warned):
    fields = {"optimizer.name": name, "optimizer.learning_rate": rate, "optimizer.scale_by_batch": False}
    warn.cache_clear()
    warn_of_rate(replaced(default_config(), fields))
    assert ("is 1e-05 after scale_by_batch, but prodigy multiplies it" in capsys.readouterr().err) == warned


def test_runs_begun_with_the_number_that_the_default_beta2_stands_for_go_on():
    now = flatten(default_config())
    assert now["optimizer.beta2"] == -1
    saved = json.loads(json.dumps(now | {"optimizer.beta2": 0.999}))
    del saved["optimizer.rates"]
    check_same_experiment(now, saved, "runs/old", default_config())
    lion = {"optimizer.name": "lion"}
    with pytest.raises(ValueError, match=r"optimizer.beta2 was 0.999, now 0.99"):
        check_same_experiment(now | lion, saved | lion, "runs/old", default_config())
