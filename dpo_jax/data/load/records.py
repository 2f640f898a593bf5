"""The records that training reads: those of a prepared data set with their labels, random ones, and relabelled ones.

Axes: N records.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow.compute as pc
from PIL import Image

from dpo_jax.data import images
from dpo_jax.data.load.pair_weights import WEIGHTS, PairWeights, gaps
from dpo_jax.data.store import scores
from dpo_jax.data.store.prepared import PreparedData, Ties, open_prepared
from dpo_jax.data.store.scores import Combine
from dpo_jax.data.store.select import select
from dpo_jax.errors import UserError

Labels = Literal["hard", "soft", "order"]

TRAINED_ON = ("caption", "captions", "images", "preference")
"""The columns of a record that training reads; each costs time."""


class TrainingRecords(Protocol):
    """Random access to records: dicts of `captions`, `images` (best first), `preference` and `weight`.

    A record has one caption for all images, or one for each. Images are positions in the data set, and so are the
    `masks` of images, -1 where there is none; only records that were opened with masks have them.
    """

    num_candidates: int
    """The largest number of images of a record."""
    num_captions: int
    """1, or `num_candidates` if the images of a record have their own captions."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def candidates(self) -> tuple[np.ndarray, np.ndarray]:
        """Return, of each record, the number of images and the preference of the best."""
        ...

    def read_images(self, record: dict[str, Any]) -> Sequence[images.ImageBytes]:
        """Return the image files at the positions of `images` of a record, bytes unchanged."""
        ...

    def name_of(self, index: int) -> str:
        """Return a name for the record, for messages."""
        ...


def open_records(
    path: str | Path,
    split: str,
    *,
    ties: Ties = "drop",
    labels: Labels = "hard",
    num_candidates: int = 2,
    judges: Sequence[str] = (),
    combine: Combine = "mean",
    score_judge: str = "",
    pair_weights: PairWeights | None = None,
    masks: bool = False,
    **filters: Any,
) -> "PreparedRecords | RandomRecords":
    """Return the chosen records of one split of a prepared folder; `random:N` makes N random records, all chosen.

    Args:
        ties: `drop` leaves them out, `zero_weight` keeps them with weight 0 in the loss, `soft` trains on them as on
            other records, with equal shares.
        labels: `hard` gives the whole preference to the best candidate; `soft` uses the shares of the data set;
            `order` uses the shares of the data set or of the judges, of which only the order has a meaning.
        num_candidates: K; of records with more candidates, the best K - 1 and the worst are kept.
        judges: the judges whose scores order the candidates in place of the votes; `combine`: as in `open_prepared`.
        score_judge: the judge whose stored scores `pair_weights` and `PreparedRecords.gap_N` need.
        pair_weights: weigh records in the loss by what the source states and by a function of `pair_weights.WEIGHTS`;
            the mean weight is 1. None gives every record the weight 1.
        masks: give records the masks of their images.
        filters: arguments of `select`.

    Raises:
        FileNotFoundError: nothing was prepared there.
        ValueError: no record is left, or the data set cannot be read.
    """
    if str(path).startswith("random:"):
        number = str(path).removeprefix("random:")
        if not number.isdigit() or not int(number):
            raise UserError(f"data path {path}: random:N makes N random pairs, and {number!r} is not a number above 0")
        if masks:
            raise UserError(
                f"data path {path}: random pairs have no masks. Take a prepared data set, or set data.masks=False"
            )
        if score_judge:
            raise UserError(
                f"data path {path}: random pairs have no scores by {score_judge}. Take a prepared data set, or leave "
                "score_judge, pair_weights and order out"
            )
        return RandomRecords(int(number), seed=0 if split == "train" else 1, num_candidates=num_candidates)
    if judges and labels == "soft":
        raise UserError(
            f"labels='soft' needs votes, and the scores by {', '.join(judges)} have none; set labels='hard'"
        )
    prepared = open_prepared(path, judges, combine, score_judge)
    chosen = select(prepared, split=split, ties=ties, num_candidates=num_candidates, **filters)
    if masks and not prepared.has_masks:
        raise UserError(
            f"data.masks=True, but no image of {prepared.folder} has a mask. Set data.masks=False, or prepare records "
            "that name masks"
        )
    return PreparedRecords(prepared, chosen, ties, labels, num_candidates, pair_weights, masks)


