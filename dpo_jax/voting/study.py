"""The tasks of a study, made from folders of images, and the questions about them.

A task is what a rater sees at once: one image, two images or K images. An answer is a list with one number per image of
the task; the mode defines what the numbers mean.
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
    """A question to raters."""

    text: str
    title: str = ""
    """Two words that tell the questions of a study apart at a glance."""
    advice: str = ""
    """What to judge and what to leave aside."""
    hides_prompt: bool = False


QUESTIONS = {
    "preference": Question(
        "Which image do you prefer given the prompt?",
        title="Overall preference",
        advice="Weigh everything: how the images look and how well they follow the prompt.",
    ),
    "appeal": Question(
        "Which image is more visually appealing?",
        title="Looks only",
        advice="Judge only how the images look. The prompt is hidden on purpose.",
        hides_prompt=True,
    ),
    "alignment": Question(
        "Which image better fits the text description?",
        title="Prompt match only",
        advice="Judge only whether the images show what the prompt says, even if one of them looks worse.",
    ),
}
"""The questions of the Diffusion-DPO paper (https://arxiv.org/abs/2311.12908, section 5.1), with its wording. The paper
asks the second one without regard to the prompt, so the page hides the prompt."""


class Folder(NamedTuple):
    """A folder with the images of one model."""

    path: Path
    entries: list[Entry]
    digests: list[str]
    """SHA-256 of each file. Folders of two models often differ in nothing else."""
    sizes: list[tuple[int, int]]
    """(width, height) of each image."""


class TaskImage(NamedTuple):
    folder: int
    """Index of the folder in the study."""
    name: str


class Task(NamedTuple):
    """The images that a rater sees at once."""

    prompt: str
    seed: int | None
    """None if the images have different seeds."""
    category: str
    images: tuple[TaskImage, ...]


class Mode(NamedTuple):
    """What a task consists of and how raters answer."""

    help: str
    unit: str
    """The name of its tasks, in the plural."""
    hint: str
    """What a rater has to do; shown below the question."""
    tasks: Callable[[Sequence[Folder]], list[Task]]
    """Makes the tasks. Raises UserError, with the reason, if the folders do not give a single one."""
    is_answer: Callable[[Answer], bool]
    """Whether an answer is possible. It has as many numbers as the task has images."""
    scores: Callable[[Answer], Answer]
    """The score of each image; higher is better."""
    level: Literal["nominal", "ordinal"]
    """Level of measurement, for Krippendorff's alpha."""
    side: Callable[[Answer], float] | None = None
    """For modes with two possible answers: 1 for the first, -1 for the second, 0 for a tie."""


TIE: Answer = (0.5, 0.5)
POINTS = range(1, 6)


def read_folder(path: Path, prompts: Sequence[Prompt] = ()) -> Folder:
    """Read the list of a folder of images, and each image once to see that it can be shown.

    Args:
        path: the folder, as `read_list` reads it.
        prompts: the prompts of images that are named by the number of their prompt.

    Raises MissingFileError or UserError if the folder has no images with prompts or an image cannot be read.
    """
    entries = read_list(path, prompts)
    seen = set()
    for entry in entries:
        if (entry.prompt, entry.seed) in seen:
            raise UserError(
                f"{path} has two images of the prompt {entry.prompt!r} and seed {entry.seed}; remove one of them"
            )
        seen.add((entry.prompt, entry.seed))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        seen_images = list(pool.map(_look, [path / entry.image for entry in entries]))
    return Folder(path, entries, [digest for digest, _ in seen_images], [size for _, size in seen_images])


def study_digest(mode: str, folders: Sequence[Folder]) -> str:
    """Return a digest of the mode and of all images, prompts and seeds. It does not depend on the folders' paths."""
    lists = [list(zip(folder.entries, folder.digests, strict=True)) for folder in folders]
    return hashlib.sha256(json.dumps([mode, lists]).encode()).hexdigest()


def warnings(folders: Sequence[Folder], tasks: Sequence[Task], unit: str) -> list[str]:
    """Return sentences about tasks whose answers say little."""
    images = [
        {entry.image: (digest, size) for entry, digest, size in zip(*folder[1:], strict=True)} for folder in folders
    ]
    shown = [[images[image.folder][image.name] for image in task.images] for task in tasks]
    alike = sum(len({digest for digest, _ in of_task}) < len(of_task) for of_task in shown)
    of_sizes = sum(len({size for _, size in of_task}) > 1 for of_task in shown)
    counts = {
        "the same image twice, so their answers mean nothing": alike,
        "images of different sizes, so raters can tell the folders apart": of_sizes,
    }
    return [f"{count} of {len(tasks)} {unit} show {what}" for what, count in counts.items() if count]


def _look(path: Path) -> tuple[str, tuple[int, int]]:
    """Return (SHA-256 of the file, size of the image)."""
    data = read_bytes(path, MAX_BYTES)
    return hashlib.sha256(data).hexdigest(), decode_file(path, data).size


def _all_pairs(folders: Sequence[Folder]) -> list[Task]:
    if len(folders) < 2:
        raise UserError(
            f"--mode=pairs compares two folders or more, but --images names {len(folders)}; set --images=DIR_A,DIR_B"
        )
    return [task for two in itertools.combinations(range(len(folders)), 2) for task in _matching(folders, two)]


def _groups(folders: Sequence[Folder]) -> list[Task]:
    """Make a task of K images of a prompt: one seed from K folders, or K seeds from one folder."""
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
        raise UserError(
            f"{folders[0].path} has no prompt with two or more images to compare; name more folders in --images"
        )
    return tasks


def _singles(folders: Sequence[Folder]) -> list[Task]:
    return [
        Task(entry.prompt, entry.seed, entry.category, (TaskImage(position, entry.image),))
        for position, folder in enumerate(folders)
        for entry in folder.entries
    ]


def _matching(folders: Sequence[Folder], positions: Iterable[int]) -> list[Task]:
    """Make a task for each prompt and seed that all these folders have, in the order of the first folder."""
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
        raise UserError(
            f"{names} have no image of the same prompt and seed; generate both from the same list of prompts"
        )
    return tasks


def _images_beaten(answer: Answer) -> Answer:
    return tuple(len(answer) - rank for rank in answer)


MODES = {
    "pairs": Mode(
        help="two images of the same prompt and seed, from two folders; raters choose one.",
        unit="comparisons",
        hint="",
        tasks=_all_pairs,
        is_answer=lambda answer: answer in ((1, 0), (0, 1), TIE),
        scores=lambda answer: answer,
        level="nominal",
        side=lambda answer: answer[0] - answer[1],
    ),
    "rank": Mode(
        help="K images of a prompt (one per folder, or all of a single folder); raters put them in order.",
        unit="groups of images",
        hint="Click the images in order, the best one first.",
        tasks=_groups,
        is_answer=lambda answer: sorted(answer) == list(range(1, len(answer) + 1)),
        scores=_images_beaten,
        level="ordinal",
    ),
    "points": Mode(
        help="the same images; raters give each image 1 to 5 points.",
        unit="groups of images",
        hint="Give each image 1 to 5 points: 1 is poor, 5 is excellent.",
        tasks=_groups,
        is_answer=lambda answer: all(points in POINTS for points in answer),
        scores=lambda answer: answer,
        level="ordinal",
    ),
    "tag": Mode(
        help="a single image; raters say whether it has the faults in --tags.",
        unit="images",
        hint="",
        tasks=_singles,
        is_answer=lambda answer: answer in ((0,), (1,)),
        scores=lambda answer: (1 - answer[0],),
        level="nominal",
        side=lambda answer: 2 * answer[0] - 1,
    ),
}
"""Answers are (1, 0), (0, 1) or TIE for pairs; ranks, 1 for the best image; points; and for tags (1,) for yes and (0,)
for no."""
