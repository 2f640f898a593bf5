"""The same round on one device, on eight, and on two processes of four: the same images and parameters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dpo_jax.data.images import read_image
from dpo_jax.sampling.image_folder import read_list
from dpo_jax.training.run import open_run

ROOT = Path(__file__).parents[2]

# Adam with a large epsilon is smooth: an element with a tiny gradient doesn't turn rounding into a full step.
SCRIPT = """
import json, sys
from dpo_jax import cluster, sharding
from dpo_jax.cli import load_config
from dpo_jax.training.defaults import with_fields
workdir, fields = sys.argv[1], json.loads(sys.argv[2])
def brightness(images, captions):  # the bytes of a JPEG would turn rounding of one pixel into another order
    return [image.mean() for image in images]
cluster.join()
from dpo_jax.rounds.loop import learn
sharding.SMALL = 256  # or nothing of this model would be split
config = load_config("configs/d3po.py:tiny")
config.online.rounds, config.online.epochs, config.data.batch_size, config.sample.every = 1, 3, 2, 0
config.online.prompts_per_round, config.online.candidates = 4, 3
config.optimizer.learning_rate, config.optimizer.epsilon, config.loss.beta = 3e-2, 1e-2, 10.0
config.online.judges = ("python=__main__:brightness",)
learn(with_fields(config, fields), workdir)
"""

SPO = {"online.branching": True, "online.best_and_worst": True}
NFT = {"loss.name": "nft", "online.timesteps": 1.0, "loss.kl_weight": 0.1}
WINDOW = {
    **{"loss.name": "flow_grpo", "loss.ratio": "guard", "loss.clip": 0.1, "online.sampler": "ddim"},
    **{
        "online.candidates": 3,
        "online.window": 2,
        "online.sampling_steps": 4,
        "data.batch_size": 4,
        "online.epochs": 6,
    },
}
FULL = {"lora.rank": 0, "optimizer.learning_rate": 1e-3}
NAMED = {"lora": {}, "spo": SPO, "nft": NFT, "window": WINDOW, "full": FULL}
NAMES = {json.dumps(fields): name for name, fields in NAMED.items()}
MESHES = {"data": {}, "fsdp": {"mesh.data": 2, "mesh.fsdp": 4}}


def learned(workdir: Path, fields: dict, *, processes: int, devices: int):
    """(images, losses, what was learned) of a run in new processes."""
    script = [sys.executable, "-c", SCRIPT, str(workdir), json.dumps(fields)]
    if processes > 1:
        script = ["bash", "launch/local_cluster.sh", *script]
    environment = os.environ | {
        "PROCESSES": str(processes),
        "DEVICES": str(devices),
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    folder = workdir / "rounds" / "00000" / "images"
    images = np.stack([read_image(folder / entry.image) for entry in read_list(folder)]).astype(int)
    return images, [row["train/loss"] for row in rows if "train/loss" in row], open_run(workdir)


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory: pytest.TempPathFactory):
    runs = {}

    def run(**fields):
        key = json.dumps(fields)
        if key not in runs:
            runs[key] = learned(tmp_path_factory.mktemp("one"), fields, processes=1, devices=1)
        return runs[key]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "fields", "processes"),
    [pytest.param(mesh, fields, processes) for mesh in MESHES for fields in NAMED.values() for processes in (1, 2)],
    ids=lambda value: NAMES.get(json.dumps(value)) if isinstance(value, dict) else str(value),
)
def test_eight_devices_agree_with_one(on_one_device, tmp_path: Path, mesh: str, fields: dict, processes: int) -> None:
    images, losses, run = learned(tmp_path, fields | MESHES[mesh], processes=processes, devices=8 // processes)
    expected_images, expected_losses, expected = on_one_device(**fields)

    assert np.abs(images - expected_images).max() <= 1
    assert len(losses) == 6
    assert abs(expected_losses[-1] - expected_losses[0]) > 1e-3
    # Advantages, unlike an order of candidates, pass on the rounding of images; and a policy gradient is 0 at first.
    has_advantages = "loss.ratio" in fields
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4, atol=5e-5 if has_advantages else 0)
    begun = {name: 0 for name in expected.params if ".lora_B." in name} or expected.base
    moved = max(np.abs(expected.params[name] - value).max() for name, value in begun.items())
    assert moved > 1e-3
    apart = (2e-3 if has_advantages else 5e-4) * moved
    for name, value in expected.params.items():
        np.testing.assert_allclose(run.params[name], value, rtol=1e-4, atol=apart, err_msg=name)
