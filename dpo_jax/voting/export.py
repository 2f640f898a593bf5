"""Votes as files that other commands read.

A `.jsonl` file is a source of preferences, for `python -m dpo_jax.prepare --source=jsonl`. Each line has the prompt,
the images' paths relative to the file, the names of their folders as models, and of the raters' answers

- for pairs, `votes`: how many each image got, a tie being half a vote for both;
- for ranks and points, `scores`: a list for each rater, higher is better;
- for tags, `scores`: the share of the answers that deny the fault, with all images of the prompt on a line.

What has no vote is left out.

A `.json` file is D3PO's human feedback (https://arxiv.org/abs/2311.13231): `[prompt][candidate]`, the mean score over
raters, higher is better, null where nobody has voted (which `dpo_jax.online` reads and D3PO's released script does
not). A prompt's candidates are its images from the K folders, in the order of --images, or the K seeds of a single
folder, in the order of its list. Rows follow the first folder's list: with K folders each prompt and seed is a row,
with a single folder each prompt of two images or more. Tags have the images of a prompt from all folders in a row.
Pairs have no scores.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.errors import UserError
from dpo_jax.files import write_whole
from dpo_jax.voting.contents import Vote
from dpo_jax.voting.results import folder_names, group_by_task, mean_scores
from dpo_jax.voting.store import Store
from dpo_jax.voting.study import QUESTIONS, TaskImage


class Group(NamedTuple):
    """The images of a prompt and what raters said of them."""

    prompt: str
    images: list[TaskImage]
    votes: list[list[float]]
    """From each rater, a score for each image."""
    means: list[float | None]
    """Of each image, None for one without a vote."""


def export(store: Store, path: Path, questions: Sequence[str] = ()) -> tuple[int, int]:
    """Writes `path`, whole or not at all; how many rows have votes, and how many have none or not for all images.

    Args:
        questions: whose answers to take: one of those that were asked, for tags any number. By default the first,
            for tags all.

    Raises:
        ValueError: nobody has voted, the images can't be named relative to `path`, or its ending is another.
    """
    if path.suffix not in (".jsonl", ".json"):
        raise UserError(f"--export={path}: write a .jsonl file for dpo_jax.prepare, or D3PO's scores as .json")
    if path.suffix == ".json" and store.mode == "pairs":
        raise UserError(f"--export={path}: pairs have no scores for each image; take .jsonl")
    votes = store.votes()
    chosen = _chosen(store, votes, questions)
    groups = list(_groups(store, [vote for vote in votes if vote.question in chosen]))
    complete = [group for group in groups if None not in group.means and len(group.images) > 1]
    if path.suffix == ".json":
        lines = json.dumps([group.means for group in groups]) + "\n"
        missing = sum(None in group.means for group in groups)
    else:
        images = _image_paths(store, path)
        lines = "".join(json.dumps(_row(store, group, images), ensure_ascii=False) + "\n" for group in complete)
        missing = len(groups) - len(complete)
    write_whole(path, lines)
    return len(groups) - missing, missing


def describe(path: Path, rows: int, missing: int) -> str:
    """What `export` has written, for whoever called it."""
    written = f"{rows} prompts or pairs with votes were written to {path}; {missing} lack votes for some or all images"
    if path.suffix == ".json" and missing:
        written += (
            ". Their scores are null, which dpo_jax.online reads and D3PO's released script does not: for that script "
            "have every image voted on first"
        )
    return written


def _chosen(store: Store, votes: Sequence[Vote], questions: Sequence[str]) -> list[str]:
    answered = {vote.question for vote in votes}
    if not answered:
        raise UserError(f"{store.path} has no votes yet")
    ordered = sorted(answered, key=lambda name: (list(QUESTIONS).index(name) if name in QUESTIONS else 0, name))
    for name in questions:
        if name not in answered:
            raise UserError(f"nobody has answered {name!r} in {store.path}, but {', '.join(ordered)}")
    if store.mode == "tag":
        return list(questions) or ordered
    if len(questions) > 1:
        raise UserError(f"--questions={','.join(questions)}: an export has the answers to one question")
    return list(questions) or ordered[:1]


def _groups(store: Store, votes: Sequence[Vote]) -> Iterator[Group]:
    by_task = group_by_task(votes)
    if store.mode == "tag":
        prompts: dict[str, list[str]] = {}
        for id, task in store.tasks.items():
            prompts.setdefault(task.prompt, []).append(id)
        for prompt, ids in prompts.items():
            means = [mean_scores(store, by_task[id])[0] if id in by_task else None for id in ids]
            yield Group(prompt, [store.tasks[id].images[0] for id in ids], [], means)
        return
    for id, task in store.tasks.items():
        scores = [list(store.how.scores(vote.answer)) for vote in by_task.get(id, [])]
        means = list(mean_scores(store, by_task[id])) if scores else [None] * len(task.images)
        yield Group(task.prompt, list(task.images), scores, means)


def _row(store: Store, group: Group, images: dict[TaskImage, str]) -> dict[str, Any]:
    names = folder_names(store.folders)
    row: dict[str, Any] = {"prompt": group.prompt, "images": [images[image] for image in group.images]}
    if store.mode == "pairs":
        row["votes"] = [math.fsum(of_image) for of_image in zip(*group.votes, strict=True)]
    else:
        row["scores"] = group.votes or group.means
    return row | {"models": [names[image.folder] for image in group.images]}


def _image_paths(store: Store, path: Path) -> dict[TaskImage, str]:
    """Of all images, relative to the file at `path`."""
    here = path.parent.resolve()
    for folder in store.folders:
        if not folder.is_relative_to(here):
            common = os.path.commonpath([here, *store.folders])
            raise UserError(
                f"--export={path}: the file names images relative to itself, and {folder} is not beneath {here}; "
                f"write it to {Path(common) / path.name}"
            )
    return {
        image: (store.folders[image.folder].relative_to(here) / image.name).as_posix()
        for task in store.tasks.values()
        for image in task.images
    }
