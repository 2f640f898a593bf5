"""Judges, the implicit reward and a panel of raters put three models in the order that is known."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_models_are_ranked(tmp_path):
    output = tmp_path / "ranking"
    command = [sys.executable, "benchmarks/ranking.py", f"--output={output}"]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "XLA_FLAGS": ""})
    check(json.loads((output / "ranking.json").read_text()))


def test_committed_figures_say_the_same():
    check(json.loads((ROOT / "benchmarks" / "ranking.json").read_text()))


def check(results):
    assert len(results) == 3
    for judge, rows in results.items():
        assert set(rows) == {"half over base", "full over base", "full over half"}
        for pair, row in rows.items():
            assert row["low"] > 0.5, (judge, pair, row)
