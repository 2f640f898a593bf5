"""CSV and TSV tables with a header, whose rows name image files.

Columns are prompt, chosen and rejected, or prompt, image_0, image_1 (and more) and preferred, the index of the best.
The model of each image may follow: chosen_model and rejected_model, or model_0, model_1 and so on; the path of its
mask, or nothing: chosen_mask and rejected_mask, or mask_0, mask_1 and so on; and weight, the weight of the row in the
loss.
"""

import csv
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dpo_jax.data.sources.json_rows import lines
from dpo_jax.data.sources.paths import read_image, read_mask
from dpo_jax.data.sources.record import (
    MIN_ROWS_A_CHUNK,
    Chunk,
    Damaged,
    Dropped,
    Outcome,
    Unusable,
    chunks_at,
    make_record,
)
from dpo_jax.data.sources.values import index, is_unstated
from dpo_jax.errors import UserError

COLUMNS = "prompt, chosen, rejected; or prompt, image_0, image_1, preferred"
DELIMITERS = ",\t;"


def csv_chunks(files: Sequence[Path]) -> list[Chunk]:
    """Return chunks of `rows_a_chunk` rows. Raises a UserError, with the line, if a table cannot be read."""
    found = []
    for file in files:
        header, rows = _open(file)
        if not {"prompt", "chosen", "rejected"} <= set(header) and not {"prompt", "image_0", "image_1"} <= set(header):
            raise UserError(f"{file} has the columns {', '.join(header)[:500]}; it needs {COLUMNS}")
        offsets, count = [], 0
        for row in rows:
            if count % MIN_ROWS_A_CHUNK == 0:
                offsets.append(row.offset)
            count += 1
        found.append((file, count, offsets))
    return chunks_at(found)


def read_csv(chunk: Chunk) -> Iterator[Outcome]:
    """One prompt per row, with paths of its images relative to the table."""
    header, rows = _open(chunk.file, chunk.offset)
    for row in itertools.islice(rows, chunk.stop - chunk.start):
        where = f"{chunk.file} line {row.line}"
        if len(row.cells) != len(header):
            found = f"{len(row.cells)} instead of {len(header)}"
            yield Damaged(where, "a row does not have as many fields as the header", found)
            continue
        try:
            yield _record(where, chunk.file.parent, dict(zip(header, row.cells, strict=True)))
        except Unusable as error:
            yield Damaged(where, error.reason, error.found)


def _record(where: str, folder: Path, row: Mapping[str, str]) -> Outcome:
    shares: list[float]
    if "chosen" in row:
        names, shares = ["chosen", "rejected"], [1, 0]
        models = [row.get(f"{name}_model") or None for name in names]
        masks = [row.get(f"{name}_mask") for name in names]
    else:
        numbers = list(itertools.takewhile(lambda number: f"image_{number}" in row, itertools.count()))
        names = [f"image_{number}" for number in numbers]
        models = [row.get(f"model_{number}") or None for number in numbers]
        masks = [row.get(f"mask_{number}") for number in numbers]
        if is_unstated(row.get("preferred")):
            return Dropped(where, "without a label")
        best = index(row["preferred"], len(names))
        if best is None:
            raise Unusable('"preferred" is not the index of an image', row["preferred"][:200])
        shares = [float(number == best) for number in numbers]
    caption = row["prompt"] if row["prompt"].strip() else None
    return make_record(
        where,
        caption,
        shares,
        lambda k: read_image(row[names[k]], folder),
        models,
        weight=row.get("weight"),
        mask=lambda k: read_mask(masks[k], folder),
    )


class _Row(NamedTuple):
    cells: list[str]
    line: int
    """Line of the file on which the row begins, from 1."""
    offset: int
    """Byte of the file at which the row begins."""


def _open(file: Path, offset: int = 0) -> tuple[list[str], Iterator[_Row]]:
    """Return the header, and the rows from a byte on at which a row begins; by default those after the header."""
    first = next(lines(file), None)
    if first is None:
        raise UserError(f"{file} is empty; it needs a header with the columns {COLUMNS}")
    delimiter = max(DELIMITERS, key=_text(file, 1, first[1]).count)
    rows = _rows(file, 0, delimiter)
    titles = next(rows, None)
    header = [name.strip().lower() for name in titles.cells] if titles else []
    repeated = [name for number, name in enumerate(header) if name in header[:number]]
    if repeated:
        raise UserError(f"{file} has more than one column {repeated[0]!r}; rename or remove one")
    return header, _rows(file, offset, delimiter) if offset else rows


def _rows(file: Path, offset: int, delimiter: str) -> Iterator[_Row]:
    """Yield the rows that are not blank. A cell in quotes may hold line ends, so only csv knows where a row ends."""
    line, read = 1 + _count_lines(file, offset), 0

    def text() -> Iterator[str]:
        nonlocal read, offset
        for at, data in lines(file, offset):
            read, offset = read + 1, at + len(data)
            yield _text(file, line + read - 1, data)

    reader = csv.reader(text(), delimiter=delimiter, strict=True)
    while True:
        begin, number = offset, line + read
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{file}, line {number} cannot be read as a table: {error}") from None
        if any(cell.strip() for cell in cells):
            yield _Row(cells, number, begin)


def _text(file: Path, line: int, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x}"
        raise UserError(f"{file}, line {line} is not valid UTF-8 ({found}); save the file as UTF-8") from None


def _count_lines(file: Path, stop: int) -> int:
    """Return the number of line ends before a byte."""
    count = 0
    with open(file, "rb") as stream:
        while stop and (block := stream.read(min(stop, 2**20))):
            count, stop = count + block.count(b"\n"), stop - len(block)
    return count
