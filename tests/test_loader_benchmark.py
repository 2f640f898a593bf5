"""The loader is as fast as its benchmark says, gives PyTorch's pixels, and its memory stays flat."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def run(output: Path, *arguments: str) -> Any:
    subprocess.run([sys.executable, "benchmarks/loader.py", f"--json={output}", *arguments], cwd=ROOT, check=True)
    return json.loads(output.read_text())


def check_pixels(results: dict[str, Any]) -> None:
    for name, figures in results.items():
        if name.isdigit():
            same, resized = (
                figures["largest_difference_of_255"][str(side)] for side in (int(name), int(name) * 3 // 4)
            )
            assert same < 0.01  # their floats
            assert resized <= 1  # Pillow rounds, PyTorch doesn't


@pytest.mark.slow
def test_tiny(tmp_path: Path) -> None:
    results = run(tmp_path / "loader.json", "--tiny", "--only=bare,ours,cache,shipped")
    check_pixels(results)
    contestants = results["64"]["contestants"]
    assert list(contestants) == ["bare", "ours", "cache", "shipped"]
    for figures in contestants.values():
        assert 0 < figures["cpu_ms_a_pair"] * figures["pairs_a_second"] / 1000 < 1.5 * results["cores"]


def test_committed_figures_say_the_same() -> None:
    results = json.loads((ROOT / "benchmarks" / "loader.json").read_text())
    check_pixels(results)
    for side in ("512", "1024"):
        ratios = {name: ratio["pairs_a_second"] for name, ratio in results[side]["ratios"].items()}
        assert ratios["ours / shipped"] > 2
        assert ratios["ours / bare"] > 0.85
        assert ratios["cache / shipped"] > 20


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_is_flat(tmp_path: Path) -> None:
    results = run(tmp_path / "memory.json", "--memory")
    few, many = results
    assert (few["records"], many["records"]) == (20_000, 200_000)
    small, large = (found["bytes_after_batches"] for found in results)
    # The index of a chosen record takes 8 bytes; place, checksum and size of an image 32, and a record has two of them;
    # the rest is what choosing left unused.
    assert large["500"] - small["500"] < 130 * 180_000
    assert large["500"] - large["50"] < 20e6
