"""Complete runs of the trainer on small random models: they resume, stop, and refuse wrong configs."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dpo_jax import __version__
from dpo_jax.cli import flatten, load_config
from dpo_jax.models.random_model import write_random_model
from dpo_jax.streams import warn
from dpo_jax.training.config import check_same_experiment, default_config, resolve
from dpo_jax.training.experiment import Experiment
from dpo_jax.training.run import open_run
from dpo_jax.training.trainer import check_backend, train

from ..conftest import step_without_network

ROOT = Path(__file__).parents[2]


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def state_of(workdir, step):
    folder = (workdir / "checkpoints" / str(step)).absolute()
    state = ocp.PyTreeCheckpointer().restore(folder / "state")
    return jax.tree.map(np.asarray, state), json.loads((folder / "position" / "metadata").read_text())


ONLINE = ("d3po", "flow_grpo", "nft", "tiny_online")  # those of tests/rounds/test_loop.py
FLOWS = ("sd35", "flux", "zimage")  # those of test_flow_run.py
CONFIGS = ("sd15", "sd21", "sdxl", "sdxl_refiner", "sdxl_turbo", "tiny", "tiny_flow")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "sdxl" else [pytest.mark.slow]) for name in CONFIGS],
)
def test_tiny_variant_of_every_config_trains_validates_and_samples(tiny_config, tmp_path, name):
    assert name in {path.stem for path in (ROOT / "configs").glob("*.py")}
    config = tiny_config(name, **{"validation.every": 4, "sample.every": 4})
    train(config, tmp_path)
    rows = metrics_of(tmp_path)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 4
    assert losses[0] == pytest.approx(math.log(2), abs=3e-3)  # rounding of 1e-7 times beta = 5000
    assert losses[-1] != losses[0]
    assert 0 <= rows[-1]["validation/pair_accuracy"] <= 1
    assert (tmp_path / "samples" / "step_000004.png").read_bytes()[:4] == b"\x89PNG"
    assert list((tmp_path / "tensorboard").iterdir())
    assert open_run(tmp_path).step == 4


def test_configs_that_the_test_above_runs_are_all_there_are():
    assert {path.stem for path in (ROOT / "configs").glob("*.py")} == {*CONFIGS, *FLOWS, *ONLINE}


def test_variants_of_configs():
    config = load_config(f"{ROOT}/configs/sdxl.py:lora,tiny")
    assert (config.lora.rank, config.model, config.data.batch_size) == (8, "random:sdxl", 8)
    for name in ("sd15", "sdxl", "sdxl_turbo", "tiny"):
        full, lora = (load_config(f"{ROOT}/configs/{name}.py{variant}") for variant in ("", ":lora"))
        assert full.lora.rank == 0 < lora.lora.rank
        assert lora.lora.initializer == ("kaiming" if name == "tiny" else "gaussian")
    with pytest.raises(ValueError, match="has no variant 'lore'; it has :published and :lora and :tiny"):
        load_config(f"{ROOT}/configs/sdxl.py:lore")


def test_a_lora_begun_before_its_initializer_could_be_chosen_goes_on():
    config = load_config(f"{ROOT}/configs/sd15.py:lora")
    saved = json.loads(json.dumps(flatten(config)))
    del saved["lora.initializer"]
    check_same_experiment(flatten(config), saved, "runs/old", default_config())
    config.lora.initializer = "gausian"
    with pytest.raises(ValueError, match=r"config.lora.initializer='gausian' must be one of 'kaiming', 'gaussian'"):
        resolve(config, device_count=1, process_count=1)


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tiny_config, tmp_path, capsys):
    fields = {"checkpoint.every": 10, "validation.every": 0, "sample.every": 0, "data.random_crop": True}
    config = tiny_config("sd15", steps=20, **fields)
    train(config, tmp_path / "whole")

    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "dpo_jax.train", "--config=configs/sd15.py:tiny", f"--workdir={killed}"]
    command += [f"--config.{name}={value}" for name, value in {"steps": 1000, "data.batch_size": 4, **fields}.items()]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (killed / "checkpoints" / "10").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "checkpoints" / "20").exists()
    capsys.readouterr()
    train(config, killed)
    assert "continuing after step 10" in capsys.readouterr().out

    (whole, whole_position), (again, again_position) = state_of(tmp_path / "whole", 20), state_of(killed, 20)
    assert whole_position == again_position == {"position": 20 * 4}
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    assert int(whole["step"]) == 20


@pytest.fixture(scope="module")
def one_step(tmp_path_factory, tiny_config):
    """The work directory of a run of one step, without a network; tests copy it."""
    workdir = tmp_path_factory.mktemp("one_step")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experiment, "train_step", lambda experiment: step_without_network)
        train(tiny_config("sd15", steps=1), workdir)
    return workdir


def test_refuses_the_work_directory_of_another_config(tiny_config, one_step):
    before = sorted(path.name for path in one_step.iterdir())
    with pytest.raises(ValueError, match=r"loss.beta was 5000.0, now 1.0.*another --workdir"):
        train(tiny_config("sd15", steps=1, **{"loss.beta": 1.0}), one_step)
    assert sorted(path.name for path in one_step.iterdir()) == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "nowhere"}, r"no folder or file nowhere, and it is not a hub id"),
        ({"family": "sdxl", "model": "dpo_jax/tiny/model", "vae": "nowhere"}, r"no folder or file nowhere"),
        (
            {"family": "sd15", "model": "dpo_jax/tiny/model"},
            "holds a model of the family sdxl, not sd15; leave the family out",
        ),
        ({"lora.rank": -1}, r"config.lora.rank=-1 must be at least 0"),
        ({"lora.dropout": 1.0}, r"config.lora.dropout=1.0 must be at least 0 and below 1$"),
        ({"lora.rank": 4, "lora.dropout": 0.1, "scan": True}, r"config.scan=True runs equal blocks as one"),
        ({"attention": "cudnn"}, r'config.attention="cudnn" takes bfloat16, not config.dtype=float32'),
        ({"attention": "cudnn", "dtype": "bfloat16"}, r'config.attention="cudnn" needs a GPU'),
        ({"lora.rank": 4, "lora.targets": "to_z"}, r"'to_z' match no layer"),
        ({"lora.rank": 4, "model": "random:sd3"}, r"default, which is for UNets, .* Set lora.targets, .* to '\(to_\["),
        ({"lora.init_reference": True}, r"config.lora.init names no LoRA"),
        ({"lora.init": "nowhere"}, r"no folder or file nowhere"),
        ({"reference": "nowhere"}, r"no folder or file nowhere"),
        ({"ema.decay": 2.0}, r"config.ema.decay=2.0 must be at least 0 and below 1$"),
        ({"model": ""}, r"config.model is empty"),
        ({"data.path": "nowhere"}, r"no prepared data set at nowhere.*dpo_jax.prepare"),
        (
            {"data.accumulation": 4},
            r"data.accumulation=4 is replaced by data.micro_batch, .* Set data.micro_batch=1 on any number of devices",
        ),
        ({"dtype": "bf16"}, r"config.dtype='bf16' must be one of 'float32', 'bfloat16'$"),
        ({"data.relabel": "swaped"}, r"must be one of 'none', 'swapped', 'shuffled'$"),
        ({"data.ties": "keep"}, r"must be one of 'drop', 'zero_weight', 'soft'$"),
        ({"data.labels": "votes"}, r"must be one of 'hard', 'soft'$"),
        ({"data.min_agreement": 70.0}, r"must be a share, from 0 to 1$"),
        ({"data.min_side": -1}, r"config.data.min_side=-1 must be at least 0$"),
        ({"data.caption_dropout": 20.0}, r"must be a share, from 0 to 1$"),
        ({"data.path": "random:0"}, r"not a number above 0"),
        ({"data.resolution": 30}, r"data.resolution=30 is not a multiple of 4"),
        (
            {"checkpoint.every": 4, "checkpoint.keep_every": 6},
            r"keep_every=6 is not a multiple of config.checkpoint.every=4.*; set keep_every=4$",
        ),
        ({"log_every": 0}, r"config.log_every=0 must be at least 1"),
        ({"loss.name": "dop"}, r"^config.loss.name='dop' is not a method. Did you mean dpo"),
        ({"optimizer.name": "adam"}, r"adamw"),
        ({"mesh.data": 3}, r"mesh.data=3 x mesh.fsdp=1 x mesh.tensor=1 does not make 1 devices"),
    ],
)
def test_wrong_configs_are_one_sentence_and_leave_no_run_behind(tiny_config, tmp_path, fields, message):
    with pytest.raises((ValueError, OSError), match=message) as error:
        train(tiny_config("sd15", **fields), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_says_that_bfloat16_is_not_for_cpus(dtype, capsys):
    config = load_config(f"{ROOT}/configs/sd15.py")
    config.dtype = dtype
    warn.cache_clear()  # it prints each warning once, and another test may have had this one
    check_backend(config)
    assert ("set --config.dtype=float32" in capsys.readouterr().err) == (dtype == "bfloat16")


def test_export_and_evaluate_need_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="no training run"):
        open_run(tmp_path)


FULL_AND_LORA = {"sd35": ("tiny", "lora,tiny"), "flux": ("full,tiny", "tiny"), "zimage": ("full,tiny", "tiny")}
NO_YNN = "--xla_cpu_experimental_ynn_fusion_type="  # what it fuses on CPUs keeps float32 where it likes


@pytest.mark.parametrize(
    ("name", "variant", "batch", "xla_flags"),
    [
        ("sd15", "lora,published,tiny", 4, ""),
        ("sd15", "lora,tiny", 4, ""),
        ("sd15", "lora,tiny", 8, NO_YNN),
        ("sd15", "tiny", 4, f"{os.environ['XLA_FLAGS']} {NO_YNN}"),
        ("sd15", "tiny", 4, NO_YNN),
        ("sdxl", "lora,tiny", 4, NO_YNN),
        *((name, variant, 4, "") for name in ("sd35", "flux", "zimage") for variant in FULL_AND_LORA[name]),
    ],
)
@pytest.mark.slow
def test_loss_before_the_first_update_is_log_2_in_bfloat16(tmp_path, name, variant, batch, xla_flags):
    """Float32 weights and a bfloat16 reference must round alike: beta = 5000 would show any difference."""
    fields = ["steps=1", "dtype=bfloat16", "vae_dtype=bfloat16", "validation.every=0", "sample.every=0"]
    fields += ["loss.beta=5000.0"] if name in FLOWS else []
    command = [sys.executable, "-m", "dpo_jax.train", f"--config=configs/{name}.py:{variant}", f"--workdir={tmp_path}"]
    command += [f"--config.{field}" for field in [*fields, f"data.batch_size={batch}"]]
    environment = os.environ | {"XLA_FLAGS": xla_flags}
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=environment)
    assert json.loads((tmp_path / "config.json").read_text())["loss.beta"] == 5000
    assert metrics_of(tmp_path)[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_refuses_a_model_folder_that_changed_since_the_run_began(tiny_config, one_step, tmp_path):
    shutil.copytree(one_step, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"fingerprints\.model was"):
        train(tiny_config("sd15", steps=2), tmp_path)


def test_goes_on_when_only_the_models_place_or_the_code_has_changed(tiny_config, no_network, tmp_path, capsys):
    write_random_model("sd15", tmp_path / "here")
    train(tiny_config("sd15", steps=1, model=str(tmp_path / "here")), tmp_path / "run")
    (tmp_path / "here").rename(tmp_path / "there")
    path = tmp_path / "run" / "config.json"
    saved = json.loads(path.read_text())
    assert saved["dpo_jax_version"] == __version__
    del saved["ema.decay"], saved["checksum"]  # as if the run were older than these fields
    path.write_text(json.dumps(saved | {"dpo_jax_version": "0.0.1"}))
    capsys.readouterr()
    train(tiny_config("sd15", steps=2, model=str(tmp_path / "there")), tmp_path / "run")
    assert f"was trained with dpo_jax 0.0.1; it continues with {__version__}\n" in capsys.readouterr().out
    assert open_run(tmp_path / "run").step == 2
    first = open_run(tmp_path / "run", "1")
    assert first.step == 1
    assert first.load_model().fingerprint.endswith(", step 1")  # what folders of samples and reports say
    with pytest.raises(ValueError, match=r"fingerprints\.data was 'random:32', now 'random:64'"):
        train(
            tiny_config("sd15", steps=3, model=str(tmp_path / "there"), **{"data.path": "random:64"}), tmp_path / "run"
        )
