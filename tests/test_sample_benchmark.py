"""The benchmark of drawing runs on CPUs with the bundled model, and says what it should."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/sample.py", *arguments]
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)


@pytest.mark.slow
def test_tiny(tmp_path: Path) -> None:
    output = tmp_path / "sample.json"
    done = run("--peers=pipeline", "--rounds=2", "--seconds=0.1", "--steps=2", "--cores=1", f"--json={output}")
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert (results["sampler"], results["steps"], results["resolution"], results["cores"]) == ("euler", 2, 32, 1)
    speeds = {name: figures["images_a_second"] for name, figures in results["contestants"].items()}
    assert list(speeds) == ["ours", "pipeline"]
    assert all(len(figures["rounds_images_a_second"]) == 2 for figures in results["contestants"].values())
    assert results["ours_over"]["pipeline"] == pytest.approx(speeds["ours"] / speeds["pipeline"])
    assert f"ours / pipeline: {results['ours_over']['pipeline']:.2f}" in done.stdout


def test_an_unknown_peer_is_refused() -> None:
    done = run("--peers=pipeline,eager")
    assert done.returncode == 1
    assert "eager is neither pipeline nor compiled" in done.stderr
