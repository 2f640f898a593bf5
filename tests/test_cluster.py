"""Processes join as the environment says; some tests start real processes."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from dpo_jax import cluster, processes, streams
from dpo_jax.errors import UserError
from dpo_jax.locks import locked

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launch" / "local_cluster.sh"


@pytest.fixture(autouse=True)
def joined(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The arguments that JAX's function would be called with; no variable is set."""
    calls: list[tuple] = []

    def initialize(*arguments, heartbeat_timeout_seconds, shutdown_timeout_seconds):
        calls.append(arguments)
        assert heartbeat_timeout_seconds == 4 * shutdown_timeout_seconds == 4 * cluster.patience()

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(streams, "name_process", lambda number: None)  # it would change this process's streams
    for name in (*processes.EXPLICIT, *processes.SCHEDULERS.values(), cluster.TIMEOUT):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return calls


def test_one_process_joins_nobody(joined) -> None:
    cluster.join()
    assert joined == []
    assert cluster.is_first()


def test_variables_name_the_others(joined, monkeypatch) -> None:
    for name, value in zip(processes.EXPLICIT, ("host:123", "4", "3"), strict=True):
        monkeypatch.setenv(name, value)
    cluster.join()
    assert joined == [("host:123", 4, 3)]


@pytest.mark.parametrize("name", processes.SCHEDULERS.values())
def test_a_scheduler_with_several_tasks_is_asked(joined, monkeypatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    cluster.join()
    assert joined == []
    monkeypatch.setenv(name, "2")
    cluster.join()
    assert joined == [()]


def test_a_tpu_knows_its_hosts(joined, monkeypatch) -> None:
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: name == "libtpu")
    cluster.join()
    assert joined == []  # JAX_PLATFORMS=cpu: compiled for, not run on
    monkeypatch.delenv("JAX_PLATFORMS")
    cluster.join()
    assert joined == [()]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"JAX_COORDINATOR_ADDRESS": "host:1"},
            r"JAX_PROCESS_ID=\(not set\): a run of several",
        ),
        ({"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "from 0"),
        ({"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "=two"),
        ({cluster.TIMEOUT: "1m"}, "DPO_JAX_PEER_TIMEOUT=1m must be a whole number of seconds"),
    ],
)
def test_half_a_cluster_is_refused(joined, monkeypatch, given: dict[str, str], message: str) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        cluster.join()
    assert joined == []


def local_cluster(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", SCRIPT, *command], env=os.environ | variables, cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_local_cluster_starts_processes_that_find_each_other(tmp_path: Path) -> None:
    # Each process writes a file, because Gloo writes to the standard output in the middle of a line of Python's.
    code = f"""
from pathlib import Path
from dpo_jax import cluster
cluster.join()
import jax
cluster.wait("here")
counts = jax.process_count(), jax.device_count(), jax.local_device_count()
Path({str(tmp_path)!r}, str(jax.process_index())).write_text(str(counts))
"""
    done = local_cluster(sys.executable, "-c", code, PROCESSES="2", DEVICES="3")
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": "(2, 6, 3)", "1": "(2, 6, 3)"}


def test_local_cluster_stops_when_a_process_fails() -> None:
    done = local_cluster("bash", "-c", "[ $JAX_PROCESS_ID = 1 ] && exit 7; sleep 60", PROCESSES="3")
    assert done.returncode == 7
    assert "error: a process ended with exit code 7" in done.stderr


def test_local_cluster_hands_a_notice_on_and_waits(tmp_path: Path) -> None:
    command = f"trap 'sleep 0.3; exit 75' TERM; touch {tmp_path}/$JAX_PROCESS_ID; while :; do sleep 0.1; done"
    with subprocess.Popen(["bash", SCRIPT, "bash", "-c", command], cwd=ROOT, stderr=subprocess.PIPE, text=True) as run:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        run.terminate()
        assert run.wait(30) == 75
        assert "exit code 75" in run.stderr.read()


def test_a_failure_of_one_process_ends_the_others() -> None:
    code = """
from dpo_jax import cluster
cluster.join()
with cluster.together("to build"):
    if cluster.is_first():
        raise ValueError("broken")
"""
    done = local_cluster(sys.executable, "-c", code, PROCESSES="2", DEVICES="1", LOGS="")
    assert done.returncode == 1
    folder = done.stderr.strip().rpartition(" ")[2]
    assert "ValueError: broken" in done.stderr
    assert re.search(
        r"^\[\d\d:\d\d:\d\d process 1\] \S*OutsideProcessError: process 0 failed to build\. See its output$",
        Path(folder, "process_1.log").read_text(),
        re.MULTILINE,
    )


def test_a_mistake_of_one_process_is_not_taken_for_the_silence_of_others(monkeypatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(cluster, "_silent", lambda *_: pytest.fail("called the others"))
    with pytest.raises(UserError, match=r"^a mistake$"), cluster.watched("to see it"):
        raise UserError("a mistake")


@pytest.mark.slow
def test_one_process_locks_for_all(tmp_path: Path) -> None:
    code = f"""
from dpo_jax import cluster
cluster.join()
with cluster.locked({str(tmp_path)!r}, "python -m dpo_jax.train"):
    cluster.wait("inside")
    print("inside", flush=True)
"""
    arguments = {"PROCESSES": "2", "DEVICES": "1", "LOGS": ""}
    done = local_cluster(sys.executable, "-c", code, **arguments)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
    with locked(tmp_path, "another command"):
        done = local_cluster(sys.executable, "-c", code, **arguments)
    assert done.returncode == 1
    folder = done.stderr.strip().rpartition(" ")[2]
    assert f"InUseError: {tmp_path} is in use by another command (process {os.getpid()} on " in done.stderr
    assert f"process 0 failed to lock {tmp_path}" in Path(folder, "process_1.log").read_text()
    assert "inside" not in done.stdout


def test_local_cluster_tells_what_it_would_run_and_what_it_takes() -> None:
    lines = local_cluster("train", "--flag", DRY_RUN="1", PROCESSES="2", PORT="5", DEVICES="8").stdout.splitlines()
    assert [line.split()[2] for line in lines] == ["JAX_PROCESS_ID=0", "JAX_PROCESS_ID=1"]
    assert all(line.endswith("train --flag") and "localhost:5 " in line for line in lines)
    usage = local_cluster()
    assert usage.returncode == 2
    assert "PROCESSES  number of processes; default: 2" in usage.stderr
