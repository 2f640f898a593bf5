import itertools
from types import SimpleNamespace

import pytest

from dpo_jax import progress
from dpo_jax.progress import ProgressBar


def test_plain_lines_with_rate_and_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Each look at the clock is 6 seconds later; what was done before the first line says nothing of the rate."""
    clock = itertools.count(0, 6)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with ProgressBar("parts") as bar:
        for done in (10, 13, 16, 19):
            bar.show("reading", done, 100, records=200 * done)
        bar.show("merging", 1, 2)
        bar.show("merging", 2, 2)
    assert capsys.readouterr().err.splitlines() == [
        "reading 13/100 parts  2600 records  100 records/s  left 0:02:54",
        "reading 19/100 parts  3800 records  100 records/s  left 0:02:42",
        "merging 2/2 parts  0.17 parts/s  left 0:00:00",
    ]
