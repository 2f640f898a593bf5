"""Single images, each liked or disliked, from records of pairs and of single images.

Axes: N records, V votes.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import grain
import numpy as np

from dpo_jax.data.images import ImageBytes
from dpo_jax.data.load.records import TrainingRecords
from dpo_jax.errors import UserError


class Votes:
    """Every image of some records as a record of its own: of a pair, the winner is liked and the loser disliked."""

    num_candidates = 1
    num_captions = 1

    def __init__(self, records: TrainingRecords):
        self._records = records
        count_N, best_N = records.candidates()
        self._record_V = np.repeat(np.arange(len(count_N)), count_N)
        self._rank_V = np.arange(len(self._record_V)) - np.repeat(np.cumsum(count_N) - count_N, count_N)
        self.liked_V = (self._rank_V == 0) & (best_N[self._record_V] > 0)

    def __len__(self) -> int:
        return len(self._record_V)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record, rank = self._records[int(self._record_V[index])], int(self._rank_V[index])
        columns = ("images", "sizes", "preference", "masks")
        own = {name: record[name][rank : rank + 1] for name in columns if name in record}
        captions = record["captions"]
        return record | own | {"captions": [captions[rank if len(captions) > 1 else 0]]}

    def candidates(self) -> tuple[np.ndarray, np.ndarray]:
        return np.ones(len(self), int), self.liked_V.astype(np.float32)

    def read_images(self, record: dict[str, Any]) -> Sequence[ImageBytes]:
        return self._records.read_images(record)

    def name_of(self, index: int) -> str:
        return self._records.name_of(int(self._record_V[index]))


class VoteOrder:
    """The endless order in which training sees votes: liked and disliked ones alternate so that shares are exact.

    Each kind is shuffled anew whenever it has been seen completely. The vote at a position depends on the seed and the
    position alone.

    Raises:
        UserError: the votes have no image of a kind that the share asks for.
    """

    def __init__(self, liked_V: np.ndarray, seed: int, positive_share: float):
        self._share = Fraction(positive_share).limit_denominator(10**6)
        self._kinds = [np.flatnonzero(~liked_V), np.flatnonzero(liked_V)]
        missing = (not len(self._kinds[0]) and self._share < 1, not len(self._kinds[1]) and self._share > 0)
        if any(missing):
            kind, only = ("disliked", 1) if missing[0] else ("liked", 0)
            raise UserError(
                f"config.data.positive_share={positive_share:g}, but the training data has no {kind} image. Set "
                f"data.positive_share={only}, or prepare {kind} images too"
            )
        self._orders = [
            grain.MapDataset.range(max(len(kind), 1)).seed(seed).shuffle().repeat(None) for kind in self._kinds
        ]

    def __len__(self) -> int:
        return len(self._orders[0])

    def __getitem__(self, position: int) -> int:
        liked = int(position * self._share)
        is_liked = int((position + 1) * self._share) > liked
        kind = self._kinds[is_liked]
        return int(kind[self._orders[is_liked][liked if is_liked else position - liked]])
