"""Standard output and error: they never stop a command, and name the process where a run has several."""

import contextlib
import datetime
import functools
import io
import os
import sys
import threading
from typing import Any, TextIO


def protect() -> None:
    """Replaces standard output and error by `Lasting` streams, and opens those of the three streams that are closed.

    Otherwise the next file that is opened, such as a checkpoint, would get the number of standard error, and would
    receive what libraries print there.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            stream = io.TextIOWrapper(io.FileIO(number, "w", closefd=False), write_through=True)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a character that the terminal lacks is shown as its code
        if not isinstance(stream, Lasting):
            setattr(sys, name, Lasting(stream))


class _State:
    process = 0


def process() -> int:
    """The number of this process in its run; 0 where there is only one."""
    return _State.process


def name_process(number: int) -> None:
    """Sets the number of this process in its run. All but process 0 then begin their lines with time and number."""
    _State.process = number
    for name in ("stdout", "stderr") if number else ():
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Prefixed):
            setattr(sys, name, Prefixed(stream, f"process {number}"))


@functools.cache
def warn(message: str) -> None:
    """Prints a warning to standard error, each one only once."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


class Prefixed:
    """A text stream whose lines begin with the time and a name: `[14:03:59 process 3] `."""

    def __init__(self, stream: Any, name: str):
        self._stream, self._name = stream, name
        self._at_start = True
        self._lock = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._lock:
            for line in text.splitlines(keepends=True):
                if self._at_start:
                    self._stream.write(f"[{datetime.datetime.now():%H:%M:%S} {self._name}] ")
                self._stream.write(line)
                self._at_start = line.endswith("\n")
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)


class Lasting:
    """A text stream whose writes never fail: what cannot be written is lost."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._losing():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._losing():
            self._stream.flush()

    @contextlib.contextmanager
    def _losing(self) -> Any:
        try:
            yield
        except BrokenPipeError:  # it stays broken: give what is still buffered a place, so that the exit does not fail
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
        except (OSError, ValueError):  # ValueError: closed. A full disk may have room again later.
            pass
