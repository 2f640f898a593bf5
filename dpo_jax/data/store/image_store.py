"""Files of images, which TFDS can read and from which the loader reads each image in place.

They are Parquet as TFDS writes it, with one tf.train.Example per row, but without compression or encodings, because
images are compressed already. So each image is contiguous and can be mapped into memory. Reading JPEGs of 512 pixels
from ArrayRecord, which cuts them every 64 KiB, took 5 to 7% of the time of decoding them, and a mere copy 3% (see
benchmarks/NOTES.md). TFDS's own random access first reads all files into memory.

TFDS only ever writes here. Its `features.json` names the Python class of each feature, and TFDS imports whatever module
is named there: a folder that somebody else made would run their code. So both JSON files are read as data.
"""

import bisect
import functools
import hashlib
import itertools
import mmap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic
import xxhash

from dpo_jax import files
from dpo_jax.data.images import DamagedImage
from dpo_jax.data.store import checksums
from dpo_jax.data.store.arrow_rows import RowReader
from dpo_jax.errors import UserError

NAME, SPLIT = "preference_images", "images"  # TFDS reserves "all"
SCHEMA = pa.schema({"data": pa.binary()})
GROUP_BYTES = 2**22
"""Bytes buffered before a write."""
ROWS_AT_ONCE = 8
BUFFER_BYTES = 2**20
"""Read at a time; pyarrow would otherwise keep every row group that it has read until the last."""

INFO, FEATURES_FILE = "dataset_info.json", "features.json"
MAX_SHARDS = 100_000
"""The number of files that the five digits of a name allow."""
Decimal = Annotated[str, pydantic.StringConstraints(pattern=r"^[0-9]{1,18}$")]
"""A 64-bit integer as TFDS writes it."""
Count = Annotated[str, pydantic.StringConstraints(pattern=r"^[1-9][0-9]{0,8}$")]
FEATURES_JSON: dict[str, Any] = {
    "featuresDict": {
        "features": {
            "image": {
                "image": {"dtype": "uint8", "shape": {"dimensions": ["-1", "-1", "3"]}},
                "pythonClassName": "tensorflow_datasets.core.features.image_feature.Image",
            }
        }
    },
    "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
}
"""The text that TFDS writes for `features()`; no other `features.json` is accepted."""


class _Split(pydantic.BaseModel):
    name: Literal["images"]
    shardLengths: Annotated[list[Count], pydantic.Field(min_length=1, max_length=MAX_SHARDS)]
    filepathTemplate: Literal["{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"]
    numBytes: Decimal = "0"


class _Info(pydantic.BaseModel):
    """The part of TFDS's `dataset_info.json` that lists the files."""

    name: Literal["preference_images"]
    fileFormat: Literal["parquet"]
    splits: Annotated[list[_Split], pydantic.Field(min_length=1, max_length=1)]


def shard_name(number: int, count: int) -> str:
    """Return the name that TFDS gives a file of images."""
    return f"{NAME}-{SPLIT}.parquet-{number:05}-of-{count:05}"


def read_layout(folder: Path) -> tuple[list[Path], list[int]]:
    """Return the image files of a prepared data set, and the number of images in each.

    Raise ValueError if the JSON describes another class, name or format.
    """
    info: _Info = files.read_json(folder / INFO, _Info, checksums.MAX_JSON)
    (split,) = info.splits
    if files.read_json(folder / FEATURES_FILE, limit=checksums.MAX_JSON) != FEATURES_JSON:
        raise UserError(
            f"{folder / FEATURES_FILE} is not what dpo_jax writes there, and such a file can name code to run"
        )
    counts = [int(length) for length in split.shardLengths]
    return [folder / shard_name(number, len(counts)) for number in range(len(counts))], counts


class Writer:
    """Writes a file of images; close it, or use it as a context manager."""

    def __init__(self, file: Path):
        options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        self._file = pq.ParquetWriter(file, SCHEMA, **options)
        self._examples: list[bytes] = []
        self._bytes = 0

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def add(self, image: bytes | memoryview) -> None:
        example = features().serialize_example(features().encode_example({"image": bytes(image)}))
        self._examples.append(example)
        self._bytes += len(example)
        if self._bytes >= GROUP_BYTES:
            self._write()

    def close(self) -> None:
        if self._examples:
            self._write()
        self._file.close()

    def _write(self) -> None:
        self._file.write_table(pa.table({"data": self._examples}, SCHEMA))
        self._examples, self._bytes = [], 0


@functools.cache
def features() -> Any:
    """Return what TFDS stores of an image. It is imported here since training never needs it, and it takes 0.2 s."""
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict({"image": tfds.features.Image()})


