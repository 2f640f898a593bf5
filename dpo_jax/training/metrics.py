"""Where numbers go: TensorBoard, a JSON-lines file, and a progress bar that says how long is left."""

import contextlib
import datetime
import json
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import jax
import numpy as np
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import directory_check
from tensorboardX.summary import image, scalar

from dpo_jax import files
from dpo_jax.progress import SECONDS_BETWEEN_LINES
from dpo_jax.streams import warn

SECONDS_BETWEEN_FLUSHES = 10
"""Of TensorBoard's events: an object store receives the whole file each time."""


class MetricWriter:
    """Writes scalars and images of the first process to `workdir` (TensorBoard events and `metrics.jsonl`).

    Logs never stop a run: what can't be written is told once, and what can't be read is left out, with a warning.
    """

    def __init__(self, workdir: epath.PathLike, start: int):
        """Continues after step `start`: what a killed run wrote beyond it will be written again, and is dropped."""
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._active = jax.process_index() == 0
        self._failed = False
        self._torn = False
        """Whether the file may end in half a line."""
        self.validated: set[int] = set()
        """The steps that validation figures were there of at the start."""
        self._board: Board | None = None
        if not self._active:
            return
        rows, is_whole = _read(self._path)
        try:
            if not is_whole:
                self._path.replace(self._path.with_name("metrics.jsonl.damaged"))
            kept = [row for row in rows if row["step"] <= start]
            self.validated = {int(row["step"]) for row in kept if is_validation(row)}
            files.write_whole(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        except Exception as error:  # of whatever class the libraries of object stores have for it
            self._fail(error)
        with self._drawing_on_board():
            self._board = Board(self._path.parent / "tensorboard", start + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if not self._active:
            return
        row = json.dumps({"step": step, **values}) + "\n"
        try:
            files.append(self._path, f"\n{row}" if self._torn else row)
            self._torn = False
        except Exception as error:
            self._torn = True
            self._fail(error)
        with self._drawing_on_board():
            if self._board is not None:
                for name, value in values.items():
                    self._board.add(step, scalar(name, value))

    def image(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        with self._drawing_on_board():
            if self._board is not None:
                self._board.add(step, image(name, image_HWC, dataformats="HWC"))

    def close(self) -> None:
        with self._drawing_on_board():
            if self._board is not None:
                self._board.close()

    def _fail(self, error: Exception) -> None:
        if not self._failed:
            self._failed = True
            reason = getattr(error, "strerror", None) or error
            warn(f"{self._path} can't be written ({reason}); training goes on without its figures")

    @contextlib.contextmanager
    def _drawing_on_board(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of whatever class the libraries of object stores have for it
            self._board = None
            warn(f"TensorBoard's events can't be written to {self._path.parent} ({error}); training goes on without")


class Board:
    """TensorBoard's events, written at once: tensorboardX's own queue waits forever when its thread has failed."""

    def __init__(self, folder: epath.Path, purge_step: int):
        """What is there of `purge_step` and later steps is hidden."""
        directory_check(str(folder))
        self._writer = EventsWriter(str(folder / "events"))
        self._flushed = 0.0
        self._writer.write_event(Event(step=purge_step, file_version="brain.Event:2"))
        self._writer.write_event(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, summary: Any) -> None:
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed > SECONDS_BETWEEN_FLUSHES:
            self._flushed = time.monotonic()
            self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class ProgressBar:
    """Steps done, loss, pair accuracy, pairs per second and time left; plain lines where there is no terminal."""

    def __init__(self, total: int, start: int):
        self._console = Console(stderr=True, quiet=jax.process_index() != 0)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, completed=start, numbers="compiling")
        self._total = total
        self._noted = time.monotonic()

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def show(self, step: int, metrics: Mapping[str, float], seconds_left: float | None) -> None:
        speeds = {f"speed/{unit}_per_second": f"{unit}/s" for unit in ("pairs", "prompts")}
        shown = {"train/loss": "loss", "pair/accuracy": "accuracy", **speeds}
        numbers = "  ".join(f"{label} {metrics[name]:.4g}" for name, label in shown.items() if name in metrics)
        self._bar.update(self._task, completed=step, numbers=numbers)
        if not self._console.is_terminal:
            left = f"  left {datetime.timedelta(seconds=round(seconds_left))}" if seconds_left is not None else ""
            self.say(f"step {step}/{self._total}  {numbers}{left}")

    def note(self, message: str) -> None:
        """In place of the numbers, while something else than a step is done."""
        self._bar.update(self._task, numbers=message)
        if not self._console.is_terminal and time.monotonic() - self._noted > SECONDS_BETWEEN_LINES:
            self._noted = time.monotonic()
            self.say(message)

    def say(self, message: str) -> None:
        """A line above the bar."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)


def read_metrics(workdir: epath.PathLike) -> list[dict[str, float]]:
    """The rows of `metrics.jsonl`, without a last one that a kill left unfinished.

    Damaged lines are left out, with a warning that names the first of them.
    """
    return _read(epath.Path(workdir) / "metrics.jsonl")[0]


def last_validation(workdir: epath.PathLike, step: int | None = None) -> dict[str, float]:
    """Return the newest validation figures (up to `step`, if given); empty where there are none."""
    rows = [row for row in read_metrics(workdir) if is_validation(row) and (step is None or row["step"] <= step)]
    return rows[-1] if rows else {}


def is_validation(row: Mapping[str, float]) -> bool:
    """Whether the row holds figures of held-out pairs."""
    return any(name.startswith("validation/") for name in row)


def _read(path: epath.Path) -> tuple[list[dict[str, float]], bool]:
    """The rows that can be read, and whether these are all."""
    try:
        lines = files.read_bytes(path, files.MAX_TEXT_BYTES).split(b"\n")
    except FileNotFoundError:
        return [], True
    except (OSError, ValueError) as error:
        warn(f"{error}; its figures are left out")
        return [], False
    rows, wrong = [], []
    for number, line in enumerate(lines[:-1], 1):  # behind the last line's end is what a kill left unfinished
        try:
            where = f"line {number}"
            values = files.parse_json(files.decode_text(line, where), where)
            row: dict[str, float] = files.conform(values, dict[str, float], where)
            row["step"] = int(row["step"])
        except (ValueError, KeyError, OverflowError):
            wrong.append(number)
        else:
            rows.append(row)
    if wrong:
        more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
        warn(f"{path}, line {wrong[0]}{more}: damaged, and left out")
    return rows, not wrong
