"""It is the preferences that align, and whoever judges sees it: benchmarks of minutes, and their kept figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def check_controls(results):
    """The demo's run against its controls: preferences and not mere training raise the win rate."""
    assert results["dpo over base"]["win_rate_low"] > 0.55
    assert results["dpo over base"]["win_rate"] > results["sft over base"]["win_rate"]
    assert results["dpo over sft"]["win_rate_low"] > 0.5
    assert results["swapped over base"]["win_rate"] < 0.45
    shuffled = results["shuffled over base"]
    assert shuffled["win_rate_low"] <= 0.5 <= shuffled["win_rate_high"]
    assert 0.3 < results["dpo over base"]["base_score"] < 0.8
    assert all(figures["comparisons"] >= 400 for figures in results.values())


def check_ranking(results):
    """Judges, the implicit reward and a panel of raters put three models in the order that is known.

    Five raters who often err cannot tell the full run from half of it, but what they say agrees with the exact judge.
    """
    exact, _, raters = results.values()
    for judge, rows in results.items():
        assert set(rows) == {"half over base", "full over base", "full over half"}
        for pair, row in rows.items():
            known = "rate" if rows is raters and pair == "full over half" else "low"
            assert row[known] > 0.5, (judge, pair, row)
    assert raters["full over half"]["low"] < exact["full over half"]["rate"] < raters["full over half"]["high"]


def check_flow(results):
    """The same of the flow model, whose policy is tuned with three seeds."""
    for run in ("dpo", "dpo_seed_1", "dpo_seed_2"):
        assert results[f"{run} over base"]["win_rate_low"] > 0.52, run
    assert results["dpo over base"]["win_rate"] > results["sft over base"]["win_rate"]
    assert results["swapped over base"]["win_rate_high"] < 0.5
    shuffled = results["shuffled over base"]
    assert shuffled["win_rate_low"] <= 0.5 <= shuffled["win_rate_high"]


CHECKS = [("controls", check_controls), ("controls_flow", check_flow), ("ranking", check_ranking)]
each = pytest.mark.parametrize(("name", "check"), CHECKS)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@each
def test_a_run_shows_it(tmp_path, name, check):
    flow = ["--flow"] if name.endswith("_flow") else []
    command = [sys.executable, f"benchmarks/{name.removesuffix('_flow')}.py", f"--output={tmp_path / name}", *flow]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "XLA_FLAGS": ""})
    check(json.loads((tmp_path / name / f"{name}.json").read_text()))


@each
def test_committed_figures_say_the_same(name, check):
    check(json.loads((ROOT / "benchmarks" / f"{name}.json").read_text()))
