"""Folders of image files; the folder of an image says whether it was preferred; captions are in .txt files."""

import functools
import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dpo_jax.data.images import SUFFIXES
from dpo_jax.data.sources.paths import in_any_form, read_file
from dpo_jax.data.sources.record import Chunk, Damaged, Outcome, Record, Unusable, make_record, rows_a_chunk
from dpo_jax.errors import UserError
from dpo_jax.files import read_text

MAX_CAPTION_BYTES = 2**20


def pairs_folder_chunks(folders: Sequence[Path]) -> list[Chunk]:
    return _chunks(folders, ("w", "l"), _pair_names)


def read_pairs_folder(chunk: Chunk) -> Iterator[Outcome]:
    """The preferred image is in w/, the other one of the same name in l/, in any image format.

    The caption is the first that exists of w/NAME.txt, captions/NAME.txt and NAME.txt. If l/NAME.txt differs, it is the
    caption of the second image.
    """
    folder = chunk.file
    winners, losers = _images(folder / "w"), _images(folder / "l")
    for name in _pair_names(folder)[chunk.start : chunk.stop]:
        where = f"{folder} {name}"
        files = winners.get(name, []), losers.get(name, [])
        if any(len(found) != 1 for found in files):
            counts = " and ".join(f"{len(found)} in {place}" for place, found in zip("wl", files, strict=True))
            yield Damaged(where, "not exactly one image of this name in w and in l", f"there are {counts}")
            continue
        try:
            caption = _caption(folder / "w", folder / "captions", folder, name=name)
            other = _caption(folder / "l", name=name)
            captions = None if caption is None or other in (None, caption) else [caption, other]
            images = [folder / place / found[0] for place, found in zip("wl", files, strict=True)]
            yield make_record(where, caption, (1, 0), _reader(images), captions=captions)
        except Unusable as error:
            yield Damaged(where, error.reason, error.found)


def liked_chunks(folders: Sequence[Path]) -> list[Chunk]:
    return _chunks(folders, ("liked", "disliked"), _opinions)


def read_liked(chunk: Chunk) -> Iterator[Outcome]:
    """Single images in liked/ and disliked/, each with its caption NAME.txt beside it."""
    for place, name in _opinions(chunk.file)[chunk.start : chunk.stop]:
        yield _single(chunk.file / place / name, liked=place == "liked")


def captioned_chunks(folders: Sequence[Path]) -> list[Chunk]:
    return _chunks(folders, (), _all_files)


def read_captioned(chunk: Chunk) -> Iterator[Outcome]:
    """Images of one folder, each with its caption NAME.txt beside it."""
    for name in _all_files(chunk.file)[chunk.start : chunk.stop]:
        yield _single(chunk.file / name, liked=True)


def _single(file: Path, *, liked: bool) -> Outcome:
    """Return the record of a single image."""
    try:
        row = make_record(str(file), _caption(file.parent, name=file.stem), (1,), _reader([file]))
        return row._replace(preference=(float(liked),)) if isinstance(row, Record) else row
    except Unusable as error:
        return Damaged(str(file), error.reason, error.found)


def _chunks(folders: Sequence[Path], places: tuple[str, ...], rows: Callable[[Path], Sequence[object]]) -> list[Chunk]:
    for folder in folders:
        if not all((folder / place).is_dir() for place in ("", *places)):
            inside = f" with the folders {' and '.join(places)}" if places else " of images"
            raise UserError(f"{folder} is not a folder{inside}; name such a folder, or set the --source that fits")
    counts = [(folder, len(rows(folder))) for folder in folders]
    limit = rows_a_chunk(sum(count for _, count in counts))
    return [
        Chunk(folder, start, min(start + limit, count)) for folder, count in counts for start in range(0, count, limit)
    ]


def _pair_names(folder: Path) -> list[str]:
    return sorted(_images(folder / "w").keys() | _images(folder / "l").keys())


def _opinions(folder: Path) -> list[tuple[str, str]]:
    """Return (liked or disliked, file name) of each image."""
    return [(place, name) for place in ("liked", "disliked") for name in _all_files(folder / place)]


def _all_files(folder: Path) -> list[str]:
    """Return the file name of each image."""
    return [name for _, names in sorted(_images(folder).items()) for name in names]


def _images(folder: Path) -> dict[str, list[str]]:
    """Return names of image files by their stems, in which accents are joined to their letters."""
    return _images_since(folder, folder.stat().st_mtime_ns)


@functools.lru_cache(maxsize=2)  # kept for the next chunk
def _images_since(folder: Path, changed: int) -> dict[str, list[str]]:
    images: dict[str, list[str]] = {}
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_file())
    for name in names:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in SUFFIXES and not name.startswith("."):
            images.setdefault(unicodedata.normalize("NFC", stem), []).append(name)
    return images


def _caption(*folders: Path, name: str) -> str | None:
    for folder in folders:
        file = in_any_form(folder, f"{name}.txt")
        if file is not None and file.is_file():
            try:
                return read_text(file, MAX_CAPTION_BYTES).strip()
            except (OSError, ValueError) as error:
                raise Unusable("the caption cannot be read", str(error)) from None
    return None


def _reader(files: Sequence[Path]) -> Callable[[int], bytes]:
    return lambda k: read_file(files[k])
