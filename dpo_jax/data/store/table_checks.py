"""Checks of the tables of a prepared data set, whoever wrote them; everything that is wrong is reported at once.

Axes: N records, M candidates of all records together, I images.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo_jax.data.images import MAX_PIXELS
from dpo_jax.data.sources.record import MAX_CANDIDATES
from dpo_jax.errors import UserError

PER_CANDIDATE = ("images", "preference", "models")
"""Columns of lists with one entry per candidate."""


class _Problems:
    """Collects what is wrong in a table."""

    def __init__(self, path: Path, unit: str):
        self._path, self._unit, self._found = path, unit, list[str]()

    def add(self, wrong: np.ndarray, text: str) -> None:
        """Note the rows where `wrong` holds, if there are any."""
        number = int(np.count_nonzero(wrong))
        if number:
            more = f" and {number - 1} more" if number > 1 else ""
            self._found.append(f"{text} ({self._unit} {int(np.argmax(wrong))}{more})")

    def tell(self) -> None:
        if self._found:
            raise UserError(f"{self._path}: {'; '.join(self._found)}")


def check_records(path: Path, records: pa.Table, known_images: int) -> None:
    """Raise ValueError if records have nulls, lists of wrong length, unknown images or impossible preferences."""
    validate(path, records)
    if not records.num_rows:
        raise UserError(f"{path} holds no records")
    problems = _Problems(path, "record")
    for name in records.column_names:
        column = records[name]
        if name != "captions":
            problems.add(column.is_null().to_numpy(), f"{name} is null")
        if pa.types.is_list(column.type) and pc.list_flatten(column).null_count:
            parents = pc.list_parent_indices(column.combine_chunks()).to_numpy()
            has_null_N = np.zeros(len(column), bool)
            has_null_N[parents[pc.list_flatten(column).is_null().to_numpy()]] = True
            problems.add(has_null_N, f"{name} has a null entry")
    problems.tell()  # the checks below need values
    number_N = pc.list_value_length(records["images"]).to_numpy()
    problems.add(number_N < 1, "images is empty")
    problems.add(number_N > MAX_CANDIDATES, f"images has more than {MAX_CANDIDATES} entries")
    for name in ("preference", "models", "masks"):
        if name in records.column_names:
            is_other_N = pc.list_value_length(records[name]).to_numpy() != number_N
            problems.add(is_other_N, f"{name} does not have one entry per image")
    own = records["captions"]
    own_N = pc.list_value_length(own).fill_null(0).to_numpy()
    problems.add(own.is_valid().to_numpy() & (own_N != number_N), "captions does not have one entry per image")
    problems.tell()

    record_M = np.repeat(np.arange(len(number_N)), number_N)
    first_N = np.cumsum(number_N) - number_N

    def any_of_record(wrong_M: np.ndarray) -> np.ndarray:
        return np.logical_or.reduceat(wrong_M, first_N)

    image_M = pc.list_flatten(records["images"]).to_numpy()
    problems.add(any_of_record((image_M < 0) | (image_M >= known_images)), "images has one that images.arrow lacks")
    share_M = pc.list_flatten(records["preference"]).to_numpy()
    outside_N = any_of_record(~((share_M >= 0) & (share_M <= 1)))  # also catches NaN
    problems.add(outside_N, "preference has an entry that is not between 0 and 1")
    sum_N = np.add.reduceat(share_M.astype(np.float64), first_N)
    problems.add(~outside_N & (number_N > 1) & (np.abs(sum_N - 1) > 1e-3), "preference does not sum to 1")
    rises_M = np.zeros(len(share_M), bool)
    rises_M[1:] = (share_M[1:] > share_M[:-1]) & (record_M[1:] == record_M[:-1])
    problems.add(any_of_record(rises_M), "preference is not sorted best first")
    if "masks" in records.column_names:
        mask_M = pc.list_flatten(records["masks"]).to_numpy()
        problems.add(any_of_record((mask_M < -1) | (mask_M >= known_images)), "masks has one that images.arrow lacks")
    if "weight" in records.column_names:
        weight_N = records["weight"].to_numpy()
        problems.add(~((weight_N >= 0) & (weight_N < np.inf)), "weight is negative or not finite")
    problems.tell()


def check_images(path: Path, images: pa.Table) -> None:
    """Raise ValueError if images have nulls, digests of another length or impossible sizes."""
    validate(path, images)
    problems = _Problems(path, "image")
    for name in images.column_names:
        problems.add(images[name].is_null().to_numpy(), f"{name} is null")
    problems.tell()
    problems.add(pc.binary_length(images["sha256"]).to_numpy() != 32, "sha256 does not have 32 bytes")
    width_I, height_I = (images[side].to_numpy().astype(np.int64) for side in ("width", "height"))
    problems.add((width_I < 1) | (height_I < 1), "width or height is below 1")
    problems.add(width_I * height_I > MAX_PIXELS, f"width x height is above {MAX_PIXELS}")
    problems.add(images["offset"].to_numpy() < 0, "offset is negative")
    problems.add(images["bytes"].to_numpy() < 1, "bytes is below 1")
    problems.tell()


def validate(path: Path, table: pa.Table) -> None:
    """Raise ValueError if a table has invalid offsets or text; reading such a table would end the process."""
    try:
        table.validate(full=True)
    except pa.ArrowException as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]})") from None
