"""Loading holds little more than the weights and reads little more than its share of the file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(output, *arguments):
    subprocess.run([sys.executable, "benchmarks/loading.py", f"--json={output}", *arguments], cwd=ROOT, check=True)
    return json.loads(output.read_text())


def check(results, *, memory, read):
    assert [(r["file"], r["processes"], r["dtype"]) for r in results] == [
        (file, *case)
        for file in ("safetensors", "flax msgpack")
        for case in ((1, "bfloat16"), (1, "float32"), (2, "bfloat16"), (2, "bfloat16"))
    ]
    for result in results:
        in_strips = result["file"] == "flax msgpack" and result["processes"] > 1  # see sharding.param_sharding
        assert 0.7 < result["peak_over_held"] < memory
        assert result["read_over_share"] < (2 * read if in_strips else read)
    whole, _, one, other = (result["share_bytes"] for result in results[:4])
    assert whole < one + other < 1.1 * whole


@pytest.mark.slow
def test_small_model(tmp_path):
    check(run(tmp_path / "loading.json", "--tiny"), memory=1.4, read=1.4)


def check_full_size(results):
    assert results[1]["held_bytes"] == 4 * 2_567_463_684
    check(results, memory=1.2, read=1.1)
    assert all(result["read_over_share"] > 0.99 for result in results)  # or the disk's reads were not counted


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_full_size(tmp_path):
    check_full_size(run(tmp_path / "loading.json"))


def test_committed_figures_say_the_same():
    check_full_size(json.loads((ROOT / "benchmarks" / "loading.json").read_text()))
