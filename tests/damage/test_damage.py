"""Damaged and odd inputs: refused in one sentence that names the file, told, or without effect; never wrong in silence.

Here are a few for each command; `python -m tests.damage --count=3000 --output=DIR` tries all.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .subjects import SUBJECTS
from .trial import BAD, Runner

FEW = (
    *("export a single file", "merge a LoRA", "prepare JSONL", "evaluate images", "export what people said"),
    *("score prepared data", "sample with images to begin from", "plan tiny with odd fields", "odd flags of prepare"),
)
"""A subject of each command."""
SEEDS = 2


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    runner = Runner(tmp_path_factory.mktemp("damage"))
    yield runner
    runner.close()


def try_some(runner: Runner, folder: Path, name: str, seeds: range) -> None:
    subject, make = SUBJECTS[name]
    whole = folder / "whole"
    whole.mkdir()
    make(whole, runner)
    results = [result for seed in seeds if (result := runner.try_one(subject, whole, seed))]
    assert results
    bad = [str(result) for result in results if result.verdict in BAD]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("name", FEW)
def test_a_few(runner: Runner, tmp_path: Path, name: str) -> None:
    try_some(runner, tmp_path, name, range(SEEDS))


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBJECTS)
def test_many(runner: Runner, tmp_path: Path, name: str) -> None:
    share = SUBJECTS[name][0].share
    try_some(runner, tmp_path, name, range(SEEDS, SEEDS + 35 * share))
