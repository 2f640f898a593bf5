"""Folders of generated images and the prompts they were made for: what `sample` writes and others read.

`prompts.jsonl` has a line for each image: {"image": its file, "prompt": ..., "seed": ..., "category": ...}. Folders
that other programs made may instead hold a caption beside each image (`a.png`, `a.txt`), or names that begin with the
prompt's number in a list, from 0 (`00012.png`, `00012-3.png`).
"""

import collections
import json
import re
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from dpo_jax.evaluation.prompts import Prompt
from dpo_jax.files import write_whole

LIST = "prompts.jsonl"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Entry(NamedTuple):
    """One image of a folder."""

    image: str
    """File name in the folder."""
    prompt: str
    seed: int
    category: str = ""


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
        prompts: what numbers in the names of images refer to, for folders without `prompts.jsonl` and captions.

    Raises FileNotFoundError or ValueError, with the reason, for a folder that isn't one of generated images, and for
    lists that name files outside of it.
    """
    folder = epath.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of images at {folder}; python -m dpo_jax.sample makes one")
    entries = _listed(folder) if (folder / LIST).exists() else _found(folder, prompts)
    if not entries:
        raise ValueError(f"{folder} has no images ({', '.join(SUFFIXES)})")
    return entries


def _listed(folder: epath.Path) -> list[Entry]:
    entries = []
    names = {path.name for path in folder.iterdir()}
    for number, line in enumerate((folder / LIST).read_text(encoding="utf-8").splitlines(), 1):
        where = f"{folder / LIST}, line {number}"
        try:
            fields = json.loads(line)
            entry = Entry(
                str(fields["image"]), str(fields["prompt"]), int(fields["seed"]), str(fields.get("category", ""))
            )
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f'{where}: expected {{"image": ..., "prompt": ..., "seed": ...}}: {error}') from error
        if entry.image not in names:  # also anything with a path in it
            raise ValueError(f"{where}: there is no image {entry.image} in {folder}")
        entries.append(entry)
    return entries


def _found(folder: epath.Path, prompts: Sequence[Prompt]) -> list[Entry]:
    entries = []
    seen: collections.Counter[str] = collections.Counter()
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES):
        caption, number = path.with_suffix(".txt"), re.match(r"\d+", path.name)
        if caption.exists():
            prompt = Prompt(caption.read_text(encoding="utf-8").strip())
        elif number and int(number[0]) < len(prompts):
            prompt = prompts[int(number[0])]
        else:
            raise ValueError(
                f"{path}: no prompt is known for it: it is in no {LIST}, has no caption {caption.name}, and its name "
                f"does not begin with the number, from 0, of one of {len(prompts)} prompts"
            )
        entries.append(Entry(path.name, prompt.text, seen[prompt.text], prompt.category))
        seen[prompt.text] += 1
    return entries
