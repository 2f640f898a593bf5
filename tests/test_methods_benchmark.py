"""The benchmark of methods continues where it stopped, and its table and plot have a row per setting and rate."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_one_run_and_a_lost_one(tmp_path: Path) -> None:
    arguments = ["--table=methods", f"--output={tmp_path}", "--only=DPO,SFT", "--seeds=1", "--steps=10", "--images=2"]
    (tmp_path / "results.jsonl").write_text(json.dumps({"name": "SFT_x1_0", "lost": 1}) + "\n")

    subprocess.run([sys.executable, "benchmarks/methods.py", *arguments], cwd=ROOT, check=True)

    rows = {row["setting"]: row for row in json.loads((tmp_path / "methods.json").read_text())["rows"]}
    assert rows["SFT"] == {"setting": "SFT", "rate": 5e-5, "runs": 1, "below_base": 1, "win_rates": []}
    assert rows["DPO"]["low"] <= rows["DPO"]["win_rate"] <= rows["DPO"]["high"]
    assert rows["DPO"]["diversity"] == pytest.approx(1, abs=0.2)
    assert len((tmp_path / "methods.md").read_text().splitlines()) == 4
    assert (tmp_path / "methods.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


def test_the_stable_default_bears_rates_that_ruin_the_published_loss() -> None:
    rows = json.loads((ROOT / "benchmarks" / "stability.json").read_text())["rows"]
    of = {name: [row for row in rows if row["setting"] == name] for name in ("plain", "stable")}
    assert [row["runs"] for row in rows] == [8] * 6
    assert [row["below_base"] for row in of["stable"]] == [0, 0, 0]
    assert of["plain"][-1]["below_base"] == 8
    assert max(row["win_rate"] for row in of["stable"]) >= max(row["win_rate"] for row in of["plain"])


def test_ten_methods_with_three_seeds_each() -> None:
    rows = {row["setting"]: row for row in json.loads((ROOT / "benchmarks" / "methods.json").read_text())["rows"]}
    assert len(rows) == 10
    assert {row["runs"] for row in rows.values()} == {3}
    page = (ROOT / "docs" / "results.md").read_text()
    for row in rows.values():
        assert f"{row['win_rate']:.1%} [{row['low']:.1%}, {row['high']:.1%}]" in page
    best = max(row["win_rate"] for row in rows.values())
    assert rows["stable DPO"]["win_rate"] > best - 0.02
    assert rows["stable DPO"]["winner_error_rise"] < 0 < rows["DPO"]["winner_error_rise"]
