"""What people are asked: images of some folders put together into tasks, and the questions about each.

A task is what a rater sees at once: two images, K images, or a single one. An answer is a list of numbers, one for each
image of the task; what they mean is up to the mode.
"""

import concurrent.futures
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from dpo_jax.data.images import MAX_BYTES, decode_file
from dpo_jax.errors import UserError
from dpo_jax.files import read_bytes
from dpo_jax.sampling.image_folder import Entry, read_list
from dpo_jax.sampling.prompts import Prompt

Answer = tuple[float, ...]


class Question(NamedTuple):
    text: str
    hides_prompt: bool = False


QUESTIONS = {
    "preference": Question("Which image do you prefer given the prompt?"),
    "appeal": Question("Which image is more visually appealing?", hides_prompt=True),
    "alignment": Question("Which image better fits the text description?"),
}
"""Those of the Diffusion-DPO paper (https://arxiv.org/abs/2311.12908, section 5.1). The second is asked without regard
to the prompt, so it isn't shown then."""


class Folder(NamedTuple):
    """Images of one origin."""

    path: Path
    entries: list[Entry]
    digests: list[str]
    """SHA-256 of each file: folders of two models often agree in all but that."""
    sizes: list[tuple[int, int]]
    """(width, height) of each image."""


class TaskImage(NamedTuple):
    folder: int
    """Position among the folders of the study."""
    name: str


class Task(NamedTuple):
    prompt: str
    seed: int | None
    """None where the images' seeds differ."""
    category: str
    images: tuple[TaskImage, ...]


class Mode(NamedTuple):
    """A way to ask."""

    help: str
    unit: str
    """What a study of this mode has many of."""
    hint: str
    """What a rater has to do, beneath the question."""
    tasks: Callable[[Sequence[Folder]], list[Task]]
    """Raises ValueError, with the reason, where the folders don't make up a single task."""
    is_answer: Callable[[Answer], bool]
    """Whether it is one that this mode knows. It has as many numbers as the task has images."""
    scores: Callable[[Answer], Answer]
    """Of the images; higher is better."""
    level: Literal["nominal", "ordinal"]
    """Of measurement, for Krippendorff's alpha."""
    side: Callable[[Answer], float] | None = None
    """Where a vote has two sides: 1 for the first, -1 for the other, 0 for a tie."""


TIE: Answer = (0.5, 0.5)
POINTS = range(1, 6)


def read_folder(path: Path, prompts: Sequence[Prompt] = ()) -> Folder:
    """Raises FileNotFoundError or ValueError for folders that aren't of images with prompts, as `read_list` does."""
    entries = read_list(path, prompts)
    seen = set()
    for entry in entries:
        if (entry.prompt, entry.seed) in seen:
            raise UserError(f"{path} has two images of the prompt {entry.prompt!r} and seed {entry.seed}; drop one")
        seen.add((entry.prompt, entry.seed))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        seen_images = list(pool.map(_look, [path / entry.image for entry in entries]))
    return Folder(path, entries, [digest for digest, _ in seen_images], [size for _, size in seen_images])


def study_digest(mode: str, folders: Sequence[Folder]) -> str:
    """Changes with the mode, and with any image, prompt or seed; not with where the folders are."""
    lists = [list(zip(folder.entries, folder.digests, strict=True)) for folder in folders]
    return hashlib.sha256(json.dumps([mode, lists]).encode()).hexdigest()


def warnings(folders: Sequence[Folder], tasks: Sequence[Task], unit: str) -> list[str]:
    """What makes answers to some tasks worth less."""
    images = [
        {entry.image: (digest, size) for entry, digest, size in zip(*folder[1:], strict=True)} for folder in folders
    ]
    shown = [[images[image.folder][image.name] for image in task.images] for task in tasks]
    alike = sum(len({digest for digest, _ in of_task}) < len(of_task) for of_task in shown)
    of_sizes = sum(len({size for _, size in of_task}) > 1 for of_task in shown)
    counts = {
        "the same image twice; answers to them say nothing": alike,
        "images of different sizes, by which raters can tell them apart": of_sizes,
    }
    return [f"{count} of {len(tasks)} {unit} show {what}" for what, count in counts.items() if count]


