"""What to ask whom next. Each rater gets the tasks in an order of their own, the images too, and each task once."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_jax.errors import UserError
from dpo_jax.voting.store import Store
from dpo_jax.voting.study import TIE, Answer, Question

NO_VOTES: Mapping[Answer, int] = {}


class Survey:
    """A file of votes and how it is to be filled.

    Args:
        questions: what is asked about each task, by name.
        ties: whether "both alike" is an answer.
        raters: a question about a task is finished with so many votes.
        stop_early: it's also finished once the votes still to come can't change the majority.
    """

    def __init__(
        self,
        store: Store,
        questions: Mapping[str, Question],
        *,
        ties: bool = False,
        raters: int = 5,
        stop_early: bool = False,
    ):
        self.store, self.questions, self.ties = store, dict(questions), ties
        self.raters, self.stop_early = raters, stop_early
        self._order = functools.lru_cache(maxsize=100)(self._new_order)

    def state(self, rater: str, first: tuple[str, str] | None = None) -> dict[str, Any]:
        """How far a rater is, and what to show: a JSON object.

        done, total: tasks; now: task, prompt, question and ids of the images by place, None at the end; next_images:
        ids to load ahead; last: the task and question answered last, to undo.

        Args:
            first: task and question to ask in any case, before all others.
        """
        answers = [key for key in self.store.answered(rater) if key[1] in self.questions]
        answered, tallies = set(answers), self.store.tallies()
        done = 0
        ahead: list[tuple[str, str]] = []
        for task in self._order(rater):
            keys = [(task, question) for question in self.questions]
            is_open = [
                key == first or not (key in answered or self.is_finished(tallies.get(key, NO_VOTES))) for key in keys
            ]
            ahead += itertools.compress(keys, is_open)
            done += not any(is_open) and not answered.isdisjoint(keys)
        ahead.sort(key=lambda key: key != first)
        tasks_ahead = list(dict.fromkeys(task for task, _ in ahead))
        return {
            "done": done,
            "total": done + len(tasks_ahead),
            "now": self._screen(rater, *ahead[0]) if ahead else None,
            "next_images": [image for task in tasks_ahead[1:3] for image in self._images(rater, task)],
            "last": dict(zip(("task", "question"), answers[-1], strict=True)) if answers else None,
        }

    def vote(self, rater: str, task: str, question: str, placed: Sequence[float]) -> bool:
        """Stores an answer, whose numbers are by place; False if there's another one by this rater already.

        Raises ValueError for what can't be an answer.
        """
        self._check(task, question)
        shown = self.shown(rater, task)
        if len(placed) != len(shown):
            raise UserError(f"an answer here has {len(shown)} numbers")
        answer = tuple(placed[shown.index(k)] for k in range(len(shown)))
        if not self.store.how.is_answer(answer) or (answer == TIE and not self.ties):
            raise UserError("that is not one of the answers")
        return self.store.add(rater, task, question, answer, shown).answer == answer

    def undo(self, rater: str, task: str, question: str) -> dict[str, Any]:
        """Takes the latest answer back, if it was given; the state that asks for it again.

        Raises ValueError for an earlier one, and for one that was taken back too often.
        """
        self._check(task, question)
        if self.store.undo(rater, task, question):
            return self.state(rater, (task, question))
        return self.state(rater)

    def shown(self, rater: str, task: str) -> list[int]:
        """Which of the task's images stands at each place for this rater: random, and always the same."""
        places = range(len(self.store.tasks[task].images))
        return sorted(places, key=lambda k: self.store.opaque("place", rater, task, k))

    def is_finished(self, tally: Mapping[Answer, int]) -> bool:
        votes, side = sum(tally.values()), self.store.how.side
        if votes >= self.raters:
            return True
        if not self.stop_early or side is None:
            return False
        return abs(sum(side(answer) * count for answer, count in tally.items())) > self.raters - votes

    def find_image(self, rater: str, id: str) -> tuple[str, int] | None:
        """The task of an id that this rater was told, and which of its images it is; None for all else."""
        task = id.partition("/")[0]
        if task not in self.store.tasks:
            return None
        found = dict(zip(self._images(rater, task), self.shown(rater, task), strict=True))
        return (task, found[id]) if id in found else None

    def _check(self, task: str, question: str) -> None:
        if task not in self.store.tasks or question not in self.questions:
            raise UserError("there is no such task or question")

    def _new_order(self, rater: str) -> list[str]:
        return sorted(self.store.tasks, key=lambda task: self.store.opaque("order", rater, task))

    def _screen(self, rater: str, task: str, question: str) -> dict[str, Any]:
        text, hides_prompt = self.questions[question]
        return {
            "task": task,
            "prompt": "" if hides_prompt else self.store.tasks[task].prompt,
            "question": question,
            "text": text,
            "number": list(self.questions).index(question) + 1,
            "images": self._images(rater, task),
        }

    def _images(self, rater: str, task: str) -> list[str]:
        """Ids by place, which nobody else is told, and which are others in the next task with the same image."""
        places = range(len(self.store.tasks[task].images))
        return [f"{task}/{self.store.opaque('image', rater, task, place)}" for place in places]
