"""Joins the processes of a run through JAX's distributed runtime."""

import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dpo_jax import locks, streams
from dpo_jax.errors import OutsideProcessError, UserError
from dpo_jax.processes import EXPLICIT, may_have_peers

TIMEOUT = "DPO_JAX_PEER_TIMEOUT"
"""Environment variable: seconds that a process waits for the others before it calls them. Default: 120."""
SECONDS_TO_LEAVE = 5
"""Seconds that a failed process gives the others to report their own errors."""


def join() -> None:
    """Connect to the other processes of the run, if there are any. Call it before any other function of JAX.

    The environment tells whether there are: the three variables of `EXPLICIT`, of which only the last differs between
    processes; a scheduler of `processes.SCHEDULERS`; or a TPU, whose hosts know each other.

    Raises:
        UserError: some of `EXPLICIT` are missing, or they or `TIMEOUT` are not numbers.
    """
    # JAX's heartbeats also end a wait for a dead process, but do not always name it, so `watched` comes first.
    limits: Any = {"heartbeat_timeout_seconds": 4 * patience(), "shutdown_timeout_seconds": patience()}
    given = {name: os.environ[name] for name in EXPLICIT if os.environ.get(name)}
    if given:
        _join_explicitly(given, limits)
    elif may_have_peers():
        jax.distributed.initialize(**limits)
        streams.name_process(jax.process_index())


def is_first() -> bool:
    """Whether this is the process that acts for all."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Wait until all processes have called this with the same name."""
    multihost_utils.sync_global_devices(name)


def says_first(value: np.ndarray | bool) -> np.ndarray:
    """Return the value of the first process on all processes. All give a value of the same shape and type.

    Hosts may see different states of a shared file system for a while, so one process looks up what all act on.
    """
    array = np.asarray(value)
    if jax.process_count() == 1:
        return array
    as_bytes = np.frombuffer(array.tobytes(), np.uint8)  # JAX would round 64-bit values
    said = np.asarray(multihost_utils.broadcast_one_to_all(as_bytes))
    return np.frombuffer(said.tobytes(), array.dtype).reshape(array.shape)


def total(number: int) -> int:
    """Return the sum of the numbers of all processes on all of them."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.array(number, np.int32)).sum())


def patience() -> int:
    """Return the seconds to wait for the others; see `TIMEOUT`."""
    given = os.environ.get(TIMEOUT) or "120"
    if not given.isdigit() or int(given) < 1:
        raise UserError(f"{TIMEOUT}={given} must be a whole number of seconds, 1 or more")
    return int(given)


@contextmanager
def watched(doing: str) -> Iterator[None]:
    """Watch a wait in which all processes must take part.

    When it takes longer than `patience`, or fails, the processes call each other through a barrier of JAX's runtime. If
    some do not arrive within the same time again, this process names them and exits with code 1. If all arrive, it
    continues to wait.

    Args:
        doing: name of the wait, for example "to begin step 5"; the same in all processes and never used twice.
    """
    if jax.process_count() == 1:
        yield
        return
    done = threading.Event()

    def watch() -> None:
        calls = 0
        while not done.wait(patience()):
            calls += 1
            silent = _silent(f"{doing}, call {calls}", patience())
            if silent and not done.is_set():
                end(silent, "")

    def end(silent: str, reason: str) -> None:
        told = f"error: {silent} does not respond; this process waited for it {doing}. See its output{reason}"
        print(told, file=sys.stderr, flush=True)
        os._exit(1)  # a thread that waits for the others would wait forever

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    except (OSError, UserError):  # an error of this process
        raise
    except Exception as error:
        silent = _silent(f"{doing}, failed", SECONDS_TO_LEAVE)
        if silent:
            first_line = str(error).strip().split("\n")[0]
            end(silent, f" ({first_line})")
        raise
    finally:
        done.set()


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Exit soon after an error inside, without waiting for the other processes, which wait for this one."""
    try:
        yield
    except (Exception, KeyboardInterrupt):
        if jax.process_count() > 1:
            timer = threading.Timer(SECONDS_TO_LEAVE, os._exit, (1,))
            timer.daemon = True
            timer.start()
        raise


@contextmanager
def together(doing: str) -> Iterator[None]:
    """Wait for all processes at the end of the block; if it failed in one, the others raise OutsideProcessError."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    if jax.process_count() > 1:
        failed = np.flatnonzero(multihost_utils.process_allgather(np.array(error is not None)))
        if failed.size and error is None:
            raise OutsideProcessError(f"process {failed[0]} failed {doing}. See its output")
    if error is not None:
        raise error


@contextmanager
def locked(folder: Any, command: str, name: str = ".lock", what: object = None) -> Iterator[None]:
    """Lock a folder as `locks.locked` does, through the first process for all.

    If the lock is refused the other processes raise OutsideProcessError. A lock that `locks.locked_early` took before
    stays.
    """
    with ExitStack() as held:
        with together(f"to lock {what or folder}"):
            if is_first() and not locks.is_held(folder, name):
                held.enter_context(locks.locked(folder, command, name, what))
        yield


def _silent(call: str, seconds: int) -> str:
    """Return the names of the processes that do not arrive at the barrier `call` in time, or ""."""
    from orbax.checkpoint import multihost  # after the processes have joined

    problem: list[Any] = []

    def meet() -> None:
        try:
            multihost.get_barrier_sync_fn()(key=call, timeout_ms=seconds * 1000)
            problem.append("")
        except Exception as error:
            problem.append(str(error))

    thread = threading.Thread(target=meet, daemon=True)
    thread.start()
    thread.join(seconds + 2)  # the first process holds the barrier; without it the call does not return
    numbers = re.findall(r"^(?:\S*task:)?(\d+)$", problem[0], re.MULTILINE) if problem else ["0"]
    if problem and problem[0] and not numbers:
        return "another process"
    return " and ".join(f"process {number}" for number in numbers)


def _join_explicitly(given: dict[str, str], limits: Any) -> None:
    address, count, process = (given.get(name, "") for name in EXPLICIT)
    if len(given) < len(EXPLICIT) or not (count.isdigit() and process.isdigit() and int(process) < int(count)):
        said = ", ".join(f"{name}={given.get(name, '(not set)')}" for name in EXPLICIT)
        raise UserError(
            f"{said}: a run of several processes needs all three. Set them to host:port of the first process, the "
            "number of processes, and the number of this one, from 0; or unset them for a run of one process"
        )
    streams.name_process(int(process))
    jax.distributed.initialize(address, int(count), int(process), **limits)
