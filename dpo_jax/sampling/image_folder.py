"""Folders of generated images with their prompts: `sample` writes them, `evaluate` and `vote` read them.

`prompts.jsonl` has one line per image: {"image": its file, "prompt": ..., "seed": ..., "category": ...}. In folders
that other programs made there may instead be a caption beside each image (`a.png`, `a.txt`), or the images' names begin
with the number of the prompt's line in a file, counted from 0 (`00012.png`, `00012-3.png`).
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
    """The name of its file in the folder."""
    prompt: str
    seed: int
    category: str = ""


class _Line(TypedDict):
    image: str
    prompt: str
    seed: int
    category: NotRequired[str | None]


def image_name(index: int, prompt: str, seed: int) -> str:
    """Return a file name made of number, prompt and seed: `00003_a-red-square_7.png`."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:60].strip("-")
    return f"{index:05d}_{words}_{seed}.png"


def write_list(folder: epath.PathLike, entries: Sequence[Entry]) -> None:
    """Write `prompts.jsonl`, whole or not at all."""
    lines = [json.dumps({k: v for k, v in entry._asdict().items() if v != ""}) for entry in entries]
    write_whole(epath.Path(folder) / LIST, "".join(f"{line}\n" for line in lines))


def read_list(folder: epath.PathLike, prompts: Sequence[Prompt] = ()) -> list[Entry]:
    """Return the images of a folder, in the order of `prompts.jsonl`, otherwise of their names.

    Args:
        folder: contains the images.
        prompts: the prompts that numbers in the names of images refer to, for folders without `prompts.jsonl` and
            captions. They include lines that repeat a prompt, as `read_prompts(..., repeated=True)` returns them.

    Raises MissingFileError or UserError for a folder without images or without their prompts, and for lists that name
    files outside of it.
    """
    folder = epath.Path(folder)
    if not folder.is_dir():
        raise MissingFileError(f"there is no folder of images at {folder}; python -m dpo_jax.sample makes one")
    entries = _listed(folder) if (folder / LIST).exists() else _found(folder, prompts)
    if not entries and (folder / LIST).exists():
        raise UserError(f"{folder / LIST} lists no images; draw them again with python -m dpo_jax.sample")
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
    """Return a sorting key by which numbers in names are compared as numbers: `1-2.png` before `1-10.png`."""
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
                f"{path} has no known prompt: the folder has no {LIST}, there is no caption {caption.name}, and its "
                f"name does not begin with the number of one of the {len(prompts)} prompts, counted from 0"
            )
        entries.append(Entry(path.name, prompt.text, seen[prompt.text], prompt.category))
        seen[prompt.text] += 1
    return entries
