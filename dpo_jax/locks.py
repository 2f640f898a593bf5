"""Keeps a folder to one writer: the second process learns which process holds the lock.

On a local file system the kernel holds the lock (flock) and releases it when the process ends, also by SIGKILL. Other
hosts that share the file system, and object stores, do not know such locks; for them the lock's file names its owner,
who renews it every few seconds. A lock that was not renewed for `STALE_SECONDS`, or whose process on this host is gone,
is taken over. A process that finds its lock taken over exits at once, before it writes anything more.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import secrets
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from dpo_jax.errors import EnvironmentFault, InUseError
from dpo_jax.files import is_local, write_whole
from dpo_jax.processes import may_have_peers

HEARTBEAT_SECONDS = 4.0
STALE_SECONDS = 90.0
SETTLE_SECONDS = 1.0
"""Seconds until two processes that wrote to an object store at the same time both read the last one's lock."""
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


_held_here: dict[str, int | None] = {}
"""Paths of the locks of this process, and their file descriptors."""


def _let_go() -> None:
    """Close the locks in a forked child, which would otherwise keep them after its parent was killed."""
    for descriptor in _held_here.values():
        if descriptor is not None:
            os.close(descriptor)
    _held_here.clear()


os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def locked_early(folder: epath.PathLike, command: str) -> Iterator[None]:
    """Lock a folder as `locked` does, before JAX is imported, which takes seconds.

    It does nothing in a process that may be one of several: those use `cluster.locked` when they know their number.
    """
    with contextlib.nullcontext() if may_have_peers() else locked(folder, command):
        yield


def is_held(folder: epath.PathLike, name: str = ".lock") -> bool:
    """Whether this process holds the lock."""
    return str(epath.Path(folder) / name) in _held_here


