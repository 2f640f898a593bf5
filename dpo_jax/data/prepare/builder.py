"""Prepare preference data once for every later run: verified, each image stored once, split by prompt.

Worker processes turn each chunk of the source into a finished part (worker.py), in a hidden folder beside the output;
so a killed run loses only its unfinished parts. The parts are then merged (merge.py) in the order of the chunks: the
same input gives the same bytes, whatever the number of workers.

    OUTPUT/images/          TFDS data set of Parquet shards, one split: every image once, its bytes unchanged
    OUTPUT/images.arrow     for each image, in the same order: sha256, upright width and height, position in its shard
    OUTPUT/records.arrow    records, whose `images` are positions in that order, best first
    OUTPUT/summary.json     what became of the rows
    OUTPUT/checksums.json   checksums of the files above
    OUTPUT/quarantine.jsonl what was set aside, and why
    OUTPUT/contact_sheet.png, heldout_prompts.jsonl  for people to look at (review.py)
"""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import stat
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax import files, locks
from dpo_jax.data.prepare import review, worker
from dpo_jax.data.prepare.merge import VERSION, Merged, merge
from dpo_jax.data.sources import Chunk, Source
from dpo_jax.data.store import checksums, prepared
from dpo_jax.errors import ExistingFileError, OutsideProcessError, UserError
from dpo_jax.files import sync

SUMMARY = "summary.json"
RECORDS_TO_JUDGE_BY = 10_000
"""A run stops early only when the damage found so far is too much even for this many records."""


class Progress(NamedTuple):
    """Progress of `prepare`."""

    step: str
    done: int
    """Finished parts."""
    total: int
    records: int
    """Records in the finished parts."""


@dataclasses.dataclass
class Summary:
    """The outcome for the input's rows; written beside the data as `summary.json`."""

    files: list[str]
    source: str = ""
    """The help of the source that read the input."""
    validation_fraction: float = 0.0
    rows: int = 0
    """Rows read: records, dropped and quarantined ones."""
    records: int = 0
    pairs: int = 0
    """Records with two candidates, including ties."""
    ties: int = 0
    """Records with several candidates of equal preference."""
    candidates: Counter[str] = dataclasses.field(default_factory=Counter)
    """Records by their number of candidates."""
    splits: dict[str, int] = dataclasses.field(default_factory=dict)
    """Records by split."""
    prompts: dict[str, int] = dataclasses.field(default_factory=dict)
    """Distinct prompts by split."""
    images: int = 0
    """Distinct images, including masks."""
    duplicates: int = 0
    """Candidates and masks whose image is stored for another one too."""
    resolutions: Counter[str] = dataclasses.field(default_factory=Counter)
    """Images by width x height, upright; the most common first."""
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    """Rows without a usable preference, by reason."""
    weighted: int = 0
    """Records with a weight of their own."""
    masked: int = 0
    """Records with a mask."""
    quarantined: int = 0
    damaged: Counter[str] = dataclasses.field(default_factory=Counter)
    """Quarantined rows by reason; `quarantine.jsonl` lists each."""

    def __str__(self) -> str:
        candidates = ", ".join(f"{count} with {k} candidates" for k, count in sorted(self.candidates.items()))
        resolutions = _listed(dict(self.resolutions.most_common(5)))
        stated = (("a weight", self.weighted), ("a mask", self.masked))
        others = "".join(f"; {count} with {what}" for what, count in stated if count)
        return (
            f"rows read    {self.rows}\n"
            f"dropped      {_listed(self.dropped)}\n"
            f"quarantined  {self.quarantined}{f' ({_listed(self.damaged)})' if self.damaged else ''}\n"
            f"records      {self.records}: {_listed(self.splits)}\n"
            f"             {self.pairs} pairs, {self.ties} ties; {candidates}{others}\n"
            f"prompts      {_listed(self.prompts)}\n"
            f"images       {self.images} ({self.duplicates} duplicates): {resolutions}"
        )


