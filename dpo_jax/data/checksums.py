"""SHA-256 of the files of a prepared data set, kept beside them in `checksums.json`: a changed bit is told, not read.

Tables are read whole to be checked whenever they are opened, 1.7 GB a second, and so once per process and change. The
images are not: each has its own SHA-256 in images.arrow, which is checked when the image is read.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import pydantic

from dpo_jax import files

FILE = "checksums.json"
Name = Annotated[str, pydantic.StringConstraints(pattern=r"^(images/)?\w[\w.-]*$")]
Digest = Annotated[str, pydantic.StringConstraints(pattern=r"^[0-9a-f]{64}$")]


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal digits; read again only if the file has changed."""
    stat = files.check_regular(path).stat()
    return _sha256(str(path), stat.length, os.stat(path).st_mtime_ns, os.stat(path).st_ino)


@functools.lru_cache(maxsize=1024)
def _sha256(path: str, size: int, changed: int, inode: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(folder: Path, digests: Mapping[str, str]) -> None:
    """Stores the digests of files, which are named as seen from the folder."""
    files.write_whole(folder / FILE, json.dumps({"sha256": dict(sorted(digests.items()))}, indent=1) + "\n")


def read(folder: Path) -> dict[str, str] | None:
    """What `write` stored; None for a data set that was prepared before there were checksums."""
    if not (folder / FILE).exists():
        return None
    return files.read_json(folder / FILE, _Checksums).sha256


def check(folder: Path, digests: Mapping[str, str], names: Iterable[str]) -> None:
    """Raises ValueError where a file is not as it was when its digest was stored."""
    for name in names:
        if name not in digests:
            raise ValueError(f"{folder / FILE} is damaged (it does not list {name})")
        if sha256(folder / name) != digests[name]:
            raise ValueError(f"{folder / name} is damaged (its SHA-256 is not the one in {FILE})")


class _Checksums(pydantic.BaseModel):
    sha256: dict[Name, Digest]
