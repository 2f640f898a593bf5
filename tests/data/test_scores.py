"""Orders are compared with brute force in plain Python; files are tested with every kind of damage."""

import itertools
import json
import math
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dpo_jax.data.store.prepared import Combine, open_prepared
from dpo_jax.data.store.scores import candidates, judges_of, rank, read_scores, write_scores

from .conftest import encode, write_prepared

Scores = list[list[list[float] | None]]
"""Scores by judge, record and candidate; None for a record that the judge did not score."""


def lists(numbers: list[int]) -> pa.ChunkedArray:
    """Return a column in several chunks, as in records.arrow."""
    column = pa.array([list(range(number)) for number in numbers], pa.list_(pa.int32()))
    return pa.chunked_array([column[:3], column[3:]])


def flat(scores: Scores, numbers: list[int]) -> np.ndarray:
    rows = [[s for n, k in zip(judge, numbers, strict=True) for s in n or [math.nan] * k] for judge in scores]
    return np.asarray(rows, np.float32)


def points_by_hand(scores: Scores, record: int, number: int, combine: str) -> list[float]:
    """Return the values by which the candidates of a record are ordered."""
    mine = [judge[record] or [] for judge in scores]
    if len(scores) == 1:
        return mine[0]
    if combine == "pareto":

        def beats(a: int, b: int) -> bool:
            return all(s[a] >= s[b] for s in mine) and any(s[a] > s[b] for s in mine)

        return [sum(beats(a, b) for b in range(number)) for a in range(number)]
    return [sum(s[k] / spread(judge) for s, judge in zip(mine, scores, strict=True)) for k in range(number)]


def spread(judge: list[list[float] | None]) -> float:
    """Root mean square of all differences within records."""
    squares = [(a - b) ** 2 for record in judge for a, b in itertools.combinations(record or [], 2)]
    return math.sqrt(statistics.fmean(squares)) if any(squares) else 1.0


def order_by_hand(points: list[Any]) -> tuple[list[int], list[float]]:
    """A stable insertion sort; points that differ by less than rounding are equal."""
    order: list[int] = []
    for k in range(len(points)):
        place = len(order)
        while place and points[k] > points[order[place - 1]] + 1e-8:
            place -= 1
        order.insert(place, k)
    wins = [sum((points[k] > other + 1e-8) + (points[k] > other - 1e-8) for other in points) - 1 for k in order]
    return order, [win / sum(wins) if len(order) > 1 else 1.0 for win in wins]


@pytest.mark.parametrize("combine", ["mean", "pareto"])
@pytest.mark.parametrize("num_judges", [1, 2, 3])
@pytest.mark.parametrize("seed", range(10))
def test_order_against_brute_force(combine: Combine, num_judges: int, seed: int) -> None:
    rng = np.random.default_rng((seed, num_judges))
    numbers = rng.integers(1, 8, 60).tolist()
    few = int(rng.integers(2, 6))  # few values, many ties

    def scores_of(number: int) -> list[float] | None:
        return None if rng.random() < 0.1 else rng.integers(0, few, number).astype(float).tolist()

    scores: Scores = [[scores_of(number) for number in numbers] for _ in range(num_judges)]
    of = candidates(lists(numbers))
    found = rank(flat(scores, numbers), of, combine)
    for n, (number, first) in enumerate(zip(numbers, of.first_N, strict=True)):
        is_scored = all(judge[n] is not None for judge in scores)
        assert found.scored_N[n] == is_scored
        order = found.order_M[first : first + number] - first
        if is_scored:
            expected, preference = order_by_hand(points_by_hand(scores, n, number, combine))
            np.testing.assert_allclose(found.preference_M[first : first + number], preference, rtol=1e-6)
        else:
            expected = list(range(number))
        assert order.tolist() == expected
    assert found.scored_N.any()
    assert found.preference_M.dtype == np.float32


