"""A reference that follows the policy is what its formula says, and belongs to the training state."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax.errors import UserError
from dpo_jax.methods import METHODS
from dpo_jax.planning.estimate import Work, make_plan, measure_holdings
from dpo_jax.planning.model_shapes import open_structure
from dpo_jax.planning.topology import parse_topology
from dpo_jax.training.checkpoint import Checkpoints, restore
from dpo_jax.training.config import check, resolve
from dpo_jax.training.experiment import build
from dpo_jax.training.model import load_denoiser, open_model
from dpo_jax.training.moving_reference import first_reference
from dpo_jax.training.sample_grids import SampleGrids
from dpo_jax.training.step import TrainState, make_compare, make_train_step

from ..small_denoiser import SCHEDULE, denoise, encode, frozen_like, make_batch, perturbed

LINEAR_DPO = METHODS["linear_dpo"].objective({"loss.beta": 500.0})
KTO = METHODS["kto"].objective({"loss.beta": 500.0})
OPTIMIZER = optax.adamw(1e-2)
BATCH = make_batch()
NO_WEIGHT = BATCH._replace(weight_B=np.zeros(8, np.float32))
NOT_FINITE = BATCH._replace(preference_BK=BATCH.preference_BK.at[2].set(jnp.nan))


def small_step(objective=LINEAR_DPO, accumulation=1, **fields):
    compare = make_compare(encode, denoise, SCHEDULE, objective, seed=3)
    return jax.jit(make_train_step(compare, objective, OPTIMIZER, accumulation=accumulation, **fields))


@pytest.mark.parametrize(
    ("every", "decay", "accumulation", "objective"),
    [(1, 0.9, 4, LINEAR_DPO), (2, 0.0, 1, LINEAR_DPO), (3, 0.5, 2, KTO)],
)
def test_each_step_compares_with_the_reference_that_the_formula_gives(params, every, decay, accumulation, objective):
    """Policies and references are those of steps with a fixed reference, which a NumPy loop moves after updates."""
    batches = [BATCH, BATCH, NO_WEIGHT, BATCH, NOT_FINITE, BATCH, BATCH, BATCH, BATCH]
    fixed = small_step(objective, accumulation)
    moves = small_step(objective, accumulation, reference_every=every, reference_decay=decay)
    policy = perturbed(params)
    frozen = frozen_like(params)
    state = TrainState(jnp.int32(0), policy, OPTIMIZER.init(policy), {}, reference=first_reference(params))
    expected = state._replace(reference=None)
    reference, updates = {name: np.array(value) for name, value in params.items()}, 0
    for batch in batches:
        state, metrics = moves(state, dataclasses.replace(frozen, reference={}), batch)
        expected, expected_metrics = fixed(expected, dataclasses.replace(frozen, reference=reference), batch)
        for name, value in expected_metrics.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-9, atol=1e-12, err_msg=name)
        for name in params:
            np.testing.assert_allclose(state.params[name], expected.params[name], rtol=1e-12)
            np.testing.assert_allclose(state.reference.params[name], reference[name], rtol=1e-12)
        updates += batch is BATCH
        if batch is BATCH and updates % every == 0:
            for name, value in expected.params.items():
                reference[name] = decay * reference[name] + (1 - decay) * np.asarray(value)
    assert updates == 7
    assert not np.allclose(reference["in"], params["in"], rtol=1e-3)


def test_a_renewed_reference_is_the_policy(params):
    """Bit for bit, so that the loss begins anew at that of policy = reference."""
    step = small_step(METHODS["dpo"].objective({"loss.beta": 500.0}), reference_every=2)
    state = TrainState(jnp.int32(0), params, OPTIMIZER.init(params), {}, reference=first_reference(params))
    losses = []
    for _ in range(5):
        before = state
        state, metrics = step(state, dataclasses.replace(frozen_like(params), reference={}), BATCH)
        losses.append(float(metrics["train/loss"]))
    assert [abs(loss - math.log(2)) < 1e-12 for loss in losses] == [True, False, True, False, True]
    jax.tree.map(np.testing.assert_array_equal, state.reference.params, before.params)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_begins_with_a_copy_of_the_policy_in_float32(tiny_config, tmp_path, rank):
    """Neither the policy's memory, which a step overwrites, nor a second reference is held."""
    fields = {"moving_reference.every": 1, "moving_reference.decay": 0.99, "loss.name": "linear_dpo", "lora.rank": rank}
    config = tiny_config("sd15", dtype="bfloat16", **fields)
    experiment = build(config, resolve(config, device_count=1, process_count=1), open_model(config, tmp_path))
    state, abstract = experiment.initial_state(), experiment.abstract_state()
    assert not experiment.frozen.reference
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for name, value in state.reference.params.items():
        np.testing.assert_array_equal(value, state.params[name])
        assert value.dtype == jnp.float32
        assert value.unsafe_buffer_pointer() != state.params[name].unsafe_buffer_pointer()
    whole = experiment.frozen.with_reference(state.reference).whole_reference()
    assert whole.keys() == experiment.frozen.policy(state.params).keys()
    grids = SampleGrids(experiment, print)
    base = load_denoiser(experiment.pipeline, experiment.placement)
    jax.tree.map(np.testing.assert_array_equal, grids._compared_with(), base)


