"""Files that rows name: paths as other systems and programs write them, but only inside the data set's folder."""

import functools
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dpo_jax.data.images import MAX_BYTES
from dpo_jax.data.sources.record import Unusable
from dpo_jax.data.sources.values import is_unstated
from dpo_jax.files import read_bytes

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def read_image(name: object, *folders: Path) -> bytes:
    """Return the contents of the file that a row names, from the first of the folders that has it.

    Raises:
        Unusable: there is no such file, it cannot be read, or the path leads out of the first folder.
    """
    path = find(name, *folders)
    if path is None:
        raise no_image(name, *folders)
    return read_file(path)


def read_mask(name: object, folder: Path) -> bytes | None:
    """Return the contents of the mask file that a row names; None if the name is missing or blank.

    Raises:
        Unusable: as `read_image`; the reason says that it is a mask.
    """
    if is_unstated(name):
        return None
    try:
        return read_image(name, folder)
    except Unusable as error:
        raise Unusable(f"a mask: {error.reason}", error.found) from None


def read_file(path: Path) -> bytes:
    try:
        return read_bytes(path, MAX_BYTES)
    except (OSError, ValueError) as error:
        raise Unusable("an image file cannot be read", str(error)) from None


def find(name: object, *folders: Path) -> Path | None:
    """Return the file that a row names, in the first of the folders that has it; None if none has.

    The path may be relative to a folder, or absolute and inside the first one; with / or \\, with escapes as in
    URLs, and in another Unicode form than the file's name. The literal path is tried first.

    Raises:
        Unusable: the name is not a path, is an address, or leads out of the folder.
    """
    for form in _forms(name):
        path = _inside(folders[0], form)
        for folder in folders:
            found = folder / path
            if os.path.isfile(found):
                return found
            other = in_any_form(folder, path)
            if other is not None and os.path.isfile(other):
                return other
    return None


def relative(name: object, folder: Path) -> str:
    """Return the path that a row names, relative to `folder`, with / and without escapes."""
    *_, plain = _forms(name)
    return _inside(folder, plain)


def no_image(name: object, *folders: Path) -> Unusable:
    """Return the error for a file that `find` did not find."""
    looked = [str(folder / relative(name, folders[0])) for folder in folders]
    return Unusable("no image", f"there is no {' or '.join(looked)}")


def in_any_form(folder: Path, path: str) -> Path | None:
    """Return the path below `folder` that has these names in any Unicode form: macOS splits accents from letters."""
    here = folder
    for part in Path(path).parts:
        if not os.path.lexists(here / part):
            if part.isascii():
                return None
            try:
                part = _accented(here, here.stat().st_mtime_ns)[unicodedata.normalize("NFC", part)]
            except (OSError, KeyError):
                return None
        here /= part
    return here


@functools.lru_cache(maxsize=8)
def _accented(folder: Path, changed: int) -> dict[str, str]:
    """Return the names in a folder that are not ASCII, by their joined form."""
    return {unicodedata.normalize("NFC", name): name for name in os.listdir(folder) if not name.isascii()}


def _forms(name: object) -> Iterator[str]:
    if not isinstance(name, str) or not name or "\0" in name:
        raise Unusable("an image's path is not text", repr(name)[:200])
    if name.startswith("file://"):
        name = unquote(urlsplit(name).path)
    if _ADDRESS.match(name):
        raise Unusable("an image's path is an address on the web; download the images and name the files", name[:200])
    name = os.path.expanduser(name) if name.startswith("~/") else name
    yield name
    slashes = name.replace("\\", "/")
    yield from dict.fromkeys(form for form in (slashes, unquote(slashes)) if form != name and "\0" not in form)


def _inside(folder: Path, name: str) -> str:
    """Return the path relative to the folder; raise Unusable if it leads out of it."""
    path = os.path.normpath(name)
    if os.path.isabs(path):
        here, real = os.path.abspath(folder), os.path.realpath(folder)
        for root, full in ((here, path), (real, path), (real, os.path.realpath(path))):
            if full.startswith(root.rstrip("/") + "/"):
                return os.path.relpath(full, root)
    if os.path.isabs(path) or path.split("/")[0] == "..":
        raise Unusable("an image's path leads out of the data set's folder", f"{name[:200]} is not inside {folder}")
    return path
