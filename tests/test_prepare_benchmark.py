"""Preparing ten times the records takes hardly more memory, and two workers share a small input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(output, *arguments):
    subprocess.run([sys.executable, "benchmarks/prepare.py", f"--json={output}", *arguments], cwd=ROOT, check=True)
    return json.loads(output.read_text())


def check(results, *, records, rounds, worker):
    cases = [("records", records, 2), ("records", 10 * records, 2), *[("row group", records // 20, 1)] * 2]
    small = records * 3 // 50
    cases += [("small input", small, 1), ("small input", small, 2)] * rounds
    assert [(result["case"], result["records"], result["workers"]) for result in results] == cases
    once, ten_times = results[:2]
    assert ten_times["images"] == 20 * records
    # The contact sheet needs the places and checksums of all images, 24 bytes each, and the list of held-out prompts a
    # number for each of them.
    assert ten_times["main_bytes"] - once["main_bytes"] < 200 * 9 * records + 2e6
    assert 0.9 < ten_times["worker_bytes"] / once["worker_bytes"] < worker


@pytest.mark.slow
def test_small_size(tmp_path):  # a worker's chunk still grows with the records
    check(run(tmp_path / "prepare.json", "--tiny"), records=200, rounds=1, worker=1.3)


def check_full_size(results):
    check(results, records=20_000, rounds=3, worker=1.1)
    small_pages, one_page = results[2:4]
    assert small_pages["worker_bytes"] < 200e6  # of a row group of 1 GB
    assert one_page["worker_bytes"] < 1.3e9  # a page can't be read in parts
    alone, shared = ([result["busiest_cpu_seconds"] for result in results[first::2]] for first in (4, 5))
    assert sum(shared) < 0.7 * sum(alone)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_full_size(tmp_path):
    check_full_size(run(tmp_path / "prepare.json"))


def test_committed_figures_say_the_same():
    check_full_size(json.loads((ROOT / "benchmarks" / "prepare.json").read_text()))
