"""Standard output and error that never stop a command: not when their reader is gone, nor when the disk is full."""

import contextlib
import functools
import io
import os
import sys
from typing import Any, TextIO


def protect() -> None:
    """Replaces standard output and error by `Lasting` ones, and opens those of the three streams that are closed.

    Otherwise the next file that is opened, such as a checkpoint, would have the number of standard error, and would
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
            stream.reconfigure(errors="backslashreplace")  # what a terminal has no letter for is shown all the same
        if not isinstance(stream, Lasting):
            setattr(sys, name, Lasting(stream))


@functools.cache
def warn(message: str) -> None:
    """Prints a warning to standard error, but the same one only once."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


class Lasting:
    """A text stream whose writes don't fail: what can't be written is lost."""

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
        except BrokenPipeError:  # for good: so that what is still buffered goes somewhere, and does not fail at the end
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
        except (OSError, ValueError):  # ValueError: closed. A full disk may have room again later.
            pass
