"""Checksums of the files of a prepared data set, kept beside them in `checksums.json`, so that damage is reported.

They are XXH3 of 128 bits, as fast as memory; SHA-256 would take two seconds for the tables of a million records. They
detect damage, not forgery. Tables are read whole when they are opened, once per process unless they change. Shards are
not: each image has its own checksum in images.arrow, which is compared when the image is read.
"""

import functools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import pydantic
import xxhash

from dpo_jax import files
from dpo_jax.errors import UserError

FILE = "checksums.json"
CHUNK = 2**24
MAX_JSON = 2**26
"""Bytes; a hundred thousand shards take 12 MB."""
Name = Annotated[str, pydantic.StringConstraints(pattern=r"^(images/)?\w[\w.-]*$")]
Digest = Annotated[str, pydantic.StringConstraints(pattern=r"^[0-9a-f]{32}$")]


def checksum(path: Path) -> str:
    """Return the checksum of a file in hexadecimal digits; a file is read again only if it has changed."""
    files.check_regular(path)
    stat = os.stat(path)
    return _checksum(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@functools.lru_cache(maxsize=1024)
def _checksum(path: str, size: int, changed: int, inode: int) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write(folder: Path, digests: Mapping[str, str]) -> None:
    """Store the digests of files, which are named by their path in the folder."""
    files.write_whole(folder / FILE, json.dumps({"xxh3_128": dict(sorted(digests.items()))}, indent=1) + "\n")


def read(folder: Path) -> dict[str, str] | None:
    """Return what `write` stored; None for data sets of versions without checksums."""
    if not (folder / FILE).exists():
        return None
    return files.read_json(folder / FILE, _Checksums, MAX_JSON).xxh3_128


def check(folder: Path, digests: Mapping[str, str], names: Iterable[str]) -> None:
    """Raise a UserError if a file has changed since its digest was stored."""
    for name in names:
        if name not in digests:
            raise UserError(f"{folder / FILE} is damaged (it does not list {name})")
        too_long = name.endswith(".json") and files.check_regular(folder / name).stat().length > MAX_JSON
        if too_long or checksum(folder / name) != digests[name]:  # reading a file that is too long would take minutes
            raise UserError(f"{folder / name} is damaged (its checksum is not the one in {FILE})")


class _Checksums(pydantic.BaseModel):
    xxh3_128: dict[Name, Digest]