def test_units_of_judges_do_not_matter_in_the_mean() -> None:
    rng = np.random.default_rng(0)
    of = candidates(lists([4] * 50))
    scores_JM = rng.normal(size=(2, 200)).astype(np.float32)
    scaled = scores_JM * np.asarray([[1000], [1]], np.float32) + np.asarray([[0], [64]], np.float32)
    np.testing.assert_array_equal(rank(scores_JM, of, "mean").order_M, rank(scaled, of, "mean").order_M)


def test_equal_means_are_ties_whatever_the_rounding() -> None:
    """The judges have equal units; without rounding, the means differ in the last digit."""
    scores: Scores = [[[1, 2, 4]], [[4, 1, 2]], [[2, 4, 1]]]
    assert rank(flat(scores, [3]), candidates(lists([3])), "mean").preference_M.tolist() == [np.float32(1 / 3)] * 3


def test_one_judge_is_taken_at_its_word() -> None:
    """A small difference decides, even if the judge's differences elsewhere are large."""
    found = rank(flat([[[0, 1e-12], [0, 1]]], [2, 2]), candidates(lists([2, 2])), "mean")
    assert found.order_M.tolist() == [1, 0, 3, 2]
    assert found.preference_M.tolist() == [1, 0, 1, 0]


def test_judges_that_contradict_each_other_tie_under_pareto() -> None:
    scores: Scores = [[[1, 0], [0, 1], [0, 1]], [[0, 1], [0, 1], [1, 1]]]
    found = rank(flat(scores, [2, 2, 2]), candidates(lists([2, 2, 2])), "pareto")
    assert found.order_M.tolist() == [0, 1, 3, 2, 5, 4]
    assert found.preference_M.tolist() == [0.5, 0.5, 1, 0, 1, 0]


RECORDS: list[dict[str, Any]] = [
    {
        "caption": f"prompt {i}",
        "images": [encode(np.full((8, 8, 3), 20 * i + k, np.uint8), "PNG") for k in range(number)],
        "models": [f"model {i} {k}" for k in range(number)],
        "split": "validation" if i == 5 else "train",
    }
    | ({"captions": [f"own {i} {k}" for k in range(number)]} if i in (1, 6) else {})
    | ({"preference": [0.0]} if number == 1 else {})
    for i, number in enumerate([2, 3, 1, 2, 4, 2, 2])
]
NUMBERS = [len(record["images"]) for record in RECORDS]
SCORES: Scores = [
    [[0.1, 0.9], [1, 3, 2], [7], None, [2, 2, 1, 3], [1, 0], [5, 5]],
    [[0, 0], [0, 0, 1], None, [1, 2], [4, 4, 4, 4], [0, 2], [1, 0]],
]


@pytest.fixture(scope="module")
def prepared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_prepared(tmp_path_factory.mktemp("judged") / "data", RECORDS)
    of = candidates(open_prepared(folder).records["images"])
    for judge, scores_M in zip(("a", "b"), flat(SCORES, NUMBERS), strict=True):
        write_scores(folder, judge, "by hand", scores_M, of, {"judge": judge})
    return folder


