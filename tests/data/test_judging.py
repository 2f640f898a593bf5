"""Scores by judges with obvious verdicts, and files of scores with every mistake."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from dpo_jax.data.labels.agreement import agreement, summarise
from dpo_jax.data.labels.judging import import_scores, score_images
from dpo_jax.data.store.prepared import PreparedData, open_prepared
from dpo_jax.data.store.scores import candidates, read_scores, write_scores
from dpo_jax.errors import UserError

from .conftest import encode, write_prepared


def grey(level: int, height: int = 8, width: int = 8) -> bytes:
    return encode(np.full((height, width, 3), level, np.uint8), "PNG")


def ends_in_zero() -> bytes:
    """An image whose digest ends in a zero byte, which NumPy's byte strings would drop."""
    return next(
        data
        for n in range(10**4)
        if hashlib.sha256(data := encode(np.full((1, 1, 3), (n % 256, n // 256, 7), np.uint8), "PNG")).digest()[-1] == 0
    )


LEVELS = [[10, 20], [20, 10], [20, 30, 30], [40], [50, 60]]
CAPTIONS = ["one", "one", "two", "one", "three"]
RECORDS: list[dict[str, Any]] = [
    {"caption": caption, "images": [grey(level, 8 + n) for level in levels]}
    for n, (caption, levels) in enumerate(zip(CAPTIONS, LEVELS, strict=True))
]
RECORDS[1]["images"] = RECORDS[0]["images"][::-1]  # the same images with the same caption
RECORDS[2]["captions"] = ["one", "two", "one"]
RECORDS[4]["images"][0] = ends_in_zero()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return open_prepared(write_prepared(tmp_path_factory.mktemp("judging") / "data", RECORDS))


class Brightness:
    """A judge whose score is 100 times the length of the caption plus the mean of blue; it remembers what it saw."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str]] = []

    def __call__(self, images: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
        assert all(image.dtype == np.uint8 and image.ndim == 3 for image in images)
        self.seen += [(len(image), text) for image, text in zip(images, captions, strict=True)]
        return np.asarray([100 * len(text) + p[..., 2].mean() for p, text in zip(images, captions, strict=True)])


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_each_image_is_judged_once_with_each_of_its_captions(prepared: PreparedData, batch: int) -> None:
    judge, shown = Brightness(), []
    scores_M = score_images(prepared, judge, lambda *done: shown.append(done), batch=batch)
    assert scores_M.tolist() == [310, 320, 320, 310, 320, 330, 330, 340, 507, 560]
    assert len(judge.seen) == 8
    assert shown[-1] == (8, 8)
    assert [done for done, _ in shown] == [*range(batch, 8, batch), 8]


def test_own_captions_count(prepared: PreparedData) -> None:
    judge = Brightness()
    score_images(prepared, judge)
    assert sorted(text for height, text in judge.seen if height == 10) == ["one", "one", "two"]


def test_a_judge_that_refuses_several_sizes_gets_them_singly(prepared: PreparedData) -> None:
    def judge(images: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
        if len({image.shape for image in images}) > 1:
            raise UserError("the images have several sizes")
        return np.stack(list(images)).mean(axis=(1, 2, 3))

    assert score_images(prepared, judge)[:3].tolist() == [10, 20, 20]


def test_what_a_judge_refuses_is_named(prepared: PreparedData) -> None:
    def judge(images: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
        if any(len(image) == 11 for image in images):
            raise UserError("11 pixels are too high")
        return np.zeros(len(images))

    with pytest.raises(ValueError, match=r"^made row 3 cannot be judged: 11 pixels are too high$"):
        score_images(prepared, judge)

    def broken(images: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match=r"^a bug$"):
        score_images(prepared, broken)

    def undecided(images: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
        return np.asarray([np.nan if text == "three" else 0 for text in captions])

    with pytest.raises(ValueError, match=r"^made row 4 cannot be judged: an image got the score nan$"):
        score_images(prepared, undecided)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def by_image(record: int, image: int, score: float, caption: str | None = None) -> dict[str, Any]:
    sha256 = digest(RECORDS[record]["images"][image])
    return {"caption": caption or CAPTIONS[record], "sha256": sha256, "score": score}


def write(tmp_path: Path, *lines: dict[str, Any] | str) -> Path:
    path = tmp_path / "scores.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_lines_of_records(prepared: PreparedData, tmp_path: Path) -> None:
    file = write(
        tmp_path,
        {"record": 4, "scores": [1, 2.5], "model": "another field"},
        "",
        {"record": 0, "scores": [0.1, 0.2]},
        {"record": 4, "scores": [1.0, 2.5]},
    )
    expected = np.full(10, np.nan, np.float32)
    expected[:2], expected[8:] = [0.1, 0.2], [1, 2.5]
    np.testing.assert_array_equal(import_scores(prepared, file), expected)


def test_lines_of_images_score_each_record_that_shows_them(prepared: PreparedData, tmp_path: Path) -> None:
    file = write(
        tmp_path,
        by_image(0, 0, 1),
        by_image(0, 1, 2) | {"sha256": digest(RECORDS[0]["images"][1]).upper()},
        by_image(2, 0, 3, "one"),
        by_image(2, 1, 4, "two"),  # the same image as the next, which has another caption
        by_image(2, 2, 5, "one"),
        by_image(4, 0, 6),
        by_image(0, 0, 1),
    )
    nan = np.nan
    np.testing.assert_array_equal(import_scores(prepared, file), [1, 2, 2, 1, 3, 4, 5, nan, 6, nan])


def test_both_kinds_of_lines(prepared: PreparedData, tmp_path: Path) -> None:
    file = write(tmp_path, by_image(0, 0, 1), {"record": 0, "scores": [1, 2]})
    assert import_scores(prepared, file)[:4].tolist()[:2] == [1, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", r"not of the form .* it is not valid JSON \(Expecting value, line 1, column 1\)"),
        ('{"record": 1, "scores": [1, 2], "record": 0}', r"not of the form .* \(it has the field 'record' twice"),
        ("\x00\xff", "not of the form"),
        ("[" * 100_000, "not of the form"),
        ("[1]", "not of the form"),
        ({"record": 1}, "not of the form"),
        ({"caption": "one", "score": 1}, "not of the form"),
        ({"record": 5, "scores": [1, 2]}, "there is no record 5; the records are 0 to 4"),
        ({"record": -1, "scores": [1, 2]}, "there is no record -1"),
        ({"record": True, "scores": [1, 2]}, "there is no record True"),
        ({"record": "1.5", "scores": [1, 2]}, "there is no record '1.5'"),
        ({"record": 2, "scores": [1, 2]}, "record 2 has 3 images, but the line has 2 scores"),
        ({"record": 1, "scores": 1}, '"scores" is not a list'),
        ({"record": 1, "scores": [1, "two"]}, '"scores" has an entry that is not a finite number'),
        ({"record": 1, "scores": [1, None]}, '"scores" has an entry that is not a finite number'),
        ('{"record": 1, "scores": [1, NaN]}', '"scores" has an entry that is not a finite number'),
        ('{"record": 1, "scores": [1, -Infinity]}', '"scores" has an entry that is not a finite number'),
        ({"record": 1, "scores": [1, 10**400]}, '"scores" has an entry that is not a finite number'),
        ({"record": 1, "scores": [1, -1e39]}, r"the score -1e\+39 is too large for float32"),
        ({"record": 0, "scores": [1, 2.5]}, "the score 2.5 contradicts 2 in an earlier line for the same image"),
        (by_image(0, 1, 3), "the score 3 contradicts 2 in an earlier line for the same image"),
        (by_image(0, 1, []), '"score" has an entry that is not a finite number'),
        (by_image(0, 1, 2) | {"sha256": "abc"}, "\"sha256\" is 'abc', not 64 hexadecimal digits"),
        (by_image(0, 1, 2) | {"sha256": 5}, '"sha256" is 5, not 64'),
        (by_image(0, 1, 2) | {"sha256": "f" * 64}, f"no image has the sha256 {'f' * 64}"),
        (by_image(0, 1, 2) | {"sha256": "0" * 64}, f"no image has the sha256 {'0' * 64}"),
        (by_image(0, 1, 2, "two"), "no record has the caption 'two' with this image"),
        (by_image(0, 1, 2, "ten"), "no record has the caption 'ten' with this image"),
        (by_image(0, 1, 2) | {"caption": ["one"]}, r"no record has the caption \['one'\] with this image"),
    ],
)
def test_mistakes_in_a_file_of_scores(
    prepared: PreparedData, tmp_path: Path, line: dict[str, Any] | str, message: str
) -> None:
    file = write(tmp_path, {"record": 0, "scores": [1, 2]}, "", line, {"record": 4, "scores": [1, 2]})
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))} line 3: {message}") as error:
        import_scores(prepared, file)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_file_without_scores(prepared: PreparedData, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no record with a score for each of its images"):
        import_scores(prepared, write(tmp_path, by_image(4, 0, 6)))
    with pytest.raises(FileNotFoundError, match=r"no file of scores at .*nowhere"):
        import_scores(prepared, tmp_path / "nowhere")


def test_incomplete_records_are_stored_as_null(prepared: PreparedData, tmp_path: Path) -> None:
    file = write(tmp_path, by_image(2, 0, 6, "one"), by_image(2, 1, 7, "two"), {"record": 0, "scores": [1, 2]})
    of = candidates(prepared.records["images"])
    scores_M = import_scores(prepared, file)
    summary = summarise(prepared, "mine", str(file), scores_M)
    assert (summary.records, summary.scored, summary.pairs, summary.ties) == (5, 1, 1, 0)
    write_scores(prepared.folder, "mine", str(file), scores_M, of, summary.as_json())
    (stored_M,) = read_scores(prepared.folder, ("mine",), of)
    np.testing.assert_array_equal(stored_M, [1, 2] + [np.nan] * 8)


def agreement_by_hand(points: list[list[float]], others: list[list[float]]) -> tuple[int, int, int]:
    """Return (pairs that both decide, pairs decided alike, ties of the first)."""
    decided = alike = ties = 0
    for mine, other in zip(points, others, strict=True):
        for a in range(len(mine)):
            for b in range(a):
                ties += mine[a] == mine[b]
                if mine[a] != mine[b] and other[a] != other[b]:
                    decided += 1
                    alike += (mine[a] > mine[b]) == (other[a] > other[b])
    return decided, alike, ties


def column(lists: list[list[float]]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(lists, pa.list_(pa.float32()))])


@pytest.mark.parametrize("seed", range(5))
def test_agreement_against_a_count(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    votes = [sorted(rng.integers(0, 3, number).tolist(), reverse=True) for number in rng.integers(1, 8, 12)]
    shares = [
        np.divide(vote, sum(vote)) if any(vote) else np.full(len(vote), len(vote) > 1) / len(vote) for vote in votes
    ]
    points, others = ([rng.integers(0, 4, len(vote)).astype(float).tolist() for vote in votes] for _ in range(2))
    records = [
        {"caption": f"{n % 4}", "images": [grey(8 * n + k) for k in range(len(vote))], "preference": shares[n]}
        | {"split": "train" if n % 2 else "validation"}
        for n, vote in enumerate(votes)
    ]
    prepared = open_prepared(write_prepared(tmp_path / "data", records))
    of = candidates(prepared.records["images"])
    write_scores(prepared.folder, "other", "by hand", np.concatenate(others).astype(np.float32), of, {})
    write_scores(prepared.folder, "mine", "an earlier time", np.zeros(len(of.rank_M), np.float32), of, {})
    summary = summarise(prepared, "mine", "by hand", np.concatenate(points).astype(np.float32))
    assert list(summary.agreement) == ["votes", "other"]
    for found, other in zip(summary.agreement.values(), (votes, others), strict=True):
        decided, alike, ties = agreement_by_hand(points, other)
        assert found is not None
        assert (found.pairs, found.rate) == (decided, pytest.approx(alike / decided))
        assert 0 <= found.low < found.rate < found.high <= 1
        assert summary.ties == ties
    assert summary.pairs == sum(len(vote) * (len(vote) - 1) // 2 for vote in votes)
    decided, alike, _ = agreement_by_hand(points[::2], votes[::2])
    held_out = summary.held_out["votes"]
    assert held_out is not None
    assert (held_out.pairs, held_out.rate) == (decided, pytest.approx(alike / decided))


def test_interval_is_wilsons_for_independent_pairs_and_wider_for_dependent_ones() -> None:
    rng = np.random.default_rng(0)
    number = 2000
    right = rng.random(number) < 0.7
    of = candidates(column([[1, 0]] * number))
    points_M = np.stack([right, ~right], axis=1).ravel().astype(float)
    votes_M = np.tile([1.0, 0.0], number)
    alone = agreement(points_M, votes_M, of, pa.chunked_array([[str(n) for n in range(number)]]))
    assert alone is not None
    wilson = stats.binomtest(int(right.sum()), number).proportion_ci(method="wilson")
    np.testing.assert_allclose([alone.low, alone.high], [wilson.low, wilson.high], atol=1e-4)
    # Counting each pair four times adds no information.
    four_M = (np.repeat(points_M.reshape(-1, 2), 4, axis=0).ravel(), np.tile(votes_M, 4))
    captions = pa.chunked_array([[str(n // 4) for n in range(4 * number)]])
    repeated = agreement(*four_M, candidates(column([[1, 0]] * 4 * number)), captions)
    assert repeated is not None
    np.testing.assert_allclose([repeated.low, repeated.high], [alone.low, alone.high], atol=1e-4)


def test_perfect_agreement_is_not_certain_and_none_is_none() -> None:
    of = candidates(column([[1, 0]] * 10))
    votes_M = np.tile([1.0, 0.0], 10)
    captions = pa.chunked_array([[str(n) for n in range(10)]])
    perfect = agreement(votes_M, votes_M, of, captions)
    assert perfect is not None
    wilson = stats.binomtest(10, 10).proportion_ci(method="wilson")
    np.testing.assert_allclose(perfect[:3], [1, wilson.low, 1])
    assert agreement(np.zeros(20), votes_M, of, captions) is None
    assert agreement(np.full(20, np.nan), votes_M, of, captions) is None


def test_judges_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    prepared = open_prepared(write_prepared(tmp_path / "data", RECORDS))
    (tmp_path / "data" / "scores").mkdir()
    (tmp_path / "data" / "scores" / "old.arrow").write_bytes(b"")
    summary = summarise(prepared, "mine", "by hand", np.arange(10, dtype=np.float32))
    assert list(summary.agreement) == ["votes"]
    assert "not compared old: " in str(summary)
    assert "is damaged" in summary.not_compared["old"]
    json.dumps(summary.as_json())
