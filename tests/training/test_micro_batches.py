"""The same config gives the same batch on any number of devices; the micro-batches follow from `data.micro_batch`."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dpo_jax.api.training import settled
from dpo_jax.cli import flatten, load_config, replaced
from dpo_jax.errors import UserError
from dpo_jax.rounds import config as rounds_config
from dpo_jax.training import config as training_config
from dpo_jax.training.checkpoint import write_config
from dpo_jax.training.config import check_same_experiment, default_config, describe_batch, resolve
from dpo_jax.training.micro_batches import sum_over

ROOT = Path(__file__).parents[2]


def divided(name: str, devices: int, **fields: object):
    config = replaced(load_config(f"{ROOT}/configs/{name}.py"), fields)
    return resolve(config, device_count=devices, process_count=1)


@pytest.mark.parametrize("devices", [1, 8, 16, 64, 256])
@pytest.mark.parametrize(
    ("name", "micro_batch"), [("sdxl", 1), ("sdxl_refiner", 1), ("sdxl_turbo", 4), ("sd15", 8), ("sd21", 4)]
)
def test_a_published_config_has_the_same_batch_on_any_number_of_devices(name, micro_batch, devices):
    derived = divided(name, devices)
    assert derived.micro_batch_per_device == micro_batch
    assert derived.micro_batch_per_device * derived.accumulation * devices == 2048
    assert derived.learning_rate == pytest.approx(2.048e-5)


@pytest.mark.parametrize(
    ("batch", "asked", "devices", "expected"),  # per device at a time, micro-batches
    [
        (32, 8, 1, (8, 4)),
        (30, 8, 1, (6, 5)),
        (62, 8, 2, (1, 31)),
        (32, 64, 4, (8, 1)),
        (32, 0, 4, (8, 1)),
    ],
)
def test_the_largest_micro_batch_that_divides_is_taken(batch, asked, devices, expected):
    derived = divided("sd15", devices, **{"data.batch_size": batch, "data.micro_batch": asked})
    assert (derived.micro_batch_per_device, derived.accumulation) == expected


def test_a_smaller_micro_batch_is_told():
    fields = {"data.batch_size": 60, "data.micro_batch": 8}
    config = replaced(load_config(f"{ROOT}/configs/sd15.py"), fields)
    told = describe_batch(config, resolve(config, device_count=2, process_count=2), process_count=2)
    assert told == (
        "60 pairs per step = 2 devices x 5 micro-batches x 6 (data.micro_batch=8 does not divide the 30 of a device)"
    )
    config.data.micro_batch = 64  # all at once is what it asks for
    told = describe_batch(config, resolve(config, device_count=2, process_count=1), process_count=1)
    assert told == "60 pairs per step = 2 devices x 1 micro-batches x 30"


@pytest.mark.parametrize(
    ("fields", "devices", "message"),
    [
        ({"data.batch_size": 100}, 16, r"batch_size=100 is not divisible by 16 devices\. Set .* to 96 or 112$"),
        ({"data.batch_size": 8}, 16, r"batch_size=8 is not divisible by 16 devices\. Set data\.batch_size to 16$"),
        (
            {"data.batch_size": 9, "mesh.tensor": 2},
            8,
            r"9 is not divisible by 4 groups of devices \(mesh\.tensor=2\)\. .* to 8 or 12$",
        ),
    ],
)
def test_a_batch_that_devices_do_not_divide_is_told_with_the_nearest(fields, devices, message):
    with pytest.raises(UserError, match=message):
        divided("sd15", devices, **fields)


@pytest.mark.parametrize(
    ("module", "name", "accumulation", "micro_batch"),
    [(training_config, "sd15", 256, 8), (training_config, "sdxl:lora", 16, 1), (rounds_config, "d3po", 10, 2)],
)
def test_the_name_of_before_is_answered_with_the_new_one(module, name, accumulation, micro_batch):
    path, _, variant = name.partition(":")
    config = load_config(f"{ROOT}/configs/{path}.py:{variant}")
    with config.unlocked():
        config.data.accumulation = accumulation
    with pytest.raises(UserError, match=rf"^config\.data\.accumulation={accumulation} is .*micro_batch={micro_batch} "):
        module.check(config)


def test_a_run_that_had_an_accumulation_goes_on():
    """Micro-batches do not change the results, so a run may continue with others."""
    config = load_config(f"{ROOT}/configs/sdxl.py")
    fields = json.loads(json.dumps(flatten(config)))
    saved = {field: value for field, value in fields.items() if field != "data.micro_batch"} | {"data.accumulation": 64}
    check_same_experiment(fields, saved, "WORKDIR", default_config())
    with pytest.raises(UserError, match=r"data\.batch_size was 1024, now 2048"):
        check_same_experiment(fields, saved | {"data.batch_size": 1024}, "WORKDIR", default_config())


def test_sums_in_bfloat16_lose_no_small_gradients():
    """Rounded to the nearest, a sum would stop growing at 256 times what is added."""
    like = {"kernel": jnp.zeros((64, 64), jnp.bfloat16)}

    def gradient(batch):
        return {"kernel": jnp.full((64, 64), 1.0, jnp.bfloat16) * batch}, {}

    summed = jax.jit(lambda micro: sum_over(gradient, micro, like, jax.random.key(0))[0]["kernel"])
    total = summed(jnp.ones((2000,), jnp.bfloat16))
    assert total.dtype == jnp.bfloat16
    assert float(total.astype(jnp.float32).mean()) == pytest.approx(2000, rel=0.01)


def test_a_run_that_goes_on_keeps_what_memory_auto_chose(tmp_path):
    config = load_config(f"{ROOT}/configs/sd15.py:tiny")
    config.memory.auto = True
    assert settled(config, tmp_path).memory.masters == "float32"
    write_config(tmp_path, flatten(replaced(config, {"memory.masters": "bfloat16", "optimizer.moments": "int8"})))
    kept = settled(config, tmp_path)
    assert (kept.memory.masters, kept.optimizer.moments) == ("bfloat16", "int8")


TRAIN = """
import sys
from dpo_jax.api.training import settled
from dpo_jax.cli import load_config
from dpo_jax.training import command, trainer

def is_planned():
    return any(name.startswith("dpo_jax.planning") for name in sys.modules)

config = load_config("configs/sd15.py:tiny")
assert settled(config, "none") is config
print(is_planned())
config.data.micro_batch = 0
settled(config, "none")
print(is_planned())
"""


def test_training_imports_the_plan_only_where_something_is_left_to_choose():
    command = [sys.executable, "-c", TRAIN]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