@contextlib.contextmanager
def locked(folder: epath.PathLike, command: str, name: str = ".lock", what: object = None) -> Iterator[None]:
    """Hold the lock of a folder, which is created if it does not exist.

    Args:
        folder: to write to.
        command: name of this process in the message that other processes get, for example "python -m dpo_jax.train".
        name: name of the lock's file, for a folder that holds several things.
        what: what is locked, in that message; by default the folder.

    Raises:
        InUseError: another process holds the lock; the message names it, within 10 seconds.
        EnvironmentFault: the folder cannot be written to.
    """
    folder = epath.Path(folder)
    what = what or folder
    made = [place for place in (folder, *folder.parents) if not place.exists()] if is_local(folder) else []
    with _told(folder):
        folder.mkdir(parents=True, exist_ok=True)
    me = {
        "owner": secrets.token_hex(8),
        "host": socket.gethostname(),
        "processes": _process_numbers(),
        "process": os.getpid(),
        "command": command,
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    path = folder / name
    descriptor = _flock(path, what) if is_local(path) else None
    try:
        if descriptor is None or (_read(path) or me)["host"] != me["host"]:
            _check_alive(path, what, me, has_flock=descriptor is not None)
        with _told(folder):
            _write(path, me, descriptor)
        if descriptor is None:
            time.sleep(SETTLE_SECONDS)
            if (_read(path) or me)["owner"] != me["owner"]:
                raise InUseError(_held(what, _read(path)))
    except BaseException:
        if descriptor is not None:
            os.close(descriptor)
        raise
    done = threading.Event()
    heart = threading.Thread(target=_renew, args=(path, what, me, descriptor, done), daemon=True)
    heart.start()
    _held_here[str(path)] = descriptor
    try:
        yield
    finally:
        if os.getpid() == me["process"]:  # not in a forked child
            _release(path, me, descriptor, heart, done)
            with contextlib.suppress(OSError):  # it is not empty
                for place in made:
                    os.rmdir(place)


def _release(
    path: epath.Path, me: dict[str, Any], descriptor: int | None, heart: threading.Thread, done: threading.Event
) -> None:
    del _held_here[str(path)]
    done.set()
    heart.join()
    with contextlib.suppress(Exception):  # an error of the work inside matters more than one of its lock
        if (_read(path) or {}).get("owner") == me["owner"]:
            path.unlink(missing_ok=True)  # before it is released: a process that waits for it creates a new one
    if descriptor is not None:
        os.close(descriptor)


@contextlib.contextmanager
def _told(folder: epath.Path) -> Iterator[None]:
    """Name the folder in the error if the operating system refuses to write to it."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise EnvironmentFault(
            error.errno, f"{folder} cannot be written to ({reason}). Choose another folder"
        ) from None


def _flock(path: epath.Path, what: object) -> int | None:
    """Return the descriptor of the open, locked file, or None if the file system has no such locks."""
    deadline = time.monotonic() + 2
    while True:
        if os.path.islink(path):
            raise EnvironmentFault(f"{path} is a symbolic link, but must be a regular file. Remove it")
        with _told(path.parent):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise EnvironmentFault(f"{path} is not a regular file. Remove it")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                    return descriptor
            os.close(descriptor)  # its owner has just removed this file
        except BlockingIOError:
            os.close(descriptor)
            found = _wait_for(path)
            # A child that a killed process had just started keeps its copy of the descriptor until it runs.
            if found is None or not _has_died(found) or time.monotonic() > deadline:
                raise InUseError(_held(what, found)) from None
            time.sleep(0.05)
        except OSError as error:
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                return None
            raise


def _check_alive(path: epath.Path, what: object, me: dict[str, Any], *, has_flock: bool) -> None:
    """Raise InUseError if a process renewed the lock recently, or renews it now."""
    found = _read(path)
    for _ in range(3):  # a lock that cannot be read may still belong to a process
        if found is None and path.exists():
            time.sleep(HEARTBEAT_SECONDS / 8)
            found = _read(path)
    if found is None:
        return
    if _has_died(found) or (_is_here(found) and found["process"] == me["process"]):
        return
    # Where the kernel granted the lock, a process that renewed it recently may be dead, so it is watched for a while.
    if not has_flock and 0 <= time.time() - found["renewed"] < STALE_SECONDS:
        raise InUseError(_held(what, found))
    # The clocks of hosts may differ, so only a lock that does not change belongs to a dead process.
    deadline = time.monotonic() + 2 * HEARTBEAT_SECONDS
    while time.monotonic() < deadline:
        time.sleep(HEARTBEAT_SECONDS / 8)
        if not path.exists():
            return
        now = _read(path)  # None if it could not be read this time
        if now is not None and now != found:
            raise InUseError(_held(what, now))


def _process_numbers() -> str:
    """Return the namespace of process numbers: containers with the same host name count for themselves."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _is_here(found: dict[str, Any]) -> bool:
    processes = _process_numbers()
    return found["host"] == socket.gethostname() and found.get("processes", processes) == processes


def _has_died(found: dict[str, Any]) -> bool:
    """Whether the owner was a process of this host that runs no more."""
    return _is_here(found) and not _is_running(found["process"])


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it belongs to another user
        pass
    return True


def _renew(path: epath.Path, what: object, me: dict[str, Any], descriptor: int | None, done: threading.Event) -> None:
    while not done.wait(HEARTBEAT_SECONDS):
        found = _read(path)
        if found is not None and found["owner"] != me["owner"]:
            print(
                f"error: {_held(what, found)}. It took over the lock of this process, which did not renew it in time "
                "and now exits, so that nothing is written twice",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)
        # The disk may be full, or an object store not reachable; others wait longer than for one renewal.
        with contextlib.suppress(Exception):
            _write(path, me, descriptor)


def _write(path: epath.Path, me: dict[str, Any], descriptor: int | None) -> None:
    data = (json.dumps(me | {"renewed": time.time()}) + "\n").encode()
    if descriptor is None:
        # In an object store a file appears when it is closed; elsewhere others must not read half of it.
        write_whole(path, data) if is_local(path) else path.write_bytes(data)
        return
    # In place, since the lock belongs to the file and not to its name; spaces overwrite a longer text.
    os.pwrite(descriptor, data.ljust(os.fstat(descriptor).st_size), 0)
    os.fsync(descriptor)  # or other hosts would not see it before the file is closed


def _read(path: epath.Path) -> dict[str, Any] | None:
    """Return what the owner wrote, or None if there is nothing, only a part of it, or it cannot be read now."""
    try:
        found = json.loads(path.read_bytes()[:4096])
        known = {
            "owner": str,
            "host": str,
            "process": int,
            "command": str,
            "since": str,
            "renewed": float,
        }
        return found if all(isinstance(found[field], kind) for field, kind in known.items()) else None
    except Exception:  # libraries of object stores have their own classes
        return None


def _wait_for(path: epath.Path) -> dict[str, Any] | None:
    """Return what the owner wrote, after giving it the time to write."""
    for _ in range(20):
        found = _read(path)
        if found is not None:
            return found
        time.sleep(0.05)
    return None


def _held(what: object, found: dict[str, Any] | None) -> str:
    who = "another process"
    if found is not None:
        command, host = (ascii(found[field])[1:-1][:200] for field in ("command", "host"))
        who = f"{command} (process {found['process']} on {host}, since {ascii(found['since'])[1:-1][:40]})"
    return f"{what} is in use by {who}. Wait until it ends, or choose another place"