def read_in_order(file: Path) -> Iterator[bytes]:
    """Yield the images of a file by reading it as Parquet."""
    from tensorflow_datasets.proto import tf_example_pb2

    with pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False) as table:
        for rows in table.iter_batches(ROWS_AT_ONCE, use_threads=False):
            for row in rows["data"]:
                yield tf_example_pb2.Example.FromString(row.as_py()).features.feature["image"].bytes_list.value[0]


def locate(file: Path) -> list[int]:
    """Return the byte at which each image of a file begins."""
    offsets = []
    end = 0
    mapped = _map(file)
    for image in read_in_order(file):
        offset = mapped.find(image, end)
        assert offset >= 0, f"{file}: an image is not in one piece"
        offsets.append(offset)
        end = offset + len(image)
    return offsets


IsWhole = Callable[[int, memoryview], bool]
"""Maps (position, image) to whether its bytes are the ones that were stored."""


def by_xxh3(digests_I: np.ndarray) -> IsWhole:
    """Return a check at every read: 2 microseconds for 100 kB, which take 1000 to decode."""
    return lambda position, image: xxhash.xxh3_64_intdigest(image) == digests_I[position]


def by_sha256(digests: pa.ChunkedArray) -> IsWhole:
    """Return a check when an image is first read: 70 microseconds for 100 kB."""
    rows = RowReader(pa.table({"sha256": digests}))
    known_I = np.zeros(len(digests), bool)

    def is_whole(position: int, image: memoryview) -> bool:
        if not known_I[position]:
            known_I[position] = hashlib.sha256(image).digest() == rows.read(position, ("sha256",))["sha256"]
        return bool(known_I[position])

    return is_whole


class ImageFiles:
    """Random access to the images of several files, mapped into memory and not copied.

    Args:
        counts: number of images in each file.
        offsets_I, lengths_I: first byte of each image in its file, and its number of bytes.
        is_whole: whether the bytes at a position are the ones that were stored.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        counts: Sequence[int],
        offsets_I: np.ndarray,
        lengths_I: np.ndarray,
        is_whole: IsWhole,
    ):
        self.files, self._offsets_I, self._lengths_I, self._is_whole = paths, offsets_I, lengths_I, is_whole
        self._counts, self._stops = counts, list(itertools.accumulate(counts))
        self._mapped: dict[int, mmap.mmap] = {}

    def __len__(self) -> int:
        return self._stops[-1]

    def __getitem__(self, position: int) -> memoryview:
        """Return the bytes of an image. Raise DamagedImage, which names the file, where they have changed."""
        number = bisect.bisect_right(self._stops, position)
        mapped = self._mapped.get(number)
        if mapped is None:
            mapped = self._mapped.setdefault(number, _map(self.files[number]))
        start, length = int(self._offsets_I[position]), int(self._lengths_I[position])
        # The whole image is fetched from disk at once, without waiting; the decoder would fetch it page by page.
        first = start - start % mmap.PAGESIZE
        mapped.madvise(mmap.MADV_WILLNEED, first, start + length - first)
        image = memoryview(mapped)[start : start + length]
        if not self._is_whole(position, image):
            raise DamagedImage(f"the bytes of image {position} in {self.files[number]} have changed")
        return image

    def positions(self) -> Iterator[tuple[Path, range]]:
        """Yield every file with the positions of its images."""
        for file, count, stop in zip(self.files, self._counts, self._stops, strict=True):
            yield file, range(stop - count, stop)

    def check(self) -> None:
        """Open every file, in less than a millisecond each, so that one that is cut short is found before a run.

        Raise ValueError if a file is missing, damaged, or has other images.
        """
        for file, count, stop in zip(self.files, self._counts, self._stops, strict=True):
            try:
                found = pq.read_metadata(files.check_regular(file)).num_rows
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{file} is missing or damaged ({files.why(file, error)})") from None
            if found != count:
                raise UserError(f"{file} holds {found} images instead of {count}")
            starts = self._offsets_I[stop - count : stop]
            stops = starts + self._lengths_I[stop - count : stop]
            if stops[-1] > file.stat().st_size:
                raise UserError(f"{file} is damaged (its last image ends at byte {stops[-1]}, after its end)")
            if starts[0] < 0 or (self._lengths_I[stop - count : stop] < 1).any() or (starts[1:] < stops[:-1]).any():
                raise UserError(f"the images of {file} overlap in images.arrow")


def _map(file: Path) -> mmap.mmap:
    with open(file, "rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
