"""The file of votes."""

import concurrent.futures
import datetime

import pytest

from dpo_jax.voting.store import open_study
from dpo_jax.voting.study import read_folder


@pytest.fixture
def study(make_folders, tmp_path):
    paths = make_folders("base", "tuned", prompts=4)
    return tmp_path / "votes.sqlite", [read_folder(path) for path in paths]


def test_votes_survive_and_the_first_answer_counts(study):
    path, folders = study
    with open_study(path, "pairs", folders) as store:
        task = next(iter(store.tasks))
        first = store.add("ann", task, "preference", (1, 0), [1, 0])
        assert store.add("ann", task, "preference", (0, 1), [1, 0]) == first  # the first answer stays
        store.add("ann", task, "appeal", (0.5, 0.5), [1, 0])
        store.add("bob", task, "preference", (0, 1), [0, 1])
    with open_study(path, "pairs", folders) as store:
        votes = store.votes()
        assert votes[0] == first
        assert first.answer == (1, 0)
        assert first.shown == (1, 0)
        assert datetime.datetime.fromisoformat(first.time).utcoffset() == datetime.timedelta(0)
        assert [(vote.rater, vote.question) for vote in votes] == [
            ("ann", "preference"), ("ann", "appeal"), ("bob", "preference")
        ]  # fmt: skip
        assert store.tallies()[task, "preference"] == {(1, 0): 1, (0, 1): 1}
        assert store.answered("ann") == [(task, "preference"), (task, "appeal")]


def test_a_commit_is_on_the_disk_before_it_returns(study):
    with open_study(study[0], "pairs", study[1]) as store:
        (mode,), (synchronous,) = (
            store._connection.execute(f"PRAGMA {name}").fetchone() for name in ("journal_mode", "synchronous")
        )
    assert (mode, synchronous) == ("wal", 2)  # FULL


def test_undo_keeps_what_was_said(study):
    with open_study(study[0], "pairs", study[1]) as store:
        task = next(iter(store.tasks))
        store.add("ann", task, "preference", (1, 0), [0, 1])
        assert store.undo("ann", task, "preference")
        assert not store.undo("ann", task, "preference")  # a repeated request undoes nothing more
        assert store.votes() == []
        store.add("ann", task, "preference", (0, 1), [0, 1])
        assert [vote.answer for vote in store.votes()] == [(0, 1)]
        rows = store._connection.execute("SELECT rater, task, answer FROM undone").fetchall()
    assert rows == [("ann", task, "[1, 0]")]


def test_many_at_once_from_two_connections(study):
    path, folders = study
    with open_study(path, "pairs", folders) as one, open_study(path, "pairs", folders) as two:
        tasks = list(one.tasks)
        assert tasks == list(two.tasks)

        def vote(k):
            store = (one, two)[k % 2]
            return store.add(f"rater {k // 8}", tasks[k // 2 % 4], "preference", (k % 2, 1 - k % 2), [0, 1])

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            given = list(pool.map(vote, range(160)))
        stored = one.votes()
        assert set(given) == set(stored)  # everybody learns what is stored, also the second one
        assert len(stored) == 80


def test_ids_tell_nothing_and_last(study, tmp_path):
    path, folders = study
    with open_study(path, "pairs", folders) as store:
        ids = list(store.tasks)
        assert store.opaque("image", 0, "a.png") == store.opaque("image", 0, "a.png")
        assert store.opaque("image", 0, "a.png") != store.opaque("image", 1, "a.png")
    with open_study(path, "pairs", folders) as store:
        assert list(store.tasks) == ids
    with open_study(tmp_path / "other.sqlite", "pairs", folders) as store:
        assert set(store.tasks).isdisjoint(ids)


def test_only_its_own_study_opens_it(study, make_folders, tmp_path):
    path, folders = study
    open_study(path, "pairs", folders).close()
    third = read_folder(make_folders("same as base", "same as tuned", "third", prompts=4)[2])
    for wrong in ([folders[0], third], folders[::-1], [*folders, third]):
        with pytest.raises(ValueError, match="votes on other images"):
            open_study(path, "pairs", wrong)
    with pytest.raises(ValueError, match="votes of --mode=pairs, not rank"):
        open_study(path, "rank", folders)
    moved = folders[0].path.rename(tmp_path / "moved")
    with open_study(path, "pairs", [read_folder(moved), folders[1]]) as store:
        assert store.folders == [moved, folders[1].path]
