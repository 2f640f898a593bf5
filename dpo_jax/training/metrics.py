"""Writes figures to metrics.jsonl and to the loggers that the config names; shows a progress bar with the time left."""

import contextlib
import datetime
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import jax
import numpy as np
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dpo_jax import files
from dpo_jax.progress import SECONDS_BETWEEN_LINES
from dpo_jax.streams import warn
from dpo_jax.training.figures import SAMPLES
from dpo_jax.training.loggers import LOGGERS, Logger, RunInfo


class MetricWriter:
    """Writes the figures and image grids of process 0 to `metrics.jsonl` and to loggers; use it as a context manager.

    Logging never stops a run: a failed write is reported once, and damaged rows are left out, with a warning.

    Args:
        workdir: folder of metrics.jsonl.
        start: the step after which the run continues. Rows of later steps, which a killed run wrote, are dropped; they
            will be written again.
        loggers: names in `loggers.LOGGERS`.
        name: name of the run, for services that show several; "" takes the name of the work directory.
        project: project of the run, for the same services.
        fields: the resolved config, by dotted path.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        start: int,
        loggers: Sequence[str] = (),
        *,
        name: str = "",
        project: str = "dpo_jax",
        fields: Mapping[str, Any] | None = None,
    ):
        workdir = epath.Path(workdir)
        self._path = workdir / "metrics.jsonl"
        self._active = jax.process_index() == 0
        self._failed = False
        self._torn = False
        """True if the file may end in half a line."""
        self.validations: dict[int, dict[str, float]] = {}
        """The figures of held-out pairs by step. Those of before the start are known to process 0 alone."""
        self.trained: dict[str, float] = {}
        """The newest figures of training, with the same exception."""
        self.samples: dict[int, dict[str, float]] = {}
        """A judge's scores of the image grids by step, with the same exception."""
        self._loggers: dict[str, Logger] = {}
        self._dropped: set[tuple[int, frozenset[str]]] = set()
        """Step and names of the rows that were dropped; some loggers cannot drop them."""
        if not self._active:
            return
        rows, is_whole = _read(self._path)
        kept = [row for row in rows if row["step"] <= start]
        self._dropped = {_key(row) for row in rows if row["step"] > start}
        for row in kept:
            self._remember(int(row["step"]), row)
        try:
            if not is_whole:
                self._path.replace(self._path.with_name("metrics.jsonl.damaged"))
            files.write_whole(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        except Exception as error:  # the libraries of object stores raise errors of any class
            self._fail(error)
        info = RunInfo(workdir, name or workdir.absolute().name, project, fields or {}, start, kept, bool(rows))
        for logger in dict.fromkeys(loggers):
            with self._telling_failure(logger):
                self._loggers[logger] = LOGGERS[logger](info)

    def _remember(self, step: int, values: Mapping[str, float]) -> None:
        if is_validation(values):
            self.validations[step] = dict(values)
        elif is_of_samples(values):
            self.samples[step] = dict(values)
        elif "train/loss" in values:
            self.trained = dict(values)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._remember(step, values)
        if not self._active:
            return
        row = json.dumps({"step": step, **values}) + "\n"
        try:
            files.append(self._path, f"\n{row}" if self._torn else row)
            self._torn = False
        except Exception as error:
            self._torn = True
            self._fail(error)
        is_repeated = _key({"step": step, **values}) in self._dropped
        self._each(lambda logger: logger.scalars(step, values), is_repeated)

    def image(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        self._each(lambda logger: logger.image(step, name, image_HWC))

    def close(self, *, failed: bool = False) -> None:
        """Close the loggers; services show whether the run failed."""
        self._each(lambda logger: logger.close(failed=failed))
        self._loggers = {}

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def _each(self, log: Callable[[Logger], None], is_repeated: bool = False) -> None:
        for name, logger in list(self._loggers.items()):
            if logger.repeats or not is_repeated:
                with self._telling_failure(name):
                    log(logger)

    def _fail(self, error: Exception) -> None:
        if not self._failed:
            self._failed = True
            reason = getattr(error, "strerror", None) or error
            warn(f"cannot write {self._path} ({reason}); the run continues without its figures")

    @contextlib.contextmanager
    def _telling_failure(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the logger's library may raise errors of any class
            self._loggers.pop(name, None)
            reason = " ".join(str(error).split()) or type(error).__name__
            warn(f'logging to "{name}" failed ({reason}); the run continues without it')


class ProgressBar:
    """Shows steps, loss, pair accuracy, pairs per second and the time left; plain lines without a terminal."""

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
        speeds = {f"speed/{unit}_per_second": f"{unit}/s" for unit in ("pairs", "votes", "prompts")}
        shown = {"train/loss": "loss", "pair/accuracy": "accuracy", "vote/accuracy": "accuracy", **speeds}
        numbers = "  ".join(f"{label} {metrics[name]:.4g}" for name, label in shown.items() if name in metrics)
        self._bar.update(self._task, completed=step, numbers=numbers)
        if not self._console.is_terminal:
            left = f"  left {datetime.timedelta(seconds=round(seconds_left))}" if seconds_left is not None else ""
            self.say(f"step {step}/{self._total}  {numbers}{left}")

    def note(self, message: str) -> None:
        """Show a message in place of the numbers, while the run does something else than steps."""
        self._bar.update(self._task, numbers=message)
        if not self._console.is_terminal and time.monotonic() - self._noted > SECONDS_BETWEEN_LINES:
            self._noted = time.monotonic()
            self.say(message)

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)


def read_metrics(workdir: epath.PathLike) -> list[dict[str, float]]:
    """Return the rows of `metrics.jsonl`, without a last row that a kill left unfinished.

    Damaged lines are left out, with a warning that names the first of them.
    """
    return _read(epath.Path(workdir) / "metrics.jsonl")[0]


def last_validation(workdir: epath.PathLike, step: int | None = None) -> dict[str, float]:
    """Return the newest validation figures (up to `step`, if given); empty if there are none."""
    return _last(workdir, step, is_validation)


def last_scores(workdir: epath.PathLike, step: int | None = None) -> dict[str, float]:
    """Return the newest scores of an image grid (up to `step`, if given); empty if there are none."""
    return _last(workdir, step, is_of_samples)


def is_validation(row: Mapping[str, float]) -> bool:
    """Return whether the row holds figures of held-out pairs."""
    return any(name.startswith("validation/") for name in row)


def is_of_samples(row: Mapping[str, float]) -> bool:
    """Return whether the row holds a judge's scores of an image grid."""
    return any(name.startswith(SAMPLES) for name in row)


def _last(
    workdir: epath.PathLike, step: int | None, is_wanted: Callable[[Mapping[str, float]], bool]
) -> dict[str, float]:
    rows = [row for row in read_metrics(workdir) if is_wanted(row) and (step is None or row["step"] <= step)]
    return rows[-1] if rows else {}


def _key(row: Mapping[str, float]) -> tuple[int, frozenset[str]]:
    return int(row["step"]), frozenset(row)


def _read(path: epath.Path) -> tuple[list[dict[str, float]], bool]:
    """Return the rows that can be read, and whether these are all."""
    try:
        lines = files.read_bytes(path, files.MAX_TEXT_BYTES).split(b"\n")
    except FileNotFoundError:
        return [], True
    except (OSError, ValueError) as error:
        warn(f"{error}; its figures are left out")
        return [], False
    rows, wrong = [], []
    for number, line in enumerate(lines[:-1], 1):  # text after the last line end was left unfinished by a kill
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
