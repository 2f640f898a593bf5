"""From a prepared data set to batches: Grain shuffles, shards, makes the inputs of each record and batches them.

Every sample is a function of the seed and its position in one endless stream, so the samples of a run don't depend on
the number of processes or workers, and an iterator resumes anywhere. NumPy only: worker processes never start JAX.

Axes: B prompts, K candidates (best first), V views of an image, H x W pixels, C channels.
"""

import contextlib
import dataclasses
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import grain
import numpy as np
import tree
from absl import flags
from PIL import Image

from dpo_jax.batch import PreferenceBatch
from dpo_jax.data import images
from dpo_jax.data.inputs import Draws, Inputs
from dpo_jax.data.prepared import Prepared, Ties, open_prepared, select
from dpo_jax.data.scores import Combine

SizeConditioning = Literal["constant", "real"]
Relabel = Literal["none", "swapped", "shuffled"]
Labels = Literal["hard", "soft"]

CHUNK = 8
"""Most samples that a thread or a worker makes at a time. A chunk from a worker costs milliseconds whatever its size;
but each thread works on one of its own, so that large chunks take memory."""


class Pairs(Protocol):
    """Random access to records: dicts of `captions`, `images` (best first), `preference` and `weight`.

    There is one caption for all images, or one for each. Images are encoded, as they came; or, for stored inputs, they
    are positions in the data set, and there are `sizes` beside them.
    """

    num_candidates: int
    """No record has more images than this."""
    num_captions: int
    """1, or `num_candidates` where a record has captions of their own for its images."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def open_pairs(
    path: str | Path,
    split: str,
    *,
    ties: Ties = "drop",
    labels: Labels = "hard",
    num_candidates: int = 2,
    judges: Sequence[str] = (),
    combine: Combine = "mean",
    read_images: bool = True,
    **filters: Any,
) -> Pairs:
    """What is chosen of one split of a prepared folder; `random:N` makes N pairs, to which no choice applies.

    Args:
        ties: `drop` leaves them out, `zero_weight` keeps them without a part in the loss, `soft` trains on them as on
            other records, with equal shares.
        labels: `hard` gives all of the preference to the best candidate; `soft` the shares that the data set states.
        num_candidates: K; of records with more, the best K - 1 and the worst are kept.
        judges: whose scores order the candidates, in place of the votes, and `combine`: as in `open_prepared`.
        read_images: False gives their positions instead.
        filters: arguments of `prepared.select`.

    Raises:
        FileNotFoundError: nothing was prepared there.
        ValueError: nothing is left, or the data set can't be read.
    """
    if str(path).startswith("random:"):
        number = str(path).removeprefix("random:")
        if not number.isdigit() or not int(number):
            raise ValueError(f"data path {path}: random:N makes N pairs, and {number!r} is no number above 0")
        return RandomPairs(int(number), seed=0 if split == "train" else 1)
    if judges and labels == "soft":
        raise ValueError(
            f"labels='soft' are shares of the votes, which scores by {', '.join(judges)} do not state; take 'hard' ones"
        )
    prepared = open_prepared(path, judges, combine)
    chosen = select(prepared, split=split, ties=ties, num_candidates=num_candidates, **filters)
    return PreparedPairs(prepared, chosen, ties, labels, num_candidates, read_images)


def make_iterator(
    pairs: Pairs,
    inputs: Inputs,
    *,
    batch_size: int,
    seed: int,
    caption_dropout: float = 0.0,
    size_conditioning: SizeConditioning = "constant",
    relabel: Relabel = "none",
    shard_index: int = 0,
    shard_count: int = 1,
    num_workers: int = 0,
) -> "BatchIterator":
    """Endless shuffled training batches, each epoch in another order.

    Args:
        pairs: of `open_pairs`.
        inputs: what images and captions become.
        batch_size: prompts a batch of this process; all processes together read `batch_size * shard_count`.
        caption_dropout: probability of training on the empty caption instead.
        size_conditioning: `constant` tells the model (res, res, 0, 0, res, res) as the official Diffusion-DPO trainer
            does; `real` the original size and the crop, as diffusers' SDXL trainers do.
        relabel: for control experiments: `swapped` reverses the order of the candidates of every record, `shuffled`
            that of half of the records, the same ones in each epoch.
        shard_index: this process; it reads positions `shard_index + n * shard_count` of the stream.
        num_workers: processes that prepare batches; 0 uses threads of this one.
    """
    if relabel != "none":
        pairs = _Relabelled(pairs, seed if relabel == "shuffled" else None)
    to_sample = _ToSample(inputs, pairs.num_candidates, pairs.num_captions, size_conditioning, caption_dropout)
    # Sharded last: an epoch needn't divide by the shards, and Grain's random generators count global positions.
    stream = grain.MapDataset.source(pairs).seed(seed).shuffle().repeat(None)
    stream = stream.map_with_index(_with_position).random_map(to_sample)
    return BatchIterator(stream, batch_size, shard_index, shard_count, num_workers)


def validation_batches(
    pairs: Pairs,
    inputs: Inputs,
    *,
    batch_size: int,
    size_conditioning: SizeConditioning = "constant",
    shard_index: int = 0,
    shard_count: int = 1,
) -> "BatchIterator":
    """Every record once, in order, centre crop; then it ends, in all processes after as many batches.

    What is missing from the last batches is filled with samples of weight 0. Arguments as in `make_iterator`.
    """
    to_sample = _ToSample(inputs, pairs.num_candidates, pairs.num_captions, size_conditioning)

    def sample(position: int) -> PreferenceBatch:
        row = to_sample((position, pairs[position % len(pairs)]))
        return row if position < len(pairs) else row._replace(weight_B=np.float32(0))

    everyone = batch_size * shard_count
    padded = -(-len(pairs) // everyone) * everyone
    stream = grain.MapDataset.range(padded).map(sample)
    return BatchIterator(stream, batch_size, shard_index, shard_count)


class BatchIterator(Iterator[PreferenceBatch]):
    """Batches of this process's share of a stream of samples.

    The state is the position in the stream, a JSON-able dict: it can be resumed with other numbers of workers and
    processes and another batch size. Close the iterator, or use it as a context manager, to end its workers.
    """

    def __init__(
        self,
        stream: grain.MapDataset,
        batch_size: int,
        shard_index: int,
        shard_count: int,
        num_workers: int = 0,
    ):
        self._stream, self._batch_size, self._num_workers = stream, batch_size, num_workers
        self._shard_index, self._shard_count = shard_index, shard_count
        self._chunk = math.gcd(batch_size, CHUNK)
        self._position = 0
        self._chunks: grain.DatasetIterator | None = None

    def __next__(self) -> PreferenceBatch:
        if self._chunks is None:
            self._chunks = self._start()
        # The one copy here assembles the batch, and frees the shared memory that workers hand chunks over in.
        batch = None
        for row in range(0, self._batch_size, self._chunk):
            chunk = next(self._chunks)
            if batch is None:
                batch = tree.map_structure(lambda x: np.empty((self._batch_size, *x.shape[1:]), x.dtype), chunk)
            for whole, part in zip(tree.flatten(batch), tree.flatten(chunk), strict=True):
                whole[row : row + self._chunk] = part
        assert batch is not None
        self._position += self._batch_size * self._shard_count
        return batch

    def get_state(self) -> dict[str, int]:
        return {"position": self._position}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on behind the last batch that was handed out when `get_state` gave this state."""
        self.close()
        self._position = state["position"]

    def close(self) -> None:
        """Ends threads and workers; the iterator can still go on, with new ones."""
        if self._chunks is not None:
            self._chunks.close()
        self._chunks = None

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self) -> grain.DatasetIterator:
        share = self._stream[self._position + self._shard_index :: self._shard_count]
        chunks_a_batch = self._batch_size // self._chunk
        threads = 2 if self._num_workers else 8
        # One batch waits to be read while the device works on the one before, and every thread has a chunk to make.
        waiting = threads if self._num_workers else max(threads, chunks_a_batch)
        chunks = share.batch(self._chunk, drop_remainder=True).to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=waiting)
        )
        return iter(_in_workers(chunks, self._num_workers, chunks_a_batch))


