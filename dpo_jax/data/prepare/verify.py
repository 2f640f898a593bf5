"""Reads all of a prepared data set and compares it with its checksums: what `prepare --verify` does."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from dpo_jax.data.images import DamagedImage
from dpo_jax.data.store import checksums, scores
from dpo_jax.data.store.latents import INDEX, StoredLatents
from dpo_jax.data.store.prepared import CHECKED, PreparedData, open_prepared
from dpo_jax.errors import MissingFileError, UserError

OnProgress = Callable[[int, int], None]
"""Called with the bytes read and their total."""


class Verified(NamedTuple):
    """What was found to be as it was written. As a string: for people to read."""

    folder: Path
    files: int
    bytes: int
    images: int
    added: bool
    """Whether the data set had no checksums, and has some now."""
    without: list[str]
    """Encodings and scores of an earlier time, which have none."""

    def __str__(self) -> str:
        lines = [f"verified {self.files} files, {self.bytes:,} bytes, {self.images} images in {self.folder}"]
        if self.added:
            lines.append(f"it had no checksums: they were written to {self.folder / checksums.FILE}")
        lines += [f"{name} has no checksums: make it again to have them" for name in self.without]
        return "\n".join(lines)


def verify(folder: Path, on_progress: OnProgress = lambda done, total: None) -> Verified:
    """Compares every file of a prepared data set with its checksum, scores and encodings included.

    A data set that was prepared before there were checksums gets them, if every image is what images.arrow says.

    Raises:
        FileNotFoundError: nothing was prepared there, or a part is missing.
        ValueError: names all files that are damaged, and their images.
    """
    prepared = open_prepared(folder)
    stored = checksums.read(folder)
    shards = {f"images/{path.name}": path for path in prepared.images.files}
    digests = stored or {}
    names = sorted({*CHECKED, *shards, *digests})
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise MissingFileError(f"the data set {folder} misses {', '.join(missing)}")
    encodings = [StoredLatents(file.parent) for file in sorted((folder / "encoded").glob(f"*/{INDEX}"))]
    for each in encodings:
        each.check()
    encoded = [file for each in encodings for file in each.files]
    sizes = {
        path: path.stat().st_size for path in (*(folder / name for name in names), *(file.path for file in encoded))
    }
    total, done = sum(sizes.values()), 0
    problems: list[str] = []
    suspects = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, digest in zip(names, pool.map(lambda name: checksums.checksum(folder / name), names), strict=True):
            if stored is None:
                digests[name] = digest
                suspects.append(folder / name)
            elif digest != digests.get(name):
                suspects.append(folder / name)
                problems.append(f"{folder / name} (its checksum is not the one in {checksums.FILE})")
            done += sizes[folder / name]
            on_progress(done, total)
        for file, damage in zip(encoded, pool.map(lambda file: file.damage(), encoded), strict=True):
            problems += [damage] if damage else []
            done += sizes[file.path]
            on_progress(done, total)
    problems += _damaged_images(prepared, suspects)
    of = scores.candidates(prepared.records["images"])
    judges = scores.judges_of(folder)
    for judge in judges:
        try:
            scores.read_scores(folder, [judge], of)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise UserError(f"{len(problems)} damaged in {folder}: {'; '.join(problems[:10])}")
    if stored is None:
        checksums.write(folder, digests)
    without = [str(each.folder) for each in encodings if not each.has_checksums]
    without += [str(scores.scores_file(folder, judge)) for judge in judges if not scores.has_checksum(folder, judge)]
    return Verified(folder, len(sizes) + len(judges), total, len(prepared.images), stored is None, without)


def _damaged_images(prepared: PreparedData, suspects: list[Path]) -> Iterator[str]:
    for file, positions in prepared.images.positions():
        if file in suspects:
            for position in positions:
                try:
                    _ = prepared.images[position]
                except DamagedImage as error:
                    yield str(error)