def _look(path: Path) -> tuple[str, tuple[int, int]]:
    """(SHA-256 of the file, size of the image)"""
    data = read_bytes(path, MAX_BYTES)
    return hashlib.sha256(data).hexdigest(), decode_file(path, data).size


def _all_pairs(folders: Sequence[Folder]) -> list[Task]:
    if len(folders) < 2:
        raise UserError("pairs are made of the images of two folders or more: --images=DIR_A,DIR_B")
    return [task for two in itertools.combinations(range(len(folders)), 2) for task in _matching(folders, two)]


def _groups(folders: Sequence[Folder]) -> list[Task]:
    """K images of a prompt: of one seed from K folders, or of K seeds from one folder."""
    if len(folders) > 1:
        return _matching(folders, range(len(folders)))
    by_prompt: dict[str, list[Entry]] = {}
    for entry in folders[0].entries:
        by_prompt.setdefault(entry.prompt, []).append(entry)
    tasks = [
        Task(prompt, None, entries[0].category, tuple(TaskImage(0, entry.image) for entry in entries))
        for prompt, entries in by_prompt.items()
        if len(entries) > 1
    ]
    if not tasks:
        raise UserError(f"{folders[0].path} has no prompt with two images or more to compare; name further folders")
    return tasks


def _singles(folders: Sequence[Folder]) -> list[Task]:
    return [
        Task(entry.prompt, entry.seed, entry.category, (TaskImage(position, entry.image),))
        for position, folder in enumerate(folders)
        for entry in folder.entries
    ]


def _matching(folders: Sequence[Folder], positions: Iterable[int]) -> list[Task]:
    """A task for each prompt and seed that all these folders have, in the order of the first."""
    positions = list(positions)
    first, *others = ({(entry.prompt, entry.seed): entry for entry in folders[k].entries} for k in positions)
    tasks = []
    for key, entry in first.items():
        if all(key in other for other in others):
            entries = [entry, *(other[key] for other in others)]
            images = tuple(TaskImage(k, entry.image) for k, entry in zip(positions, entries, strict=True))
            tasks.append(Task(entry.prompt, entry.seed, entry.category, images))
    if not tasks:
        names = " and ".join(str(folders[k].path) for k in positions)
        raise UserError(f"{names} have no image of the same prompt and seed; make them from one list of prompts")
    return tasks


def _points_beaten(answer: Answer) -> Answer:
    return tuple(len(answer) - rank for rank in answer)


MODES = {
    "pairs": Mode(
        help="two images of a prompt and seed, from two folders: which one?",
        unit="comparisons",
        hint="",
        tasks=_all_pairs,
        is_answer=lambda answer: answer in ((1, 0), (0, 1), TIE),
        scores=lambda answer: answer,
        level="nominal",
        side=lambda answer: answer[0] - answer[1],
    ),
    "rank": Mode(
        help="K images of a prompt, one from each folder, or all of a single folder: put in order.",
        unit="groups of images",
        hint="Choose the images in order, the best first.",
        tasks=_groups,
        is_answer=lambda answer: sorted(answer) == list(range(1, len(answer) + 1)),
        scores=_points_beaten,
        level="ordinal",
    ),
    "points": Mode(
        help="the same, but each image gets 1 to 5 points.",
        unit="groups of images",
        hint="Give each image points: 1 is poor, 5 is excellent.",
        tasks=_groups,
        is_answer=lambda answer: all(points in POINTS for points in answer),
        scores=lambda answer: answer,
        level="ordinal",
    ),
    "tag": Mode(
        help="a single image: does it have this fault? --tags names the faults.",
        unit="images",
        hint="",
        tasks=_singles,
        is_answer=lambda answer: answer in ((0,), (1,)),
        scores=lambda answer: (1 - answer[0],),
        level="nominal",
        side=lambda answer: 2 * answer[0] - 1,
    ),
}
"""Answers are (1, 0), (0, 1) or TIE for pairs, ranks from 1 for the best, points, and (1,) for yes, (0,) for no."""
