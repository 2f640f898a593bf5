"""One process at a time writes to a folder, and the next one can write whatever happened to it."""

import contextlib
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dpo_jax import cluster, locks
from dpo_jax.locks import locked

HOLDER = """
import sys, time
from dpo_jax.locks import locked
with locked(sys.argv[1], "python -m dpo_jax.train"):
    print("locked", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def quick(monkeypatch):
    """Make heartbeats and waits a few hundredths of a second long."""
    for name, seconds in (("HEARTBEAT_SECONDS", 0.05), ("SETTLE_SECONDS", 0.02), ("STALE_SECONDS", 90.0)):
        monkeypatch.setattr(locks, name, seconds)


def no_flock(monkeypatch):
    def flock(*_):
        raise OSError(locks.errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", flock)


WAYS = pytest.mark.parametrize("way", [lambda _: None, no_flock], ids=["flock", "no flock"])


def test_the_second_is_told_who_is_there_and_after_a_kill_the_next_goes_on_at_once(tmp_path):
    folder = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        began = time.monotonic()
        with pytest.raises(BlockingIOError) as error, locked(folder, "python -m dpo_jax.online"):
            pytest.fail("two have it")
        assert time.monotonic() - began < 10
        assert re.fullmatch(
            rf"{folder} is in use by python -m dpo_jax\.train \(process {holder.pid} on {socket.gethostname()}, since "
            r"\d{4}-\d\d-\d\dT\S+\)\. Wait until it ends, or choose another place",
            str(error.value),
        )
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    began = time.monotonic()
    with locked(folder, "python -m dpo_jax.online"):
        assert json.loads((folder / ".lock").read_text())["process"] == os.getpid()
    assert time.monotonic() - began < 1


FORKING = """
import os, sys, time
from dpo_jax.locks import locked
with locked(sys.argv[1], "python -m dpo_jax.train"):
    if not os.fork():
        sys.exit()
    if not os.fork():
        print(os.getpid(), flush=True)
    time.sleep(600)
