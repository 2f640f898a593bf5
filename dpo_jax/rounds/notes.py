"""Writes down what judges or people say about a round: process 0's part of judging.

Axes: P prompts, K images of a prompt, R judges, W watched judges.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from dpo_jax.errors import UserError
from dpo_jax.evaluation.drift import frechet_distance
from dpo_jax.rounds.config import RoundSizes, images_per_prompt
from dpo_jax.rounds.feedback import read_feedback
from dpo_jax.rounds.folder import Rewards, RoundFolder, read_said
from dpo_jax.rounds.guard import verdict
from dpo_jax.rounds.result import Result
from dpo_jax.rounds.round_images import best_and_worst_images, diversity_of_prompts, features_of
from dpo_jax.sampling.grid import save_png
from dpo_jax.training.loop import Loop
from dpo_jax.training.metrics import read_metrics


class Notes:
    """Writes the scores of rounds, and what follows from them.

    Args:
        loop: the training loop, whose writer and bar receive figures and lines.
        plan: sizes of a round.
        feedback: files with people's scores that a flag names.
    """

    def __init__(self, loop: Loop, plan: RoundSizes, feedback: Sequence[epath.Path]):
        self._config, self._workdir, self._say = loop.config, loop.workdir, loop.bar.say
        self._writer, self._plan, self._feedback = loop.writer, plan, feedback
        self._judges, self._watched = list(self._config.online.judges), list(self._config.online.watched_judges)
        self._images = images_per_prompt(self._config)
        self._result = Result(self._workdir, self._config, plan)
        self._first_ND: np.ndarray | None = None
        """Features of the first round's images."""

    def note(self, folder: RoundFolder, step: int, found: Sequence[Rewards]) -> tuple[int, bool]:
        """Write the round's scores to its folder, the metrics and `result.json`; also what a kill has kept from some.

        Args:
            folder: the round, all images of which are there.
            step: step of the state.
            found: rewards of each prompt, by judges; empty if people judge.

        Returns:
            The step of the best round's checkpoint, -1 for none; and whether the run should end here.
        """
        number, start = folder.number, folder.number * self._plan.updates
        names = self._judges or ["people"]
        noted_PKR = folder.read_scores((self._images, len(names)))
        # Of judges what is beside the trajectories counts: the rounds may have been begun anew.
        shown_PKR = self._shown(folder, found) if noted_PKR is None or self._judges or self._feedback else noted_PKR
        is_new = noted_PKR is None or not np.array_equal(shown_PKR, noted_PKR, equal_nan=True)
        if is_new and noted_PKR is not None and step > start and self._feedback:
            raise UserError(
                f"--feedback differs from {folder.path / 'scores.json'}, with which round {number + 1} is "
                f"already trained up to step {step}. Leave out --feedback to continue with those scores, or start in "
                "another --workdir"
            )
        if is_new:
            fields = {"round": number, "step": start, "judges": names, **self._looked_at(folder, found)}
            folder.write_scores(fields, shown_PKR)
        history = self._result.read(number)
        concluded = verdict(self._config, history) if self._judges else None
        self._result.write(concluded)

        row = self._result.row(number)
        said = {name: values["mean"] for name, values in row["scores"].items()}
        said |= {f"watched/{name}": values["mean"] for name, values in row.get("watched", {}).items()}
        said |= {name: row[name] for name in ("diversity", "drift") if name in row}
        if is_new or all(row.get("online/round") != number for row in read_metrics(self._workdir)):
            self._show(folder, start, shown_PKR[..., 0])
            self._writer.scalars(start, {"online/round": number, **{f"online/{name}": x for name, x in said.items()}})
        line = "  ".join(f"{name.replace('/', ' ', name.startswith('watched/'))} {x:.4g}" for name, x in said.items())
        self._say(f"round {number + 1}/{self._config.online.rounds} at step {start}: {line}")
        if not concluded:
            return -1, False
        if concluded.warning:
            self._say(f"warning: {concluded.warning}. Look at the images in {folder.images}")
        if concluded.stop:
            self._say(
                f"stopped early after step {start}, before training on round {number + 1}, because {concluded.stop}. "
                f"{self._best(concluded.best)}"
            )
        return concluded.best * self._plan.updates or -1, bool(concluded.stop)

    def _shown(self, folder: RoundFolder, found: Sequence[Rewards]) -> np.ndarray:
        """Return the scores [P, K, R] of the images: those found by judges, or people's."""
        if self._judges:
            return np.stack([rewards.shown_KR for rewards in found])
        files = self._feedback or folder.feedback()
        return read_feedback(files, len(folder.prompts), self._images)[..., None]

    def _looked_at(self, folder: RoundFolder, found: Sequence[Rewards]) -> dict[str, Any]:
        """Return the figures for `scores.json` that nothing is trained on, without those of images that are gone."""
        fields: dict[str, Any] = {}
        watched = [rewards.watched_KW.tolist() for rewards in found if rewards.watched_KW is not None]
        if watched:
            fields |= {"watched_judges": self._watched, "watched": watched}
        now_ND = features_of(folder.image_files(self._images))
        if now_ND is None:
            return fields
        fields["diversity"] = diversity_of_prompts(now_ND, folder.prompts)
        if folder.number == 0:
            self._first_ND = now_ND
            return fields | {"drift": 0.0}
        if self._first_ND is None:
            said = read_said(folder.path.parent / "00000" / "scores.json", 0)
            self._first_ND = features_of(RoundFolder(self._workdir, 0, said["prompts"]).image_files(self._images))
        if self._first_ND is not None:
            fields["drift"] = frechet_distance(now_ND, self._first_ND)
        return fields

    def _show(self, folder: RoundFolder, step: int, scores_PK: np.ndarray) -> None:
        """Write the grid of the best and worst images, by the first judge, to the round's folder and the loggers."""
        files = folder.image_files(self._images)
        grid = best_and_worst_images(files, folder.prompts, scores_PK) if all(file.exists() for file in files) else None
        if grid is not None:
            save_png(folder.path / "best_and_worst.png", grid)
            self._writer.image(step, "best_and_worst", np.asarray(grid))

    def _best(self, number: int) -> str:
        """Return a sentence about the best round."""
        judges, step = " and ".join(self._watched or self._judges), number * self._plan.updates
        if not number:
            return f"The best images by {judges} are those of round 1, which the model drew before training"
        return (
            f"The best images by {judges} are those of round {number + 1}; the checkpoint of step {step}, which drew "
            f"them, is kept: --step=best takes it"
        )
