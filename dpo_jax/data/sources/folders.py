"""Folders of image files, whose place says which were preferred, with captions in .txt files."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dpo_jax.data.sources.record import ROWS_A_CHUNK, Chunk, Damaged, Record, Row, make_record

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}


def pairs_folder_chunks(folders: Sequence[Path]) -> list[Chunk]:
    return [chunk for folder in folders for chunk in _chunks(folder, "w", "l", len(_pair_names(folder)))]


def read_pairs_folder(chunk: Chunk) -> Iterator[Row]:
    """The preferred image in w/, the other one of the same name in l/, in any image format.

    The caption is w/NAME.txt, captions/NAME.txt or NAME.txt, the first that exists. If l/NAME.txt differs, it is the
    second image's own caption.
    """
    folder = chunk.file
    winners, losers = _images(folder / "w"), _images(folder / "l")
    for name in _pair_names(folder)[chunk.start : chunk.stop]:
        where = f"{folder} {name}"
        files = winners.get(name, []), losers.get(name, [])
        if any(len(found) != 1 for found in files):
            yield Damaged(where, "there is not one image of this name in both w and l")
            continue
        try:
            caption = _caption(folder / "w", folder / "captions", folder, name=name)
            other = _caption(folder / "l", name=name)
            captions = None if caption is None or other in (None, caption) else [caption, other]
            yield make_record(where, caption, (1, 0), _reader([found[0] for found in files]), captions=captions)
        except ValueError as error:
            yield Damaged(where, str(error))


def liked_chunks(folders: Sequence[Path]) -> list[Chunk]:
    return [chunk for folder in folders for chunk in _chunks(folder, "liked", "disliked", len(_opinions(folder)))]


def read_liked(chunk: Chunk) -> Iterator[Row]:
    """Images without a counterpart, in liked/ and disliked/, each with its caption NAME.txt beside it."""
    for file, liked in _opinions(chunk.file)[chunk.start : chunk.stop]:
        try:
            row = make_record(str(file), _caption(file.parent, name=file.stem), (1,), _reader([file]))
            yield row._replace(preference=(float(liked),)) if isinstance(row, Record) else row
        except ValueError as error:
            yield Damaged(str(file), str(error))


def _chunks(folder: Path, first: str, second: str, count: int) -> list[Chunk]:
    if not (folder / first).is_dir() or not (folder / second).is_dir():
        raise ValueError(f"{folder} should be a folder with the folders {first} and {second}")
    return [Chunk(folder, start, min(start + ROWS_A_CHUNK, count)) for start in range(0, count, ROWS_A_CHUNK)]


def _pair_names(folder: Path) -> list[str]:
    return sorted(_images(folder / "w").keys() | _images(folder / "l").keys())


def _opinions(folder: Path) -> list[tuple[Path, bool]]:
    return [
        (file, place == "liked")
        for place in ("liked", "disliked")
        for _, files in sorted(_images(folder / place).items())
        for file in files
    ]


def _images(folder: Path) -> dict[str, list[Path]]:
    """Image files by their name without suffix."""
    names: dict[str, list[Path]] = {}
    if folder.is_dir():
        for file in sorted(folder.iterdir()):
            if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file():
                names.setdefault(file.stem, []).append(file)
    return names


def _caption(*folders: Path, name: str) -> str | None:
    for folder in folders:
        file = folder / f"{name}.txt"
        if file.is_file():
            try:
                return _read(file).decode("utf-8-sig").strip()
            except UnicodeDecodeError:
                raise ValueError("its caption is not UTF-8") from None
    return None


def _reader(files: Sequence[Path]) -> Callable[[int], bytes]:
    return lambda k: _read(files[k])


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        raise ValueError("a file can't be read") from None
