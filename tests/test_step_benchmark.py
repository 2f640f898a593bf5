"""The benchmark of the training step runs on CPUs at its small size, with consistent figures."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("peers", [["P1"], ["P0", "P2"]], ids="-".join)
def test_tiny(tmp_path: Path, peers: list[str]) -> None:
    output = tmp_path / "step.json"
    arguments = ["--mode=tiny", f"--peers={','.join(peers)}", "--rounds=1", "--seconds=0.5", f"--json={output}"]
    done = subprocess.run(
        [sys.executable, "benchmarks/step.py", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    )
    results = json.loads(output.read_text())
    assert list(results["contestants"]) == ["ours", *peers]
    for name, figures in results["contestants"].items():
        assert "failed" not in figures, (name, figures)
        assert figures["loss"] == pytest.approx(math.log(2), abs=1e-3)
        assert figures["mfu"] == pytest.approx(
            figures["pairs_a_second"] * results["tflop_a_pair"] / results["tflops"], rel=1e-6
        )
        assert 0 < figures["mfu"] < 1
    for name in peers:
        ratio = results["contestants"]["ours"]["pairs_a_second"] / results["contestants"][name]["pairs_a_second"]
        assert results["ours_over"][name] == pytest.approx(ratio)
        assert f"ours / {name}: {ratio:.2f}" in done.stdout


def test_an_unknown_peer_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/step.py", "--peers=P1,P9"], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "error: --peers=P1,P9: P9 is not one of P0, P1, P2\n"
