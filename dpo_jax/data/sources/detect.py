"""Finds the source that reads given files, by their kind and by the columns of the first row."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from dpo_jax.data.images import SUFFIXES
from dpo_jax.data.sources.json_rows import elements
from dpo_jax.data.sources.listings import IMAGEREWARD
from dpo_jax.data.sources.tables import OPEN_IMAGE_PREFERENCES, PICKAPIC, parquet_columns
from dpo_jax.errors import UserError
from dpo_jax.files import decode_text, parse_json

LAYOUTS: dict[str, list[tuple[str, Sequence[str]]]] = {
    ".parquet": [
        ("pickapic", tuple(PICKAPIC.needed)),
        ("open_image_preferences", tuple(OPEN_IMAGE_PREFERENCES.needed)),
        ("imagerewarddb", IMAGEREWARD),
    ],
    ".json": [
        ("imagerewarddb", IMAGEREWARD),
        ("jsonl", ("prompt", "chosen", "rejected")),
        ("jsonl", ("prompt", "images")),
        ("hpdv3", ("prompt", "path1", "path2")),
        ("hpdv3", ("prompt", "file_path")),
        ("hpdv3", ("prompt", "image_path")),
    ],
}
"""Sources, and the columns of their rows, by kind of file; the first source whose columns all exist is chosen."""
KINDS = {".tar": "pickapic_tar", ".csv": "csv", ".tsv": "csv"}
"""Kinds of files that only one source reads."""
FOLDERS = [("pairs_folder", ("w", "l")), ("liked", ("liked", "disliked"))]
"""Sources of folders, and the folders that they read inside."""


def detect_source(files: Sequence[Path]) -> str:
    """Return the name of the source in `SOURCES` that reads these files.

    Raises a UserError, with what was found and what is known, if no source does or if different sources do.
    """
    found = {file: _source_of(file) for file in files}
    if len(set(found.values())) > 1:
        (one, source), (other, another) = next(
            pair for pair in itertools.pairwise(found.items()) if pair[0][1] != pair[1][1]
        )
        raise UserError(
            f"{one} looks like --source={source}, but {other} like --source={another}; prepare them one by one, or "
            "state the --source"
        )
    return found[files[0]]


def _source_of(file: Path) -> str:
    if file.is_dir():
        parts = sorted(file.rglob("*.parquet"))
        return _source_of(parts[0]) if parts else _source_of_folder(file)
    kind = ".json" if file.suffix == ".jsonl" else file.suffix
    if kind in KINDS:
        return KINDS[kind]
    if kind not in LAYOUTS:
        raise UserError(
            f"{file}: its ending does not tell what it is; known are .parquet, .json, .jsonl, .csv, .tsv, .tar and "
            "folders of images. State the --source"
        )
    columns = parquet_columns(file) if kind == ".parquet" else _json_columns(file)
    for source, needed in LAYOUTS[kind]:
        if set(needed) <= set(columns):
            return source
    known = "; ".join(f"{', '.join(needed)} ({source})" for source, needed in LAYOUTS[kind])
    raise UserError(
        f"{file} has the columns {', '.join(columns)[:500]}, which no layout fits; the layouts of such files "
        f"are: {known}. Rename the columns, or write JSON lines of prompt, chosen and rejected"
    )


def _source_of_folder(folder: Path) -> str:
    for source, inside in FOLDERS:
        if all((folder / name).is_dir() for name in inside):
            return source
    if any(entry.suffix.lower() in SUFFIXES for entry in folder.iterdir()):
        return "captioned_folder"
    raise UserError(
        f"{folder} holds no .parquet files, no folders w and l or liked and disliked, and no images; name the files "
        "to read, or the folder that holds them"
    )


def _json_columns(file: Path) -> list[str]:
    """Return the keys of the first object of a JSON list or of JSON lines."""
    for offset, element in elements(file):
        if element.strip():
            where = f"{file}, the object at byte {offset},"
            row = parse_json(decode_text(element, where), where)
            return list(row) if isinstance(row, dict) else []
    return []
