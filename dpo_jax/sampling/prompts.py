"""Lists of prompts, as benchmarks publish them or as one writes them down."""

import csv
import io
from collections.abc import Iterable, Iterator
from typing import NamedTuple, NotRequired

from etils import epath
from typing_extensions import TypedDict

from dpo_jax.errors import MissingFileError, UserError
from dpo_jax.files import check_regular, read_json, read_json_lines, read_lines, read_text

BUNDLED = {
    "bundled": "sampling/bundled_prompts.jsonl",
    "ddpo_animals": "sampling/ddpo_animals.txt",
    "ddpo_animal_activities": "sampling/ddpo_animal_activities.jsonl",
    "animals": "sampling/animals.txt",
    "animal_activities": "sampling/animal_activities.jsonl",
    "hands": "sampling/hands.txt",
    "tiny_train": "tiny/train.txt",
    "tiny_heldout": "tiny/heldout.txt",
}
"""Files of the lists that come with the package.

The 45 animals and the 3 activities that DDPO and D3PO train on (arXiv 2305.13301, 2311.13231): an animal is prompted
for by its bare name, as in their code, and each is at each activity. The others are our own: 64 prompts to evaluate by;
45 animals, and 24 of them at 8 activities; 40 hands at work; the captions of the tiny world.
"""


class Prompt(NamedTuple):
    text: str
    category: str = ""
    """Results are told for each; "" where a list has none."""
    number: int = 0
    """Of its line in the file, from 0, blank lines counted; in tables and lists of its row. Images are named by it."""


class _Line(TypedDict):
    prompt: str
    category: NotRequired[str | int | float | None]


def read_prompts(source: epath.PathLike, *, repeated: bool = False) -> list[Prompt]:
    """The prompts of a file or folder, in its order, each once.

    Args:
        source: a name in `BUNDLED`, or a path; by its ending
            .txt      one prompt a line;
            .jsonl    lines of {"prompt": ..., "category": ...}, the category if there is one;
            .tsv      PartiPrompts (columns Prompt and Category), without quoting;
            .csv      the same columns, in quotes where they hold commas or line ends;
            .json     a list of prompts, as HPSv2's benchmark has them; the file's name is the category;
            .parquet  the captions of Pick-a-Pic's schema;
            a folder  all such files in it, whose lines are numbered on from file to file.
        repeated: also the lines whose prompt an earlier line has, for who looks prompts up by their numbers.

    Raises FileNotFoundError or ValueError where there is no prompt, with the reason.
    """
    bundled = BUNDLED.get(str(source))
    path = epath.Path(__file__).parents[1] / bundled if bundled else epath.Path(source)
    if not path.exists():
        raise MissingFileError(f"no prompts at {path}; name a file (one prompt a line) or one of {', '.join(BUNDLED)}")
    files = sorted(file for file in path.iterdir() if file.suffix in _READERS) if path.is_dir() else [path]
    prompts: list[Prompt] = []
    first = 0
    for file in files:
        if file.suffix not in _READERS:
            raise UserError(f"{file}: prompts are read from {', '.join(_READERS)}")
        last = -1
        for prompt in _READERS[file.suffix](file):
            last, text = prompt.number, prompt.text.strip("\ufeff").strip()  # files joined by cat have marks within
            if text:
                prompts.append(Prompt(text, prompt.category, first + prompt.number))
        first += last + 1
    if not prompts:
        raise UserError(f"{path} has no prompt; write one prompt a line")
    return prompts if repeated else distinct(prompts)


def distinct(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The first of each text, with the number of its own line."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.text, prompt)
    return list(first.values())


def _lines(file: epath.Path) -> Iterator[Prompt]:
    return (Prompt(line, "", number) for number, line in enumerate(read_lines(file)))


def _json_lines(file: epath.Path) -> Iterator[Prompt]:
    lines: Iterator[tuple[int, _Line]] = read_json_lines(file, _Line)
    for number, fields in lines:
        category = fields.get("category")
        yield Prompt(fields["prompt"], "" if category is None else str(category), number - 1)


def _tsv(file: epath.Path) -> Iterator[Prompt]:
    return _table(file, csv.DictReader(read_lines(file), delimiter="\t", quoting=csv.QUOTE_NONE))


def _csv(file: epath.Path) -> Iterator[Prompt]:
    return _table(file, csv.DictReader(io.StringIO(read_text(file), newline="")))


def _table(file: epath.Path, rows: "csv.DictReader[str]") -> Iterator[Prompt]:
    try:
        columns = {name.strip().lower(): name for name in rows.fieldnames or () if name}
        if "prompt" not in columns:
            found = " ".join(", ".join(columns.values()).split())
            raise UserError(f"{file} has no column Prompt, as PartiPrompts has; it has {found[:200]}")
        for index, row in enumerate(rows):
            category = row.get(columns.get("category", "")) or ""
            number = rows.line_num - 2 if rows.reader.dialect.quoting == csv.QUOTE_NONE else index
            yield Prompt(row[columns["prompt"]] or "", category, number)
    except csv.Error as error:
        raise UserError(f"{file}, line {rows.line_num + 1} can't be read as a table: {error}") from None


def _json_list(file: epath.Path) -> Iterator[Prompt]:
    texts: list[str] = read_json(file, list[str])
    return (Prompt(text, file.stem, number) for number, text in enumerate(texts))


def _parquet(file: epath.Path) -> Iterator[Prompt]:
    import pyarrow as pa
    from pyarrow import parquet

    from dpo_jax.data.sources.tables import not_parquet

    try:
        table = parquet.ParquetFile(check_regular(file))
        names = table.schema_arrow.names
        column = next((name for name in ("caption", "prompt") if name in names), None)
        if column is None:
            raise UserError(f"{file} has no column caption, as Pick-a-Pic has; it has {', '.join(names)}")
        number = 0
        for batch in table.iter_batches(columns=[column]):
            for text in batch.column(0).cast(pa.string()).to_pylist():
                yield Prompt(text or "", "", number)
                number += 1
    except (pa.ArrowException, OSError, MemoryError) as error:
        raise not_parquet(file, error) from None


_READERS = {
    ".txt": _lines,
    ".jsonl": _json_lines,
    ".tsv": _tsv,
    ".csv": _csv,
    ".json": _json_list,
    ".parquet": _parquet,
}
