"""Runs with weights and moments in fewer bits begin at log 2, and go on bit by bit after a stop."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dpo_jax.training.run import open_run
from dpo_jax.training.trainer import train

STORED = {
    "both": {"memory.masters": "bfloat16", "optimizer.moments": "int8"},
    "weights": {"memory.masters": "bfloat16"},
    "8 bits": {"optimizer.moments": "int8"},
    "bfloat16 moments": {"optimizer.moments": "bfloat16"},
    "lion": {"memory.masters": "bfloat16", "optimizer.moments": "int8", "optimizer.name": "lion"},
    "adafactor": {"memory.masters": "bfloat16", "optimizer.name": "adafactor"},
    "averaged": {
        "memory.masters": "bfloat16",
        "ema.decay": 0.9,
        "moving_reference.every": 1,
        "moving_reference.decay": 0.9,
    },
    "lora": {"memory.masters": "bfloat16", "optimizer.moments": "int8", "lora.rank": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STORED)
def test_it_goes_on_bit_by_bit(name, tmp_path, tiny_config):
    fields = STORED[name] | {"optimizer.schedule": "constant", "data.micro_batch": 2, "checkpoint.every": 2}
    fields |= {"optimizer.learning_rate": 1e-3, "optimizer.scale_by_batch": False, "loss.beta": 100.0}
    train(tiny_config("sd15", steps=4, **fields), tmp_path / "at once")
    for steps in (2, 4):
        train(tiny_config("sd15", steps=steps, **fields), tmp_path / "stopped")
    whole, resumed = (
        ocp.PyTreeCheckpointer().restore(tmp_path / folder / "checkpoints" / "4" / "state")
        for folder in ("at once", "stopped")
    )
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), whole, resumed)

    stored = jnp.dtype(fields.get("memory.masters", "float32"))
    assert {x.dtype for x in jax.tree.leaves(whole["params"])} == {stored}
    kinds = {x.dtype.name for x in jax.tree.leaves(whole["opt_state"])}
    assert ("uint8" in kinds) == (fields.get("optimizer.moments") == "int8" and name != "lora")  # all of it is small
    rows = [json.loads(line) for line in (tmp_path / "at once" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(losses[-1] - math.log(2)) > 1e-4  # it has moved
    run = open_run(tmp_path / "at once")
    assert {x.dtype for x in run.params.values()} == {jnp.dtype("float32")}