"""


def test_children_keep_nothing_of_a_killed_parent(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", FORKING, tmp_path], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(BlockingIOError), locked(tmp_path, "me"):  # also not the child that has ended
            pytest.fail("two have it")
        holder.kill()
        holder.wait()
        with locked(tmp_path, "me"):
            os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()


def test_a_child_that_has_not_run_yet_delays_the_next_by_a_moment(tmp_path):
    process = subprocess.Popen(["true"])
    process.wait()
    left(tmp_path, host=socket.gethostname(), process=process.pid)
    copy = os.open(tmp_path / ".lock", os.O_RDWR)
    fcntl.flock(copy, fcntl.LOCK_EX)
    timer = threading.Timer(0.3, os.close, [copy])
    timer.start()
    with locked(tmp_path, "me"):
        timer.join()


@WAYS
def test_one_has_it_at_a_time_and_nothing_is_left_of_it(tmp_path, monkeypatch, quick, way):
    way(monkeypatch)
    folder = tmp_path / "a" / "run"
    for _ in range(2):
        with locked(folder, "first"):
            if way is not no_flock:  # there a process of the same number is a dead one
                with pytest.raises(BlockingIOError, match="in use by first"), locked(folder, "second"):
                    pytest.fail("two have it")
            (folder / "kept").touch()
        assert [path.name for path in folder.iterdir()] == ["kept"]
    with contextlib.suppress(ValueError), locked(tmp_path / "new" / "run", "third"):
        raise ValueError
    assert not (tmp_path / "new").exists(), "of a command that failed before it wrote anything"


def test_of_many_at_once_one_at_a_time_has_it(tmp_path):
    inside, most, had = [], [], []
    start = threading.Barrier(8)

    def ask(number):
        start.wait()
        while number not in had:
            with contextlib.suppress(BlockingIOError), locked(tmp_path, f"command {number}"):
                inside.append(number)
                most.append(len(inside))
                inside.remove(number)
                had.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert sorted(had) == list(range(8))


def left(folder, **changes):
    fields = {"owner": "abc", "host": "elsewhere", "process": 7, "command": "python -m dpo_jax.train"}
    fields |= {"since": "2026-01-01T00:00:00+00:00", "renewed": time.time()}
    folder.mkdir(exist_ok=True)
    (folder / ".lock").write_text(json.dumps(fields | changes))


@WAYS
def test_the_lock_of_another_host_holds_while_it_is_renewed(tmp_path, monkeypatch, quick, way):
    way(monkeypatch)
    left(tmp_path)
    if way is no_flock:
        with pytest.raises(BlockingIOError, match=r"process 7 on elsewhere"), locked(tmp_path, "me"):
            pytest.fail("two have it")
        assert json.loads((tmp_path / ".lock").read_text())["owner"] == "abc"
    else:  # the kernel gave the lock, and nobody renews it: its host was killed a moment ago
        with locked(tmp_path, "me"):
            pass

    left(tmp_path, renewed=time.time() - 1000)  # nobody for long
    with locked(tmp_path, "me"):
        pass

    left(tmp_path, renewed=time.time() - 1000)  # its clock is behind, and it lives
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.5)
    timer = threading.Timer(0.2, left, [tmp_path], {"renewed": time.time() - 996})
    timer.start()
    with pytest.raises(BlockingIOError, match=r"process 7 on elsewhere"), locked(tmp_path, "me"):
        pytest.fail("two have it")
    timer.join()


@WAYS
def test_a_dead_process_of_this_host_holds_nothing(tmp_path, monkeypatch, quick, way):
    way(monkeypatch)
    process = subprocess.Popen(["true"])
    process.wait()
    left(tmp_path, host=socket.gethostname(), process=process.pid)
    with locked(tmp_path, "me"):
        pass


def test_without_flock_a_live_process_of_this_host_holds_it(tmp_path, monkeypatch, quick):
    no_flock(monkeypatch)
    left(tmp_path, host=socket.gethostname(), process=os.getppid())
    with pytest.raises(BlockingIOError, match=r"in use by python -m dpo_jax\.train"), locked(tmp_path, "me"):
        pytest.fail("two have it")


def test_of_two_that_write_at_the_same_time_the_last_has_it(tmp_path, monkeypatch, quick):
    no_flock(monkeypatch)
    monkeypatch.setattr(locks, "SETTLE_SECONDS", 0.3)
    timer = threading.Timer(0.1, left, [tmp_path])
    timer.start()
    with pytest.raises(BlockingIOError, match="on elsewhere"), locked(tmp_path, "me"):
        pytest.fail("two have it")
    timer.join()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # where a process would have ended
@WAYS
def test_who_loses_the_lock_ends_at_once(tmp_path, monkeypatch, capsys, quick, way):
    way(monkeypatch)
    ended = threading.Event()
    monkeypatch.setattr(locks.os, "_exit", lambda code: ended.set() or sys.exit(code))
    with locked(tmp_path, "me"):
        (tmp_path / ".lock").unlink()
        left(tmp_path)
        assert ended.wait(5)
    assert "is in use by python -m dpo_jax.train (process 7 on elsewhere" in capsys.readouterr().err
    assert json.loads((tmp_path / ".lock").read_text())["owner"] == "abc", "it is the other's, and stays"


@WAYS
def test_it_is_renewed(tmp_path, monkeypatch, quick, way):
    way(monkeypatch)
    with locked(tmp_path, "me"):
        first = json.loads((tmp_path / ".lock").read_text())
        time.sleep(0.3)
        now = json.loads((tmp_path / ".lock").read_text())
    assert now["renewed"] > first["renewed"]
    assert now | {"renewed": 0} == first | {"renewed": 0}


@WAYS
@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"[1]", b"{", b'{"host": 3}', b"\xff" * 10_000])
def test_a_damaged_lock_is_taken_over(tmp_path, monkeypatch, quick, way, content):
    way(monkeypatch)
    (tmp_path / ".lock").write_bytes(content)
    with locked(tmp_path, "me"):
        assert json.loads((tmp_path / ".lock").read_bytes().rstrip(b"\xff\n"))["command"] == "me"


def test_links_and_places_that_cannot_be_written_to_are_told(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "target").write_text("precious")
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match=r"\.lock is a symbolic link"), locked(tmp_path / "run", "me"):
        pytest.fail("followed")
    assert (tmp_path / "target").read_text() == "precious"
    message = r"target/run cannot be written to \(Not a directory\)"
    with pytest.raises(OSError, match=message), locked(tmp_path / "target" / "run", "me"):
        pytest.fail("made")
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(OSError, match=r"\.lock is not a regular file"), locked(tmp_path, "me"):
        pytest.fail("opened")


def test_locks_of_several_things_in_one_folder(tmp_path: Path):
    with locked(tmp_path, "score", ".a.lock", what="scores by a"):
        with locked(tmp_path, "score", ".b.lock"):
            pass
        again = locked(tmp_path, "score", ".a.lock", what="scores by a")
        with pytest.raises(BlockingIOError, match=r"^scores by a is in use by score"), again:
            pytest.fail("two have it")


CONFIGS = {"train": "configs/tiny.py:tiny", "online": "configs/tiny_online.py:tiny"}


@pytest.mark.parametrize("name", ["train", "online", "sample", "evaluate", "export", "score"])
def test_every_command_asks_before_it_loads_anything(command, mixed_pairs, tmp_path, name):
    data, output, lock = mixed_pairs, tmp_path / "output", ".lock"
    arguments = [f"--output={output}"]
    if name in CONFIGS:
        arguments = [f"--config={CONFIGS[name]}", f"--workdir={output}"]
    elif name == "sample":
        arguments += ["--model=dpo_jax/tiny/model", "--prompts=bundled"]
    elif name == "evaluate":
        arguments += ["--models=a=dpo_jax/tiny/model,b=nowhere", "--prompts=bundled", "--judges=shapes"]
    elif name == "export":
        arguments += ["--model=dpo_jax/tiny/model"]
        lock = ".output.lock"
    else:
        arguments = [f"--data={data}", "--judge=jpeg_compressibility"]
        output, lock = data / "scores" / "x", ".jpeg_compressibility.lock"
    with locked(output if lock == ".lock" else output.parent, "another command", lock):
        done = command(name, *arguments)
        assert done.returncode == 1
        assert re.search(r"^error: \S+ is in use by another command \(process \d+ on ", done.stderr), done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_process_that_may_have_peers_asks_only_when_it_knows_them(tmp_path, monkeypatch):
    with locks.locked_early(tmp_path, "me"):
        assert locks.is_held(tmp_path)
        with cluster.locked(tmp_path, "me"):  # it is this process's already
            pass
        assert locks.is_held(tmp_path)
        assert (tmp_path / ".lock").exists()
    assert not locks.is_held(tmp_path)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with locks.locked_early(tmp_path, "me"):
        assert not locks.is_held(tmp_path)
        assert not (tmp_path / ".lock").exists()
        with cluster.locked(tmp_path, "me"):
            assert locks.is_held(tmp_path)
    assert not list(tmp_path.iterdir())
