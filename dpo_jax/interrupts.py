"""Ctrl-C: the first one ends a command, but not in the middle of a write; the second one ends it at once.

A KeyboardInterrupt can be lost: Python drops it in destructors and in callbacks of the garbage collector, and libraries
turn it into errors of their own. So `received` remembers it, and long loops call `check`.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any, NoReturn

EXIT_CODE = 130
"""Exit code of an interrupted command: 128 + the number of SIGINT, as shells have it."""


class _State:
    received = False
    held = 0


def received() -> bool:
    """Whether the command has been interrupted."""
    return _State.received


def check() -> None:
    """Raise KeyboardInterrupt if the command has been interrupted."""
    if _State.received:
        raise KeyboardInterrupt


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Delay the KeyboardInterrupt of a first Ctrl-C to the end of the block; a second one is raised at once."""
    before = _State.received
    _State.held += 1
    try:
        yield
    finally:
        _State.held -= 1
    if not before:
        check()


def await_first() -> None:
    """Handle SIGINT for the command that begins, unless it is ignored, as it is in the background of a script."""
    _State.received, _State.held = False, 0
    _take(_receive)
    sys.unraisablehook = raise_again(sys.unraisablehook)


def leave_at_once() -> None:
    """Let SIGINT end the process immediately: while libraries are imported, and when all is done."""
    _take(_leave)


def _take(handler: Callable[[int, FrameType | None], Any]) -> None:
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _receive, _leave):
        signal.signal(signal.SIGINT, handler)


def _receive(number: int, frame: FrameType | None) -> None:
    again, _State.received = _State.received, True
    if _State.held and not again:
        return
    if _is_importing(frame):  # extension modules crash when they are half imported
        _leave(number, frame)
    raise KeyboardInterrupt


def _is_importing(frame: FrameType | None) -> bool:
    return any(code.co_filename.startswith("<frozen importlib") for code in _running(frame))


def _running(frame: FrameType | None) -> Iterator[CodeType]:
    """Yield the code of a frame and of those that it was called from."""
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, b"error: interrupted\n")
    os._exit(EXIT_CODE)


def raise_again(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a sys.unraisablehook that raises a lost KeyboardInterrupt again, and passes other exceptions to `hook`."""

    def tell(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            _State.received = False
            threading.Thread(target=_interrupt_after, args=(tell.__code__,), daemon=True).start()
        else:
            hook(unraisable)

    return tell


def _interrupt_after(code: CodeType) -> None:
    """Interrupt the main thread when it has left this code, whose exceptions are dropped, too."""
    main = threading.main_thread().ident
    assert main is not None
    is_inside = True
    while is_inside:
        time.sleep(0.01)
        is_inside = code in _running(sys._current_frames()[main])
    signal.pthread_kill(main, signal.SIGINT)
