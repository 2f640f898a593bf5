"""It is the preferences that do it: the demo's run against its controls. Minutes long."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_preferences_and_not_mere_training_raise_the_win_rate(tmp_path):
    output = tmp_path / "controls"
    command = [sys.executable, "benchmarks/controls.py", f"--output={output}"]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "XLA_FLAGS": ""})
    check(json.loads((output / "controls.json").read_text()))


def test_committed_figures_say_the_same():
    check(json.loads((ROOT / "benchmarks" / "controls.json").read_text()))


def check(results):
    assert results["dpo over base"]["win_rate_low"] > 0.55
    assert results["dpo over base"]["win_rate"] > results["sft over base"]["win_rate"]
    assert results["dpo over sft"]["win_rate_low"] > 0.5
    assert results["swapped over base"]["win_rate"] < 0.45
    shuffled = results["shuffled over base"]
    assert shuffled["win_rate_low"] <= 0.5 <= shuffled["win_rate_high"]
    assert 0.3 < results["dpo over base"]["base_score"] < 0.8
    assert all(figures["comparisons"] >= 400 for figures in results.values())
