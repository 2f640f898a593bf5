"""The benchmark of single operations leaves none out and says what it should."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_jax.cli import load_config
from dpo_jax.planning.estimate import measure_work

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_tiny(tmp_path: Path) -> None:
    output = tmp_path / "operations.json"
    arguments = ["--mode=tiny", "--seconds=0.005", f"--json={output}"]
    done = subprocess.run(
        [sys.executable, "benchmarks/operations.py", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    )
    results = json.loads(output.read_text())
    rows = results["operations"]
    assert {row["kind"] for row in rows} == {"convolution", "linear", "norm", "geglu", "attention"}
    # Forward and derivatives of all operations are the policy's work in a step, forward alone the reference's; the
    # plan's count leaves out what the edges of convolutions multiply with padding, and the first layer's input, whose
    # derivative nobody asks for.
    config = load_config(str(ROOT / "configs/sdxl.py:tiny"))
    config.dtype, config.data.resolution = "float32", 128
    config.data.encoded_views, config.data.random_flip, config.data.path = 1, False, "made up"
    gflop = sum(row["times"] * (row["forward"]["gflop"] + row["with_derivatives"]["gflop"]) for row in rows)
    work = measure_work(config, "gpu")
    assert gflop / results["pairs_at_a_time"] == pytest.approx(work.flops / 1e9, rel=0.03)
    of_pair = sum(row["times"] * (row["forward"]["ms"] + row["with_derivatives"]["ms"]) for row in rows) / 4
    assert results["step_ms_a_pair"]["ms"] == pytest.approx(of_pair)
    assert all(row[of]["floor_ms"] > 0 for row in rows for of in ("forward", "with_derivatives"))
    assert f"sum of a pair, policy and reference: {of_pair:.1f} ms" in done.stdout
