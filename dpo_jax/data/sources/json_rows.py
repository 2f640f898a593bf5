"""Rows of JSONL files and of JSON lists, found without parsing the file whole, so that a chunk begins anywhere."""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.data.sources.record import MIN_ROWS_A_CHUNK, Chunk, Damaged, Row, rows_a_chunk

# A row of a JSON list is no longer than this.
BLOCK_BYTES = 1 << 20
ROWS_LOOKED_AT = 100

# What may stand before the first row, before another one or the end of the list, and where a chunk begins.
OPENING, SEPARATOR, NOTHING = (re.compile(p, re.A) for p in (r"\s*\[\s*", r"\s*(,\s*|(?=\]))", ""))

Rows = Callable[[Path, int], Iterator[tuple[int, bytes]]]
"""Rows from an offset on: (the byte where it begins, its JSON)."""


def lines(file: Path, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    with open(file, "rb") as stream:
        stream.seek(offset)
        for line in stream:
            yield offset, line
            offset += len(line)


def elements(file: Path, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """The objects of a JSON list, or the lines of a file that isn't one.

    Raises:
        ValueError: the list is damaged; where the next object begins can't be told then.
    """
    with open(file, "rb") as stream:
        if stream.read(BLOCK_BYTES).lstrip()[:1] != b"[":
            yield from lines(file, offset)
            return
        stream.seek(offset)
        decoder = json.JSONDecoder(strict=False)
        text, at, before = "", 0, NOTHING if offset else OPENING
        while True:
            if len(text) - at < BLOCK_BYTES:  # as latin-1 a byte is a character, and JSON's own signs are the same
                text, at = text[at:] + stream.read(BLOCK_BYTES).decode("latin-1"), 0
            separated = before.match(text, at)
            begin = separated.end() if separated else at
            if separated and text[begin : begin + 1] == "]" and not text[begin + 1 :].strip():
                return
            try:
                end = decoder.raw_decode(text, begin)[1] if separated else begin
            except (ValueError, RecursionError):
                end = begin
            offset += begin - at
            if end == begin:
                raise ValueError(f"{file} is not valid JSON: the object at byte {offset} is damaged")
            yield offset, text[begin:end].encode("latin-1")
            offset, at, before = offset + end - begin, end, SEPARATOR


def chunk_rows(
    files: Sequence[Path], rows: Rows, has_schema: Callable[[dict[str, Any]], bool], schema: str
) -> list[Chunk]:
    """Chunks of `rows_a_chunk` rows.

    Args:
        has_schema: whether a row has the keys of the data set; one of the first rows of each file must.
        schema: what a row should look like, for the message if none has.
    """
    found = []
    for file in files:
        offsets, count, known = [], 0, False
        for offset, row in rows(file, 0):
            if count % MIN_ROWS_A_CHUNK == 0:
                offsets.append(offset)
            known = known or (count < ROWS_LOOKED_AT and has_schema(_parse(row) or {}))
            count += 1
        if count and not known:
            raise ValueError(f"{file} has another schema: a row should be {schema}")
        found.append((file, count, offsets))
    limit = rows_a_chunk(sum(count for _, count, _ in found))
    return [
        Chunk(file, start, min(start + limit, count), offsets[start // MIN_ROWS_A_CHUNK])
        for file, count, offsets in found
        for start in range(0, count, limit)
    ]


def read_rows(chunk: Chunk, rows: Rows, make_row: Callable[[str, Path, dict[str, Any]], Row]) -> Iterator[Row]:
    """The rows of a chunk; `make_row` raises ValueError with the reason if one can't be used."""
    for number, (_, text) in enumerate(itertools.islice(rows(chunk.file, chunk.offset), chunk.stop - chunk.start)):
        where = f"{chunk.file} row {chunk.start + number}"
        row = _parse(text)
        if row is not None:
            try:
                yield make_row(where, chunk.file.parent, row)
            except ValueError as error:
                yield Damaged(where, str(error))
        elif text.strip():
            yield Damaged(where, "not a JSON object")


def numbers(name: str, value: object, count: int) -> list[float]:
    """`value` if it's a list of so many finite numbers, else ValueError."""
    if not isinstance(value, list) or len(value) != count:
        raise ValueError(f'"{name}" is not a list of as many numbers as there are images')
    if any(isinstance(x, bool) or not isinstance(x, int | float) or not abs(x) < 1e300 for x in value):
        raise ValueError(f'"{name}" holds what is not a finite number')
    return [float(x) for x in value]


def _parse(text: bytes) -> dict[str, Any] | None:
    """None if it's anything but a JSON object."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