def view_batches(
    prepared: Prepared,
    views: Sequence[images.View],
    resolution: int,
    num_workers: int,
    positions: np.ndarray,
    batch_size: int,
) -> Iterator[np.ndarray]:
    """All views of the images at these positions, uint8 [batch_size, V, H, W, 3]; the last batch may be shorter."""
    rows = grain.MapDataset.source(_Views(prepared, tuple(views), resolution, positions)).batch(batch_size)
    batches = rows.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2))
    with contextlib.closing(iter(_in_workers(batches, num_workers, 2 * num_workers))) as iterator:
        yield from iterator


@dataclasses.dataclass(frozen=True)
class _Views:
    prepared: Prepared
    views: tuple[images.View, ...]
    resolution: int
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> np.ndarray:
        data = self.prepared.image(int(self.positions[index]))
        images_VHWC = np.empty((len(self.views), self.resolution, self.resolution, 3), np.uint8)
        for view, image_HWC in zip(self.views, images_VHWC, strict=True):
            images.read(data, view, image_HWC)
        return images_VHWC


def _in_workers(dataset: grain.IterDataset, num_workers: int, buffered: int) -> grain.IterDataset:
    """The data set made by worker processes, which keep this many elements ready between them."""
    if not num_workers:
        return dataset
    if not flags.FLAGS.is_parsed():  # Grain hands the flags to its workers, notebooks and tests have none
        flags.FLAGS.mark_as_parsed()
    each = -(-buffered // num_workers)
    return dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=each))


