"""Which question to ask a rater next.

Every rater gets the tasks in a random order and the images of a task at random places. Both are the same whenever the
rater comes back.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_jax.errors import UserError
from dpo_jax.voting.store import Store
from dpo_jax.voting.study import TIE, Answer, Question

NO_VOTES: Mapping[Answer, int] = {}


class Survey:
    """A file of votes, the questions that are asked, and how many raters each question needs.

    Args:
        store: the file of votes.
        questions: the questions about each task, by name.
        ties: whether "Both alike" is an answer.
        raters: votes per task and question, after which nobody else is asked.
        stop_early: whether to stop asking as soon as further votes cannot change the majority.
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
        """Return the progress of a rater and what to show next, as a JSON object.

        answered: questions that this rater has answered; total: these and the questions that are still to be asked;
        now: task, prompt, question and image ids by place, or None at the end; next_images: ids of images to load in
        advance; last: task and question of the latest answer, for undo.

        Args:
            first: task and question to ask before all others, even if others have finished it.
        """
        answers = [key for key in self.store.answered(rater) if key[1] in self.questions]
        answered, tallies = set(answers), self.store.tallies()
        open_questions = [
            key
            for task in self._order(rater)
            for key in ((task, question) for question in self.questions)
            if key == first or not (key in answered or self.is_finished(tallies.get(key, NO_VOTES)))
        ]
        open_questions.sort(key=lambda key: key != first)
        open_tasks = list(dict.fromkeys(task for task, _ in open_questions))
        return {
            "answered": len(answers),
            "total": len(answers) + len(open_questions),
            "now": self._screen(rater, *open_questions[0]) if open_questions else None,
            "next_images": [image for task in open_tasks[1:3] for image in self._images(rater, task)],
            "last": dict(zip(("task", "question"), answers[-1], strict=True)) if answers else None,
        }

    def vote(self, rater: str, task: str, question: str, placed: Sequence[float]) -> bool:
        """Store an answer. Return False if this rater has already given another answer, which stays.

        Args:
            placed: one number per image, in the order in which the images were shown.

        Raises UserError if the task or question does not exist, or if `placed` is not a possible answer.
        """
        self._check(task, question)
        shown = self.shown(rater, task)
        if len(placed) != len(shown):
            raise UserError(f"an answer to this question has {len(shown)} numbers, not {len(placed)}")
        answer = tuple(placed[shown.index(k)] for k in range(len(shown)))
        if not self.store.rules.is_answer(answer) or (answer == TIE and not self.ties):
            raise UserError("that is not one of the possible answers")
        return self.store.add(rater, task, question, answer, shown).answer == answer

    def undo(self, rater: str, task: str, question: str) -> dict[str, Any]:
        """Delete this rater's latest answer, if it is the named one, and return the state that asks again.

        Raises UserError for an earlier answer, and for one that was deleted too often.
        """
        self._check(task, question)
        if self.store.undo(rater, task, question):
            return self.state(rater, (task, question))
        return self.state(rater)

    def shown(self, rater: str, task: str) -> list[int]:
        """Return the index of the task's image at each place: a random order, always the same for a rater."""
        places = range(len(self.store.tasks[task].images))
        return sorted(places, key=lambda k: self.store.opaque("place", rater, task, k))

    def is_finished(self, tally: Mapping[Answer, int]) -> bool:
        """Return whether a question with these votes is asked no more."""
        votes, side = sum(tally.values()), self.store.rules.side
        if votes >= self.raters:
            return True
        if not self.stop_early or side is None:
            return False
        return abs(sum(side(answer) * count for answer, count in tally.items())) > self.raters - votes

    def find_image(self, rater: str, id: str) -> tuple[str, int] | None:
        """Return the task of an image id and the image's index in the task, or None if this rater has no such id."""
        task = id.partition("/")[0]
        if task not in self.store.tasks:
            return None
        found = dict(zip(self._images(rater, task), self.shown(rater, task), strict=True))
        return (task, found[id]) if id in found else None

    def _check(self, task: str, question: str) -> None:
        if task not in self.store.tasks or question not in self.questions:
            raise UserError("the study has no such task or question")

    def _new_order(self, rater: str) -> list[str]:
        return sorted(self.store.tasks, key=lambda task: self.store.opaque("order", rater, task))

    def _screen(self, rater: str, task: str, question: str) -> dict[str, Any]:
        asked = self.questions[question]
        return {
            "task": task,
            "prompt": "" if asked.hides_prompt else self.store.tasks[task].prompt,
            "question": question,
            "title": asked.title,
            "text": asked.text,
            "advice": asked.advice,
            "number": list(self.questions).index(question) + 1,
            "images": self._images(rater, task),
        }

    def _images(self, rater: str, task: str) -> list[str]:
        """Return the image ids by place. They differ for every rater, and for every task that shows the same image."""
        places = range(len(self.store.tasks[task].images))
        return [f"{task}/{self.store.opaque('image', rater, task, place)}" for place in places]
