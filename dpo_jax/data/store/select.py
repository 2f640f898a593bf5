"""Chooses the records of a data set that a run uses."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo_jax.data.store import scores
from dpo_jax.data.store.prepared import PreparedData, Ties
from dpo_jax.errors import UserError


class NothingChosenError(UserError):
    """No record of a data set passes the filters."""


def select(
    prepared: PreparedData,
    *,
    split: str,
    ties: Ties = "drop",
    generators: Sequence[str] = (),
    min_agreement: float = 0.0,
    min_side: int = 0,
    num_candidates: int = 2,
    liked_images: bool = False,
    single_images: bool = False,
    limit: int = 0,
    limit_seed: int = -1,
) -> np.ndarray:
    """Return the indices of the records to use, ascending. With num_candidates above 1, single images are left out.

    With judges, only records that all judges scored are used; the same holds for `score_judge`.

    Args:
        ties: `drop` leaves out records whose candidates are all equal; otherwise they stay.
        generators: regular expressions; the model of every candidate must contain a match of one of them.
        min_agreement: lowest share of the best candidate against the worst; a tie has 0.5.
        min_side: lowest number of pixels on the shorter side of every candidate.
        num_candidates: as in `PreparedData.record`; the last three filters only see the candidates that are kept.
        liked_images: use single images that were liked, and none that was disliked.
        single_images: use all single images.
        limit: at most this many; 0 means all.
        limit_seed: -1 takes the first ones, any other number draws them, the same ones for the same number.

    Raises:
        NothingChosenError: no record is left.
        ValueError: a regular expression is not valid, or min_agreement is set together with judges.
    """
    if min_agreement and prepared.judges:
        raise UserError(
            f"min_agreement={min_agreement} filters by votes, but the scores by {', '.join(prepared.judges)} have "
            "none; set min_agreement=0 or leave the judges out"
        )
    records = prepared.records
    splits = records["split"].unique().to_pylist()
    if split not in splits:
        raise NothingChosenError(
            f"the data set {prepared.folder} has no split {split!r}; it has {', '.join(sorted(splits))}"
        )
    labels = _labels(records)
    filters = _filters(
        prepared,
        labels,
        split=split,
        ties=ties,
        generators=generators,
        min_agreement=min_agreement,
        min_side=min_side,
        num_candidates=num_candidates,
        liked_images=liked_images,
        single_images=single_images,
    )
    passed_N = np.ones(len(prepared), bool)
    left = []
    for name, passes_N in filters.items():
        passed_N &= passes_N
        left.append(f"{passed_N.sum()} {name}")
    trained_on_N = passed_N & labels.untied_N if ties == "zero_weight" else passed_N
    if not trained_on_N.any():
        what = "nothing but ties" if passed_N.any() else "no record"
        hint = "set weaker filters"
        if (labels.single_N & (labels.best_N > 0)).any() and not liked_images and num_candidates > 1:
            hint += ', or train on its single images with loss.name="sft"'
        raise NothingChosenError(f"{what} is left of {prepared.folder}: {', then '.join(left)}; {hint}")
    chosen = np.flatnonzero(passed_N)
    if not limit:
        return chosen
    if limit_seed >= 0:
        chosen = np.random.default_rng(limit_seed).permutation(chosen)
    return np.sort(chosen[:limit])


class _Labels(NamedTuple):
    """Shares of the best and of the worst candidate of each record, and whether it has only one."""

    best_N: np.ndarray
    worst_N: np.ndarray
    single_N: np.ndarray

    @property
    def untied_N(self) -> np.ndarray:
        return self.single_N | (self.best_N > self.worst_N)

    @property
    def agreement_N(self) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # 0 / 0 for a disliked image
            return np.where(self.single_N, 1.0, self.best_N / (self.best_N + self.worst_N))


def _labels(records: pa.Table) -> _Labels:
    preference_M = pc.list_flatten(records["preference"]).to_numpy()
    number_N, first_N, *_ = scores.candidates(records["images"])
    return _Labels(preference_M[first_N], preference_M[first_N + number_N - 1], number_N == 1)


def _filters(
    prepared: PreparedData,
    labels: _Labels,
    *,
    split: str,
    ties: Ties,
    generators: Sequence[str],
    min_agreement: float,
    min_side: int,
    num_candidates: int,
    liked_images: bool,
    single_images: bool,
) -> dict[str, np.ndarray]:
    """Return whether each record passes each filter of `select`, by words that tell what the records then are."""
    records = prepared.records
    images_M = pc.list_flatten(records["images"]).to_numpy()
    number_N, _, record_M, rank_M = scores.candidates(records["images"])
    last_M = rank_M == number_N[record_M] - 1
    kept_M = (rank_M == 0) | (rank_M < num_candidates - 1) | (last_M & (num_candidates > 1))

    def of_all_candidates(holds_M: np.ndarray) -> np.ndarray:
        return np.bincount(record_M[kept_M & ~holds_M], minlength=len(number_N)) == 0

    filters = {f"in the split {split}": pc.equal(records["split"], split).to_numpy()}
    if prepared.judges:
        filters[f"with scores by {' and '.join(prepared.judges)}"] = prepared.scored_N
    if prepared.score_judge:
        filters[f"with scores by {prepared.score_judge}"] = np.isfinite(prepared.pair_scores_N2).all(axis=1)
    if liked_images:
        filters["with several images or one that was liked"] = ~labels.single_N | (labels.best_N > 0)
    elif num_candidates > 1 and not single_images:
        filters["with several images"] = ~labels.single_N
    if ties == "drop":
        filters["without ties"] = labels.untied_N
    if generators:
        filters[f"generated by {' or '.join(generators)}"] = of_all_candidates(_made_by(generators, records["models"]))
    if min_agreement:  # shares are float32
        filters[f"with an agreement of {min_agreement}"] = labels.agreement_N > min_agreement - 1e-6
    if min_side:
        filters[f"of {min_side} pixels"] = of_all_candidates(prepared.sizes_I2.min(axis=1)[images_M] >= min_side)
    return filters


def _made_by(generators: Sequence[str], models: pa.ChunkedArray) -> np.ndarray:
    """Return, for each candidate, whether one of the regular expressions matches the model's name."""
    try:
        patterns = [re.compile(generator) for generator in generators]
    except re.error as error:
        raise UserError(
            f"generators={tuple(generators)}: {error.pattern!r} is not a valid regular expression ({error})"
        ) from None
    names_M = pc.list_flatten(models).dictionary_encode().combine_chunks()
    fits = [any(pattern.search(name) for pattern in patterns) for name in names_M.dictionary.to_pylist()]
    return np.asarray(fits, bool)[names_M.indices.to_numpy()]
