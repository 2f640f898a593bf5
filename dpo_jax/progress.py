"""The progress of a command: a bar with rate and time left, or plain lines without a terminal."""

import datetime
import time

SECONDS_BETWEEN_LINES = 10


class ProgressBar:
    """`with ProgressBar("parts") as bar: bar.show("reading", done, total, records=12)`.

    Args:
        unit: what `done` and `total` count.
        quiet: print nothing; for all processes of a run but one.
    """

    def __init__(self, unit: str, *, quiet: bool = False):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._unit = unit
        self._console = Console(stderr=True, quiet=quiet)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit)
        figures = TextColumn("{task.fields[figures]}")
        self._bar = Progress(*columns, figures, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("", total=None, figures="")
        self._step: str | None = None
        self._printed = time.monotonic()

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def show(self, step: str, done: int, total: int, **counts: int) -> None:
        """Show how far a step is, with rates since the step was first shown in this run.

        Args:
            counts: other counts so far; their rates are shown in place of the unit's.
        """
        now, counts = time.monotonic(), counts or {self._unit: done}
        if step != self._step:
            self._step, self._started, self._done, self._counts = step, now, done, counts
        seconds = now - self._started
        figures = [f"{count} {name}" for name, count in counts.items() if name != self._unit]
        figures += [
            f"{_rate((count - self._counts[name]) / seconds)} {name}/s"
            for name, count in counts.items()
            if count > self._counts[name]
        ]
        if done > self._done:
            left = seconds / (done - self._done) * (total - done)
            figures.append(f"left {datetime.timedelta(seconds=round(left))}")
        line = "  ".join(figures)
        self._bar.update(self._task, description=step, completed=done, total=total, figures=line)
        if not self._console.is_terminal and now - self._printed > SECONDS_BETWEEN_LINES:
            self._printed = now
            self.say(f"{step} {done}/{total} {self._unit}  {line}")

    def say(self, message: str) -> None:
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)


def _rate(per_second: float) -> str:
    return f"{per_second:.0f}" if per_second >= 10 else f"{per_second:.2g}"
