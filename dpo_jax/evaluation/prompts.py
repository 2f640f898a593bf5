"""Lists of prompts, as benchmarks publish them or as one writes them down."""

import csv
import json
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath

BUNDLED = {
    "bundled": "evaluation/bundled_prompts.jsonl",
    "animals": "evaluation/animals.txt",
    "animal_activities": "evaluation/animal_activities.jsonl",
    "hands": "evaluation/hands.txt",
    "tiny_train": "tiny/train.txt",
    "tiny_heldout": "tiny/heldout.txt",
}
"""Files of the lists that come with the package: 64 prompts to evaluate by; 45 animals, and 24 of them at 8 activities,
to learn from as DDPO and D3PO do (arXiv 2305.13301, 2311.13231); 40 hands at work; the captions of the tiny world."""


class Prompt(NamedTuple):
    text: str
    category: str = ""
    """Results are told for each; "" where a list has none."""


def read_prompts(source: epath.PathLike) -> list[Prompt]:
    """The prompts of a file or folder, in its order, each once.

    Args:
        source: a name in `BUNDLED`, or a path; by its ending
            .txt      one prompt a line;
            .jsonl    lines of {"prompt": ..., "category": ...}, the category if there is one;
            .tsv      PartiPrompts (columns Prompt and Category);
            .json     a list of prompts, as HPSv2's benchmark has them; the file's name is the category;
            .parquet  the captions of Pick-a-Pic's schema;
            a folder  all such files in it.

    Raises FileNotFoundError or ValueError where there is no prompt, with the reason.
    """
    bundled = BUNDLED.get(str(source))
    path = epath.Path(__file__).parents[1] / bundled if bundled else epath.Path(source)
    if not path.exists():
        raise FileNotFoundError(f"no prompts at {path}; name a file (one prompt a line) or one of {', '.join(BUNDLED)}")
    files = sorted(file for file in path.iterdir() if file.suffix in _READERS) if path.is_dir() else [path]
    prompts: dict[str, Prompt] = {}
    for file in files:
        if file.suffix not in _READERS:
            raise ValueError(f"{file}: prompts are read from {', '.join(_READERS)}")
        try:
            found = list(_READERS[file.suffix](file))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not in UTF-8: {error}") from error
        for prompt in found:
            text = prompt.text.strip()
            if text:
                prompts.setdefault(text, prompt._replace(text=text))
    if not prompts:
        raise ValueError(f"{path} has no prompt; write one prompt a line")
    return list(prompts.values())


def _lines(file: epath.Path) -> Iterator[Prompt]:
    return map(Prompt, file.read_text(encoding="utf-8").splitlines())


def _json_lines(file: epath.Path) -> Iterator[Prompt]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        fields = _parse(line, f"{file}, line {number}")
        if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
            raise ValueError(f'{file}, line {number}: expected {{"prompt": "..."}}, found {line[:80]}')
        yield Prompt(fields["prompt"], str(fields.get("category", "")))


def _tsv(file: epath.Path) -> Iterator[Prompt]:
    rows = csv.DictReader(file.read_text(encoding="utf-8").splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    if "Prompt" not in (rows.fieldnames or ()):
        raise ValueError(f"{file} has no column Prompt, as PartiPrompts has; it has {', '.join(rows.fieldnames or ())}")
    for row in rows:
        yield Prompt(row["Prompt"] or "", row.get("Category") or "")


def _json_list(file: epath.Path) -> Iterator[Prompt]:
    texts = _parse(file.read_text(encoding="utf-8"), str(file))
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{file}: expected a JSON list of prompts, as in HPSv2's benchmark")
    return (Prompt(text, file.stem) for text in texts)


def _parquet(file: epath.Path) -> Iterator[Prompt]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        if "caption" not in table.schema_arrow.names:
            raise ValueError(f"{file} has no column caption, as Pick-a-Pic has")
        for batch in table.iter_batches(columns=["caption"]):
            yield from (Prompt(text or "") for text in batch.column("caption").to_pylist())
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file} is no whole parquet file: {error}") from error


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: no valid JSON ({error})") from error


_READERS = {".txt": _lines, ".jsonl": _json_lines, ".tsv": _tsv, ".json": _json_list, ".parquet": _parquet}
