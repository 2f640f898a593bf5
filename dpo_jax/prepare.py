"""Turns preference data into the data set that training reads: verified, images stored once, split by prompt.

python -m dpo_jax.prepare --source=pickapic --input='data/*.parquet' --output=data/pickapic

Run the same command again to continue where a run stopped.
"""

import datetime
import glob
import time
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from dpo_jax import cli
from dpo_jax.data.sources import SOURCES, missing

if TYPE_CHECKING:
    from dpo_jax.data.builder import Progress

SOURCE = flags.DEFINE_enum(
    "source",
    "pickapic",
    list(SOURCES),
    "What the input is.\n" + "\n".join(f"{name}: {source.help}" for name, source in SOURCES.items()),
)
INPUT = flags.DEFINE_list("input", None, "Files or folders to read; comma-separated, wildcards allowed.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Folder to write; it must not exist yet, or be empty.", required=True)
WORKERS = flags.DEFINE_integer(
    "workers", None, "Processes that read and verify; one a core if not given, 0 for none.", lower_bound=0
)
VALIDATION_FRACTION = flags.DEFINE_float(
    "validation_fraction", 0.05, "Share of the prompts to hold out for validation.", lower_bound=0, upper_bound=1
)
MAX_DAMAGED_FRACTION = flags.DEFINE_float(
    "max_damaged_fraction", 0.01, "Share of the records that may be damaged.", lower_bound=0, upper_bound=1
)

SECONDS_BETWEEN_LINES = 10


def main() -> None:
    from dpo_jax.data import builder  # after the flags are checked: importing TFDS takes a second

    files = []
    for pattern in INPUT.value:
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise missing(pattern)
        files += [Path(match) for match in matches]
    with _ProgressBar() as bar:
        summary = builder.prepare(
            SOURCES[SOURCE.value],
            files,
            Path(OUTPUT.value),
            workers=WORKERS.value,
            validation_fraction=VALIDATION_FRACTION.value,
            max_damaged_fraction=MAX_DAMAGED_FRACTION.value,
            on_progress=bar.show,
        )
    print(f"{summary}\nwritten to {OUTPUT.value}")


class _ProgressBar:
    """Parts done, records a second and time left of each step; plain lines where there is no terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self._console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("parts"))
        self._bar = Bar(
            *columns, TextColumn("{task.fields[figures]}"), console=self._console, disable=not self._console.is_terminal
        )
        self._task = self._bar.add_task("reading", total=None, figures="")
        self._start: Progress | None = None
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> "_ProgressBar":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def show(self, progress: "Progress") -> None:
        now = time.monotonic()
        if self._start is None or self._start.step != progress.step:  # what an earlier run did says nothing of the rate
            self._start, self._started = progress, now
            if progress.step == "reading" and progress.done:
                self._say(f"continuing: {progress.done} of {progress.total} parts are finished")
        figures, seconds = [f"{progress.records} records"], now - self._started
        done = progress.done - self._start.done
        if progress.records > self._start.records:
            figures.append(f"{(progress.records - self._start.records) / seconds:.0f} records/s")
        if done:
            left = seconds / done * (progress.total - progress.done)
            figures.append(f"left {datetime.timedelta(seconds=round(left))}")
        line = "  ".join(figures)
        self._bar.update(
            self._task, description=progress.step, completed=progress.done, total=progress.total, figures=line
        )
        if not self._console.is_terminal and now - self._printed > SECONDS_BETWEEN_LINES:
            self._printed = now
            self._say(f"{progress.step} {progress.done}/{progress.total} parts  {line}")

    def _say(self, message: str) -> None:
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    cli.run(main)
