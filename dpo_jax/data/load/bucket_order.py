"""The order of records whose images have several shapes: every batch has records of one shape.

Axes: N records.
"""

import sys

import numpy as np


class BucketOrder:
    """The endless order in which training sees the records of buckets, each once an epoch.

    An epoch shuffles the records of each bucket, cuts them into as few batches as hold them, of equal length up to one
    record, and shuffles the batches of all buckets. Places that are left at the end of a batch repeat its records with
    weight 0, so the loss of a batch is the mean over its own records.

    The record at a position depends on the buckets, the seed, the position and the number of places of a batch alone.
    """

    def __init__(self, bucket_N: np.ndarray, seed: int, batch_size: int):
        """Make the order.

        Args:
            bucket_N: the number of the bucket of each record.
            seed: of all shuffling.
            batch_size: places in a batch of all processes together.
        """
        self._members = [np.flatnonzero(bucket_N == bucket) for bucket in np.unique(bucket_N)]
        self._seed, self._batch_size = seed, batch_size
        self.batches = sum(-(-len(members) // batch_size) for members in self._members)
        """Number of batches in an epoch."""
        self._epoch: tuple[int, list[np.ndarray]] = (-1, [])

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, position: int) -> tuple[int, bool]:
        """Return the record at a position, and whether it counts there."""
        batch, place = divmod(position, self._batch_size)
        epoch, number = divmod(batch, self.batches)
        records = self._batches_of(epoch)[number]
        return int(records[place % len(records)]), place < len(records)

    def _batches_of(self, epoch: int) -> list[np.ndarray]:
        if self._epoch[0] != epoch:
            rng = np.random.default_rng((self._seed, epoch))
            batches = [
                batch
                for members in self._members
                for batch in np.array_split(rng.permutation(members), -(-len(members) // self._batch_size))
            ]
            self._epoch = epoch, [batches[number] for number in rng.permutation(len(batches))]
        return self._epoch[1]


def in_buckets(bucket_N: np.ndarray, batch_size: int) -> list[tuple[int, bool]]:
    """Return every record once, with True, bucket by bucket; repeated ones, with False, fill the last batch of each."""
    places: list[tuple[int, bool]] = []
    for bucket in np.unique(bucket_N):
        members = np.flatnonzero(bucket_N == bucket).tolist()
        padded = -(-len(members) // batch_size) * batch_size
        places += [(members[place % len(members)], place < len(members)) for place in range(padded)]
    return places
