"""From a prepared data set to batches: Grain shuffles, and threads write the inputs of each example into its batch.

Every sample is a function of the seed and its position in one endless stream, so the samples of a run do not depend on
the number of processes or workers, and an iterator resumes anywhere.

Axes: N records, B prompts, K candidates (best first), V views of an image, H x W pixels, C channels.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import grain
import numpy as np

from dpo_jax.batch import PreferenceBatch
from dpo_jax.data.load.batches import BatchBuilder, Sample, SizeConditioning, Skipped
from dpo_jax.data.load.bucket_order import BucketOrder, in_buckets
from dpo_jax.data.load.buffer_pool import Pool
from dpo_jax.data.load.curriculum import CurriculumOrder
from dpo_jax.data.load.inputs import Example, Inputs, ViewDraws
from dpo_jax.data.load.records import Relabelled, TrainingRecords
from dpo_jax.data.load.votes import VoteOrder, Votes
from dpo_jax.data.store.prepared import MAX_DAMAGED
from dpo_jax.errors import UserError
from dpo_jax.streams import warn

Relabel = Literal["none", "swapped", "shuffled"]

NUM_WORKERS = min(8, 2 * (os.cpu_count() or 1))
"""With fewer, a core has nothing to decode while a batch is planned; with more, the planner waits for a core."""
EXAMPLES_PER_TASK = 4
"""Examples per task of a thread: changing less often between Python and decoding makes both faster."""
EXAMPLES_PER_PLAN = 64
"""Examples planned at once: after a decode, which empties a core's caches, planning takes three times as long."""


def make_iterator(
    records: TrainingRecords,
    inputs: Inputs,
    *,
    batch_size: int,
    seed: int,
    caption_dropout: float = 0.0,
    size_conditioning: SizeConditioning = "constant",
    caption_lines: bool = False,
    relabel: Relabel = "none",
    positive_share: float | None = None,
    curriculum: CurriculumOrder | None = None,
    mask_floor: float | None = None,
    bucket_N: np.ndarray | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
    num_workers: int = NUM_WORKERS,
) -> "BatchIterator":
    """Return endless training batches, shuffled anew in each epoch unless there is a curriculum.

    Args:
        records: what `open_records` returned.
        inputs: makes the inputs of a batch from images and captions.
        batch_size: examples per batch of this process; all processes together read `batch_size * shard_count`.
        caption_dropout: probability of replacing the caption by the empty one.
        size_conditioning: `constant` gives the model (res, res, 0, 0, res, res), as the official Diffusion-DPO trainer
            does; `real` gives each image's original size and its crop, as diffusers' SDXL trainers do.
        caption_lines: each line of a caption is a caption of its own; one is drawn every time, the same one for all
            candidates that share them. Validation uses the first.
        relabel: for control experiments: `swapped` reverses the candidates of every record, `shuffled` those of half of
            the records, the same ones in each epoch.
        positive_share: train on single images instead, with this share of liked ones; see `Votes` and `VoteOrder`.
        curriculum: order in which the records are seen.
        mask_floor: give batches the weights of latent cells that `cell_weights` makes of the records' masks with this
            floor; None gives them none. An example with a mask that is black in its view has weight 0, unless the floor
            is above 0.
        bucket_N: for each record, the number of its images' shape among those of the inputs. Every batch then has
            images of one shape, in the order of `BucketOrder`; this needs neither votes nor a curriculum.
        shard_index: the number of this process; it reads positions `shard_index + n * shard_count` of the stream.
        num_workers: threads that fill batches. Decoding releases Python's lock, so threads use all cores and write in
            place; processes would have to copy their results.
    """
    if relabel != "none":
        records = Relabelled(records, seed if relabel == "shuffled" else None)
    order: Any
    if bucket_N is not None:
        order = BucketOrder(bucket_N, seed, batch_size * shard_count)
    elif curriculum is not None:
        order = curriculum
    elif positive_share is None:
        # Only indices go through Grain, which would measure the size of everything that a record holds.
        order = grain.MapDataset.range(len(records)).seed(seed).shuffle().repeat(None)
    else:
        records = votes = Votes(records)
        order = VoteOrder(votes.liked_V, seed, positive_share)
    builder = BatchBuilder(inputs, records, size_conditioning, caption_lines, caption_dropout, mask_floor, bucket_N)

    def samples(positions: range) -> list[Sample]:
        drawn = zip(positions, _draws(seed, positions).tolist(), strict=True)
        return [Sample(at, *look_up(order[at]), drop, ViewDraws(*of_view)) for at, (drop, *of_view) in drawn]

    def look_up(found: Any) -> tuple[int, bool]:
        return found if bucket_N is not None else (found, True)

    return BatchIterator(samples, len(order), builder, batch_size, shard_index, shard_count, num_workers)


