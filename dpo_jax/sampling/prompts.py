"""Lists of prompts: those that benchmarks publish, those that come with dpo_jax, and the user's own."""

import csv
import difflib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, NotRequired

from etils import epath
from typing_extensions import TypedDict

from dpo_jax.errors import MissingFileError, UserError
from dpo_jax.files import check_regular, is_text, read_json, read_json_lines, read_lines, read_text

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
"""The lists that come with the package, by name: files in the folder of dpo_jax.

The lists ddpo_animals and ddpo_animal_activities are those that DDPO and D3PO train on (arXiv 2305.13301, 2311.13231):
45 animals, each prompted for by its bare name as in their code, and each of them at 3 activities. The other lists were
written for dpo_jax: 64 prompts for evaluation (bundled); 45 animals; 24 of them at 8 activities; 40 prompts of hands;
the captions of the tiny world.
"""
FORMS = "a file (.txt, .jsonl, .tsv, .csv, .json, .parquet) or a folder of them"
"""What `read_prompts` reads, for --help."""


class Prompt(NamedTuple):
    text: str
    category: str = ""
    """Win rates are also reported per category; "" where a list has none."""
    number: int = 0
    """The number of its line in the file, counted from 0 and with blank lines, or of its row in a table. It is part of
    the names of images."""


class _Line(TypedDict):
    prompt: str
    category: NotRequired[str | int | float | None]
    tag: NotRequired[str | None]


def given_prompts(values: Sequence[str], *, repeated: bool = False) -> list[Prompt]:
    """Return the prompts of a --prompts flag, each of whose values is a source of `read_prompts` or a prompt itself.

    A value is a prompt if nothing exists at that path and it looks neither like a path (it contains a slash, or ends
    like a file name) nor like a misspelt list. Each of its lines is then a prompt. Numbers go on from value to value.

    Raises MissingFileError for a value that looks like a path or a misspelt list, UserError as `read_prompts` does.
    """
    prompts: list[Prompt] = []
    for value in values:
        first = prompts[-1].number + 1 if prompts else 0
        found = _written_out(value) if _is_prompt(value) else read_prompts(value, repeated=True)
        prompts += [prompt._replace(number=first + prompt.number) for prompt in found]
    return prompts if repeated else distinct(prompts)


def _written_out(text: str) -> list[Prompt]:
    if not is_text(text):
        raise UserError(f"--prompts={text!r} is not valid UTF-8; set the terminal to UTF-8, or write it in a file")
    prompts = [Prompt(line.strip(), "", number) for number, line in enumerate(text.splitlines()) if line.strip()]
    if not prompts:
        raise UserError(f"--prompts={text!r} is empty; give a prompt, {FORMS}, or one of {', '.join(BUNDLED)}")
    return prompts


def _is_prompt(value: str) -> bool:
    """Whether the value of a flag is a prompt, not the name of a list, a file or a folder."""
    is_file_name = epath.Path(value).suffix in _READERS or re.fullmatch(r"\S+\.[a-zA-Z]\w{0,7}", value)
    if value in BUNDLED or "/" in value or is_file_name:
        return False
    try:
        exists = bool(value.strip()) and epath.Path(value).exists()
    except OSError:  # such as a name that is too long for a file
        exists = False
    return not exists and not difflib.get_close_matches(value, BUNDLED, cutoff=0.8)


def read_prompts(source: epath.PathLike, *, repeated: bool = False) -> list[Prompt]:
    """Return the prompts of a file or folder, in their order, each once.

    Args:
        source: a name in `BUNDLED`, or a path. The ending of the file's name decides how it is read:
            .txt      one prompt per line;
            .jsonl    lines of {"prompt": ..., "category": ...}; the category is optional, and GenEval's metadata call
                      it "tag";
            .tsv      columns Prompt (or text) and Category (optional), without quoting, as PartiPrompts has them;
            .csv      the same columns, with quotes around values that contain commas or line ends; DPG-Bench's list of
                      questions is such a file;
            .json     a list of prompts, as HPSv2's benchmark has them; the file's name is their category;
            .parquet  the captions of Pick-a-Pic's schema;
            a folder  all such files in it; the numbers of lines go on from file to file.
        repeated: whether to keep lines that repeat the prompt of an earlier line, for callers that look prompts up by
            their numbers.

    Raises MissingFileError where nothing exists at the path, UserError where there is no prompt or it cannot be read.
    """
    bundled = BUNDLED.get(str(source))
    path = epath.Path(__file__).parents[1] / bundled if bundled else epath.Path(source)
    if not path.exists():
        near = difflib.get_close_matches(str(source), BUNDLED, n=1, cutoff=0.8)
        hint = f"did you mean {near[0]}?" if near else f"name {FORMS}, or one of the lists {', '.join(BUNDLED)}"
        raise MissingFileError(f"there are no prompts at {path}; {hint}")
    files = sorted(file for file in path.iterdir() if file.suffix in _READERS) if path.is_dir() else [path]
    prompts: list[Prompt] = []
    first = 0
    for file in files:
        if file.suffix not in _READERS:
            raise UserError(f"{file} does not end in {', '.join(_READERS)}, the forms in which prompts are read")
        last = -1
        for prompt in _READERS[file.suffix](file):
            last, text = prompt.number, prompt.text.strip("\ufeff").strip()  # joined files have marks inside
            if text:
                prompts.append(Prompt(text, prompt.category, first + prompt.number))
        first += last + 1
    if not prompts:
        raise UserError(f"{path} contains no prompt; write one prompt per line")
    return prompts if repeated else distinct(prompts)


def distinct(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Return the first prompt of each text, with the number of its own line."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.text, prompt)
    return list(first.values())


def _lines(file: epath.Path) -> Iterator[Prompt]:
    return (Prompt(line, "", number) for number, line in enumerate(read_lines(file)))


def _json_lines(file: epath.Path) -> Iterator[Prompt]:
    lines: Iterator[tuple[int, _Line]] = read_json_lines(file, _Line)
    for number, fields in lines:
        category = fields.get("category", fields.get("tag"))
        yield Prompt(fields["prompt"], "" if category is None else str(category), number - 1)


def _tsv(file: epath.Path) -> Iterator[Prompt]:
    return _table(file, csv.DictReader(read_lines(file), delimiter="\t", quoting=csv.QUOTE_NONE))


def _csv(file: epath.Path) -> Iterator[Prompt]:
    return _table(file, csv.DictReader(io.StringIO(read_text(file), newline="")))


def _table(file: epath.Path, rows: "csv.DictReader[str]") -> Iterator[Prompt]:
    try:
        columns = {name.strip().lower(): name for name in rows.fieldnames or () if name}
        column = columns.get("prompt", columns.get("text"))
        if column is None:
            found = " ".join(", ".join(columns.values()).split())
            raise UserError(f"{file} has no column Prompt or text; its columns are {found[:200]}")
        for index, row in enumerate(rows):
            category = row.get(columns.get("category", "")) or ""
            number = rows.line_num - 2 if rows.reader.dialect.quoting == csv.QUOTE_NONE else index
            yield Prompt(row[column] or "", category, number)
    except csv.Error as error:
        raise UserError(f"{file}, line {rows.line_num + 1} cannot be read as a table: {error}") from None


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
            raise UserError(f"{file} has no column caption or prompt; its columns are {', '.join(names)}")
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
