"""A prepared data set: records that refer to images.

`prepare` (builder.py) writes a folder with

  images/         TFDS data set of one split (image_store.py): each distinct image or mask once, its bytes unchanged
  images.arrow    one row per image, in the same order
  records.arrow   one row per record: a prompt with its candidates, best first
  checksums.json  checksums of these files (checksums.py)

Both tables are mapped into memory, and read once to check them. With judges, records are built anew in their order.

Axes: N records, M candidates of all records together, I images.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo_jax.data.store import checksums, scores, table_checks
from dpo_jax.data.store.arrow_file import map_table
from dpo_jax.data.store.arrow_rows import RowReader
from dpo_jax.data.store.image_store import FEATURES_FILE, INFO, ImageFiles, by_sha256, by_xxh3, read_layout
from dpo_jax.data.store.scores import Combine
from dpo_jax.errors import MissingFileError, UserError
from dpo_jax.streams import warn

Ties = Literal["drop", "zero_weight", "soft"]

RECORDS = pa.schema(
    {
        "caption": pa.string(),
        "captions": pa.list_(pa.string()),  # null unless the candidates have captions of their own
        "images": pa.list_(pa.int32()),  # best first
        "preference": pa.list_(pa.float32()),  # sums to 1; all equal is a tie; a single image: 1 liked, 0 disliked
        "models": pa.list_(pa.string()),  # the model that generated each; "" if the source does not say
        "split": pa.string(),
        "where": pa.string(),  # file and row of the source, for messages
    }
)
OPTIONAL = (
    pa.field("weight", pa.float32()),  # in the loss
    pa.field("masks", pa.list_(pa.int32())),  # the mask of each of the images, in their order; -1 if it has none
)
"""Columns after those of `RECORDS`, in this order, each written only if the source states any such value."""
IMAGES = pa.schema(
    {
        "sha256": pa.binary(),
        "width": pa.int32(),  # upright, by EXIF
        "height": pa.int32(),
        "offset": pa.int64(),  # first byte of the image in its file of the data set
        "bytes": pa.int32(),
        "xxh3": pa.uint64(),  # XXH3 of its bytes, compared at each read: 30 times as fast as SHA-256
    }
)
IMAGES_BEFORE_XXH3 = pa.schema([field for field in IMAGES if field.name != "xxh3"])

AGAIN = "prepare it again into another folder"
MAX_DAMAGED = 0.01
"""Fraction of the records or images that may be left out because they are damaged; one is always allowed."""
CHECKED = ("records.arrow", "images.arrow", f"images/{INFO}", f"images/{FEATURES_FILE}")
"""The files whose checksums are compared whenever a data set is opened."""


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """A prepared data set, as `open_prepared` returns it."""

    folder: Path
    judges: tuple[str, ...] = ()
    """The judges whose scores order the candidates, in place of the votes."""
    combine: Combine = "mean"
    score_judge: str = ""
    """The judge whose scores `pair_scores_N2` has; it does not order the candidates."""

    def __len__(self) -> int:
        return self.records.num_rows

    def record(
        self, index: int, num_candidates: int | None = None, columns: Sequence[str] = tuple(RECORDS.names)
    ) -> dict[str, Any]:
        """Return columns of `RECORDS`, including `images` and `preference`, and `sizes`: (height, width) of each image.

        Of more than `num_candidates` candidates, keep the best `num_candidates - 1` and the worst, and scale their
        preference to sum to 1 again.
        """
        record = self._rows.read(index, columns)
        record["preference"] = np.asarray(record["preference"], np.float32)
        if num_candidates is not None and len(record["images"]) > num_candidates:
            kept = [0, *range(1, num_candidates - 1), len(record["images"]) - 1][:num_candidates]
            for name in record.keys() & {"images", "models", "captions", "masks"}:
                if record[name] is not None:
                    record[name] = [record[name][rank] for rank in kept]
            preference = record["preference"][kept]
            record["preference"] = preference / (preference.sum() or 1)
        record["sizes"] = self.sizes_I2[record["images"]]
        return record

    def read_images(self, record: dict[str, Any]) -> list[memoryview]:
        """Return the image files of a record, bytes unchanged."""
        return [self.images[position] for position in record["images"]]

    def candidate_images(self) -> tuple[np.ndarray, np.ndarray]:
        """Return image_M, the image of every candidate of all records, and record_M, its record."""
        lists = self.records["images"]
        return pc.list_flatten(lists).to_numpy(), scores.candidates(lists).record_M

    @property
    def has_masks(self) -> bool:
        """Whether any image has a mask."""
        return "masks" in self.records.column_names

    @property
    def records(self) -> pa.Table:
        """The table, `RECORDS` and maybe some of `OPTIONAL`; judges order the records that all of them scored."""
        return self._judged.records

    @functools.cached_property
    def _rows(self) -> RowReader:
        return RowReader(self.records)

    @property
    def scored_N(self) -> np.ndarray:
        """For each record, whether it has scores from all judges."""
        return self._judged.scored_N

    @functools.cached_property
    def _judged(self) -> "_Judged":
        votes = map_table(self.folder / "records.arrow", RECORDS, AGAIN, OPTIONAL)
        if not self.judges:
            return _Judged(votes, np.ones(votes.num_rows, bool), None)
        of = scores.candidates(votes["images"])
        ranking = scores.rank(scores.read_scores(self.folder, self.judges, of), of, self.combine)
        return _Judged(scores.best_first(votes, ranking, of), ranking.scored_N, ranking.order_M)

    @functools.cached_property
    def pair_scores_N2(self) -> np.ndarray:
        """The scores that `score_judge` gave to the best and to the worst candidate of each record, NaN for none."""
        of = scores.candidates(self.records["images"])
        scores_M = scores.read_scores(self.folder, [self.score_judge], of)[0]
        if self._judged.order_M is not None:
            scores_M = scores_M[self._judged.order_M]
        return np.stack([scores_M[of.first_N], scores_M[of.first_N + of.number_N - 1]], axis=1)

    @property
    def weight_N(self) -> np.ndarray:
        """The weight of each record in the loss, as the source states it; 1 where it states none."""
        records = self.records
        return records["weight"].to_numpy() if "weight" in records.column_names else np.ones(len(self), np.float32)

    @property
    def sha256_I(self) -> pa.ChunkedArray:
        """The SHA-256 of every stored image file."""
        return self._images_table["sha256"]

    @functools.cached_property
    def sizes_I2(self) -> np.ndarray:
        """(height, width) of every upright image in pixels."""
        return np.stack([self._images_table[side].to_numpy() for side in ("height", "width")], axis=1)

    @functools.cached_property
    def images(self) -> ImageFiles:
        """Random access to the image files, bytes unchanged."""
        paths, counts = read_layout(self.folder / "images")
        table = self._images_table
        offsets_I, lengths_I = (table[name].to_numpy() for name in ("offset", "bytes"))
        is_whole = by_xxh3(table["xxh3"].to_numpy()) if "xxh3" in table.column_names else by_sha256(table["sha256"])
        return ImageFiles(paths, counts, offsets_I, lengths_I, is_whole)

    def name_of(self, record: int) -> str:
        """Return a name for the record in messages: its index, the data set, and where it came from."""
        return f"record {record} of {self.folder} ({self.records['where'][record].as_py()})"

    @functools.cached_property
    def _images_table(self) -> pa.Table:
        return map_table(self.folder / "images.arrow", IMAGES_BEFORE_XXH3, AGAIN, [IMAGES.field("xxh3")])


class _Judged(NamedTuple):
    """The records in the order of the judges, if there are any."""

    records: pa.Table
    scored_N: np.ndarray
    order_M: np.ndarray | None
    """The candidates of `records` as positions among those that are stored; None if they are the same."""


def open_prepared(
    folder: str | Path, judges: Sequence[str] = (), combine: Combine = "mean", score_judge: str = ""
) -> PreparedData:
    """Open the folder that `prepare` wrote, and check that its parts fit together.

    Args:
        judges: names under which `python -m dpo_jax.score` stored scores, which then order the candidates in place of
            the votes.
        combine: how the scores of several judges are combined; see `scores.rank`.
        score_judge: name of the scores for `pair_scores_N2`.

    Raises:
        FileNotFoundError: nothing was prepared there, a part is missing, or a judge has no scores.
        ValueError: a part is damaged or has another layout, or scores belong to another data set.
    """
    folder = Path(folder)
    if combine not in get_args(Combine):
        raise UserError(f"combine={combine!r} is unknown; set it to {' or '.join(get_args(Combine))}")
    if not (folder / "records.arrow").is_file():
        if (folder / "dataset_info.json").is_file():
            raise UserError(f"{folder} was prepared by an earlier version of dpo_jax; {AGAIN}")
        raise MissingFileError(
            f"no prepared data set at {folder}: run python -m dpo_jax.prepare --input=FILES --output={folder}"
        )
    for name in CHECKED[1:]:
        if not (folder / name).is_file():
            raise MissingFileError(f"the data set {folder} has no {name}; {AGAIN}")
    prepared = PreparedData(folder, tuple(judges), combine, score_judge)
    try:
        _check(folder)
    except ValueError as error:
        raise UserError(str(error) if AGAIN in str(error) else f"{error}; {AGAIN}") from None
    _ = prepared.records  # reads and checks the scores of the judges
    if not (folder / checksums.FILE).exists():
        warn(
            f"{folder} was prepared without checksums of its tables, so damage may go unnoticed; add them with "
            f"python -m dpo_jax.prepare --verify --output={folder}"
        )
    return prepared


def _check(folder: Path) -> None:
    """Raise ValueError if a file of a data set is damaged, or the files do not fit together."""
    prepared = PreparedData(folder)
    _ = prepared.records, prepared._images_table  # files other than tables may be too long to read completely
    digests = checksums.read(folder)
    if digests is not None:
        checksums.check(folder, digests, CHECKED)
    records, images = (checksums.checksum(folder / name) for name in CHECKED[:2])
    known = _check_images(folder, images)
    stored = prepared.images
    if len(stored) != known:
        raise UserError(f"{folder} holds {len(stored)} images, but images.arrow lists {known}")
    stored.check()
    _check_records(folder, records, known)


@functools.lru_cache(maxsize=64)  # once per process for each state of the file
def _check_images(folder: Path, sha256: str) -> int:
    """Check images.arrow and return the number of images."""
    table = PreparedData(folder)._images_table
    table_checks.check_images(folder / "images.arrow", table)
    return table.num_rows


@functools.lru_cache(maxsize=64)
def _check_records(folder: Path, sha256: str, known_images: int) -> None:
    table = map_table(folder / "records.arrow", RECORDS, AGAIN, OPTIONAL)
    table_checks.check_records(folder / "records.arrow", table, known_images)


def lines_of(caption: str) -> list[str]:
    """Return the lines of a caption that have text, each as a separate caption; the caption itself if none has."""
    return [line.strip() for line in caption.split("\n") if line.strip()] or [caption]
