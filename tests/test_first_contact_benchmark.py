"""The benchmark for a few minutes of a GPU keeps to its budget, loses nothing, and runs on CPUs at its small size."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("stages", ROOT / "benchmarks" / "first_contact_stages.py")
assert SPEC is not None
assert SPEC.loader is not None
stages = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(stages)


class Machine:
    """A clock, and processes that take the time that is written for them, or all that they are given."""

    def __init__(self, takes: dict[str, float]):
        self.now, self.takes = 100.0, takes
        self.ran: list[str] = []
        self.stopped = 0

    def measure(self, stage: Any, following: Any, seconds: float) -> dict[str, Any]:
        del following
        self.ran.append(stage.name)
        takes = self.takes.get(stage.name, stage.most)
        self.now += min(takes, seconds)
        figure = {"tflops": 800.0} if stage.kind == "ceilings" else {"tflop_a_pair": 50.0, "pairs_a_second": 8.0}
        return figure if takes <= seconds else {"failed": "", "out_of_time": True}

    def stop(self) -> None:
        self.stopped += 1


def spend(tmp_path: Path, machine: Machine, budget: float) -> list[dict[str, Any]]:
    began = machine.now
    lines = stages.Lines(tmp_path / "results.jsonl")
    stages.spend(stages.STAGES, budget, lines, machine, clock=lambda: machine.now)
    assert machine.now - began <= budget
    return [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("budget", [20, 300, 640, 10_000])
def test_the_budget_holds_even_if_every_stage_takes_all_its_time(tmp_path: Path, budget: float) -> None:
    machine = Machine({stage.name: 1e9 for stage in stages.STAGES})
    spend(tmp_path, machine, budget)
    assert machine.stopped == 1


def test_by_default_it_ends_within_eleven_minutes() -> None:
    assert stages.BUDGET <= 660


def test_what_says_most_comes_first_and_the_rest_follows_later(tmp_path: Path) -> None:
    usual = dict.fromkeys([stage.name for stage in stages.STAGES], 60.0)
    found = spend(tmp_path, first := Machine(usual), 250)
    assert first.ran == ["ceilings", "sd15-full", "sdxl-full", "sdxl-full-again"]  # with 70 s left
    assert [row["stage"] for row in found] == first.ran
    assert [row.get("mfu_measured") for row in found] == [None, 0.5, 0.5, 0.5]
    found = spend(tmp_path, later := Machine(usual), 1000)
    names = [stage.name for stage in stages.STAGES]
    assert later.ran == [name for name in names if name not in first.ran]
    assert [row["stage"] for row in found] == first.ran + later.ran


@pytest.mark.parametrize("row", [{"failed": "", "out_of_time": True}, {"left_out": "torch is missing"}], ids=str)
def test_a_stage_without_figures_runs_again(tmp_path: Path, row: dict[str, Any]) -> None:
    (tmp_path / "results.jsonl").write_text(json.dumps({"stage": "ceilings"} | row) + "\n")
    machine = Machine({"ceilings": 5})
    spend(tmp_path, machine, 20)
    assert machine.ran == ["ceilings"]


@pytest.mark.slow
def test_the_rehearsal_takes_less_than_three_minutes(tmp_path: Path) -> None:
    began = time.monotonic()
    arguments = [f"--output={tmp_path / 'figures'}", "--tiny", f"--before={ROOT}", "--budget=400"]
    subprocess.run([sys.executable, "benchmarks/first_contact.py", *arguments], cwd=ROOT, check=True)
    rows = {row["stage"]: row for row in map(json.loads, (tmp_path / "figures" / "results.jsonl").open())}
    assert list(rows) == [stage.name for stage in stages.STAGES]
    for stage in stages.STAGES:
        row = rows[stage.name]
        assert not {"failed", "exit_code", "out_of_time"} & row.keys(), row
        if stage.kind == "ours":
            assert row["first_loss"] == pytest.approx(0.6931, abs=1e-3)
            assert row["busy_ms_a_pair"]
            assert row["planned_gib"] > 0
    assert time.monotonic() - began < 180