def validation_batches(
    records: TrainingRecords,
    inputs: Inputs,
    *,
    batch_size: int,
    size_conditioning: SizeConditioning = "constant",
    caption_lines: bool = False,
    mask_floor: float | None = None,
    bucket_N: np.ndarray | None = None,
    most: int | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
) -> "BatchIterator":
    """Return the first `most` records (by default all) once, with the centre crop.

    They come in order or, if they have several shapes, one shape after the other. The last batches, or the last of each
    shape, are filled up with samples of weight 0, and all processes end after the same number of batches. The other
    arguments are as in `make_iterator`. The position of a sample is that of its record, whatever the batches.
    """
    everyone = batch_size * shard_count
    count = min(len(records), most or len(records))
    places = [(at % len(records), at < count) for at in range(-(-count // everyone) * everyone)]
    if bucket_N is not None:
        places = in_buckets(bucket_N[:count], everyone)

    def samples(positions: range) -> list[Sample]:
        found = [(at, *places[at]) for at in positions]
        return [Sample(number if counts else at, number, counts) for at, number, counts in found]

    builder = BatchBuilder(inputs, records, size_conditioning, caption_lines, mask_floor=mask_floor, bucket_N=bucket_N)
    return BatchIterator(samples, len(places), builder, batch_size, shard_index, shard_count)


def _draws(seed: int, positions: range) -> np.ndarray:
    """Return random numbers in [0, 1) of samples: [position, caption dropout or one of `ViewDraws`].

    Philox makes four numbers per value of its counter, which is the position, so they depend on nothing else.
    """
    all_N4 = np.random.Generator(np.random.Philox(key=seed, counter=positions.start)).random(
        (len(positions) * positions.step, 4)
    )
    return all_N4[:: positions.step]


class BatchIterator(Iterator[PreferenceBatch]):
    """Batches of this process's share of a stream of samples.

    Samples are dealt to processes by position, so an epoch need not be divisible by their number.

    A sample whose images or latents are damaged stays in its place with weight 0 and inputs 0, so that batches are the
    same on any number of processes. Each such record is reported once, on stderr.

    The state is the position in the stream, a JSON-able dict: it can be resumed with other numbers of workers and
    processes and another batch size. Close the iterator, or use it as a context manager, to end its threads.
    """

    def __init__(
        self,
        samples: Callable[[range], list[Sample]],
        length: int,
        builder: BatchBuilder,
        batch_size: int,
        shard_index: int,
        shard_count: int,
        num_workers: int = NUM_WORKERS,
    ):
        self._samples, self._length, self._builder, self._batch_size = samples, length, builder, batch_size
        self._shard_index, self._shard_count, self._num_workers = shard_index, shard_count, num_workers
        self._position = self._planned_to = 0
        self._threads: ThreadPoolExecutor | None = None
        self._pool = Pool()
        self._planned: deque[tuple[dict[str, np.ndarray], list[Example]]] = deque()
        self._begun: deque[tuple[PreferenceBatch, list[Future[list[Skipped]]]]] = deque()
        self.damaged: set[int] = set()
        """The records that this iterator left out, as indices among those to train on."""
        self.unseen: set[int] = set()
        """The records that had weight 0 in some view because a mask was black in it."""

    def __next__(self) -> PreferenceBatch:
        # Every thread has examples to fill, also while this one begins batches and keeps Python's lock.
        enough = -(-self._num_workers * min(EXAMPLES_PER_TASK, self._batch_size) // self._batch_size)
        if len(self._begun) <= enough:
            while len(self._begun) < 2 * enough and (self._planned or self._plan()):
                self._begin(*self._planned.popleft())
        if not self._begun:
            raise StopIteration
        batch, tasks = self._begun.popleft()
        for task in tasks:
            for skipped in task.result():
                self._skip(skipped)
        self._position += self._batch_size * self._shard_count
        return batch

    def _skip(self, skipped: Skipped) -> None:
        """Note a record that was left out; raise ValueError when too many are damaged."""
        if not skipped.is_damaged:
            return self._note_unseen(skipped)
        self.damaged.add(skipped.number)
        known = len(self._builder.records)
        message = f"{self._builder.records.name_of(skipped.number)}: {skipped.reason}"
        if len(self.damaged) > max(1, MAX_DAMAGED * known) or len(self.damaged) == known:
            raise UserError(
                f"{len(self.damaged)} of {known} records have damaged images or latents, more than the "
                f"{MAX_DAMAGED:.0%} that may be left out; the last is {message}. List what is damaged with "
                "python -m dpo_jax.prepare --verify --output=FOLDER"
            )
        warn(f"{message}; it is left out")

    def _note_unseen(self, skipped: Skipped) -> None:
        """Note a record with a mask that is black in its view, and warn of the first, the tenth, the hundredth ..."""
        before = len(self.unseen)
        self.unseen.add(skipped.number)
        count = len(self.unseen)
        if count > before and count == 10 ** (len(str(count)) - 1):
            warn(
                f"{self._builder.records.name_of(skipped.number)}: {skipped.reason}, so it has weight 0 there. This is "
                f"so for {count} of {len(self._builder.records)} records until now. To let the rest of the image "
                "count, set data.mask_floor above 0"
            )

    def _plan(self) -> bool:
        """Plan the next batches; return False if the stream has ended."""
        everyone = self._batch_size * self._shard_count
        count = min(-(-EXAMPLES_PER_PLAN // self._batch_size), (self._length - self._planned_to) // everyone)
        start, self._planned_to = self._planned_to, self._planned_to + count * everyone
        samples = self._samples(range(start + self._shard_index, self._planned_to, self._shard_count))
        for first in range(0, count * self._batch_size, self._batch_size):
            self._planned.append(self._builder.plan(samples[first : first + self._batch_size]))
        return count > 0

    def _begin(self, planned: dict[str, np.ndarray], examples: list[Example]) -> None:
        """Have the threads fill a planned batch."""
        self._threads = self._threads or ThreadPoolExecutor(self._num_workers)
        batch = PreferenceBatch(inputs=self._builder.allocate(self._pool, examples), **planned)
        tasks = [
            self._threads.submit(self._builder.fill, batch, examples[first : first + EXAMPLES_PER_TASK])
            for first in range(0, len(examples), EXAMPLES_PER_TASK)
        ]
        self._begun.append((batch, tasks))

    def get_state(self) -> dict[str, int]:
        return {"position": self._position}

    def set_state(self, state: dict[str, int]) -> None:
        """Continue after the last batch that had been returned when `get_state` gave this state."""
        self.close()
        self._position = self._planned_to = state["position"]

    def describe(self, batch: PreferenceBatch) -> list[str]:
        """Return, for each example of a batch of this stream, its record and the captions that it was read with."""
        samples = [self._samples(range(position, position + 1))[0] for position in batch.index_B.tolist()]
        _, examples = self._builder.plan(samples)
        name_of = self._builder.records.name_of
        return [f"{name_of(e.record_number)} {' | '.join(dict.fromkeys(e.captions))!r}" for e in examples]

    def close(self) -> None:
        """End the threads; the iterator can continue with new ones."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        self._threads, self._planned_to = None, self._position
        self._planned.clear()
        self._begun.clear()

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
