"""Small files of the sources' layouts, and sources without files."""

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

from dpo_jax.data.sources import SOURCES, Chunk, Outcome, Record, Source


def read(name: str, *files: Path) -> list[Outcome]:
    source = pickle.loads(pickle.dumps(SOURCES[name]))  # as when it is sent to spawned processes
    return [row for chunk in source.chunks(files) for row in source.read(chunk)]


def write_images(folder: Path, *names: str) -> None:
    """Write files that contain their own name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def write_lines(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def reasons(rows: list[Outcome]) -> list[str]:
    return [row.reason for row in rows if not isinstance(row, Record)]


def write_tar(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            tar.addfile(_info(name, len(data)), io.BytesIO(data))
    return file


def _info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    return info


def in_memory(*chunks: list[Outcome]) -> Source:
    """Return a source of these rows; the files that it is given are ignored."""
    return Source(
        chunks=lambda files: [Chunk(files[0], i, i + 1) for i in range(len(chunks))],
        read=lambda chunk: iter(chunks[chunk.start]),
        help="",
    )


def record(*images: bytes | None, caption: str = "a cat", **fields: Any) -> Record:
    shares = (1.0,) + (0.0,) * (len(images) - 1)
    return Record("row", caption, images, shares, ("",) * len(images))._replace(**fields)