class PreparedRecords:
    """The chosen records of a prepared data set, with the labels to train on."""

    def __init__(
        self,
        prepared: PreparedData,
        indices_N: np.ndarray,
        ties: Ties,
        labels: Labels,
        num_candidates: int,
        pair_weights: PairWeights | None = None,
        masks: bool = False,
    ):
        self._prepared, self._indices_N, self._ties, self._labels = prepared, indices_N, ties, labels
        self.num_candidates, self._columns = num_candidates, (*TRAINED_ON, *(["masks"] if masks else []))
        have_own = bool(prepared.records["captions"].is_valid().to_numpy()[indices_N].any())
        self.num_captions = num_candidates if have_own else 1
        self.weight_N = np.ones(len(indices_N))
        """The weight of each record in the loss, if it is not a tie."""
        if pair_weights is not None:
            self.weight_N = self._weights(pair_weights)

    def _weights(self, pair_weights: PairWeights) -> np.ndarray:
        weight_N = self._prepared.weight_N[self._indices_N].astype(np.float64)
        if pair_weights != "none":
            weight_N *= WEIGHTS[pair_weights](self._prepared.pair_scores_N2[self._indices_N])
        if not weight_N.any():
            raise UserError(
                f"all {len(self)} chosen records of {self._prepared.folder} have the weight 0. Set weaker filters, or "
                "prepare the data with other weights"
            )
        return weight_N / weight_N.mean()

    @property
    def gap_N(self) -> np.ndarray:
        """The score of the best candidate of each record minus that of the worst, by the `score_judge`."""
        return gaps(self._prepared.pair_scores_N2[self._indices_N])

    @property
    def number_masked(self) -> int:
        """How many of the chosen records have a mask."""
        if not self._prepared.has_masks:
            return 0
        masks = self._prepared.records["masks"].combine_chunks()
        with_mask = pc.list_parent_indices(masks).to_numpy()[masks.flatten().to_numpy() >= 0]
        return int(np.isin(self._indices_N, with_mask).sum())

    def __len__(self) -> int:
        return len(self._indices_N)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._prepared.record(int(self._indices_N[index]), self.num_candidates, self._columns)
        preference = record["preference"]
        tie = len(preference) > 1 and preference[0] == preference[-1]
        if self._labels == "hard" and not tie and len(preference) > 1:
            preference = np.zeros_like(preference)
            preference[0] = 1
        weight = 0.0 if tie and self._ties == "zero_weight" else float(self.weight_N[index])
        captions = record["captions"] or [record["caption"]]
        if len(captions) == 1:
            captions *= self.num_captions
        return record | {"captions": captions, "preference": preference, "weight": weight}

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Return sizes_M2, (height, width) of all candidates of the records, and record_M, the records they are of.

        Candidates that are not kept (see `num_candidates`) are among them.
        """
        image_M, record_M = self._prepared.candidate_images()
        number_N = np.full(len(self._prepared), -1)
        number_N[self._indices_N] = np.arange(len(self))
        chosen_M = number_N[record_M] >= 0
        return self._prepared.sizes_I2[image_M[chosen_M]], number_N[record_M[chosen_M]]

    def candidates(self) -> tuple[np.ndarray, np.ndarray]:
        records = self._prepared.records
        number_N, first_N, *_ = scores.candidates(records["images"])
        best_N = pc.list_flatten(records["preference"]).to_numpy()[first_N]
        return np.minimum(number_N, self.num_candidates)[self._indices_N], best_N[self._indices_N]

    def read_images(self, record: dict[str, Any]) -> Sequence[images.ImageBytes]:
        return self._prepared.read_images(record)

    def name_of(self, index: int) -> str:
        return self._prepared.name_of(int(self._indices_N[index]))


class RandomRecords:
    """Random records for tests and dry runs: coloured noise in several shapes, each list with a caption of its own."""

    num_captions = 1

    def __init__(self, length: int, seed: int, num_candidates: int = 2):
        self._length, self._seed, self.num_candidates = length, seed, num_candidates

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        K = self.num_candidates
        points = np.arange(K - 1, -1, -1, dtype=np.float32)
        return {
            "captions": [f"made pair number {index}"],
            "images": list(range(K * index, K * (index + 1))),
            "preference": points / points.sum(),
            "weight": 1.0,
        }

    def candidates(self) -> tuple[np.ndarray, np.ndarray]:
        return np.full(len(self), self.num_candidates), np.ones(len(self), np.float32)

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Return sizes_M2 and record_M, as `PreparedRecords.sizes`."""
        sizes_N2 = np.asarray([self._begin(number)[1] for number in range(len(self))])
        return np.repeat(sizes_N2, self.num_candidates, axis=0), np.repeat(np.arange(len(self)), self.num_candidates)

    def _begin(self, number: int) -> tuple[np.random.Generator, np.ndarray]:
        """Return the generator of the noise of a record, and (height, width) of its images."""
        rng = np.random.default_rng((self._seed, number))
        return rng, rng.choice([48, 64, 80], 2)

    def read_images(self, record: dict[str, Any]) -> Sequence[images.ImageBytes]:
        positions, K = record["images"], self.num_candidates
        rng, (height, width) = self._begin(positions[0] // K)
        made = [_noise_png(rng, height, width) for _ in range(K)]
        return [made[position % K] for position in positions]

    def name_of(self, index: int) -> str:
        return f"made pair {index}"


def _noise_png(rng: np.random.Generator, height: int, width: int) -> bytes:
    noise = np.clip(rng.integers(256, size=3) + rng.normal(0, 30, (height, width, 3)), 0, 255)
    file = io.BytesIO()
    Image.fromarray(noise.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


class Relabelled:
    """Records with their candidates reversed: all of them, or a random half."""

    def __init__(self, records: TrainingRecords, coin_seed: int | None):
        self._records, self._coin_seed = records, coin_seed
        self.num_candidates, self.num_captions = records.num_candidates, records.num_captions

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        if self._coin_seed is not None and np.random.default_rng((self._coin_seed, index)).random() < 0.5:
            return record
        return record | {
            name: record[name][::-1] for name in ("images", "sizes", "captions", "masks") if name in record
        }

    def candidates(self) -> tuple[np.ndarray, np.ndarray]:
        return self._records.candidates()

    def read_images(self, record: dict[str, Any]) -> Sequence[images.ImageBytes]:
        return self._records.read_images(record)

    def name_of(self, index: int) -> str:
        return self._records.name_of(index)
