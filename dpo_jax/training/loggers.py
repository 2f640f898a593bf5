"""The services and files that receive the figures, image grids and config of a run: `config.logging.to`.

Each logger imports its library when it is opened, so a run needs only the libraries that its config names.
`metrics.MetricWriter` reports their errors, which never stop a run.
"""

import contextlib
import csv
import dataclasses
import importlib.util
import io
import json
import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath

from dpo_jax import files
from dpo_jax.errors import UserError

SECONDS_BETWEEN_FLUSHES = 10
"""Seconds between two flushes of TensorBoard's events: an object store receives the whole file each time."""


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """The information that a logger gets about its run."""

    workdir: epath.Path
    name: str
    project: str
    fields: Mapping[str, Any]
    """The resolved config, by dotted path."""
    start: int
    """The step after which the run continues; 0 for a new run."""
    rows: Sequence[Mapping[str, float]]
    """The rows of metrics.jsonl up to `start`."""
    continues: bool
    """True if the work directory has been logged from before."""


class Logger(Protocol):
    """Receives what a run logs. Only process 0 opens loggers."""

    repeats: bool
    """True to receive again figures that a killed run logged after its last checkpoint; others keep the first ones."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def image(self, step: int, name: str, image_HWC: np.ndarray) -> None: ...

    def close(self, *, failed: bool) -> None: ...


@contextlib.contextmanager
def without_torch() -> Iterator[None]:
    """Hide PyTorch, where it is not imported yet, from tensorboardX, which would import it: that takes 1.5 s."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


class TensorBoard:
    """Events in WORKDIR/tensorboard, written at once: tensorboardX's own queue waits forever if its thread fails."""

    repeats = True

    def __init__(self, run: RunInfo):
        """Hide the events after step `run.start` that a killed run wrote."""
        with without_torch():
            from tensorboardX import summary
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
            from tensorboardX.record_writer import directory_check

        self._summary, self._event = summary, Event
        folder = run.workdir / "tensorboard"
        directory_check(str(folder))
        self._writer = EventsWriter(str(folder / "events"))
        self._flushed = 0.0
        self._writer.write_event(Event(step=run.start + 1, file_version="brain.Event:2"))
        self._writer.write_event(Event(step=run.start + 1, session_log=SessionLog(status=SessionLog.START)))
        if run.fields:
            table = "\n".join(["|field|value|", "|---|---|", *(f"|{k}|{v!r}|" for k, v in run.fields.items())])
            self._add(run.start, summary.text("config", table))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._add(step, self._summary.scalar(name, value))

    def image(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        self._add(step, self._summary.image(name, image_HWC, dataformats="HWC"))

    def close(self, *, failed: bool) -> None:
        self._writer.close()

    def _add(self, step: int, summary: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed > SECONDS_BETWEEN_FLUSHES:
            self._flushed = time.monotonic()
            self._writer.flush()


class Wandb:
    """A run of Weights & Biases, whose id WORKDIR/wandb/run_id keeps, so that a resumed run continues it.

    WANDB_MODE=offline writes to WORKDIR/wandb, for `wandb sync`. Steps are logged as the figure "step" and are the
    horizontal axis of all charts: W&B's own counter would refuse the steps that a resumed run repeats.
    """

    repeats = False

    def __init__(self, run: RunInfo):
        import wandb

        file = run.workdir / "wandb" / "run_id"
        run_id = file.read_text().strip() if file.exists() else secrets.token_hex(4)
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(file, f"{run_id}\n")
        self._image = wandb.Image
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run_id,
            resume="allow",
            dir=str(run.workdir) if files.is_local(run.workdir) else None,
            config=dict(run.fields),
            allow_val_change=True,  # fields that may differ when a run continues
            settings=wandb.Settings(console="off"),  # otherwise it replaces this process's output stream with its own
        )
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def image(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        self._run.log({"step": step, name: self._image(image_HWC)})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio:
    """A run of Trackio in WORKDIR/trackio (TRACKIO_DIR=WORKDIR/trackio trackio show), unless TRACKIO_DIR is set."""

    repeats = False

    def __init__(self, run: RunInfo):
        if files.is_local(run.workdir):
            os.environ.setdefault("TRACKIO_DIR", str(run.workdir.absolute() / "trackio"))  # the import reads it
        import trackio

        self._trackio = trackio
        self._run = trackio.init(
            project=run.project,
            name=run.name,
            resume="allow" if run.continues else "never",
            config=json.loads(json.dumps(dict(run.fields))),
            embed=False,
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        self._run.log({name: self._trackio.Image(image_HWC)}, step=step)

    def close(self, *, failed: bool) -> None:
        self._trackio.finish()


class Csv:
    """WORKDIR/metrics.csv: one row per row of metrics.jsonl, one column per figure; images are not stored."""

    repeats = True

    def __init__(self, run: RunInfo):
        self._path = run.workdir / "metrics.csv"
        self._columns = list(dict.fromkeys(["step", *(name for row in run.rows for name in row)]))
        self._rewrite(run.rows)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        row: dict[str, Any] = {"step": step, **values}
        new = [name for name in row if name not in self._columns]
        if new:
            rows = list(csv.DictReader(io.StringIO(files.read_text(self._path))))
            self._columns += new
            self._rewrite([*rows, row])
        else:
            files.append(self._path, self._lines([row]))

    def image(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        pass

    def close(self, *, failed: bool) -> None:
        pass

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        header = dict(zip(self._columns, self._columns, strict=True))
        files.write_whole(self._path, self._lines([header, *rows]))

    def _lines(self, rows: Sequence[Mapping[str, Any]]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self._columns, lineterminator="\n").writerows(rows)
        return text.getvalue()


LOGGERS: dict[str, type[TensorBoard] | type[Wandb] | type[Trackio] | type[Csv]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
    "csv": Csv,
}
LIBRARIES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
"""The library that a logger imports, which is also the name of its package."""


def check_libraries(names: Sequence[str]) -> None:
    """Raise a UserError, with the command that installs it, if the library of a logger is missing."""
    for name in names:
        library = LIBRARIES.get(name)
        if library is None:
            continue
        found = importlib.util.find_spec(library)
        if found is None or found.origin is None:  # a folder that W&B wrote has the name but is not the library
            raise UserError(
                f'config.logging.to has "{name}", and its library is not installed; run pip install {library}, or '
                f'leave "{name}" out'
            )
