"""The memory tables of the documentation are those that benchmarks/memory.py wrote last."""

import functools
import importlib.util
import json
from pathlib import Path

import pytest

from dpo_jax.training.config import check_values

ROOT = Path(__file__).parents[1]


@functools.cache
def load_benchmark():
    spec = importlib.util.spec_from_file_location("memory_benchmark", ROOT / "benchmarks" / "memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(path: str) -> list[str]:
    lines = (ROOT / path).read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("| model | pixels | trained |"))
    end = next(i for i in range(begin, len(lines)) if not lines[i])
    return lines[begin:end]


def test_the_documentation_shows_the_computed_table():
    benchmark = load_benchmark()
    table = benchmark.table(json.loads(benchmark.FILE.read_text())).splitlines()
    assert len(table) == 2 + len(benchmark.MODELS)
    assert rows("docs/memory.md") == table
    without_last_column = [f"{line.rsplit('|', 2)[0]}|" for line in table]
    assert rows("README.md") == [line for line in without_last_column if "SD2.1" not in line]


def test_the_documentation_shows_the_table_of_choices():
    benchmark = load_benchmark()
    table = benchmark.table_of_choices(json.loads(benchmark.CHOICES_FILE.read_text()))
    assert table in (ROOT / "docs" / "memory.md").read_text()
    for name, fields, ways in benchmark.CHOICES.values():
        for stored in ways.values():
            check_values(benchmark.config_of(name, benchmark.STORED | fields | stored))


def test_all_rows_and_columns_are_configs():
    benchmark = load_benchmark()
    for name in benchmark.MODELS:
        for fields in benchmark.SETTINGS.values():
            check_values(benchmark.config_of(name, fields))


@pytest.mark.slow
def test_a_row_computed_again():
    benchmark = load_benchmark()
    for column, gib in json.loads(benchmark.FILE.read_text())["sd15:lora"].items():
        assert benchmark.needed("sd15:lora", benchmark.SETTINGS[column]) / 2**30 == pytest.approx(gib, rel=1e-3)
