"""The work of one process of `prepare`: one chunk of a source becomes one folder of the future data set.

parts/00012/
    images.parquet   the distinct images of this part, bytes unchanged
    images.arrow     their sizes and checksums, in the same order
    records.arrow    records, whose `images` and `masks` count from the first image of the part
    damaged.jsonl    rows that were set aside
    counts.json      what became of the rows; written last, when the folder is complete
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pydantic
import xxhash

from dpo_jax import files
from dpo_jax.data import images
from dpo_jax.data.sources import Chunk, Damaged, Dropped, Record, Source
from dpo_jax.data.store import checksums, image_store, prepared

# The hash of the prompt takes the place of the split, which it decides.
RECORDS = pa.schema(
    [*(field for field in prepared.RECORDS if field.name != "split"), *prepared.OPTIONAL, ("prompt", pa.uint64())]
)
FILE = "images.parquet"


COUNTS = "counts.json"
Number = Annotated[int, pydantic.Field(ge=0)]


class Counts(pydantic.BaseModel):
    """The outcome for the rows of a part: the contents of `counts.json`."""

    rows: Number
    records: Number
    ties: Number
    dropped: dict[str, Number]
    damaged: dict[str, Number]
    candidates: dict[str, Number]
    bytes: dict[str, Number]
    """Size of each file of the part."""
    checksum: checksums.Digest
    """Checksum of the file of images."""


def read_counts(folder: Path) -> Counts:
    return files.read_json(folder / COUNTS, Counts)


def make_part(source: Source, chunk: Chunk, folder: Path) -> None:
    """Read and verify a chunk; `folder` appears only when it is complete."""
    temporary = temporary_folder(folder, os.getpid())
    temporary.mkdir()
    records: list[dict[str, Any]] = []
    rows = 0
    counts: dict[str, Counter] = {"dropped": Counter(), "damaged": Counter(), "candidates": Counter()}
    ties = 0
    with open(temporary / "damaged.jsonl", "w") as quarantine, _Images(temporary / FILE) as store:

        def set_aside(reason: str, **facts: Any) -> None:
            counts["damaged"][reason] += 1
            quarantine.write(json.dumps(facts | {"reason": reason}) + "\n")

        for row in source.read(chunk):
            rows += 1
            if isinstance(row, Dropped):
                counts["dropped"][row.reason] += 1
            elif isinstance(row, Damaged):
                set_aside(row.reason, where=row.where, **({"found": row.found} if row.found else {}))
            else:
                verdicts = [store.verify(data) for data in row.images]
                verified = [verdict for verdict in verdicts if isinstance(verdict, _Verified)]
                wrong = [(k, verdict) for k, verdict in enumerate(verdicts) if isinstance(verdict, str)]
                masks = _verified_masks(store, row.masks, verified) if row.masks and not wrong else []
                wrong += [(k, f"a mask: {verdict}") for k, verdict in enumerate(masks) if isinstance(verdict, str)]
                if wrong:
                    candidate, reason = wrong[0]
                    set_aside(reason, where=row.where, caption=row.caption, candidate=candidate)
                elif (kept := _settled(row, _firsts(verified))) is None:
                    counts["dropped"]["all candidates are the same image"] += 1
                else:
                    row, order = kept
                    chosen = [masks[k] for k in order] if masks else []
                    places = [store.add(mask) if isinstance(mask, _Verified) else -1 for mask in chosen]
                    records.append(_described(row, [store.add(verified[k]) for k in order], places or None))
                    counts["candidates"][len(row.images)] += 1
                    ties += len(row.images) > 1 and len(set(row.preference)) == 1
    located = zip(store.rows, image_store.locate(temporary / FILE), strict=True)
    _write(temporary / "images.arrow", prepared.IMAGES, [row | {"offset": offset} for row, offset in located])
    _write(temporary / "records.arrow", RECORDS, records)
    sizes = {file.name: file.stat().st_size for file in temporary.iterdir()}
    digest = checksums.checksum(temporary / FILE)  # it was just read, so it comes from memory
    summary = {"rows": rows, "records": len(records), "ties": ties, **counts, "bytes": sizes, "checksum": digest}
    (temporary / COUNTS).write_text(json.dumps(summary))
    sync(temporary)
    os.replace(temporary, folder)


def is_whole(folder: Path, images_moved: bool) -> bool:
    """Return whether the files of a finished part still have their length; a crash of the machine may have cut them."""
    try:
        sizes = read_counts(folder).bytes
    except (OSError, ValueError):
        return False
    found = [(folder / name, size) for name, size in sizes.items() if not (images_moved and name == FILE)]
    return all(file.is_file() and file.stat().st_size == size for file, size in found)


def sync(path: Path) -> None:
    """Write a file, or a folder and everything in it, to the disk, so that it survives a crash of the machine."""
    if path.is_dir():
        for file in path.iterdir():
            sync(file)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if path.is_file():  # some network file systems cannot do this for folders
            raise
    finally:
        os.close(descriptor)


def temporary_folder(folder: Path, process: int) -> Path:
    """Return the folder in which a process makes a part; its name tells which part killed the process."""
    return folder.with_name(f".{folder.name}.{process}")


def prompt_hash(caption: str) -> int:
    """Return a 64-bit hash of the caption as CLIP's tokenizer sees it: case and white space do not matter."""
    normalised = " ".join(caption.lower().split())
    return int.from_bytes(hashlib.sha256(normalised.encode()).digest()[:8])


