"""Preparation of a data set, as a function."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pydantic

from dpo_jax.data.sources import SOURCES, hub, missing
from dpo_jax.data.sources.detect import detect_source
from dpo_jax.errors import ExistingFileError, UserError
from dpo_jax.files import read_json

if TYPE_CHECKING:
    from dpo_jax.data.prepare.builder import Progress, Summary


class Prepared(NamedTuple):
    """The result of `prepare`, also if an earlier call has written it."""

    folder: Path
    records: int
    summary: "Summary | None"
    """Figures of the data set; None if an earlier call had prepared it."""


def prepare(
    input: str | Path | Sequence[str | Path] | None,
    output: str | Path,
    *,
    source: str | None = None,
    workers: int | None = None,
    validation_fraction: float = 0.05,
    max_damaged_fraction: float = 0.01,
) -> Prepared:
    """Make the data set that training reads: checked, every image stored once, split by prompt.

    The same call continues after an interruption, and returns at once when all is done.

        dpo_jax.prepare("pairs/*.parquet", "data/mine")

    Args:
        input: files or folders, with wildcards if wanted; or "hub:OWNER/NAME", a data set on the Hugging Face hub.
        output: folder to write; new, empty, or what the same call has written.
        source: layout of the input, as `dpo_jax prepare --help` lists them; by default the one that fits.
        workers: processes that read; None takes one per core, 0 reads in this process.
        validation_fraction: fraction of the prompts to hold out for validation.
        max_damaged_fraction: fraction of the records that may be damaged.

    Raises:
        UserError: the input cannot be used, too much of it is damaged, or `output` holds something else.
    """
    from dpo_jax.data.prepare import builder
    from dpo_jax.progress import ProgressBar

    if source is not None and source not in SOURCES and not source.startswith(hub.PREFIX):
        raise UserError(f"source={source} is not a layout; the layouts are {', '.join(SOURCES)}, or hub:OWNER/NAME")
    output = Path(output)
    given = [input] if isinstance(input, (str, Path)) else input
    files, layout = find_input(None if given is None else [str(pattern) for pattern in given], source)
    if (records := already_prepared(output, files, layout, validation_fraction)) is not None:
        return Prepared(output, records, None)
    with ProgressBar("parts") as bar:
        is_first = True

        def show(progress: "Progress") -> None:
            nonlocal is_first
            if is_first and progress.done:
                bar.say(f"continuing: {progress.done} of {progress.total} parts are finished")
            is_first = False
            bar.show(progress.step, progress.done, progress.total, records=progress.records)

        summary = builder.prepare(
            SOURCES[layout],
            files,
            output,
            workers=workers,
            validation_fraction=validation_fraction,
            max_damaged_fraction=max_damaged_fraction,
            on_progress=show,
        )
    return Prepared(output, summary.records, summary)


def find_input(patterns: Sequence[str] | None, source: str | None) -> tuple[list[Path], str]:
    """Return the files to read, and the name of the layout that they have."""
    if source is not None and source.startswith(hub.PREFIX):
        if patterns is not None:
            raise UserError(
                f"--source={source} names the input already; leave --input out, or give the layout as --source and "
                f"--input={source}"
            )
        patterns, source = [source], None
    if not patterns:
        raise UserError("--input is missing; name the files or folders to read")
    files = []
    for pattern in patterns:
        if pattern.startswith(hub.PREFIX):
            files += hub.fetch(pattern)
            continue
        # Brackets may be part of a name.
        matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise missing(pattern)
        files += [Path(match) for match in matches]
    return files, source or detect_source(files)


class Inputs(pydantic.BaseModel):
    """The part of `summary.json` that says what was prepared; `source` is the help of the layout."""

    files: list[str]
    source: str
    validation_fraction: float
    records: int = 0


def already_prepared(output: Path, files: list[Path], source: str, validation_fraction: float) -> int | None:
    """Return the number of records if an earlier run has prepared just this, and None if nothing was prepared.

    Raises ExistingFileError if something else was prepared.
    """
    summary_file = output / "summary.json"
    if not summary_file.is_file():
        return None
    summary: Inputs = read_json(summary_file, Inputs)
    layouts = {summary.source, SOURCES[source].help} & {known.help for known in SOURCES.values()}
    given = [str(file) for file in files], validation_fraction
    if (summary.files, summary.validation_fraction) != given or len(layouts) > 1:  # help of old versions is unknown
        raise ExistingFileError(
            f"{output} was prepared before, from another --input, --source or --validation_fraction; name another "
            "--output or remove it, or leave --input out to encode the data set that is there"
        )
    written = summary_file.stat().st_mtime
    home = output.resolve()

    def is_own(path: Path) -> bool:
        """Return whether a path is part of the prepared data, or a folder that writing it has changed."""
        return path.is_relative_to(home) or path in home.parents

    read = [each for file in files for each in (file, *(file.rglob("*") if file.is_dir() else ()))]
    read = [each for each in read if not is_own(each.resolve())]
    changed = [file for file in read if max(file.stat().st_mtime, file.stat().st_ctime) > written]
    if changed:
        raise ExistingFileError(
            f"{output} was prepared before {changed[0]} last changed; name another --output or remove it to prepare it "
            "again, or leave --input out to encode the data set that is there"
        )
    return summary.records
