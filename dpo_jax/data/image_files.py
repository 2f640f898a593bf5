"""Files of encoded images, which TFDS reads and from which the loader takes each image where it lies.

They are Parquet as TFDS writes it, with one tf.train.Example a row, but neither compressed nor encoded, as images are
compressed already: so the bytes of each stand in one piece, to be mapped into memory. Reading JPEGs of 512 pixels from
ArrayRecord, which cuts them every 64 KiB, took 5 to 7% of the time of decoding them, and a mere copy 3% (see
benchmarks/NOTES.md). No checksum is looked at. TFDS's own random access first reads all files into memory.
"""

import bisect
import itertools
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

FEATURES = tfds.features.FeaturesDict({"image": tfds.features.Image()})
SCHEMA = pa.schema({"data": pa.binary()})
GROUP_BYTES = 2**22
"""That a writer holds before it writes them."""
ROWS_AT_ONCE = 8


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
        example = FEATURES.serialize_example(FEATURES.encode_example({"image": bytes(image)}))
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


def read_in_order(file: Path) -> Iterator[bytes]:
    """The images of a file, as any reader of the format finds them."""
    with pq.ParquetFile(file) as table:
        for rows in table.iter_batches(ROWS_AT_ONCE, use_threads=False):
            for row in rows["data"]:
                yield tf_example_pb2.Example.FromString(row.as_py()).features.feature["image"].bytes_list.value[0]


def locate(file: Path) -> list[int]:
    """Where each image of a file begins."""
    offsets = []
    end = 0
    mapped = _map(file)
    for image in read_in_order(file):
        offset = mapped.find(image, end)
        assert offset >= 0, f"{file}: an image is not in one piece"
        offsets.append(offset)
        end = offset + len(image)
    return offsets


class ImageFiles:
    """Random access to the images of several files, mapped into memory and not copied.

    Args:
        counts: images of each file.
        offsets_I, lengths_I: where each begins in its file, and its bytes.
    """

    def __init__(self, files: Sequence[Path], counts: Sequence[int], offsets_I: np.ndarray, lengths_I: np.ndarray):
        self._files, self._offsets_I, self._lengths_I = files, offsets_I, lengths_I
        self._counts, self._stops = counts, list(itertools.accumulate(counts))
        self._mapped: dict[int, mmap.mmap] = {}

    def __len__(self) -> int:
        return self._stops[-1]

    def __getitem__(self, position: int) -> memoryview:
        number = bisect.bisect_right(self._stops, position)
        mapped = self._mapped.get(number)
        if mapped is None:
            mapped = self._mapped.setdefault(number, _map(self._files[number]))
        start, length = int(self._offsets_I[position]), int(self._lengths_I[position])
        # All of it is fetched from disk at once, without waiting: the decoder would go page by page.
        first = start - start % mmap.PAGESIZE
        mapped.madvise(mmap.MADV_WILLNEED, first, start + length - first)
        return memoryview(mapped)[start : start + length]

    def check(self) -> None:
        """Opens every file, in less than a millisecond each: one that is cut short isn't found in the middle of a run.

        Raises ValueError if a file is missing, damaged, or of other images.
        """
        for file, count, stop in zip(self._files, self._counts, self._stops, strict=True):
            try:
                found = pq.read_metadata(file).num_rows
            except (pa.ArrowException, OSError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"{file} is missing or damaged ({reason})") from None
            if found != count:
                raise ValueError(f"{file} holds {found} images instead of {count}")
            end = int(self._offsets_I[stop - 1] + self._lengths_I[stop - 1])
            if end > file.stat().st_size:
                raise ValueError(f"{file} is damaged (its last image ends at byte {end}, behind its end)")


def _map(file: Path) -> mmap.mmap:
    with open(file, "rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