@pytest.fixture
def folder(prepared_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(prepared_folder, tmp_path / "copy")


def test_files(folder: Path) -> None:
    table = pa.ipc.open_file(str(folder / "scores" / "a.arrow")).read_all()
    for found, expected in zip(table["scores"].to_pylist(), SCORES[0], strict=True):
        assert found == (None if expected is None else np.float32(expected).tolist())
    assert table.schema.metadata[b"judge"] == b"a"
    assert table.schema.metadata[b"origin"] == b"by hand"
    assert json.loads((folder / "scores" / "a.json").read_text()) == {"judge": "a"}
    assert judges_of(folder) == ["a", "b"]
    assert sorted(file.name for file in (folder / "scores").iterdir()) == ["a.arrow", "a.json", "b.arrow", "b.json"]
    of = candidates(open_prepared(folder).records["images"])
    np.testing.assert_array_equal(read_scores(folder, ("b", "a"), of), flat(SCORES, NUMBERS)[::-1])


def test_a_write_that_fails_leaves_the_old_scores(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = candidates(open_prepared(folder).records["images"])
    before = read_scores(folder, ("a",), of)

    def disk_full(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", disk_full)
    with pytest.raises(OSError, match="disk full"):
        write_scores(folder, "a", "again", np.zeros_like(before[0]), of, {})
    np.testing.assert_array_equal(read_scores(folder, ("a",), of), before)
    assert len(list((folder / "scores").iterdir())) == 4


@pytest.mark.parametrize("judges", [("a",), ("b",), ("a", "b")])
@pytest.mark.parametrize("combine", ["mean", "pareto"])
def test_records_in_the_order_of_judges(folder: Path, judges: tuple[str, ...], combine: Combine) -> None:
    prepared = open_prepared(folder, judges, combine)
    scores = [SCORES["ab".index(judge)] for judge in judges]
    for i, record in enumerate(RECORDS):
        found = prepared.record(i)
        order, preference = list(range(NUMBERS[i])), [1.0] + [0.0] * (NUMBERS[i] - 1)
        if NUMBERS[i] == 1:
            preference = [0.0]  # the votes
        elif all(judge[i] is not None for judge in scores):
            order, preference = order_by_hand(points_by_hand(scores, i, NUMBERS[i], combine))
        assert prepared.read_images(found) == [record["images"][k] for k in order]
        assert found["models"] == [record["models"][k] for k in order]
        assert found["captions"] == ([record["captions"][k] for k in order] if "captions" in record else None)
        assert (found["caption"], found["where"]) == (record["caption"], f"made row {i}")
        np.testing.assert_allclose(found["preference"], preference, rtol=1e-6)
    votes = open_prepared(folder)
    assert votes.read_images(votes.record(1)) == RECORDS[1]["images"]  # the votes are unchanged


def damage(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        table = change(pa.ipc.open_file(file.read_bytes()).read_all())
        with pa.ipc.new_file(str(file), table.schema) as writer:
            writer.write_table(table)

    return apply


def one_score_more(table: pa.Table) -> pa.Table:
    rows = table["scores"].to_pylist()
    return pa.table({"scores": pa.array([[*rows[0], 1.0], *rows[1:]], table.schema.field(0).type)}, table.schema)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:100]), "is damaged"),
        (lambda file: file.write_bytes(b""), "is damaged"),
        (damage(lambda table: table.rename_columns(["score"])), "has another layout"),
        (damage(lambda table: table.replace_schema_metadata(None)), "was made for another data set than"),
        (damage(lambda table: table.slice(1)), "does not have one score per image"),
        (damage(lambda table: table.slice(len(table))), "does not have one score per image"),
        (damage(one_score_more), "does not have one score per image"),
    ],
)
def test_damaged_scores(folder: Path, change: Callable[[Path], None], message: str) -> None:
    change(folder / "scores" / "a.arrow")
    with pytest.raises(
        ValueError, match=rf"a\.arrow {message}.*; make it again with python -m dpo_jax.score .* --overwrite$"
    ) as error:
        open_prepared(folder, ("b", "a"))
    assert "\n" not in str(error.value)
    open_prepared(folder, ("b",))


def test_scores_of_another_data_set(folder: Path, tmp_path: Path) -> None:
    """The data set has the same images in the same order, with another caption."""
    other = write_prepared(tmp_path / "other", [RECORDS[0] | {"caption": "another"}, *RECORDS[1:]])
    shutil.copytree(folder / "scores", other / "scores")
    with pytest.raises(ValueError, match=r"was made for another data set than .*other \(records.arrow differs\)"):
        open_prepared(other, ("a",))


def test_no_such_judge(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError,
        match=r"no scores by 'c' \(its judges: a, b\); make them with python -m dpo_jax.score .* --judge=c ",
    ):
        open_prepared(folder, ("a", "c"))
    shutil.rmtree(folder / "scores")
    with pytest.raises(FileNotFoundError, match=r"no scores by 'a' \(its judges: none\)"):
        open_prepared(folder, ("a",))
    with pytest.raises(ValueError, match="combine='median' is unknown; set it to mean or pareto"):
        open_prepared(folder, ("a",), "median")  # type: ignore[arg-type]
