"""A run has the same losses and parameters, up to rounding, on one device, on eight, and on two processes of four."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dpo_jax.training.run import open_run
from dpo_jax.training.side_gradients import SIDES

ROOT = Path(__file__).parents[2]

# Adam with a large epsilon is smooth: an element with a tiny gradient doesn't turn rounding into a full step.
SCRIPT = """
import json, sys
from dpo_jax import cluster, sharding
from dpo_jax.weights import quantised
from dpo_jax.cli import load_config
workdir, fields = sys.argv[1], json.loads(sys.argv[2])
cluster.join()
from dpo_jax.training import trainer
from dpo_jax.training.defaults import with_fields
sharding.SMALL = quantised.SMALL = 1024  # or nothing of this model would be split or quantised
config = load_config(f"configs/{fields.pop('config', 'sd15')}.py:tiny")
config.steps, config.data.batch_size, config.optimizer.epsilon = 10, 16, 1e-2
config.validation.every = config.sample.every = 0
config.checkpoint.every = 10
config.optimizer.warmup_steps, config.optimizer.learning_rate = 0, 1e-3
trainer.train(with_fields(config, {"loss.beta": 10.0} | fields), workdir)
"""

LORA = {"lora.rank": 4, "lora.alpha": 4.0, "optimizer.learning_rate": 0.1, "optimizer.epsilon": 0.1}  # smoother still
KTO = {"loss.name": "kto", "data.micro_batch": 1}  # its mean is over the whole batch
FOLLOWS = {"moving_reference.every": 2, "moving_reference.decay": 0.5, "loss.inversion_steps": 2}
MESHES = {
    "data": {},
    "fsdp": {"mesh.fsdp": 8},
    "tensor": {"mesh.fsdp": 2, "mesh.tensor": 2},
    "eight": {"mesh.data": 8, "mesh.fsdp": 1},
    "two_by_four": {"mesh.data": 2, "mesh.fsdp": 4},
}
QUANTISED = ({**LORA, "memory.frozen": "nf4"}, {"config": "flux", **LORA, "memory.frozen": "int8"})
FLOWS = ({"config": "sd35"}, {"config": "flux", **LORA}, {"config": "zimage", **LORA})


def train(workdir: Path, fields: dict, *, processes: int, devices: int) -> list[list[float]]:
    """Train in new processes and return the loss of each step, and the gradient's norms by the predictions."""
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
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [[row[name] for name in ("train/loss", *SIDES)] for row in rows]


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory: pytest.TempPathFactory):
    """(losses, parameters, sizes of their changes) of the same run on one device."""
    runs = {}

    def run(**fields):
        key = json.dumps(fields)
        if key not in runs:
            workdir = tmp_path_factory.mktemp("one")
            losses = train(workdir, fields, processes=1, devices=1)
            opened = open_run(workdir)
            begun = {name: 0 for name in opened.params} if "lora.rank" in fields else opened.base
            changes = {name: np.abs(value - begun[name]).max() for name, value in opened.params.items()}
            runs[key] = losses, opened.params, changes
        return runs[key]

    return run


def assert_same(workdir: Path, losses: list[list[float]], expected) -> None:
    expected_losses, expected_params, changes = expected
    assert len(losses) == 10
    assert (np.ptp(expected_losses, axis=0) > 0.01 * np.mean(expected_losses, axis=0)).all()
    np.testing.assert_allclose(np.array(losses)[:, 0], np.array(expected_losses)[:, 0], rtol=1e-5)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    params = open_run(workdir).params
    moved = max(changes.values())
    assert moved > 1e-3
    for name, value in expected_params.items():
        np.testing.assert_allclose(params[name], value, rtol=1e-5, atol=1e-4 * moved, err_msg=name)


