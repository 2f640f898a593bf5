"""Where numbers go: TensorBoard, a JSON-lines file, and a progress bar that says how long is left."""

import datetime
import json
import time
from collections.abc import Mapping
from types import TracebackType

import jax
import numpy as np
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from dpo_jax.files import write_whole
from dpo_jax.progress import SECONDS_BETWEEN_LINES


class MetricWriter:
    """Writes scalars and images of the first process to `workdir` (TensorBoard events and `metrics.jsonl`)."""

    def __init__(self, workdir: epath.PathLike, start: int):
        """Continues after step `start`: what a killed run wrote beyond it will be written again, and is dropped."""
        self._folder = epath.Path(workdir)
        self._active = jax.process_index() == 0
        if self._active:
            kept = [row for row in read_metrics(workdir) if row["step"] <= start]
            write_whole(self._folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
            self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=start + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if not self._active:
            return
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        row = json.dumps({"step": step, **values}) + "\n"
        path = self._folder / "metrics.jsonl"
        if "://" in str(path):  # nothing can be appended to what object stores hold
            path.write_text(path.read_text() + row)
        else:
            with path.open("a") as file:
                file.write(row)

    def image(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        if self._active:
            self._board.add_image(name, image_HWC, step, dataformats="HWC")

    def close(self) -> None:
        if self._active:
            self._board.close()


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
    """The rows of `metrics.jsonl`, without a last one that a kill left unfinished."""
    path = epath.Path(workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_validation(workdir: epath.PathLike) -> dict[str, float]:
    """The newest validation figures; empty where there are none."""
    rows = [row for row in read_metrics(workdir) if any(name.startswith("validation/") for name in row)]
    return rows[-1] if rows else {}
