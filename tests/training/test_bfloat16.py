"""Runs in bfloat16, compiled as users compile them."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dpo_jax.models.execution import POLICIES
from dpo_jax.training.run import open_run

ROOT = Path(__file__).parents[2]


def run(config: str, workdir: Path, **fields: object) -> np.ndarray:
    """Return the losses of a run of the command."""
    settings = {"validation.every": 0, "sample.every": 0, "checkpoint.every": 10_000, "log_every": 1, **fields}
    arguments = [f"--config={config}", f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in settings.items())]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "dpo_jax.train", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return np.array([row["train/loss"] for row in rows if "train/loss" in row])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared data of the demo."""
    folder = tmp_path_factory.mktemp("pairs") / "data"
    prepare = ["dpo_jax.prepare", "--source=pickapic", "--input=dpo_jax/tiny/pairs.parquet", f"--output={folder}"]
    subprocess.run([sys.executable, "-m", *prepare], cwd=ROOT, check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "remat"), [*(("configs/tiny.py", remat) for remat in POLICIES), ("configs/tiny.py:lora", "none")]
)
def test_policy_and_reference_round_alike(config: str, remat: str, data: Path, tmp_path: Path) -> None:
    """With beta = 5000 the loss begins at log 2, except for the few pairs whose products a CPU rounds differently.

    Where intermediate values are not rounded it begins at 2.
    """
    fields = {"dtype": "bfloat16", "loss.beta": 5000.0, "steps": 1, "remat": remat, "data.path": data}
    assert run(config, tmp_path, **fields) == pytest.approx([math.log(2)], abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["configs/tiny.py", "configs/tiny.py:lora"])
def test_200_steps_learn_what_those_of_float32_learn(config: str, data: Path, tmp_path: Path) -> None:
    """The demo's update in bfloat16 is near to that in float32, and that of another order of the data is not.

    The losses themselves are less near. A prediction of only 256 numbers, each rounded, gives a logit with noise of
    some standard deviation s, which raises the mean of -log sigmoid by s^2 / 8, here about 0.01.
    """
    settings: dict[str, object] = {"data.path": data, "steps": 200}
    losses, updates = {}, {}
    for name, fields in {"float32": {}, "bfloat16": {"dtype": "bfloat16"}, "another seed": {"seed": 1}}.items():
        losses[name] = run(config, tmp_path / name, **settings, **fields)
        trained = open_run(tmp_path / name)
        base = trained.pipeline.read("unet")
        change = [np.asarray(trained.merged[weight], np.float64) - base[weight] for weight in base]
        updates[name] = np.concatenate([array.ravel() for array in change])
    assert {len(curve) for curve in losses.values()} == {200}
    smooth = {name: np.convolve(curve, np.ones(20) / 20, "valid") for name, curve in losses.items()}
    fell = smooth["float32"][0] - smooth["float32"][-1]
    assert fell > 5 * np.abs(smooth["bfloat16"] - smooth["float32"]).mean()
    length = np.linalg.norm(updates["float32"])
    away = {name: np.linalg.norm(update - updates["float32"]) / length for name, update in updates.items()}
    print({name: round(float(curve[-1]), 4) for name, curve in smooth.items()}, away)
    assert 0 < away["bfloat16"] < 0.2 < 1 < away["another seed"]
