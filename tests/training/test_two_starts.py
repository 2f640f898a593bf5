"""Of two runs started at once in one work directory, one trains to its end and the other ends with one sentence."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = 2


def start(workdir: Path) -> "subprocess.Popen[str]":
    fields = [f"steps={STEPS}", "checkpoint.every=1", "checkpoint.keep=9", "validation.every=0", "sample.every=0"]
    flags = [f"--config.{field}" for field in fields]
    command = [sys.executable, "-m", "dpo_jax.train", "--config=configs/sd15.py:tiny", f"--workdir={workdir}", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_of_two_starts_at_once_the_second_ends_in_one_sentence_and_nothing_is_lost(tmp_path, capsys):
    """Twenty times; the time of the second run counts from when the first one had the lock, on 2 cores."""
    with capsys.disabled():
        print("\n  no  codes  second ended after, steps in metrics.jsonl, checkpoints")
    for number in range(20):
        workdir = tmp_path / str(number)
        processes = [start(workdir) for _ in range(2)]
        locked = None
        while all(process.poll() is None for process in processes):
            if locked is None and (workdir / ".lock").exists():
                locked = time.monotonic()
            time.sleep(0.01)
        seconds = time.monotonic() - (locked or time.monotonic())
        first, second = sorted(processes, key=lambda process: process.poll() is not None)
        first_error, second_error = first.communicate()[1], second.communicate()[1]

        assert first.returncode == 0, first_error
        assert second.returncode == 1
        assert len(second_error.splitlines()) == 1
        assert f"{workdir} is in use by python -m dpo_jax.train (process {first.pid} on " in second_error
        assert seconds < 10
        steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, STEPS + 1))
        saved = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
        assert saved == list(range(1, STEPS + 1))
        assert not (workdir / "damaged_checkpoints").exists()
        assert not (workdir / ".lock").exists()
        with capsys.disabled():
            print(f"{number + 1:4}  {first.returncode}  {second.returncode}  {seconds:5.1f} s  {steps}  {saved}")