@pytest.mark.parametrize(
    ("mesh", "fields", "processes"),
    [
        pytest.param("tensor", {}, 1),  # all three axes
        *(
            pytest.param(mesh, fields, processes, marks=pytest.mark.slow)
            for mesh in ("data", "fsdp", "tensor")
            for fields in ({}, LORA)
            for processes in (1, 2)
            if (mesh, fields, processes) != ("tensor", {}, 1)
        ),
        pytest.param("fsdp", FOLLOWS, 1, marks=pytest.mark.slow),
        pytest.param("fsdp", KTO, 1, marks=pytest.mark.slow),
        *(
            pytest.param(mesh, fields, 1, marks=pytest.mark.slow)
            for fields in FLOWS
            for mesh in ("eight", "two_by_four")
        ),
        pytest.param("fsdp", QUANTISED[0], 1, marks=pytest.mark.slow),
        pytest.param("tensor", QUANTISED[0], 1, marks=pytest.mark.slow),
        pytest.param("two_by_four", QUANTISED[1], 1, marks=pytest.mark.slow),
    ],
    ids=lambda value: {
        json.dumps(LORA): "lora",
        json.dumps(FOLLOWS): "follows",
        json.dumps(KTO): "kto",
        "{}": "full",
        **{json.dumps(fields): fields["config"] for fields in FLOWS},
        **{json.dumps(fields): fields["memory.frozen"] for fields in QUANTISED},
    }.get(json.dumps(value), str(value)),
)
def test_eight_devices_agree_with_one(on_one_device, tmp_path: Path, mesh: str, fields: dict, processes: int) -> None:
    losses = train(tmp_path, fields | MESHES[mesh], processes=processes, devices=8 // processes)
    assert_same(tmp_path, losses, on_one_device(**fields))


@pytest.mark.slow
def test_goes_on_on_other_devices_as_if_it_had_stayed(on_one_device, tmp_path: Path) -> None:
    """Five steps on one device, then five on two processes of two, which read their parts of that checkpoint."""
    train(tmp_path, {"checkpoint.every": 5}, processes=1, devices=1)
    shutil.rmtree(tmp_path / "checkpoints" / "10")
    losses = train(tmp_path, {"mesh.fsdp": 2, "mesh.tensor": 2}, processes=2, devices=2)
    assert_same(tmp_path, losses, on_one_device())


UPDATE = """
import json, math, re, sys
import dpo_jax, jax, jax.numpy as jnp
jax.config.update("jax_num_cpu_devices", 8)
from dpo_jax import sharding
from dpo_jax.cli import load_config
from dpo_jax.training.config import resolve
from dpo_jax.training.experiment import build
from dpo_jax.training.model import open_model
import optax
sharding.SMALL = 1024
config = load_config("configs/sd15.py:tiny")
config.data.batch_size, config.mesh.fsdp, config.optimizer.name = 8, int(sys.argv[1]), sys.argv[3]
derived = resolve(config, device_count=8, process_count=1)
experiment = build(config, derived, open_model(config, sys.argv[2]))
state = experiment.abstract_state()

def update(params, opt_state, grads):
    updates, opt_state = experiment.optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

place = jax.tree.map(lambda x: x.sharding, (state.params, state.opt_state))
text = jax.jit(update, out_shardings=place).lower(state.params, state.opt_state, state.params).compile().as_text()
shapes = re.findall(r"= f32\\[([\\d,]*)\\]\\S* all-gather\\(", text)
gathered = sum(math.prod(map(int, shape.split(","))) for shape in shapes)
split = sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state.opt_state))
print(json.dumps([gathered, sum(x.size for x in state.params.values()), split]))
"""


@pytest.mark.parametrize(
    ("fsdp", "name"),
    [(1, "adamw"), (8, "adamw"), *(pytest.param(8, name, marks=pytest.mark.slow) for name in ("lion", "prodigy"))],
)
def test_the_optimizer_state_is_never_gathered(tmp_path: Path, fsdp: int, name: str) -> None:
    """With fsdp nothing is gathered for the update; copies of the model that share it gather new parameters once."""
    done = subprocess.run(
        [sys.executable, "-c", UPDATE, str(fsdp), str(tmp_path), name],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    gathered, parameters, split = json.loads(done.stdout.splitlines()[-1])
    assert split > 40
    assert gathered == 0 if fsdp == 8 else 0.5 * parameters < gathered <= parameters


STEP = """
import json, sys
import dpo_jax, jax
jax.config.update("jax_num_cpu_devices", 8)
from dpo_jax import sharding
from dpo_jax.cli import load_config
from dpo_jax.planning.compiled import count_collectives
from dpo_jax.training.config import resolve
from dpo_jax.training.experiment import compose
from dpo_jax.training.model import make_placement, open_model
sharding.SMALL = 1024
config = load_config("configs/sdxl.py:tiny")
config.data.batch_size, config.mesh.data, config.mesh.fsdp, config.scan = 8, 1, 8, True
experiment = compose(config, resolve(config, device_count=8, process_count=1), open_model(config, sys.argv[1]),
                     make_placement(config))
arguments = experiment.abstract_state(), experiment.frozen, experiment.abstract_batch()
print(json.dumps(count_collectives(experiment.train_step().lower(*arguments).compile().as_text())))
"""


@pytest.mark.slow
def test_weights_come_to_the_images_and_not_images_to_the_weights(tmp_path: Path) -> None:
    """With fsdp, weights are gathered and gradients summed; activations stay on the devices of their examples."""
    done = subprocess.run(
        [sys.executable, "-c", STEP, str(tmp_path)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert json.loads(done.stdout.splitlines()[-1]).keys() <= {"all-gather", "all-reduce", "reduce-scatter"}
