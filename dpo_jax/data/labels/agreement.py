"""Measures how often a judge prefers the same image as the votes or another judge.

Axes: N records, M candidates of all records together, Q pairs of candidates, P prompts.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy import stats

from dpo_jax.data.store.prepared import PreparedData
from dpo_jax.data.store.scores import Candidates, candidates, complete, judges_of, read_scores


class Agreement(NamedTuple):
    """Agreement over the pairs of images of a record in which both sides prefer one image."""

    rate: float
    low: float
    """Lower end of the 95% confidence interval."""
    high: float
    """Upper end of the 95% confidence interval."""
    pairs: int

    def __str__(self) -> str:
        return f"{self.rate:.1%} [{self.low:.1%}, {self.high:.1%}] of {self.pairs} pairs"


@dataclasses.dataclass
class Summary:
    """Summary of a judge's scores; written next to them as JSON."""

    judge: str
    origin: str
    records: int
    scored: int
    """Records with a score for each of their images."""
    pairs: int
    """Pairs of images of one scored record."""
    ties: int
    """Pairs of equal scores."""
    agreement: dict[str, Agreement | None]
    """Agreement with the `votes` and with each judge whose scores are stored; None if there is no pair to compare."""
    held_out: dict[str, Agreement | None]
    """The same on the validation split, which a judge that was trained on this data has not seen."""
    not_compared: dict[str, str]
    """Judges whose scores cannot be read, and why."""

    def __str__(self) -> str:
        lines = [
            f"judge        {self.judge} ({self.origin})",
            f"records      {self.records}: {self.scored} scored, {self.records - self.scored} without scores",
            f"pairs        {self.pairs}, {self.ties} of them with equal scores",
            *(f"agrees with  {name}: {found or 'no pair to compare'}" for name, found in self.agreement.items()),
            *(f"  held out   {name}: {found or 'no pair to compare'}" for name, found in self.held_out.items()),
            *(f"not compared {name}: {reason}" for name, reason in self.not_compared.items()),
        ]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        tables = {"agreement": self.agreement, "held_out": self.held_out}
        return dataclasses.asdict(self) | {
            table: {name: each and each._asdict() for name, each in found.items()} for table, found in tables.items()
        }


def summarise(prepared: PreparedData, judge: str, origin: str, scores_M: np.ndarray) -> Summary:
    """Compare scores with the votes and with the scores of other judges in the folder."""
    records = prepared.records
    of = candidates(records["images"])
    points = {"votes": pc.list_flatten(records["preference"]).to_numpy()}
    not_compared = {}
    for other in judges_of(prepared.folder):
        try:
            if other != judge:
                (points[other],) = read_scores(prepared.folder, [other], of)
        except ValueError as error:
            not_compared[other] = str(error)
    scored_N = complete(scores_M, of)
    scores_M = np.where(scored_N[of.record_M], scores_M, np.nan)
    pairs, tied = _ties(scores_M, of)
    found = {name: agreement(scores_M, other_M, of, records["caption"]) for name, other_M in points.items()}
    held_N = pc.equal(records["split"], "validation").to_numpy()
    held_M = np.where(held_N[of.record_M], scores_M, np.nan)
    held_out = {name: agreement(held_M, other_M, of, records["caption"]) for name, other_M in points.items()}
    held_out = held_out if held_N.any() else {}
    return Summary(judge, origin, len(scored_N), int(scored_N.sum()), pairs, tied, found, held_out, not_compared)


def agreement(points_M: np.ndarray, other_M: np.ndarray, of: Candidates, captions: pa.ChunkedArray) -> Agreement | None:
    """Return how often both sides prefer the same image; None if there is no pair in which both prefer one.

    Pairs of one prompt are not independent, because they share images and raters. So the interval is Wilson's for the
    number of independent pairs that would vary as much as the rates of prompts do (a cluster-robust variance, Cameron &
    Miller 2015), or for the number of prompts if their rates do not vary.
    """
    _, prompt_N = np.unique(captions.dictionary_encode().combine_chunks().indices.to_numpy(), return_inverse=True)
    same_P, pairs_P = np.zeros((2, prompt_N.max(initial=-1) + 1))
    for first, second in of.pairs():
        product_Q = np.sign(points_M[first] - points_M[second]) * np.sign(other_M[first] - other_M[second])
        prompt_Q = prompt_N[of.record_M[first]]
        same_P += np.bincount(prompt_Q[product_Q > 0], minlength=len(same_P))
        pairs_P += np.bincount(prompt_Q[abs(product_Q) > 0], minlength=len(pairs_P))
    same_P, pairs_P = same_P[pairs_P > 0], pairs_P[pairs_P > 0]
    P, pairs = len(pairs_P), pairs_P.sum()
    if not P:
        return None
    rate = same_P.sum() / pairs
    variance = np.square(same_P - rate * pairs_P).sum() / pairs**2 * P / max(P - 1, 1)
    independent = min(rate * (1 - rate) / variance, pairs) if variance else P
    z = stats.norm.ppf(0.975)
    spread = z * np.sqrt(rate * (1 - rate) / independent + (z / independent / 2) ** 2)
    low, high = (rate + z**2 / independent / 2 + np.array([-spread, spread])) / (1 + z**2 / independent)
    return Agreement(float(rate), float(min(low, rate)), float(max(high, rate)), int(pairs))


def _ties(points_M: np.ndarray, of: Candidates) -> tuple[int, int]:
    """Return (pairs that were compared, those of equal points); NaN compares with nothing."""
    compared = tied = 0
    for first, second in of.pairs():
        compared += int(np.isfinite(points_M[first] - points_M[second]).sum())
        tied += int((points_M[first] == points_M[second]).sum())
    return compared, tied