class OlderState:
    """A state as versions saved it that had no moving reference."""

    def __init__(self, state):
        self.step, self.state = state.step, state

    def _asdict(self):
        return {name: value for name, value in self.state._asdict().items() if name != "reference"}


def test_the_reference_is_checkpointed_and_older_checkpoints_have_none(tmp_path):
    params = {"a.kernel": jnp.arange(3.0)}
    fixed = TrainState(jnp.int32(2), params, (), {})
    moved = fixed._replace(reference=first_reference({"a.kernel": jnp.ones(3)})._replace(updates=jnp.int32(7)))
    for name, saved, expected in (("moved", moved, moved), ("fixed", fixed, fixed), ("old", OlderState(fixed), fixed)):
        checkpoints = Checkpoints(tmp_path / name, keep=1)
        checkpoints.save(saved, {"position": 5})
        checkpoints.close()
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), expected)
        restored, position = restore(tmp_path / name, shapes)
        assert position == {"position": 5}
        jax.tree.map(np.testing.assert_array_equal, restored, expected)


def test_a_plan_counts_a_moving_reference_in_place_of_the_fixed_one(tiny_config):
    """Eight devices hold two copies of the model, each split as the policy is."""
    moving, fixed = (
        tiny_config("sdxl", dtype="bfloat16", **{"mesh.data": 2, "mesh.fsdp": 4, "data.batch_size": 8, **fields})
        for fields in ({"moving_reference.every": 1}, {})
    )
    work, machine = Work("none", 8e12, 8e12, 0, 0, 0), parse_topology("v5e:2x4")
    plans = [
        make_plan(measure_holdings(config, open_structure(config), 8), work, machine, batch_size=8, pairs=1)
        for config in (moving, fixed)
    ]
    memory, before = plans[0].memory, plans[1].memory
    trained = memory["trained weights, float32"]
    assert (memory["moving reference"], before["moving reference"]) == (trained, 0)
    assert (memory["reference and frozen denoiser"], before["reference and frozen denoiser"]) == (0, trained / 2)
    assert memory["trained weights, rounded"] - before["trained weights, rounded"] == trained / 2
    sent, sent_before = ([c.received_bytes for c in plan.collectives if c.axis == "fsdp"] for plan in plans)
    assert sent == sent_before, "devices exchange rounded weights of both"
    assert plans[0].update_seconds > plans[1].update_seconds


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"moving_reference.decay": 0.9}, r"decay=0.9 has no effect with .*every=0, .*; set every=1"),
        ({"moving_reference.every": 5, "loss.name": "sft"}, r"every=5, but this run compares with no reference"),
        ({"moving_reference.every": 5, "reference": "FOLDER"}, r"every=5 .* config.reference=FOLDER names another one"),
        ({"moving_reference.every": 5, "lora.init": "FILE"}, r"begins with that of config.lora.init.*_reference=True"),
        (
            {"moving_reference.every": 5, "validation.every": 1, "checkpoint.best": "pair_accuracy"},
            r"config.checkpoint.best=pair_accuracy compares with the reference, which .*every=5 moves",
        ),
    ],
)
def test_fields_that_contradict_a_moving_reference(tiny_config, fields, message):
    with pytest.raises(UserError, match=message):
        check(tiny_config("sd15", **fields))
