"""Folders of generated images and the prompts they were made for: what `sample` writes and others read.

`prompts.jsonl` has a line for each image: {"image": its file, "prompt": ..., "seed": ..., "category": ...}. Folders
that other programs made may instead hold a caption beside each image (`a.png`, `a.txt`), or names that begin with the
number of the prompt's line in a file, from 0 (`00012.png`, `00012-3.png`).
"""

import collections
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple, NotRequired

from etils import epath
from typing_extensions import TypedDict

from dpo_jax.data.images import SUFFIXES
from dpo_jax.errors import MissingFileError, UserError
from dpo_jax.files import read_json_lines, read_text, write_whole
from dpo_jax.sampling.prompts import Prompt

LIST = "prompts.jsonl"


class Entry(NamedTuple):
    """One image of a folder."""

    image: str
    """File name in the folder."""
    prompt: str
    seed: int
    category: str = ""


class _Line(TypedDict):
    image: str
    prompt: str
    seed: int
    category: NotRequired[str | None]


def image_name(index: int, prompt: str, seed: int) -> str:
    """A file name that tells prompt and seed: `00003_a-red-square_7.png`."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:60].strip("-")
    return f"{index:05d}_{words}_{seed}.png"


def write_list(folder: epath.PathLike, entries: Sequence[Entry]) -> None:
    """Writes `prompts.jsonl`, whole or not at all."""
    lines = [json.dumps({k: v for k, v in entry._asdict().items() if v != ""}) for entry in entries]
    write_whole(epath.Path(folder) / LIST, "".join(f"{line}\n" for line in lines))


def read_list(folder: epath.PathLike, prompts: Sequence[Prompt] = ()) -> list[Entry]:
    """The images of a folder that exist, in the order of `prompts.jsonl` or of their names.

    Args:
        folder: holds the images.
        prompts: what numbers in the names of images refer to, for folders without `prompts.jsonl` and captions; with
            the lines that repeat a prompt, as `read_prompts(..., repeated=True)` has them.

    Raises FileNotFoundError or ValueError, with the reason, for a folder that isn't one of generated images, and for
    lists that name files outside of it.
    """
    folder = epath.Path(folder)
    if not folder.is_dir():
        raise MissingFileError(f"no folder of images at {folder}; python -m dpo_jax.sample makes one")
    entries = _listed(folder) if (folder / LIST).exists() else _found(folder, prompts)
    if not entries and (folder / LIST).exists():
        raise UserError(f"{folder / LIST} lists no images")
    if not entries:
        raise UserError(f"{folder} has no images ({', '.join(SUFFIXES)})")
    return entries


def _listed(folder: epath.Path) -> list[Entry]:
    entries = []
    names = {unicodedata.normalize("NFC", path.name): path.name for path in folder.iterdir()}
    lines: Iterator[tuple[int, _Line]] = read_json_lines(folder / LIST, _Line, strict=False)
    for number, line in lines:
        image = names.get(unicodedata.normalize("NFC", line["image"]))
        if image is None:  # also anything with a path in it
            raise UserError(f"{folder / LIST}, line {number}: there is no image {line['image']} in {folder}")
        entries.append(Entry(image, line["prompt"], line["seed"], line.get("category") or ""))
    return entries


def _in_natural_order(path: epath.Path) -> list[tuple[int, str]]:
    """Numbers in names by their size: `1-2.png` before `1-10.png`."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part) if part.isascii() and part.isdigit() else -1, part) for part in parts]


def _found(folder: epath.Path, prompts: Sequence[Prompt]) -> list[Entry]:
    entries = []
    by_number = {prompt.number: prompt for prompt in prompts}
    seen: collections.Counter[str] = collections.Counter()
    for path in sorted(folder.iterdir(), key=_in_natural_order):
        if path.name.startswith(".") or path.suffix.lower() not in SUFFIXES:
            continue
        caption, number = path.with_suffix(".txt"), re.match(r"\d+", path.name)
        if caption.exists():
            prompt = Prompt(read_text(caption).strip())
        elif number and int(number[0]) in by_number:
            prompt = by_number[int(number[0])]
        else:
            raise UserError(
                f"{path}: no prompt is known for it: it is in no {LIST}, has no caption {caption.name}, and its name "
                f"does not begin with the number of a line, from 0, that has one of {len(prompts)} prompts"
            )
        entries.append(Entry(path.name, prompt.text, seen[prompt.text], prompt.category))
        seen[prompt.text] += 1
    return entries
