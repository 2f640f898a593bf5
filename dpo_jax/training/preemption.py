"""The notice, by SIGTERM, that a scheduler or a cloud will take the machine away soon."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75
"""Exit code of a preempted run: EX_TEMPFAIL of sysexits.h, which tells schedulers to start it again."""


class Preempted(Exception):
    """Training ended before its last step because of a notice; the message says how to continue."""


class Notice:
    """Tells whether a notice has come. Use it as `with Notice.awaited() as notice: notice.given(step)`."""

    def __init__(self) -> None:
        self._received = False

    @classmethod
    @contextmanager
    def awaited(cls) -> Iterator["Notice"]:
        """Catch SIGTERM within the block, except in a thread of a program, where Python catches none."""
        notice = cls()
        in_thread = threading.current_thread() is not threading.main_thread()  # it cannot catch signals
        if in_thread or jax.process_count() > 1:  # JAX's runtime catches it since this process joined the others
            yield notice
            return

        def receive(number: int, frame: FrameType | None) -> None:
            notice._received = True

        former = signal.signal(signal.SIGTERM, receive)
        try:
            yield notice
        finally:
            signal.signal(signal.SIGTERM, former)

    def received(self) -> bool:
        """True if the run should stop between two steps; single processes only, because several could not agree."""
        return self._received

    def given(self, step: int) -> bool:
        """Return whether to stop after this step: True for the same step in all processes, whichever was notified.

        All processes must ask once per step, in order.
        """
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received
