"""Rows of JSONL files and JSON lists, found without parsing the whole file, so that a chunk can begin anywhere."""

import codecs
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from dpo_jax.data.sources.record import MIN_ROWS_A_CHUNK, Chunk, Damaged, Outcome, Unusable, chunks_at
from dpo_jax.data.sources.values import number
from dpo_jax.errors import UserError
from dpo_jax.files import check_regular, parse_json, what_it_is

# Largest length of a row of a JSON list.
BLOCK_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 24
ROWS_LOOKED_AT = 100

# The text that may come before the first row, before another row or the end of the list, and at the start of a chunk.
OPENING, SEPARATOR, NOTHING = (re.compile(p, re.A) for p in (r"\s*\[\s*", r"\s*(,\s*|(?=\]))", ""))

Rows = Callable[[Path, int], Iterator[tuple[int, bytes]]]
"""(file, offset) -> rows from this byte on: (the byte where a row begins, its JSON)."""


def lines(file: Path, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file from a byte on: (the byte where a line begins, its bytes).

    Raises:
        ValueError: the file is not UTF-8 text, or a line is too long.
    """
    with open(check_regular(file), "rb") as stream:
        offset = max(offset, _text_begins(file, stream))
        stream.seek(offset)
        while line := stream.readline(MAX_LINE_BYTES):
            if len(line) == MAX_LINE_BYTES:
                raise UserError(f"{file}: the line at byte {offset} has more than {MAX_LINE_BYTES} bytes")
            yield offset, line
            offset += len(line)


def _text_begins(file: Path, stream: BinaryIO) -> int:
    """Return the byte after a byte order mark."""
    head = stream.read(64)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{file} is UTF-16; save the file as UTF-8")
    if head and (known := what_it_is(head)):
        raise UserError(f"{file} is {known}")
    return len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0


def elements(file: Path, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield the objects of a JSON list, or the lines of a file that is not one.

    Raises:
        ValueError: the list is damaged, so it is not known where the next object begins.
    """
    with open(check_regular(file), "rb") as stream:
        begin = _text_begins(file, stream)
        stream.seek(begin)
        if stream.read(BLOCK_BYTES).lstrip()[:1] != b"[":
            yield from lines(file, offset)
            return
        before = NOTHING if offset else OPENING
        offset = offset or begin
        stream.seek(offset)
        decoder = json.JSONDecoder(strict=False)
        text, at = "", 0
        while True:
            if len(text) - at < BLOCK_BYTES:  # in latin-1 each byte is a character; JSON's own are unchanged
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
                raise UserError(f"{file} is not valid JSON: the object at byte {offset} is damaged")
            yield offset, text[begin:end].encode("latin-1")
            offset, at, before = offset + end - begin, end, SEPARATOR


def chunk_rows(
    files: Sequence[Path], rows: Rows, has_schema: Callable[[dict[str, Any]], bool], schema: str
) -> list[Chunk]:
    """Return chunks of `rows_a_chunk` rows.

    Args:
        has_schema: whether a row has the keys of the layout; one of the first rows of each file must.
        schema: what a row should look like, for the message if none has them.
    """
    found = []
    for file in files:
        offsets, count, known, problem = [], 0, False, ""
        for offset, row in rows(file, 0):
            if count % MIN_ROWS_A_CHUNK == 0:
                offsets.append(offset)
            if not known and count < ROWS_LOOKED_AT and row.strip():
                try:
                    known = has_schema(_parse(row))
                except Unusable as error:
                    place = f", line {count + 1}" if rows is lines else f" row {count}"
                    problem = problem or f"{file}{place} is {error.reason} ({error.found})"
            count += 1
        if count and not known:
            raise UserError(problem or f"{file} has another layout: a row should look like {schema}")
        found.append((file, count, offsets))
    return chunks_at(found)


def read_rows(chunk: Chunk, rows: Rows, make_row: Callable[[str, Path, dict[str, Any]], Outcome]) -> Iterator[Outcome]:
    """Yield the outcome of each row of a chunk; `make_row` raises Unusable for a row that cannot be used."""
    for row, (_, text) in enumerate(itertools.islice(rows(chunk.file, chunk.offset), chunk.stop - chunk.start)):
        where = f"{chunk.file} row {chunk.start + row}"
        if text.strip():
            try:
                yield make_row(where, chunk.file.parent, _parse(text))
            except Unusable as error:
                yield Damaged(where, error.reason, error.found)


def numbers(name: str, value: object, count: int) -> list[float]:
    """Return `value` as `count` finite numbers; raise Unusable if it is not a list of these."""
    if not isinstance(value, list) or len(value) != count:
        raise Unusable(f'"{name}" is not a list with one number per image', repr(value)[:200])
    found = [number(x) for x in value]
    if any(x is None or not abs(x) < 1e300 for x in found):
        raise Unusable(f'"{name}" has an entry that is not a finite number', repr(value)[:200])
    return [x for x in found if x is not None]


def _parse(text: bytes) -> dict[str, Any]:
    try:
        row = parse_json(text.decode(), "the line")
    except UnicodeDecodeError as error:
        raise Unusable("not UTF-8; save the file as UTF-8", f"byte 0x{text[error.start]:02x}") from None
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise Unusable("not a JSON object", repr(text[:80].decode(errors="replace")))
    return row
