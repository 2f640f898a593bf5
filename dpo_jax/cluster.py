"""Joins the processes of one run, by JAX's own distributed runtime."""

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
"""Environment variable: seconds that a process waits for the others before it calls them; 120 unless set."""
SECONDS_TO_LEAVE = 5


def join() -> None:
    """Connects to the other processes where there are any; call it before anything else of JAX.

    The environment says whether there are: the three variables of `EXPLICIT`, the same on all processes but for the
    last; a scheduler of `processes.SCHEDULERS`; or a TPU, whose hosts know each other.

    Raises:
        ValueError: some of `EXPLICIT` are missing, or they or `TIMEOUT` are no numbers.
    """
    # JAX's own heartbeats also end what waits for a dead process, but don't always say for which: so after `watched`.
    limits: Any = {"heartbeat_timeout_seconds": 4 * patience(), "shutdown_timeout_seconds": patience()}
    given = {name: os.environ[name] for name in EXPLICIT if os.environ.get(name)}
    if given:
        _join_explicitly(given, limits)
    elif may_have_peers():
        jax.distributed.initialize(**limits)
        streams.name_process(jax.process_index())


def is_first() -> bool:
    """Whether this process does what one must do for all."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Until all processes have come to the point of this name."""
    multihost_utils.sync_global_devices(name)


def says_first(value: np.ndarray | bool) -> np.ndarray:
    """What the first process says, on all of them; the others say something of the same shape and type.

    What a file system shows may differ between hosts for a while, so what all act upon is looked up by one.
    """
    array = np.asarray(value)
    if jax.process_count() == 1:
        return array
    as_bytes = np.frombuffer(array.tobytes(), np.uint8)  # or JAX would round what has 64 bits
    said = np.asarray(multihost_utils.broadcast_one_to_all(as_bytes))
    return np.frombuffer(said.tobytes(), array.dtype).reshape(array.shape)


def total(number: int) -> int:
    """The sum of what the processes say, on all of them."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.array(number, np.int32)).sum())


def patience() -> int:
    """Seconds to wait for the others; see `TIMEOUT`."""
    given = os.environ.get(TIMEOUT) or "120"
    if not given.isdigit() or int(given) < 1:
        raise UserError(f"{TIMEOUT}={given} must be a number of seconds, 1 or more")
    return int(given)


@contextmanager
def watched(doing: str) -> Iterator[None]:
    """For a wait in which all processes must take part; `doing` names it, the same in all and never twice.

    When it takes longer than `patience`, or fails, the processes call each other by a barrier of JAX's runtime. If some
    don't come within that time again, this process says who, and ends with code 1. If all come, it waits on.
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
        print(f"error: {silent} does not answer {doing}; see its own output{reason}", file=sys.stderr, flush=True)
        os._exit(1)  # whatever waits for the others will wait forever

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    except OSError:  # this process's own
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
    """A process that fails inside doesn't wait at its end for the others, which wait for it."""
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
    """All processes leave at the same time; when it failed in one, with a ChildProcessError in the others."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    if jax.process_count() > 1:
        failed = np.flatnonzero(multihost_utils.process_allgather(np.array(error is not None)))
        if failed.size and error is None:
            raise OutsideProcessError(f"process {failed[0]} failed {doing}; see its own output")
    if error is not None:
        raise error


@contextmanager
def locked(folder: Any, command: str, name: str = ".lock", what: object = None) -> Iterator[None]:
    """As `locks.locked`, by the first process for all; where it is refused, with a ChildProcessError in the others.

    What this process has locked before, by `locks.locked_early`, stays so.
    """
    with ExitStack() as held:
        with together(f"to lock {what or folder}"):
            if is_first() and not locks.is_held(folder, name):
                held.enter_context(locks.locked(folder, command, name, what))
        yield


def _silent(call: str, seconds: int) -> str:
    """The processes that don't come to the barrier `call` in time, or ""."""
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
    thread.join(seconds + 2)  # the first process holds the barrier: without it there is no answer at all
    numbers = re.findall(r"^(?:\S*task:)?(\d+)$", problem[0], re.MULTILINE) if problem else ["0"]
    if problem and problem[0] and not numbers:
        return "another process"
    return " and ".join(f"process {number}" for number in numbers)


def _join_explicitly(given: dict[str, str], limits: Any) -> None:
    address, count, process = (given.get(name, "") for name in EXPLICIT)
    if len(given) < len(EXPLICIT) or not (count.isdigit() and process.isdigit() and int(process) < int(count)):
        said = ", ".join(f"{name}={given.get(name, '(not set)')}" for name in EXPLICIT)
        raise UserError(
            f"{said}: to join several processes set all three, to host:port of the first process, their number, and "
            "the number of this one, from 0; or unset them for a run of one process"
        )
    streams.name_process(int(process))
    jax.distributed.initialize(address, int(count), int(process), **limits)