class PreparedPairs:
    """The chosen records of a prepared data set, with the labels to train on."""

    def __init__(
        self,
        prepared: Prepared,
        indices_N: np.ndarray,
        ties: Ties,
        labels: Labels,
        num_candidates: int,
        read_images: bool,
    ):
        self._prepared, self._indices_N, self._ties, self._labels = prepared, indices_N, ties, labels
        self._read_images = read_images
        self.num_candidates = num_candidates
        have_own = bool(prepared.records["captions"].is_valid().to_numpy()[indices_N].any())
        self.num_captions = num_candidates if have_own else 1

    def __len__(self) -> int:
        return len(self._indices_N)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._prepared.record(int(self._indices_N[index]), self.num_candidates, read_images=self._read_images)
        preference = record["preference"]
        tie = len(preference) > 1 and preference[0] == preference[-1]
        if self._labels == "hard" and not tie and len(preference) > 1:
            preference = np.eye(len(preference), dtype=np.float32)[0]
        weight = 0.0 if tie and self._ties == "zero_weight" else 1.0
        captions = record["captions"] or [record["caption"]]
        if len(captions) == 1:
            captions *= self.num_captions
        return record | {"captions": captions, "preference": preference, "weight": weight}


class RandomPairs:
    """Made pairs for tests and dry runs: coloured noise in several shapes, each pair with a caption of its own."""

    num_candidates = 2
    num_captions = 1

    def __init__(self, length: int, seed: int):
        self._length, self._seed = length, seed

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((self._seed, index))
        height, width = rng.choice([48, 64, 80], 2)
        return {
            "captions": [f"made pair number {index}"],
            "images": [_noise_png(rng, height, width) for _ in range(2)],
            "preference": np.asarray([1, 0], np.float32),
            "weight": 1.0,
        }


def _noise_png(rng: np.random.Generator, height: int, width: int) -> bytes:
    noise = np.clip(rng.integers(256, size=3) + rng.normal(0, 30, (height, width, 3)), 0, 255)
    file = io.BytesIO()
    Image.fromarray(noise.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def _with_position(position: int, record: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    return position, record


class _Relabelled:
    """Records with their candidates in the opposite order: all of them, or those that a coin chooses."""

    def __init__(self, pairs: Pairs, coin_seed: int | None):
        self._pairs, self._coin_seed = pairs, coin_seed
        self.num_candidates, self.num_captions = pairs.num_candidates, pairs.num_captions

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._pairs[index]
        if self._coin_seed is not None and np.random.default_rng((self._coin_seed, index)).random() < 0.5:
            return record
        return record | {name: record[name][::-1] for name in ("images", "sizes", "captions") if name in record}


@dataclasses.dataclass(frozen=True)
class _ToSample:
    """A record to one row of a `PreferenceBatch`; without a random generator nothing is drawn."""

    inputs: Inputs
    num_candidates: int
    num_captions: int
    size_conditioning: SizeConditioning
    caption_dropout: float = 0.0

    def __call__(self, element: tuple[int, dict[str, Any]], rng: np.random.Generator | None = None) -> PreferenceBatch:
        position, record = element
        number, captions, draws = len(record["images"]), record["captions"], None
        captions = captions + [""] * (self.num_captions - len(captions))
        if rng is not None:
            # All numbers are drawn always, so that switching one option on leaves the others' draws alone.
            drop, *of_view = rng.random(4)
            draws = Draws(*of_view)
            if drop < self.caption_dropout:
                captions = [""] * len(captions)
        inputs, places_K4 = self.inputs(record, captions, self.num_candidates, draws)
        size = self.inputs.resolution
        size_cond_K6 = np.tile(np.asarray([size, size, 0, 0, size, size], np.float32), (self.num_candidates, 1))
        if self.size_conditioning == "real":
            size_cond_K6[:number, :4] = places_K4[:number]
        preference_K = np.zeros(self.num_candidates, np.float32)
        preference_K[:number] = record["preference"]
        return PreferenceBatch(
            inputs=inputs,
            size_cond_BK6=size_cond_K6,
            preference_BK=preference_K,
            valid_BK=np.arange(self.num_candidates) < number,
            weight_B=np.float32(record["weight"]),
            index_B=np.int32(position),
        )
