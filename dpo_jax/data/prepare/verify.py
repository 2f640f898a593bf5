"""Reads all of a prepared data set and compares it with its checksums: `prepare --verify`."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from dpo_jax.data.images import DamagedImage
from dpo_jax.data.store import checksums, scores
from dpo_jax.data.store.latents import INDEX, StoredLatents
from dpo_jax.data.store.prepared import AGAIN, CHECKED, PreparedData, open_prepared
from dpo_jax.errors import MissingFileError, UserError

REPAIR = "Restore the files from a copy, or prepare the data set again"
OnProgress = Callable[[int, int], None]
"""Called with the bytes read and their total."""


class Verified(NamedTuple):
    """The parts that were found to be undamaged. Its string is for people to read."""

    folder: Path
    files: int
    bytes: int
    images: int
    added: bool
    """True if the data set had no checksums before and has some now."""
    without: list[str]
    """Stored latents and scores of earlier versions, which have no checksums."""

    def __str__(self) -> str:
        lines = [f"verified {self.files} files, {self.bytes:,} bytes, {self.images} images in {self.folder}"]
        if self.added:
            lines.append(f"it had no checksums: they were written to {self.folder / checksums.FILE}")
        lines += [f"{name} has no checksums; make it again to add them" for name in self.without]
        return "\n".join(lines)


def verify(folder: Path, on_progress: OnProgress = lambda done, total: None) -> Verified:
    """Compare every file of a prepared data set with its checksum, including scores and stored latents.

    A data set of a version without checksums gets them, if every image matches images.arrow.

    Raises:
        FileNotFoundError: nothing was prepared there, or a part is missing.
        ValueError: files are damaged; the message names them and their images.
    """
    prepared = open_prepared(folder)
    stored = checksums.read(folder)
    shards = {f"images/{path.name}": path for path in prepared.images.files}
    digests = stored or {}
    names = sorted({*CHECKED, *shards, *digests})
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise MissingFileError(f"the data set {folder} has no {', '.join(missing)}; {AGAIN}")
    stored_latents = [StoredLatents(file.parent) for file in sorted((folder / "encoded").glob(f"*/{INDEX}"))]
    for each in stored_latents:
        each.check()
    latent_files = [file for each in stored_latents for file in each.files]
    sizes = {
        path: path.stat().st_size
        for path in (*(folder / name for name in names), *(file.path for file in latent_files))
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
        for file, damage in zip(latent_files, pool.map(lambda file: file.damage(), latent_files), strict=True):
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
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(f"{folder} is damaged ({len(problems)} in all): {'; '.join(problems[:10])}{more}. {REPAIR}")
    if stored is None:
        checksums.write(folder, digests)
    without = [str(each.folder) for each in stored_latents if not each.has_checksums]
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
