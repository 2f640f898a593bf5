"""The results of a study: majorities, win rates between folders with confidence intervals, and agreement of raters.

Axes: U units (what is judged), V values (the possible judgements).
"""

import collections
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import krippendorff
import numpy as np

from dpo_jax.evaluation.winrate import WinRate, rate_over_prompts, verdict
from dpo_jax.voting.contents import Vote
from dpo_jax.voting.store import Store
from dpo_jax.voting.study import Answer, Question, Task

Wins = dict[tuple[int, int], dict[str, list[float]]]
"""By (of, over), two folders, and by prompt: 1 for each win of the folder `of`, 0 for each loss, 0.5 for each tie."""


class Comparison(NamedTuple):
    """The win rate of one folder over another, from all tasks with a vote.

    The folder named later in --images comes first, as in `dpo_jax.evaluate`.
    """

    of: str
    over: str
    wins: int
    losses: int
    ties: int
    rate: WinRate | None
    """None for a single prompt, from which no confidence interval can be estimated."""

    def to_dict(self) -> dict[str, Any]:
        fields = self._asdict()
        rate = fields.pop("rate")
        return fields | (rate._asdict() if rate else {"comparisons": self.wins + self.losses + self.ties})

    def describe(self, raters: int) -> str:
        """Return a sentence with the verdict."""
        if self.rate is None:
            return (
                f"{self.of} over {self.over}: {self.wins} won, {self.losses} lost, {self.ties} tied. A win rate with "
                "a confidence interval needs at least two prompts."
            )
        return verdict(self.of, self.over, self.rate, "one rater" if raters == 1 else f"{raters} raters")


class FolderScore(NamedTuple):
    """The mean score of the images of a folder."""

    name: str
    images: int
    mean: float
    """Mean over images of their mean score: points, number of images beaten, or the share of raters who saw a fault."""


class QuestionResult(NamedTuple):
    """The result of one question."""

    question: str
    title: str
    text: str
    raters: int
    """Raters with a vote on this question."""
    votes: int
    judged: int
    """Tasks with a vote."""
    finished: int
    """Tasks that need no more votes."""
    tasks: int
    comparisons: list[Comparison]
    scores: list[FolderScore]
    alpha: float | None
    """Krippendorff's alpha; None if it is not defined yet, for example for a single rater."""
    first_place: float | None
    """For pairs: the share of choices that went to the image at the first place, about 1/2 if places do not matter."""


class Summary(NamedTuple):
    """The results of a study."""

    raters: list[tuple[str, int]]
    """Names with their number of votes."""
    questions: list[QuestionResult]

    def to_json(self) -> str:
        """Return the summary as a JSON object; its win rates have the fields of those in evaluate's result.json."""
        questions = []
        for result in self.questions:
            fields = result._asdict()
            fields["win_rates"] = [row.to_dict() for row in fields.pop("comparisons")]
            questions.append(fields | {"scores": [row._asdict() for row in result.scores]})
        return json.dumps({"raters": dict(self.raters), "questions": questions}, ensure_ascii=False, indent=2) + "\n"


def summarise(
    store: Store, questions: Mapping[str, Question], is_finished: Callable[[Mapping[Answer, int]], bool]
) -> Summary:
    """Summarise all votes so far, including those on tasks that need more votes.

    The score of an image in a task is the mean over its raters, so in a pair the majority prefers the higher score.
    With one rater the majority is what this rater said.

    Args:
        store: the file of votes.
        questions: the questions to summarise, by name.
        is_finished: whether a question with these votes needs no more.
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
                title=question.title,
                text=question.text,
                raters=len({vote.rater for vote in mine}),
                votes=len(mine),
                judged=len(by_task),
                finished=sum(is_finished(tallies.get((task, name), {})) for task in store.tasks),
                tasks=len(store.tasks),
                comparisons=_comparisons(store, by_task),
                scores=[] if store.mode == "pairs" else _folder_scores(store, by_task),
                alpha=agreement(*_units(store, by_task), store.rules.level),
                first_place=_first_place(mine) if store.mode == "pairs" else None,
            )
        )
    return Summary(collections.Counter(vote.rater for vote in votes).most_common(), results)


def group_by_task(votes: Iterable[Vote]) -> dict[str, list[Vote]]:
    """Return the votes on each task."""
    grouped: dict[str, list[Vote]] = {}
    for vote in votes:
        grouped.setdefault(vote.task, []).append(vote)
    return grouped


def mean_scores(store: Store, votes: Sequence[Vote]) -> list[float]:
    """Return the mean score of each image of a task over the votes on the task; higher is better."""
    scores = [store.rules.scores(vote.answer) for vote in votes]
    return [sum(of_image) / len(votes) for of_image in zip(*scores, strict=True)]


def agreement(values: Sequence[float], counts_UV: np.ndarray, level: Literal["nominal", "ordinal"]) -> float | None:
    """Return Krippendorff's alpha: 1 if raters agree, 0 if they agree as often as by chance.

    Args:
        values: the V numbers that occur, in order.
        counts_UV: how often each number was given to each unit.
        level: level of measurement.

    Returns None where alpha is not defined: no unit has two votes, or all votes are equal.
    """
    counts_UV = counts_UV[counts_UV.sum(axis=1) > 1]
    if (counts_UV.sum(axis=0) > 0).sum() < 2:
        return None
    return float(krippendorff.alpha(value_counts=counts_UV, value_domain=list(values), level_of_measurement=level))


def folder_names(folders: Sequence[Path]) -> list[str]:
    """Return the last part of each path, or the whole paths if two of the last parts are equal."""
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
                outcome = (1 + np.sign(other_score - score)) / 2
                wins.setdefault((other.folder, image.folder), {}).setdefault(task.prompt, []).append(outcome)
    names = folder_names(store.folders)
    ordered = sorted(wins.items(), key=lambda item: item[0][::-1])
    return [_comparison(names[of], names[over], prompts) for (of, over), prompts in ordered]


def _comparison(of: str, over: str, by_prompt: Mapping[str, list[float]]) -> Comparison:
    outcomes = collections.Counter(itertools.chain.from_iterable(by_prompt.values()))
    rate = rate_over_prompts([np.array(wins) for wins in by_prompt.values()]) if len(by_prompt) > 1 else None
    return Comparison(of, over, outcomes[1], outcomes[0], outcomes[0.5], rate)


def _folder_scores(store: Store, by_task: Mapping[str, Sequence[Vote]]) -> list[FolderScore]:
    scores: dict[int, list[float]] = {}
    for task_id, votes in by_task.items():
        for image, score in zip(store.tasks[task_id].images, mean_scores(store, votes), strict=True):
            scores.setdefault(image.folder, []).append(1 - score if store.mode == "tag" else score)
    names = folder_names(store.folders)
    return [FolderScore(names[k], len(means), sum(means) / len(means)) for k, means in sorted(scores.items())]


def _units(store: Store, by_task: Mapping[str, Sequence[Vote]]) -> tuple[list[float], np.ndarray]:
    """Return values and counts_UV. A unit is an image for rankings and points, and a task otherwise."""

    def numbers(task: Task) -> range:
        return range(len(task.images) if store.rules.level == "ordinal" else 1)

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
