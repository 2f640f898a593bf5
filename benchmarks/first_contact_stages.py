"""The stages of benchmarks/first_contact.py, and how they share its budget."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

BUDGET = 640.0
"""Seconds for everything, by default."""


class Stage(NamedTuple):
    """A measurement in a process of its own."""

    name: str
    kind: str
    """"ceilings", "ours", or a peer of `step_contestants`."""
    mode: str = ""
    fewest: float = 30
    """Seconds without which it is not worth starting."""
    most: float = 60
    attention: str = "auto"
    before: bool = False
    """Whether it runs the code of --before."""


STAGES = (
    Stage("ceilings", "ceilings", fewest=15),
    Stage("sd15-full", "ours", "sd15-full", 60, 200),
    Stage("sdxl-full", "ours", "sdxl-full", 100, 300),
    Stage("sdxl-full-before", "ours", "sdxl-full", 100, 300, attention="cudnn", before=True),
    Stage("sdxl-full-P2", "P2", "sdxl-full", 100, 240),
    Stage("sdxl-full-again", "ours", "sdxl-full", 30, 90),
    Stage("sd15-full-P2", "P2", "sd15-full", 60, 150),
    Stage("sd15-full-again", "ours", "sd15-full", 20, 60),
    Stage("sd15-lora", "ours", "sd15-lora", 60, 120),
    Stage("sdxl-lora", "ours", "sdxl-lora", 80, 180),
    Stage("sd15-full-xla", "ours", "sd15-full", 60, 120, attention="xla"),
    Stage("sd15-full-P0", "P0", "sd15-full", 40, 60),
)


class Processes(Protocol):
    """Runs stages."""

    def measure(self, stage: Stage, following: Stage | None, seconds: float) -> dict[str, Any]:
        """Return what the stage found within the time; the following one may be prepared beside it."""

    def stop(self) -> None:
        """End what is being prepared."""


class Lines:
    """The results in a file, one line for each stage."""

    def __init__(self, file: Path):
        self.file = file

    def done(self) -> set[str]:
        """Return the stages that need not run again, since they have found something."""
        return {row["stage"] for row in self.read() if not {"failed", "left_out"} & row.keys()}

    def read(self) -> list[dict[str, Any]]:
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return list(map(json.loads, lines))

    def add(self, row: dict[str, Any]) -> None:
        """Append a result, with the share of the measured rate of products (MFU) if both are known."""
        rates = [line["tflops"] for line in self.read() if line["stage"] == "ceilings" and "tflops" in line]
        if rates and "tflop_a_pair" in row:
            row["mfu_measured"] = row["tflop_a_pair"] * row["pairs_a_second"] / rates[-1]
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def spend(
    stages: Sequence[Stage],
    budget: float,
    lines: Lines,
    processes: Processes,
    *,
    share: float = 1.0,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run the stages that have no result yet, in their order, and end within the budget.

    `share` is the part of their least times that they need here.
    """
    began, done = clock(), lines.done()
    missing = [stage for stage in stages if stage.name not in done]
    for number, stage in enumerate(missing):
        left = budget - (clock() - began)
        fewest = share * stage.fewest
        if left < fewest:
            print(f"{stage.name} is left out: {left:.0f} s are left, and it needs {fewest:.0f}", flush=True)
            continue
        started = clock()
        following = next((later for later in missing[number + 1 :] if later.kind == "ours"), None)
        found = processes.measure(stage, following, min(stage.most, left))
        lines.add({"stage": stage.name, **found, "seconds": round(clock() - started, 1)})
    processes.stop()
