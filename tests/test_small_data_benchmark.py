"""The benchmark of settings for few pairs runs, and its table has a row for each run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_two_settings(tmp_path: Path) -> None:
    output = tmp_path / "results"
    arguments = ["--settings=all weights,LoRA", "--pairs=40", "--steps=10", "--seeds=1", f"--output={output}"]
    subprocess.run([sys.executable, "benchmarks/small_data.py", *arguments], cwd=ROOT, check=True)
    rows = json.loads((output / "small_data.json").read_text())["rows"]
    assert [row["settings"] for row in rows] == ["all weights", "LoRA"]
    for row in rows:
        assert row["pairs"] == 40
        assert 0 <= row["last_accuracy"] <= row["best_accuracy"] <= 1
        assert row["low"] <= row["win_rate"] <= row["high"]
    assert len((output / "small_data.md").read_text().splitlines()) == 2 + len(rows)
