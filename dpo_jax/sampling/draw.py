"""Draws a list of prompts into a folder: a PNG each, written whole, and only those that are not there yet.

The folder holds the images, `sampling.json` (what they were drawn by, written before them), `prompts.jsonl` (see
`image_folder`) and `grid.png`, both written when all images are there.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from dpo_jax import cluster
from dpo_jax.data.images import MAX_BYTES, SUFFIXES, View, decode_file, fit, read_image
from dpo_jax.errors import ExistingFileError, MissingFileError
from dpo_jax.files import is_partial, read_bytes, read_json, write_whole
from dpo_jax.sampling.generate import Generator
from dpo_jax.sampling.grid import image_grid, save_png
from dpo_jax.sampling.image_folder import Entry, image_name, write_list
from dpo_jax.sampling.prompts import Prompt
from dpo_jax.weights.layout import Params

SETTINGS = "sampling.json"
WRITERS = 4
"""Threads that compress images: a second for each million pixels and processor, while the next ones are drawn."""
GRID_ROWS, GRID_COLUMNS, GRID_PIXELS = 8, 4, 256

OnProgress = Callable[[int, int], None]
"""(images there are, of how many), after each batch."""


def list_entries(prompts: Sequence[Prompt], first_seed: int, seeds: int) -> list[Entry]:
    """The images to draw: of each prompt one for each seed, named by the prompt's number."""
    return [
        Entry(image_name(prompt.number, prompt.text, seed), prompt.text, seed, prompt.category)
        for prompt in prompts
        for seed in range(first_seed, first_seed + seeds)
    ]


def begin_folder(folder: epath.PathLike, settings: Mapping[str, Any]) -> None:
    """Makes the folder for images drawn by these settings, or sees that it is one.

    Raises FileExistsError where it holds something else, or images by other settings.
    """
    folder = epath.Path(folder)
    settings = json.loads(json.dumps(settings))
    file = folder / SETTINGS
    if file.exists():
        found: dict[str, Any] = read_json(file, dict[str, Any])
        differing = [key for key in {**found, **settings} if found.get(key) != settings.get(key)]
        if differing:
            values = (f"{key}: {found.get(key)!r} there, {settings.get(key)!r} now" for key in differing)
            raise ExistingFileError(
                f"the images in {folder} were drawn by other settings ({'; '.join(values)}); choose another --output, "
                "or the former values to continue it"
            )
        return
    if folder.exists() and not all(is_partial(path.name) or path.name == ".lock" for path in folder.iterdir()):
        raise ExistingFileError(f"{folder} holds files that are no images of ours; choose an empty or new --output")
    cluster.wait("looked at the folder")
    if cluster.is_first():
        write_whole(file, json.dumps(settings, indent=2) + "\n")
    cluster.wait("made the folder")


def draw(
    generator: Generator,
    unet: Params,
    entries: Sequence[Entry],
    folder: epath.PathLike,
    *,
    begin_from: Sequence[epath.Path] | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> int:
    """Draws those of the entries whose files the folder lacks, then lists all of them; returns how many it drew.

    Args:
        generator: how.
        unet: weights of the UNet.
        entries: what, and the names of the files.
        folder: exists; all processes see it, and the first one writes.
        begin_from: images to begin from, one an entry.
        on_progress: is told how far it is.
    """
    folder = epath.Path(folder)
    there = {path.name for path in folder.iterdir()}
    missing = [i for i, entry in enumerate(entries) if entry.image not in there]
    cluster.wait("found the missing images")
    captions, seeds = [entries[i].prompt for i in missing], [entries[i].seed for i in missing]
    images = begin_from and _Squares([begin_from[i] for i in missing], generator.resolution)
    done = 0
    with ThreadPoolExecutor(WRITERS) as writers:
        writing: list[Any] = []
        for batch in generator.batches(unet, captions, seeds, images):
            for written in writing:  # of the batch before: no more than two are held
                written.result()
            names = [entries[i].image for i in missing[done : done + len(batch)]]
            if cluster.is_first():
                writing = [
                    writers.submit(save_png, folder / name, Image.fromarray(image))
                    for name, image in zip(names, batch, strict=True)
                ]
            done += len(batch)
            on_progress(len(entries) - len(missing) + done, len(entries))
        for written in writing:
            written.result()
    if cluster.is_first():
        write_list(folder, entries)
        _write_grid(folder, entries)
    return done


def find_images(path: epath.PathLike, numbers: Sequence[int]) -> list[epath.Path]:
    """The images that the prompts of these numbers begin from: one for all, or in a folder those of their numbers.

    The names of images in a folder begin with the number of their prompt's line, from 0: `00012.png`,
    `00012-sketch.png`. Raises FileNotFoundError where there is none.
    """
    path = epath.Path(path)
    if not path.exists():
        raise MissingFileError(f"no image and no folder of images at {path}")
    if not path.is_dir():
        return [path] * len(numbers)
    found: dict[int, epath.Path] = {}
    for file in sorted(path.iterdir()):
        number = re.match(r"\d+", file.name)
        if number and file.suffix.lower() in SUFFIXES:
            found.setdefault(int(number[0]), file)
    absent = [number for number in numbers if number not in found]
    if absent:
        raise MissingFileError(f"{path} has no image for prompt number {absent[0]}, such as {absent[0]:05d}.png")
    return [found[number] for number in numbers]


class _Squares(Sequence[np.ndarray]):
    """Images read when they are asked for, scaled and cut to squares."""

    def __init__(self, files: Sequence[epath.Path], resolution: int):
        self._files, self._resolution = files, resolution

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, i: Any) -> Any:
        file = self._files[i]
        return fit(decode_file(file, read_bytes(file, MAX_BYTES)), self._resolution, View())[0]


def _write_grid(folder: epath.Path, entries: Sequence[Entry]) -> None:
    """Some prompts, some seeds of each."""
    rows: dict[str, list[np.ndarray]] = {}
    for entry in entries:
        images = rows.setdefault(entry.prompt, [])
        if len(rows) > GRID_ROWS:
            break
        if len(images) < GRID_COLUMNS:
            image = Image.fromarray(read_image(folder / entry.image))
            image.thumbnail((GRID_PIXELS, GRID_PIXELS))
            images.append(np.asarray(image))
    shown = list(rows.items())[:GRID_ROWS]
    seeds = [str(entry.seed) for entry in entries[: len(shown[0][1])]]
    save_png(folder / "grid.png", image_grid(shown, [f"seed {seed}" for seed in seeds]))
