"""WebDataset tar files with the fields of Pick-a-Pic, streamed member by member."""

import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from dpo_jax.data.images import MAX_BYTES
from dpo_jax.data.sources.record import Chunk, Damaged, Outcome
from dpo_jax.data.sources.tables import pickapic_row
from dpo_jax.errors import UserError
from dpo_jax.files import check_regular, conform, decode_text, look_at, parse_json

CAPTIONS = "caption", "original_prompt", "txt"
IMAGES = "jpg_0", "jpg_1"
TEXTS = "caption", "label_0", "label_1", "model_0", "model_1", "has_label"

LOST = "a part of the tar is damaged or missing"


def pickapic_tar_chunks(files: Sequence[Path]) -> list[Chunk]:
    """Return one chunk per file, counted in bytes."""
    for file in files:
        try:
            tarfile.open(check_regular(file), "r:").close()
        except (tarfile.TarError, ValueError) as error:
            known = look_at(file) if file.is_file() else None
            raise UserError(f"{file} is {known or f'not a readable tar file ({error})'}") from None
    return [Chunk(file, 0, file.stat().st_size) for file in files]


def read_pickapic_tar(chunk: Chunk) -> Iterator[Outcome]:
    """Members KEY.jpg_0.jpg, KEY.jpg_1.jpg, KEY.label_0.txt, KEY.label_1.txt and KEY.original_prompt.txt, one after
    the other, as in the mirrors that diffusers' ORPO script reads.

    The second suffix may be absent, the caption may be KEY.caption.txt or KEY.txt, and everything except the images may
    be in KEY.json.
    """
    key, parts = "", dict[str, bytes | None]()
    for member in _members(chunk.file):
        if isinstance(member, Damaged):
            yield member
            continue
        name, data = member
        folder, _, base = name.rpartition("/")
        stem, _, part = base.partition(".")
        part = re.sub(r"(?<=.)\.(jpe?g|png|webp|txt|cls)$", "", part.lower())
        part = "caption" if part in CAPTIONS else part
        if f"{folder}/{stem}" != key or part in parts:
            if parts:
                yield _row(f"{chunk.file} {key.lstrip('/')}", parts)
            key, parts = f"{folder}/{stem}", {}
        parts[part] = data
    if parts:
        yield _row(f"{chunk.file} {key.lstrip('/')}", parts)


def _row(where: str, parts: Mapping[str, bytes | None]) -> Outcome:
    try:
        facts = parse_json(decode_text(parts.get("json") or b"{}", "json"), "json")
        values: dict[str, Any] = conform(facts, dict[str, Any], "json")
        values |= {name: decode_text(data, name).strip() for name, data in parts.items() if data and name in TEXTS}
    except ValueError as error:
        return Damaged(where, "a label, caption or JSON member is not valid", str(error))
    absent = [name for name in TEXTS[:2] if name not in values] + [name for name in IMAGES if not parts.get(name)]
    if absent:
        return Damaged(where, f"without {', '.join(absent)}")
    return pickapic_row(where, values, parts.__getitem__)


def _members(file: Path) -> Iterator[tuple[str, bytes | None] | Damaged]:
    """Yield (name, data) of each file in the tar, None for data that are cut off; continue after damaged headers."""
    size, end = file.stat().st_size, 0
    # Without this, tarfile takes a damaged header for the end of the tar.
    with open(file, "rb") as stream, tarfile.open(fileobj=stream, mode="r:", ignore_zeros=True) as tar:
        while end < size:
            try:
                tar.offset = _behind_zeros(file, tar.offset, size)
                member = tar.next()
            except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError):
                if tar.offset < size:
                    tar.offset += tarfile.BLOCKSIZE
                    continue
                member = None
            begin = size if member is None else member.offset
            if begin > end and not _is_padding(stream, end, begin):
                yield Damaged(f"{file} byte {end}", LOST)
            if member is None:
                return
            end = tar.offset
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
            if member.isreg():
                whole = member.size <= MAX_BYTES and member.offset_data + member.size <= size
                stored = tar.extractfile(member) if whole else None
                yield member.name, stored.read() if stored else None
    yield Damaged(f"{file} byte {size}", LOST)  # a complete tar ends in padding


def _behind_zeros(file: Path, offset: int, size: int) -> int:
    """Return where the blocks of zeros end; `tarfile` would read each, and a file with a hole may have billions."""
    with open(file, "rb", buffering=0) as stream:
        while offset < size:
            stream.seek(offset)
            block = stream.read(tarfile.BLOCKSIZE)
            if any(block):
                return offset
            offset += tarfile.BLOCKSIZE
            try:
                data = os.lseek(stream.fileno(), offset, os.SEEK_DATA)
            except OSError:  # only a hole follows
                return size
            offset += (data - offset) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
    return size


def _is_padding(stream: BinaryIO, start: int, stop: int) -> bool:
    """Return whether bytes are the zeros at the end of a tar, too few to hide a lost sample."""
    stream.seek(start)
    return stop - start <= 2 * tarfile.RECORDSIZE and not any(stream.read(stop - start))
