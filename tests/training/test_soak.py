"""Runs that are killed at more than sixty moments end with the same files as an undisturbed run.

That is its parameters, the figures of held-out pairs and the image grids, bit for bit.
"""

import itertools
import json
import multiprocessing
import os
import random
import signal
import socket
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dpo_jax.training.metrics import is_validation, read_metrics

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STEPS = 30
FIELDS = [f"steps={STEPS}", "checkpoint.every=10", "checkpoint.keep=2", "data.batch_size=4", "data.random_crop=True"]
FIELDS += ["validation.every=10", "validation.max_pairs=4", "sample.every=10", "sample.seeds=1", "sample.steps=2"]
PLAN = {"save": 18, "steps": 17, "restore": 11, "start": 6, "validate": 7, "sample": 7}
"""Number of kills by what the run is doing."""
OF_TWO = 12
"""Number of kills of runs of two processes, which take longer: only the first process may cache compiled programs."""
KILLS_A_RUN = 9
GRACE = 60
"""Seconds in which a run of one process must end after a signal; with several processes, the others are killed then."""
RUN_AGAIN = 75


class Launcher:
    """Starts the processes of a run by forking one that has imported everything, which halves the time."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["marked_run"])

    def start(self, workdir: Path, processes: int) -> "Attempt":
        import marked_run

        self.count += 1
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        cluster = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(processes)}
        arguments = [
            "--config=configs/sd15.py:tiny",
            f"--workdir={workdir}",
            *(f"--config.{field}" for field in FIELDS),
        ]
        started, marks, logs = [], [], []
        for i in range(processes):
            environment = cluster | {"JAX_PROCESS_ID": str(i)} if processes > 1 else {}
            marks.append(self.folder / f"{self.count}.{i}.marks")
            logs.append(self.folder / f"{self.count}.{i}.log")
            process = self.context.Process(
                target=marked_run.run, args=(arguments, environment, str(marks[-1]), str(logs[-1]))
            )
            process.start()
            started.append(process)
        return Attempt(started, marks, logs)


class Attempt:
    def __init__(self, processes, marks: list[Path], logs: list[Path]):
        self.processes, self.marks, self.logs = processes, marks, logs

    def marked(self, process: int = 0) -> list[tuple[float, str]]:
        if not self.marks[process].exists():
            return []
        lines = self.marks[process].read_text().splitlines()
        return [(float(when), phase) for when, phase in (line.split() for line in lines)]

    def phase(self, process: int = 0) -> str:
        return self.marked(process)[-1][1] if self.marked(process) else "start"

    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def wait(self, seconds: float) -> list[int]:
        """Wait, kill the processes that are left, and return all exit codes."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0.01))
        for process in self.processes:
            process.kill()
            process.join()
        return [process.exitcode for process in self.processes]

    def output(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in self.logs if log.exists())


def final_state(workdir: Path) -> dict[str, bytes]:
    folder = workdir / "checkpoints" / str(STEPS)
    checkpointer = ocp.PyTreeCheckpointer()
    tree = checkpointer.metadata(folder / "state").item_metadata.tree
    as_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)  # whichever devices wrote it
    state = checkpointer.restore(folder / "state", args=ocp.args.PyTreeRestore(restore_args=as_arrays))
    leaves = dict(ocp.tree.to_flat_dict(state, sep="/"))
    position = json.loads((folder / "position" / "metadata").read_text())
    arrays = {name: np.asarray(value).tobytes() for name, value in (leaves | position).items()}
    rows = [row for row in read_metrics(workdir) if is_validation(row)]
    grids = {file.name: file.read_bytes() for file in (workdir / "samples").iterdir()}
    assert [row["step"] for row in rows] == list(range(0, STEPS + 1, 10))
    assert len(grids) == len(rows)
    return arrays | grids | {f"validation of step {row['step']}": json.dumps(row).encode() for row in rows}


class Hit(NamedTuple):
    phase: str
    """The phase that the first victim was in."""
    signal: signal.Signals
    victims: list[int]


def hit(attempt: Attempt, phase: str, number: int, seconds: float, rng: random.Random) -> Hit | None:
    """Signal at a random moment after the phase began `number` + 1 times; None if the run ended before."""
    while attempt.alive() and not (phase == "start" and number == 0):
        if [name for _, name in attempt.marked()].count(phase) > number:
            break
        time.sleep(0.002)
    brief = 1.0 if phase in ("validate", "sample") else seconds  # the first time takes long, as it is compiled
    time.sleep(rng.uniform(0, min(brief, seconds)))
    if not attempt.alive() or attempt.phase() == "end":
        return None
    kind = rng.choice([signal.SIGKILL, signal.SIGTERM])
    victims = rng.choice([[0], [1], [0, 1]]) if len(attempt.processes) > 1 else [0]
    before = attempt.phase(victims[0])
    for victim in victims:
        os.kill(attempt.processes[victim].pid, kind)
    if kind == signal.SIGTERM:
        return Hit(before, kind, victims)
    attempt.processes[victims[0]].join()
    return Hit(attempt.phase(victims[0]), kind, victims)  # it can have gone on until it died


