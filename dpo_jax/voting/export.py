"""Exports of votes that other commands and programs read.

A `.jsonl` file is a preference data set for `python -m dpo_jax.prepare --source=jsonl`. Each line has the prompt, the
paths of the images relative to the file, the names of their folders as models, and the raters' answers:

- pairs: `votes`, the number of votes for each image (a tie is half a vote for both);
- rankings and points: `scores`, one list per rater, higher is better;
- tags: `scores`, the share of raters who did not see the fault. All images of the prompt are on one line.

Prompts without votes are left out. The file can be in any folder: image folders that are not below it are linked from
a folder beside the file (`votes.jsonl` has `votes.images/`), so the images must stay where they are until prepare has
read them.

A `.json` file is human feedback in the format of D3PO (https://arxiv.org/abs/2311.13231): `[prompt][candidate]`, the
mean score over raters, higher is better, null for images without a vote (which `dpo_jax.online` reads and D3PO's
released script does not). The candidates of a prompt are its images from the K folders, in the order of --images, or
the K seeds of a single folder, in the order of its list. Prompts are in the order of the first folder's list: with K
folders every prompt and seed is an entry, with a single folder every prompt with two or more images. For tags, an entry
has the images of a prompt from all folders. Pairs have no scores.

A `.csv` file has one line per image of each vote, for spreadsheets and data frames.
"""

import csv
import io
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
    """The images of a prompt and their votes."""

    prompt: str
    images: list[TaskImage]
    votes: list[list[float]]
    """One list per rater with a score for each image."""
    means: list[float | None]
    """Mean score of each image, None without a vote."""


def export(store: Store, path: Path, questions: Sequence[str] = ()) -> tuple[int, int]:
    """Write `path`, whole or not at all.

    Args:
        store: the file of votes.
        path: a .jsonl, .json or .csv file, in any folder.
        questions: the questions whose answers to export: one for .jsonl and .json, or any number for tags and .csv.
            Default: the first one; all of them for tags and .csv.

    Returns the number of entries with votes for all images, and the number of entries without (for .csv: the number of
    votes, and 0).

    Raises UserError if nobody has voted, or if the ending of `path` does not fit.
    """
    if path.suffix not in (".jsonl", ".json", ".csv"):
        raise UserError(
            f"--export={path} must end in .jsonl (for dpo_jax.prepare), .json (D3PO's feedback) or .csv (every vote)"
        )
    if path.suffix == ".json" and store.mode == "pairs":
        raise UserError(f"--export={path}: pairs have no score per image; write a .jsonl file instead")
    votes = store.votes()
    chosen = _chosen(store, votes, questions, several=path.suffix == ".csv" or store.mode == "tag")
    if path.suffix == ".csv":
        of_chosen = [vote for vote in votes if vote.question in chosen]
        write_whole(path, votes_csv(store, of_chosen))
        return len(of_chosen), 0
    groups = list(_groups(store, [vote for vote in votes if vote.question in chosen]))
    complete = [group for group in groups if None not in group.means and len(group.images) > 1]
    if path.suffix == ".json":
        lines = json.dumps([group.means for group in groups]) + "\n"
        missing = sum(None in group.means for group in groups)
    else:
        images = _image_paths(store, path)
        lines = "".join(json.dumps(_line(store, group, images), ensure_ascii=False) + "\n" for group in complete)
        missing = len(groups) - len(complete)
    write_whole(path, lines)
    return len(groups) - missing, missing


def describe(path: Path, exported: int, missing: int) -> str:
    """Return a sentence about what `export` has written."""
    if path.suffix == ".csv":
        return f"Wrote {exported} votes to {path}."
    if path.suffix == ".jsonl":
        return f"Wrote {exported} prompts with votes to {path}; left out {missing} that lack votes."
    written = f"Wrote the scores of {exported + missing} prompts to {path}."
    if not missing:
        return written
    return (
        f"{written} {missing} of them have images without a vote, whose scores are null, which dpo_jax.online reads "
        "and D3PO's released script does not: for that script collect votes on every image first."
    )


def votes_csv(store: Store, votes: Sequence[Vote]) -> str:
    """Return CSV with one line per image of each vote."""
    names, file = folder_names(store.folders), io.StringIO()
    writer = csv.writer(file)
    writer.writerow(
        ["time", "rater", "question", "prompt", "seed", "category", "model", "image", "place", "answer", "score"]
    )
    for vote in votes:
        task = store.tasks[vote.task]
        for k, (image, score) in enumerate(zip(task.images, store.rules.scores(vote.answer), strict=True)):
            texts = vote.rater, vote.question, task.prompt
            shown = names[image.folder], image.name
            numbers = vote.shown.index(k) + 1, vote.answer[k], score
            writer.writerow(
                [vote.time, *map(_cell, texts), task.seed, _cell(task.category), *map(_cell, shown), *numbers]
            )
    return file.getvalue()


def _cell(text: str) -> str:
    """Text that spreadsheets do not take for a formula, which a rater's name could be."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _chosen(store: Store, votes: Sequence[Vote], questions: Sequence[str], several: bool) -> list[str]:
    """Return the questions to export. `several`: whether more than one fits into the file."""
    answered = {vote.question for vote in votes}
    if not answered:
        raise UserError(f"{store.path} has no votes yet; open the page and vote first")
    ordered = sorted(answered, key=lambda name: (list(QUESTIONS).index(name) if name in QUESTIONS else 0, name))
    for name in questions:
        if name not in answered:
            raise UserError(f"{store.path} has no answers to {name!r}; it has answers to {', '.join(ordered)}")
    if several:
        return list(questions) or ordered
    if len(questions) > 1:
        raise UserError(f"--questions={','.join(questions)}: this export holds the answers to one question; name one")
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
        scores = [list(store.rules.scores(vote.answer)) for vote in by_task.get(id, [])]
        means = list(mean_scores(store, by_task[id])) if scores else [None] * len(task.images)
        yield Group(task.prompt, list(task.images), scores, means)


def _line(store: Store, group: Group, images: dict[TaskImage, str]) -> dict[str, Any]:
    names = folder_names(store.folders)
    line: dict[str, Any] = {"prompt": group.prompt, "images": [images[image] for image in group.images]}
    if store.mode == "pairs":
        line["votes"] = [math.fsum(of_image) for of_image in zip(*group.votes, strict=True)]
    else:
        line["scores"] = group.votes or group.means
    return line | {"models": [names[image.folder] for image in group.images]}


def _image_paths(store: Store, path: Path) -> dict[TaskImage, str]:
    """Return the path of every image relative to the file at `path`, linking folders that are not below it."""
    here = path.parent.resolve()
    relative = [
        folder.relative_to(here) if folder.is_relative_to(here) else _link(path, folder, position).relative_to(here)
        for position, folder in enumerate(store.folders)
    ]
    return {
        image: (relative[image.folder] / image.name).as_posix()
        for task in store.tasks.values()
        for image in task.images
    }


def _link(path: Path, folder: Path, position: int) -> Path:
    """Link a folder of images from a folder beside the file at `path`: data sets name no file outside their folder."""
    link = path.parent.resolve() / f"{path.stem}.images" / f"{position}-{folder.name}"
    if link.is_symlink() and Path(os.readlink(link)) == folder:
        return link
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink():
            link.unlink()
        link.symlink_to(folder, target_is_directory=True)
    except OSError as error:
        common = os.path.commonpath([path.parent.resolve(), folder.parent])
        raise UserError(
            f"--export={path}: {link} cannot link to {folder} ({error.strerror}). Write the file to a folder that "
            f"contains the images, such as {common}"
        ) from error
    return link
