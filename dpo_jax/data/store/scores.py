"""Scores of judges beside the votes: one file per judge, and the order of candidates that one or several judges give.

    DATA/scores/NAME.arrow  one row per record, in the order of records.arrow: one score per image, or null
    DATA/scores/NAME.json   agreement of the judge with the votes and with other judges (agreement.py)

Axes: N records, M candidates of all records together, J judges.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from dpo_jax import files
from dpo_jax.data.store import table_checks
from dpo_jax.data.store.arrow_file import map_table
from dpo_jax.errors import MissingFileError, UserError
from dpo_jax.streams import warn

Combine = Literal["mean", "pareto"]

SCORES = pa.schema({"scores": pa.list_(pa.float32())})
ROWS_A_BATCH = 10_000


class Candidates(NamedTuple):
    """The place of each record's candidates in a flat array of all candidates."""

    number_N: np.ndarray
    first_N: np.ndarray
    record_M: np.ndarray
    rank_M: np.ndarray
    """Position of each candidate in its record."""

    def pairs(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield index arrays (first, second) which together hold every pair of candidates of a record once."""
        for apart in range(1, self.number_N.max(initial=0)):
            first = np.flatnonzero(self.rank_M + apart < self.number_N[self.record_M])
            yield first, first + apart


def candidates(lists: pa.ChunkedArray) -> Candidates:
    """Return the `Candidates` of a column with one list per record, none of them null."""
    number_N = pc.list_value_length(lists).to_numpy()
    first_N = np.cumsum(number_N) - number_N
    record_M = np.repeat(np.arange(len(number_N)), number_N)
    return Candidates(number_N, first_N, record_M, np.arange(len(record_M)) - first_N[record_M])


def check_name(judge: str) -> None:
    """Raise ValueError for a name that cannot name a file, or that the summary uses for the votes."""
    if not re.fullmatch(r"\w[\w.-]*", judge) or judge == "votes":
        raise UserError(
            f"--judge={judge} cannot name a file of scores: use letters, digits, '_', '.' and '-', and not votes; "
            "choose another --name"
        )


def judges_of(folder: Path) -> list[str]:
    """Return the names of the judges whose scores a prepared folder holds."""
    return sorted(file.stem for file in (folder / "scores").glob("[!.]*.arrow"))


def scores_file(folder: Path, judge: str) -> Path:
    return folder / "scores" / f"{judge}.arrow"


def write_scores(
    folder: Path, judge: str, origin: str, scores_M: np.ndarray, of: Candidates, summary: dict[str, Any]
) -> None:
    """Write both files of a judge, each whole or not at all. A record with a NaN among its scores gets null.

    Args:
        origin: where the scores come from; stored in the file for people to read.
        summary: the contents of NAME.json.
    """
    scored_N = complete(scores_M, of)
    scores_M = np.where(scored_N[of.record_M], scores_M, np.nan).astype(np.float32)
    offsets = np.concatenate([[0], np.cumsum(np.where(scored_N, of.number_N, 0))])
    values = pa.array(scores_M[scored_N[of.record_M]], pa.float32())
    lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, mask=pa.array(~scored_N))
    digests = {"records_sha256": _digest(folder), "scores_xxh3": _digest_of(scores_M)}
    schema = SCORES.with_metadata({"judge": judge, "origin": origin} | digests)
    file = scores_file(folder, judge)
    files.check_inside(file, folder)
    with files.writing(file) as stream, pa.ipc.new_file(stream, schema) as writer:
        writer.write_table(pa.table([lists], schema), max_chunksize=ROWS_A_BATCH)
    files.write_whole(file.with_suffix(".json"), json.dumps(summary, indent=1) + "\n")


def read_scores(folder: Path, judges: Sequence[str], of: Candidates) -> np.ndarray:
    """Return scores_JM, float32; NaN for the candidates of records that a judge did not score.

    Raises:
        FileNotFoundError: a judge has no scores.
        ValueError: a file is damaged, or belongs to other records than the folder has.
    """
    digest = _digest(folder)
    return np.stack([_read(folder, judge, of, digest) for judge in judges])


def _read(folder: Path, judge: str, of: Candidates, digest: str) -> np.ndarray:
    file = scores_file(folder, judge)
    again = f"python -m dpo_jax.score --data={folder} --judge={judge}"
    if not file.is_file():
        there = ", ".join(judges_of(folder)) or "none"
        raise MissingFileError(
            f"{folder} holds no scores by {judge!r} (its judges: {there}); make them with {again} "
            "(and --scores=FILE.jsonl for a judge outside of dpo_jax)"
        )
    again = f"make it again with {again} --overwrite"
    table = map_table(file, SCORES, again)
    table_checks.validate(file, table)
    metadata = table.schema.metadata or {}
    if metadata.get(b"records_sha256") != digest.encode():
        raise UserError(f"{file} was made for another data set than {folder} (records.arrow differs); {again}")
    scored_N = table["scores"].is_valid().to_numpy()
    number_N = pc.list_value_length(table["scores"]).fill_null(0).to_numpy()
    values = pc.list_flatten(table["scores"]).to_numpy()
    if len(scored_N) != len(of.number_N) or not np.array_equal(number_N, of.number_N * scored_N):
        raise UserError(f"{file} does not have one score per image; {again}")
    if not np.isfinite(values).all():  # NaN stands for null, too
        raise UserError(f"{file} has a score that is not a finite number; {again}")
    scores_M = np.full(len(of.record_M), np.nan, np.float32)
    scores_M[scored_N[of.record_M]] = values
    if b"scores_xxh3" not in metadata:
        warn(f"{file} has no checksum, so damage may go unnoticed; to add one, {again}")
    elif metadata[b"scores_xxh3"] != _digest_of(scores_M).encode():
        raise UserError(f"{file} is damaged (the checksum of its scores differs); {again}")
    return scores_M


def has_checksum(folder: Path, judge: str) -> bool:
    """Return whether damage can be noticed: scores of earlier versions have no checksum."""
    return b"scores_xxh3" in (pa.ipc.open_file(pa.memory_map(str(scores_file(folder, judge)))).schema.metadata or {})


def complete(scores_M: np.ndarray, of: Candidates) -> np.ndarray:
    """Return, for each record, whether it has a score for every image."""
    return np.bincount(of.record_M, np.isnan(scores_M), len(of.number_N)) == 0


class Ranking(NamedTuple):
    """The order in which judges put the candidates of all records."""

    order_M: np.ndarray
    """Candidates best first, record by record; equal ones, and those of records without scores, as stored."""
    preference_M: np.ndarray
    """Shares of the preference in that order, float32, by the Borda count (`sources.record.borda`): (1, 0) for two."""
    scored_N: np.ndarray
    """For each record, whether all judges scored it."""


def rank(scores_JM: np.ndarray, of: Candidates, combine: Combine) -> Ranking:
    """Return the common order of several judges; one judge orders by its scores.

    `mean`: the mean of their scores, each judge's divided by the root mean square difference between two images of a
    record, over all records it scored, so that the units of a judge do not give it weight.

    `pareto`: an image beats another if no judge finds it worse and one finds it better, as D3PO compares several
    rewards (https://arxiv.org/abs/2311.13231); two images are equal if the judges contradict each other. More than
    two are ordered by how many others each beats (the strength of SPEA2, Zitzler et al. 2001): an image that beats
    another beats all that the other does, so it always comes before it.
    """
    scored_N = np.logical_and.reduce([complete(scores_M, of) for scores_M in scores_JM])
    if len(scores_JM) == 1:
        points_M = scores_JM[0]
    elif combine == "mean":
        scales_J = [_typical_difference(scores_M, of) for scores_M in scores_JM]
        mean_M = sum(scores_M / scale for scores_M, scale in zip(scores_JM.astype(np.float64), scales_J, strict=True))
        points_M = np.round(mean_M, 9)  # sums that should be equal may differ by rounding
    else:
        points_M = _beaten(scores_JM, of)
    points_M = np.where(scored_N[of.record_M], points_M, 0)
    order_M = np.lexsort((-points_M, of.record_M))
    return Ranking(order_M, _shares(points_M[order_M], of), scored_N)


def _shares(points_M: np.ndarray, of: Candidates) -> np.ndarray:
    """Return the share of the comparisons of its record that each candidate wins, ties as half; points fall."""
    M = np.arange(len(points_M))
    begins_M = (of.rank_M == 0) | (points_M != np.roll(points_M, 1))
    first_M = np.maximum.accumulate(np.where(begins_M, M, 0))  # of those that are as good
    last_M = np.minimum.accumulate(np.where(np.roll(begins_M, -1), M, len(M))[::-1])[::-1]
    number_M = of.number_N[of.record_M]
    beaten_M = of.first_N[of.record_M] + number_M - 1 - (first_M + last_M) / 2
    return np.where(number_M > 1, beaten_M / np.maximum(number_M * (number_M - 1) / 2, 1), 1).astype(np.float32)


def best_first(records: pa.Table, ranking: Ranking, of: Candidates) -> pa.Table:
    """Return the records with the judges' order of candidates and the judges' preference in place of the votes.

    Single images keep whether people liked them, since there is nothing to compare them with. Records without scores
    stay as they are.
    """
    judged_M = (ranking.scored_N & (of.number_N > 1))[of.record_M]
    votes_M = pc.list_flatten(records["preference"]).to_numpy()
    preference = pa.array(np.where(judged_M, ranking.preference_M, votes_M), pa.float32())
    columns: dict[str, Any] = {name: records[name] for name in records.column_names}
    for name in columns.keys() & {"images", "models", "captions", "masks"}:
        columns[name] = _permuted(columns[name], ranking.order_M, of)
    columns["preference"] = pa.ListArray.from_arrays(columns["images"].offsets, preference)
    return pa.table(columns, records.schema)


def _permuted(lists: pa.ChunkedArray, order_M: np.ndarray, of: Candidates) -> pa.ListArray:
    valid_N = lists.is_valid().to_numpy()
    valid_M = valid_N[of.record_M]
    position_M = np.cumsum(valid_M) - 1  # flat values leave null lists out
    values = pc.list_flatten(lists).combine_chunks().take(pa.array(position_M[order_M[valid_M]]))
    offsets = np.concatenate([[0], np.cumsum(np.where(valid_N, of.number_N, 0))])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, mask=pa.array(~valid_N))


def _typical_difference(scores_M: np.ndarray, of: Candidates) -> float:
    """Return the root mean square difference between two images of a record; 1 if there is none."""
    total, number = 0.0, 0
    for first, second in of.pairs():
        differences = scores_M[first].astype(np.float64) - scores_M[second]
        known = np.isfinite(differences)
        total, number = total + np.square(differences[known]).sum(), number + known.sum()
    return float(np.sqrt(total / number)) if total else 1.0


def _beaten(scores_JM: np.ndarray, of: Candidates) -> np.ndarray:
    """Return how many others of its record each candidate beats."""
    beaten_M = np.zeros(len(of.record_M), np.int32)
    for first, second in of.pairs():
        one_JP, other_JP = scores_JM[:, first], scores_JM[:, second]
        better, worse = (one_JP > other_JP).any(axis=0), (one_JP < other_JP).any(axis=0)
        beaten_M[first] += better & ~worse
        beaten_M[second] += worse & ~better
    return beaten_M


def _digest_of(scores_M: np.ndarray) -> str:
    return xxhash.xxh3_128_hexdigest(scores_M.tobytes())


def _digest(folder: Path) -> str:
    with open(folder / "records.arrow", "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