def ended_well(codes: list[int], hit: Hit) -> bool:
    """Whether the run ended correctly and none of its processes had to be killed."""
    if hit.phase == "start":  # perhaps before it listens to SIGTERM, or the others to each other
        return all(codes[victim] in (-hit.signal, RUN_AGAIN, 0) for victim in hit.victims)
    if hit.signal == signal.SIGTERM:
        return set(codes) <= {RUN_AGAIN, 0}
    return [i for i, code in enumerate(codes) if code == -signal.SIGKILL] == hit.victims


def durations(attempt: Attempt) -> dict[str, float]:
    """Return the longest time of each phase in seconds."""
    marked = attempt.marked()
    longest: dict[str, float] = {}
    for (begun, phase), (ended, _) in itertools.pairwise(marked):
        longest[phase] = max(longest.get(phase, 0.0), ended - begun)
    return longest


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launcher:
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", f"{HERE}:{ROOT}")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_CPU_COLLECTIVES_IMPLEMENTATION", "gloo")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("DPO_JAX_PEER_TIMEOUT", "30")
    monkeypatch.chdir(ROOT)
    (tmp_path / "logs").mkdir()
    return Launcher(tmp_path / "logs")


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_any_moment_a_run_ends_as_if_it_had_not_been(
    launcher: Launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str], processes: int
) -> None:
    rng, began = random.Random(0), time.monotonic()
    seen: Counter[tuple[str, str]] = Counter()
    half_written = 0

    def say(line: str) -> None:
        with capsys.disabled():
            print(f"{time.monotonic() - began:6.0f} s  {line}", flush=True)

    plans = [phase for phase, count in PLAN.items() for _ in range(count)]
    random.Random(0).shuffle(plans)
    plan = plans[OF_TWO:] if processes == 1 else plans[:OF_TWO]
    planned = Counter(plan)
    whole = tmp_path / "whole"
    for _ in range(2):  # the second finds all done, and says how long it is to restore
        attempt = launcher.start(whole, processes)
        assert attempt.wait(900) == [0] * processes, attempt.output()
    seconds = {"restore": durations(attempt)["restore"]}
    expected = final_state(whole)
    say(f"{processes} processes undisturbed")

    number = 0
    while plan:
        number += 1
        workdir = tmp_path / str(number)
        ended = False
        for _ in range(KILLS_A_RUN):
            if not plan or ended:
                break
            begun = any((workdir / "checkpoints").glob("[0-9]*")) if workdir.exists() else False
            phase = next((phase for phase in plan if begun or phase != "restore"), "steps")
            attempt = launcher.start(workdir, processes)
            comes_once = phase == "restore" or (phase == "start" and not begun)
            struck = hit(attempt, phase, 0 if comes_once else rng.randrange(2), seconds.get(phase, 0.5), rng)
            codes = attempt.wait(GRACE if struck else 900)
            seconds |= {name: value for name, value in durations(attempt).items() if name != "restore"}
            if struck is None:
                assert codes == [0] * processes, attempt.output()
                ended = True
                continue
            say(f"{processes} processes, {struck.signal.name} in {struck.phase} to {struck.victims}: exit {codes}")
            assert ended_well(codes, struck), attempt.output()
            half_written += any(workdir.glob("checkpoints/*tmp*"))
            seen[struck.phase, struck.signal.name] += 1
            if struck.phase in plan:
                plan.remove(struck.phase)
        for _ in range(2):  # the first goes to the end, the second finds that all is done
            attempt = launcher.start(workdir, processes)
            assert attempt.wait(900) == [0] * processes, attempt.output()
        assert final_state(workdir) == expected
        say(f"{processes} processes: the same parameters, figures and grids")

    with capsys.disabled():
        print("\nkills  phase    signal")
        for (phase, kind), count in sorted(seen.items()):
            print(f"{count:5}  {phase:8} {kind}")
        print(f"{seen.total()} kills, {half_written} left a half-written checkpoint; {time.monotonic() - began:.0f} s")
    for phase, count in planned.items():
        assert sum(n for (where, _), n in seen.items() if where == phase) >= 0.8 * count, phase
    assert seen.total() >= 0.9 * planned.total()
    assert {kind for _, kind in seen} == {"SIGKILL", "SIGTERM"}
