"""What the votes say: majorities, win rates between folders with their intervals, and how far raters agree.

Axes: U units (what is judged), V values (what may be said of one).
"""

import collections
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import krippendorff
import numpy as np

from dpo_jax.evaluation.winrate import WinRate, rate_over_prompts
from dpo_jax.voting.contents import Vote
from dpo_jax.voting.store import Store
from dpo_jax.voting.study import Answer, Question, Task

Wins = dict[tuple[int, int], dict[str, list[float]]]
"""For two folders, by prompt: 1 where the first one's image won, 0 where it lost, 0.5 for a tie."""


class Comparison(NamedTuple):
    """One folder against another, over all tasks that have a vote."""

    first: str
    second: str
    wins: int
    losses: int
    ties: int
    rate: WinRate | None
    """None for a single prompt, which has no interval."""


class FolderScore(NamedTuple):
    name: str
    images: int
    mean: float
    """Over the images' mean scores: points, others beaten, or the share that has a tag."""


class QuestionResult(NamedTuple):
    question: str
    text: str
    votes: int
    judged: int
    """Tasks with a vote."""
    finished: int
    tasks: int
    comparisons: list[Comparison]
    scores: list[FolderScore]
    alpha: float | None
    """Krippendorff's; None if nothing can be said of it yet."""
    first_place: float | None
    """Share of the preferred images, of pairs, that stood at the first place: near a half if places don't matter."""


class Summary(NamedTuple):
    raters: list[tuple[str, int]]
    """Names with the number of their votes."""
    questions: list[QuestionResult]


def summarise(
    store: Store, questions: Mapping[str, Question], is_finished: Callable[[Mapping[Answer, int]], bool]
) -> Summary:
    """Figures of all votes so far, whether their tasks are finished or not.

    An image's score in a task is the mean over raters, so for a pair the larger one is the majority's.
    """
    votes = store.votes()
    tallies = store.tallies()
    results = []
    for name, question in questions.items():
        mine = [vote for vote in votes if vote.question == name]
        by_task = group_by_task(mine)
        results.append(
            QuestionResult(
                question=name,
                text=question.text,
                votes=len(mine),
                judged=len(by_task),
                finished=sum(is_finished(tallies.get((task, name), {})) for task in store.tasks),
                tasks=len(store.tasks),
                comparisons=_comparisons(store, by_task),
                scores=[] if store.mode == "pairs" else _folder_scores(store, by_task),
                alpha=agreement(*_units(store, by_task), store.how.level),
                first_place=_first_place(mine) if store.mode == "pairs" else None,
            )
        )
    return Summary(collections.Counter(vote.rater for vote in votes).most_common(), results)


def group_by_task(votes: Iterable[Vote]) -> dict[str, list[Vote]]:
    grouped: dict[str, list[Vote]] = {}
    for vote in votes:
        grouped.setdefault(vote.task, []).append(vote)
    return grouped


def mean_scores(store: Store, votes: Sequence[Vote]) -> list[float]:
    """Of each image of a task, over the votes on it; higher is better."""
    scores = [store.how.scores(vote.answer) for vote in votes]
    return [sum(of_image) / len(votes) for of_image in zip(*scores, strict=True)]


def agreement(values: Sequence[float], counts_UV: np.ndarray, level: Literal["nominal", "ordinal"]) -> float | None:
    """Krippendorff's alpha: 1 if raters agree, 0 if as often as by chance.

    Args:
        values: the V numbers that occur, in order.
        counts_UV: how often each was given.
        level: of measurement: nominal, ordinal, ...

    Returns None where it isn't defined: no unit has two votes, or all votes are alike.
    """
    counts_UV = counts_UV[counts_UV.sum(axis=1) > 1]
    if (counts_UV.sum(axis=0) > 0).sum() < 2:
        return None
    return float(krippendorff.alpha(value_counts=counts_UV, value_domain=list(values), level_of_measurement=level))


def folder_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or all of it where that isn't enough to tell them apart."""
    names = [folder.name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _comparisons(store: Store, by_task: Mapping[str, Sequence[Vote]]) -> list[Comparison]:
    wins: Wins = {}
    for task_id, votes in by_task.items():
        task = store.tasks[task_id]
        for (image, score), (other, other_score) in itertools.combinations(
            zip(task.images, mean_scores(store, votes), strict=True), 2
        ):
            if image.folder != other.folder:
                outcome = (1 + np.sign(score - other_score)) / 2
                wins.setdefault((image.folder, other.folder), {}).setdefault(task.prompt, []).append(outcome)
    names = folder_names(store.folders)
    return [_comparison(names[first], names[second], prompts) for (first, second), prompts in sorted(wins.items())]


def _comparison(first: str, second: str, by_prompt: Mapping[str, list[float]]) -> Comparison:
    outcomes = collections.Counter(itertools.chain.from_iterable(by_prompt.values()))
    rate = rate_over_prompts([np.array(wins) for wins in by_prompt.values()]) if len(by_prompt) > 1 else None
    return Comparison(first, second, outcomes[1], outcomes[0], outcomes[0.5], rate)


def _folder_scores(store: Store, by_task: Mapping[str, Sequence[Vote]]) -> list[FolderScore]:
    scores: dict[int, list[float]] = {}
    for task_id, votes in by_task.items():
        for image, score in zip(store.tasks[task_id].images, mean_scores(store, votes), strict=True):
            scores.setdefault(image.folder, []).append(1 - score if store.mode == "tag" else score)
    names = folder_names(store.folders)
    return [FolderScore(names[k], len(means), sum(means) / len(means)) for k, means in sorted(scores.items())]


def _units(store: Store, by_task: Mapping[str, Sequence[Vote]]) -> tuple[list[float], np.ndarray]:
    """Values and counts_UV. A unit is an image where each gets a number of its own, otherwise a task."""

    def numbers(task: Task) -> range:
        return range(len(task.images) if store.how.level == "ordinal" else 1)

    units = [
        collections.Counter(vote.answer[k] for vote in votes)
        for task, votes in by_task.items()
        for k in numbers(store.tasks[task])
    ]
    values = sorted(set(itertools.chain.from_iterable(units)))
    return values, np.array([[unit[value] for value in values] for unit in units]).reshape(len(units), len(values))


def _first_place(votes: Sequence[Vote]) -> float | None:
    decided = [vote for vote in votes if vote.answer[0] != vote.answer[1]]
    if not decided:
        return None
    return sum(vote.answer[vote.shown[0]] for vote in decided) / len(decided)
