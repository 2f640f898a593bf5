"""One run on one device and on a 2 x 2 mesh of four must agree; both in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json, sys
import dpo_jax, jax
devices, workdir = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_num_cpu_devices", devices)
from dpo_jax import sharding
from dpo_jax.cli import load_config
from dpo_jax.training import trainer
sharding.SMALL = 1024  # or nothing of this model would be split
config = load_config("configs/sdxl.py:tiny")
config.steps, config.data.batch_size, config.loss.beta = 3, 16, 10.0
config.validation.every = config.sample.every = 0
config.optimizer.warmup_steps, config.optimizer.learning_rate = 0, 1e-5
config.mesh.data, config.mesh.fsdp = (2, 2) if devices == 4 else (1, 1)
trainer.train(config, workdir)
from dpo_jax.training.run import open_run
params = open_run(workdir).params
split = sum(not p.sharding.is_fully_replicated for p in params.values())
print(json.dumps({"split": split, "norms": {name: float((p ** 2).sum()) for name, p in params.items()}}))
"""


def run(devices, workdir):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(devices), str(workdir)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows], json.loads(result.stdout.splitlines()[-1])


def test_four_devices_agree_with_one(tmp_path):
    one, params_of_one = run(1, tmp_path / "one")
    four, params_of_four = run(4, tmp_path / "four")
    assert params_of_one["split"] == 0
    assert params_of_four["split"] > 50
    np.testing.assert_allclose(four, one, rtol=1e-4)
    assert len(one) == 3
    assert abs(one[2] - one[0]) > 1e-3
    for name, norm in params_of_one["norms"].items():
        assert params_of_four["norms"][name] == pytest.approx(norm, rel=1e-4, abs=1e-9), name