def prepare(
    source: Source,
    files: Sequence[Path],
    output: Path,
    *,
    workers: int | None = None,
    validation_fraction: float = 0.05,
    max_damaged_fraction: float = 0.01,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Summary:
    """Write the data set `output`, which appears only when it is complete; the same input gives the same bytes.

    The same call continues a run that was stopped. Records with a damaged image are set aside.

    Args:
        workers: number of processes; 0 reads in this process, None uses one per core.
        validation_fraction: fraction of the prompts to hold out. The hash of a prompt decides, so all its records land
            in one split, and stay there when files are added. At least one prompt is held out unless this is 0.
        max_damaged_fraction: fraction of the records that may be set aside.
        on_progress: called at the start and after each part.

    Raises:
        BlockingIOError: another run is writing `output`.
        FileExistsError: `output` exists and is not an empty folder, or an unfinished run of another input is there.
        ValueError: there is no usable record, there are too many damaged ones, or a file has another layout.
        ChildProcessError: a worker was killed, for example because memory ran out.
    """
    _check_free(output)
    chunks = source.chunks(files)
    partial = output.absolute().parent / f".{output.name}.partial"
    _check_own(partial)
    with locks.locked(partial, "python -m dpo_jax.prepare", what=output):
        _check_free(output)  # another run may just have ended
        _begin(partial, _manifest(source, files, chunks))
        folders = [partial / "parts" / f"{number:05}" for number in range(len(chunks))]
        finished = [folder for folder in folders if folder.exists()]
        missing = {folder: chunk for folder, chunk in zip(folders, chunks, strict=True) if not folder.exists()}
        summary = _count(files, finished)
        on_progress(Progress("reading", len(finished), len(folders), summary.records))

        def count(folder: Path) -> None:
            _add_counts(summary, folder)
            finished.append(folder)
            on_progress(Progress("reading", len(finished), len(folders), summary.records))
            expected = (summary.records + summary.quarantined) * len(folders) / len(finished)
            _check_damage(summary, max_damaged_fraction, max(expected, RECORDS_TO_JUDGE_BY), folders)

        _make_parts(source, missing, os.cpu_count() or 1 if workers is None else workers, count)
        _check_damage(summary, max_damaged_fraction, summary.records + summary.quarantined, folders)
        summary = _count(files, folders)  # in order, whichever part was finished first
        summary.source, summary.validation_fraction = source.help, validation_fraction
        if not summary.records:
            shutil.rmtree(partial)
            found = _listed(summary.dropped + summary.damaged)
            raise UserError(
                f"none of the {summary.rows} rows of {', '.join(summary.files[:3])} can be used ({found}); check the "
                "--source and the input"
            )

        def moved(done: int, total: int) -> None:
            on_progress(Progress("merging", done, total, summary.records))

        data = partial / "data"
        merged = merge(folders, data, validation_fraction, moved)
        _add_merged(summary, merged)
        whole = prepared.PreparedData(data)
        review.write_contact_sheet(whole)
        review.write_heldout_prompts(whole)
        (data / SUMMARY).write_text(json.dumps(vars(summary), indent=1) + "\n")
        others = [SUMMARY, *prepared.CHECKED]
        checksums.write(data, merged.checksums | {name: checksums.checksum(data / name) for name in others})
        worker.sync(data)
        os.replace(data, output)
        sync(output.absolute().parent)
        shutil.rmtree(partial)
    return summary


def _check_free(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ExistingFileError(
            f"{output} already exists and is not an empty folder; choose another --output or remove it"
        )


def _check_own(partial: Path) -> None:
    """Refuse a link or another user's folder in place of the folder of unfinished work, whose name can be guessed."""
    if not os.path.lexists(partial):
        return
    found = os.lstat(partial)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise ExistingFileError(
            f"{partial}, the folder of unfinished work, is a link or belongs to another user; remove it, or choose "
            "another --output"
        )


def _manifest(source: Source, files: Sequence[Path], chunks: Sequence[Chunk]) -> dict[str, Any]:
    """Everything that the parts depend on."""
    read = dict.fromkeys([*files, *(chunk.file for chunk in chunks)])
    stats = {str(file): file.stat() for file in read}
    return {
        "version": str(VERSION),
        "source": source.help,
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "chunks": [[str(field) for field in chunk] for chunk in chunks],
    }


def _begin(partial: Path, manifest: dict[str, Any]) -> None:
    """Start the folder of unfinished work, or check that it has the same input and remove unfinished parts."""
    file = partial / "manifest.json"
    if file.exists():
        try:
            begun: dict[str, Any] = files.read_json(file, dict[str, Any])
        except ValueError as error:
            raise UserError(f"{error}; remove {partial} (rm -r) to begin again") from None
        for key, value in manifest.items():
            if begun.get(key) != value:
                raise ExistingFileError(
                    f"{partial} holds an unfinished run of another input (with different {key}); remove it "
                    f"(rm -r {partial}) to begin again, or choose another --output"
                )
        for part in (partial / "parts").iterdir():
            if part.name.startswith(".") or not worker.is_whole(part, images_moved=(partial / "data").exists()):
                shutil.rmtree(part)
    else:
        for remains in ("parts", "data"):
            shutil.rmtree(partial / remains, ignore_errors=True)
        (partial / "parts").mkdir()
        files.write_whole(file, json.dumps(manifest, indent=1))


def _count(files: Sequence[Path], folders: Sequence[Path]) -> Summary:
    summary = Summary(files=[str(file) for file in files])
    for folder in folders:
        _add_counts(summary, folder)
    return summary


def _add_counts(summary: Summary, folder: Path) -> None:
    counts = worker.read_counts(folder)
    summary.rows += counts.rows
    summary.records += counts.records
    summary.ties += counts.ties
    summary.dropped.update(counts.dropped)
    summary.damaged.update(counts.damaged)
    summary.candidates.update(counts.candidates)
    summary.quarantined = summary.damaged.total()
    summary.pairs = summary.candidates["2"]


def _add_merged(summary: Summary, merged: Merged) -> None:
    summary.splits, summary.prompts = merged.splits, merged.prompts
    summary.images, summary.duplicates, summary.resolutions = merged.images, merged.duplicates, merged.resolutions
    summary.weighted, summary.masked = merged.weighted, merged.masked
    written = sum(merged.splits.values())
    assert (written, merged.quarantined) == (summary.records, summary.quarantined)
    assert summary.rows == written + summary.dropped.total() + merged.quarantined, "a row was lost"


def _check_damage(summary: Summary, allowed: float, records: float, folders: Sequence[Path]) -> None:
    if summary.quarantined <= allowed * records:
        return
    files = (folder / "damaged.jsonl" for folder in folders)
    first = json.loads(next(text for file in files if file.exists() and (text := file.read_text())).split("\n")[0])
    found = f": {first['found']}" if "found" in first else ""
    raise UserError(
        f"{summary.quarantined} of {summary.records + summary.quarantined} records are damaged (for example "
        f"{first['where']}: {first['reason']}{found}), more than --max_damaged_fraction={allowed} allows; repair them, "
        "or raise the limit and run the command again, which keeps the finished parts"
    )


def _make_parts(source: Source, missing: Mapping[Path, Chunk], workers: int, finished: Callable[[Path], None]) -> None:
    """Make the parts in any order, one process per part, and call `finished` with each."""
    if not workers:
        for folder, chunk in missing.items():
            worker.make_part(source, chunk, folder)
            finished(folder)
    elif missing:
        others = set(multiprocessing.active_children())
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(missing)), context, _start_worker) as pool:
            futures = {
                pool.submit(worker.make_part, source, chunk, folder): folder for folder, chunk in missing.items()
            }
            processes = [process for process in multiprocessing.active_children() if process not in others]
            try:
                for future in as_completed(futures):
                    future.result()
                    finished(futures[future])
            except BaseException as error:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in processes:
                    process.terminate()
                if isinstance(error, BrokenProcessPool):
                    raise OutsideProcessError(_who_died(processes, missing)) from None
                raise


def _start_worker() -> None:
    """Leave Ctrl-C to the main process, and end when that one is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _who_died(processes: Sequence[Any], chunks: Mapping[Path, Chunk]) -> str:
    """Name the worker that died, and the part it read; the pool has stopped the other workers with SIGTERM."""
    for process in processes:
        process.join()
        for folder, chunk in chunks.items():
            if process.exitcode != -signal.SIGTERM and worker.temporary_folder(folder, process.pid).exists():
                cause = signal.Signals(-process.exitcode).name if process.exitcode < 0 else f"exit {process.exitcode}"
                return (
                    f"the worker that read {chunk.file} from {chunk.start} to {chunk.stop} died ({cause}; SIGKILL "
                    "mostly means that memory ran out: set fewer --workers); run the command again, which keeps the "
                    "finished parts"
                )
    return "a worker died before it read anything; run the command again, which keeps the finished parts"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"
