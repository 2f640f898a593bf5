"""The launch scripts run the right commands, as far as can be tested without a cluster."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from dpo_jax.cli import flatten, load_config, unflatten
from dpo_jax.sharding import mesh_shape
from dpo_jax.training.config import divide_batch

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"


def dry_run(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("NAME", "ZONE", "TYPE", "PROJECT")}
    return subprocess.run(
        ["bash", LAUNCH / script, *arguments],
        env=environment | {"DRY_RUN": "1"} | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_slurm_runs_the_command_on_every_node() -> None:
    done = dry_run("slurm.sbatch", "--config=configs/sdxl.py", "--workdir=/shared/run", VENV="/venv")
    assert done.stdout == (
        "srun --wait=60 /venv/bin/python -m dpo_jax.train --config=configs/sdxl.py --workdir=/shared/run\n"
    )


@pytest.mark.parametrize(("code", "requeued"), [(0, ""), (1, ""), (75, "requeue 7\n")])
def test_slurm_starts_a_preempted_run_again(tmp_path: Path, code: int, requeued: str) -> None:
    for name, does in (("srun", f"exit {code}"), ("scontrol", 'echo "$*"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = dry_run("slurm.sbatch", "--config=configs/sdxl.py", DRY_RUN="0", PATH=path, SLURM_JOB_ID="7")
    assert (done.returncode, done.stdout) == (code, requeued)


@pytest.mark.parametrize(
    ("arguments", "variables", "command"),
    [
        (["create"], {"TYPE": "v5p-128"}, "create dpo --zone=z --accelerator-type=v5p-128 --version=v2-alpha-tpuv5"),
        (["create"], {"TYPE": "v6e-64", "SPOT": "1"}, "--version=v2-alpha-tpuv6e --spot"),
        (["create"], {"TYPE": "v9-8", "RUNTIME": "new"}, "--accelerator-type=v9-8 --version=new"),
        (["install"], {"PROJECT": "p"}, "dpo:dpo_jax.tar.gz --zone=z --project=p --worker=all"),
        (["collect", "/runs/a", "here"], {}, "scp --recurse dpo:/runs/a here --zone=z --worker=0"),
        (["delete"], {}, "delete dpo --zone=z --quiet"),
    ],
)
def test_tpu_pod_says_what_gcloud_is_to_do(arguments: list[str], variables: dict[str, str], command: str) -> None:
    done = dry_run("tpu_pod.sh", *arguments, NAME="dpo", ZONE="z", **variables)
    assert done.returncode == 0, done.stderr
    assert command in done.stdout


def test_tpu_pod_hands_arguments_on_as_they_are() -> None:
    prompts = "--config.sample.prompts=('a cat', 'a dog')"
    done = dry_run("tpu_pod.sh", "run", prompts, NAME="dpo", ZONE="z")
    gcloud = subprocess.run(  # what gcloud is given, and then what the host's shell makes of it
        ["bash", "-c", f'gcloud() {{ for last; do :; done; echo "${{last#--command=}}"; }}; {done.stdout}'],
        capture_output=True,
        text=True,
    )
    on_host = gcloud.stdout.rpartition("-m dpo_jax.train ")[2]
    printed = subprocess.run(["bash", "-c", f"printf '%s|' {on_host}"], capture_output=True, text=True)
    assert printed.stdout == f"{prompts}|"


@pytest.mark.parametrize(
    ("script", "arguments", "variables", "message"),
    [
        ("slurm.sbatch", [], {}, "sbatch --nodes=4 launch/slurm.sbatch"),
        ("tpu_pod.sh", [], {}, "NAME     name of the slice"),
        ("tpu_pod.sh", ["run", "x"], {}, "NAME: set it to the name of the slice"),
        ("tpu_pod.sh", ["create"], {"NAME": "a", "ZONE": "z"}, "TYPE: set it to the kind and size of the slice"),
        ("tpu_pod.sh", ["create"], {"NAME": "a", "ZONE": "z", "TYPE": "v9-8"}, "no default is known for v9-8"),
        ("tpu_pod.sh", ["destroy"], {"NAME": "a", "ZONE": "z"}, "NAME     name of the slice"),
    ],
)
def test_what_is_missing_is_said(script: str, arguments: list[str], variables: dict[str, str], message: str) -> None:
    done = dry_run(script, *arguments, **variables)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.parametrize(
    ("file", "devices"),  # of what the example, or the text around it, asks for
    [("docs/clusters.md", 8), ("launch/local_cluster.sh", 8), ("launch/slurm.sbatch", 32), ("launch/tpu_pod.sh", 64)],
)
def test_meshes_of_examples_fit_their_devices(file: str, devices: int) -> None:
    text = re.sub(r"\\\n[# ]*", "", (ROOT / file).read_text())
    commands = re.findall(r"--config=(?:\S+) --workdir.*--config\.mesh.*", text)
    assert commands
    for command in commands:
        assert_fits(command.split(), devices)


def test_meshes_of_jobs_fit_their_devices() -> None:
    for document in yaml.safe_load_all((LAUNCH / "gke_jobset.yaml").read_text()):
        (replicated,) = document["spec"]["replicatedJobs"]
        job = replicated["template"]["spec"]
        (container,) = job["template"]["spec"]["containers"]
        (of_host,) = container["resources"]["limits"].values()
        assert_fits(container["args"], job["parallelism"] * int(of_host))


def assert_fits(arguments: list[str], devices: int) -> None:
    given = dict(argument.removeprefix("--").split("=", 1) for argument in arguments if argument.startswith("--config"))
    config = load_config(f"{ROOT}/{given.pop('config')}")
    known = flatten(config)
    for name, value in given.items():
        field = name.removeprefix("config.")
        known[field] = type(known[field])(value)
    mesh = unflatten(known).mesh
    mesh_shape(mesh.data, mesh.fsdp, mesh.tensor, devices)
    divide_batch(unflatten(known), known["data.batch_size"], device_count=devices, process_count=1)


def local_cluster(tmp_path: Path, command: str) -> subprocess.Popen[bytes]:
    """Start two processes that each write their process number to a file and run the command."""
    script = ["bash", "-c", f"echo $$ >{tmp_path}/$JAX_PROCESS_ID; mv {tmp_path}/$JAX_PROCESS_ID{{,.is}}; {command}"]
    environment = os.environ | {"LOGS": str(tmp_path), "PORT": "1", "TMPDIR": str(tmp_path)}
    return subprocess.Popen(["bash", LAUNCH / "local_cluster.sh", *script], env=environment, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT, signal.SIGHUP])
def test_a_local_cluster_that_is_killed_leaves_no_process(tmp_path: Path, kind: signal.Signals) -> None:
    launcher = local_cluster(tmp_path, "exec sleep 60")
    files = [tmp_path / f"{i}.is" for i in range(2)]
    while not all(file.exists() for file in files):
        assert launcher.poll() is None
        time.sleep(0.02)
    launcher.send_signal(kind)  # and it is not waited for, as if nobody cared
    deadline = time.monotonic() + 10
    while any(is_running(int(file.read_text())) for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert launcher.wait(10) != 0


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(("command", "code"), [("true", 0), ("exit 3", 3)])
def test_a_local_cluster_ends_with_its_processes(tmp_path: Path, command: str, code: int) -> None:
    assert local_cluster(tmp_path, command).wait(10) == code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.is", "1.is", "process_1.log"]


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    scripts = [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"]
    done = subprocess.run(["shellcheck", "-x", "--source-path=SCRIPTDIR", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