class _Verified(NamedTuple):
    data: bytes
    digest: bytes
    size: tuple[int, int]
    strip: int
    """A hash of some rows of pixels in the middle: images with different hashes differ."""


class _Images:
    """Decodes and stores each image of a part once."""

    def __init__(self, file: Path):
        self.rows: list[dict[str, Any]] = []
        self._writer = image_store.Writer(file)
        self._verdicts: dict[bytes, tuple[tuple[int, int], int] | str] = {}  # sha256 -> (size, strip), or what is wrong
        self._indices: dict[bytes, int] = {}

    def __enter__(self) -> "_Images":
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()

    def verify(self, data: bytes | None) -> _Verified | str:
        """Return the image if it can be decoded, otherwise what is wrong with it."""
        if not data:
            return "no image"
        digest = hashlib.sha256(data).digest()
        if digest not in self._verdicts:
            try:
                image = images.decode(data)
                width, middle = image.width, image.height // 2
                strip = hash(image.crop((0, middle, width, min(middle + 8, image.height))).tobytes())
                self._verdicts[digest] = image.size, strip
            except images.DamagedImage as error:
                self._verdicts[digest] = str(error)
        verdict = self._verdicts[digest]
        return verdict if isinstance(verdict, str) else _Verified(data, digest, *verdict)

    def add(self, image: _Verified) -> int:
        """Store the image if it is new, and return its index."""
        if image.digest not in self._indices:
            self._indices[image.digest] = len(self.rows)
            width, height = image.size
            digests = {"sha256": image.digest, "xxh3": xxhash.xxh3_64_intdigest(image.data)}
            self.rows.append(digests | {"width": width, "height": height, "bytes": len(image.data)})
            self._writer.add(image.data)
        return self._indices[image.digest]


def _verified_masks(
    store: _Images, masks: Sequence[bytes | None], verified: Sequence[_Verified]
) -> list[_Verified | str | None]:
    """Return each mask if it fits its image, None if there is none, otherwise what is wrong with it."""
    found: list[_Verified | str | None] = []
    for data, image in zip(masks, verified, strict=True):
        verdict = None if data is None else store.verify(data)
        if isinstance(verdict, _Verified) and verdict.size != image.size:
            verdict = "its size is not that of its image"
        elif isinstance(verdict, _Verified) and images.decode(verdict.data).getbbox() is None:
            verdict = "it is black everywhere"
        found.append(verdict)
    return found


def _firsts(candidates: list[_Verified]) -> list[int]:
    """Return, for each candidate, the first one with the same pixels, even if their files differ."""
    return [
        next(j for j, earlier in enumerate(candidates[: k + 1]) if j == k or _have_same_pixels(earlier, image))
        for k, image in enumerate(candidates)
    ]


def _have_same_pixels(a: _Verified, b: _Verified) -> bool:
    if a.digest == b.digest:
        return True
    alike = (a.size, a.strip) == (b.size, b.strip)
    return alike and np.array_equal(np.asarray(images.decode(a.data)), np.asarray(images.decode(b.data)))


def _settled(record: Record, firsts: list[int]) -> tuple[Record, list[int]] | None:
    """Give candidates of the same image and caption equal shares; return the record, best first, and that order.

    Return None if all candidates are the same image.

    Args:
        firsts: what `_firsts` returned.
    """
    captions = record.captions or [""] * len(firsts)
    same: dict[tuple[int, str], list[int]] = {}
    for k, key in enumerate(zip(firsts, captions, strict=True)):
        same.setdefault(key, []).append(k)
    if len(same) == len(firsts):
        return record, list(range(len(firsts)))
    if len(same) == 1:
        return None
    shares = list(record.preference)
    for candidates in same.values():
        if len({shares[k] for k in candidates}) > 1:  # equal shares would change in their last bit
            mean = math.fsum(shares[k] for k in candidates) / len(candidates)
            for k in candidates:
                shares[k] = mean
    order = sorted(range(len(shares)), key=lambda k: -shares[k])
    ordered = record._replace(
        images=tuple(record.images[k] for k in order),
        preference=tuple(shares[k] for k in order),
        models=tuple(record.models[k] for k in order),
        captions=None if record.captions is None else tuple(record.captions[k] for k in order),
    )
    return ordered, order


def _described(record: Record, indices: list[int], masks: list[int] | None) -> dict[str, Any]:
    facts = record._asdict() | {"images": indices, "masks": masks, "prompt": prompt_hash(record.caption)}
    return facts | {"where": record.where.encode(errors="backslashreplace").decode()}  # file names may be any bytes


def _write(file: Path, schema: pa.Schema, rows: list[dict[str, Any]]) -> None:
    with pa.ipc.new_file(str(file), schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema))
