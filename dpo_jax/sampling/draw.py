"""Draws a list of prompts into a folder: one PNG per prompt and seed, and only those that do not exist yet.

The folder contains the images, `sampling.json` (the settings they were drawn with, written first), `prompts.jsonl` (see
`image_folder`) and `grid.png` (both written last). Every file is written whole.
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
from dpo_jax.data.image_grid import image_grid
from dpo_jax.data.images import MAX_BYTES, SUFFIXES, View, decode_file, fit, read_image
from dpo_jax.errors import ExistingFileError, MissingFileError
from dpo_jax.files import is_partial, read_bytes, read_json, write_whole
from dpo_jax.sampling.generate import Generator
from dpo_jax.sampling.grid import save_png
from dpo_jax.sampling.image_folder import Entry, image_name, write_list
from dpo_jax.sampling.prompts import Prompt
from dpo_jax.weights.layout import Params

SETTINGS = "sampling.json"
WRITERS = 4
"""Threads that compress images (about a second per million pixels and core) while the next ones are drawn."""
GRID_ROWS, GRID_COLUMNS, GRID_PIXELS = 8, 4, 256

OnProgress = Callable[[int, int], None]
"""Called with the number of images that exist and the total, after each batch."""


def list_entries(prompts: Sequence[Prompt], first_seed: int, seeds: int) -> list[Entry]:
    """Return the images to draw: one per prompt and seed, named by the prompt's number and text and by the seed."""
    return [
        Entry(image_name(prompt.number, prompt.text, seed), prompt.text, seed, prompt.category)
        for prompt in prompts
        for seed in range(first_seed, first_seed + seeds)
    ]


def check_folder(folder: epath.PathLike, settings: Mapping[str, Any]) -> bool:
    """Return whether the folder holds images drawn with these settings; False where it is empty or does not exist.

    Raises ExistingFileError where it contains other files, or images drawn with other settings.
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
                f"the images in {folder} were drawn with other settings ({'; '.join(values)}); choose another "
                "--output, or use the former settings to continue"
            )
        return True
    if folder.exists() and not all(is_partial(path.name) or path.name == ".lock" for path in folder.iterdir()):
        raise ExistingFileError(
            f"{folder} contains files that dpo_jax did not write; choose an empty folder or a new one as --output"
        )
    return False


def begin_folder(folder: epath.PathLike, settings: Mapping[str, Any]) -> None:
    """Make the folder for images drawn with these settings, or check that it is one; raises as `check_folder`."""
    if check_folder(folder, settings):
        return
    cluster.wait("looked at the folder")
    if cluster.is_first():
        write_whole(epath.Path(folder) / SETTINGS, json.dumps(settings, indent=2) + "\n")
    cluster.wait("made the folder")


def draw(
    generator: Generator,
    denoiser: Params,
    entries: Sequence[Entry],
    folder: epath.PathLike,
    *,
    begin_from: Sequence[epath.Path] | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> int:
    """Draw the entries whose files are not in the folder, then list all of them; return how many were drawn.

    Args:
        generator: draws the images.
        denoiser: weights of the denoiser.
        entries: the images to draw, and the names of their files.
        folder: exists, and is seen by all processes; the first process writes.
        begin_from: images to start from, one per entry; without them drawing starts from noise.
        on_progress: called after each batch.
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
        for batch in generator.batches(denoiser, captions, seeds, images):
            for written in writing:  # the previous batch, so that memory holds no more than two
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
    """Return the images that drawing starts from, one for each prompt number.

    Args:
        path: one image for all prompts, or a folder of images whose names begin with the number of their prompt's line,
            counted from 0 (`00012.png`, `00012-sketch.png`).
        numbers: of the prompts.

    Raises MissingFileError where there is no image for a prompt.
    """
    path = epath.Path(path)
    if not path.exists():
        raise MissingFileError(f"there is no image and no folder of images at {path}")
    if not path.is_dir():
        return [path] * len(numbers)
    found: dict[int, epath.Path] = {}
    for file in sorted(path.iterdir()):
        number = re.match(r"\d+", file.name)
        if number and file.suffix.lower() in SUFFIXES:
            found.setdefault(int(number[0]), file)
    absent = [number for number in numbers if number not in found]
    if absent:
        raise MissingFileError(
            f"{path} has no image for number {absent[0]} of the prompts; add one whose name begins with the "
            f"number, as in {absent[0]:05d}.png"
        )
    return [found[number] for number in numbers]


class _Squares(Sequence[np.ndarray]):
    """A sequence of images that are read, scaled and cropped to squares when they are accessed."""

    def __init__(self, files: Sequence[epath.Path], resolution: int):
        self._files, self._resolution = files, resolution

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, i: Any) -> Any:
        file = self._files[i]
        return fit(decode_file(file, read_bytes(file, MAX_BYTES)), self._resolution, View())[0]


def _write_grid(folder: epath.Path, entries: Sequence[Entry]) -> None:
    """Write a grid of the first seeds of the first prompts."""
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
