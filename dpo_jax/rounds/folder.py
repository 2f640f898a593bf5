"""The folder of a round, `WORKDIR/rounds/00003`: what was sampled and what was said of it.

  images/           a PNG each and `prompts.jsonl`, as `dpo_jax.sample` writes them: what people look at and vote on
  trajectories/     an .npz a prompt, with the rewards of judges; removed when no checkpoint needs them any more
  scores.json       what judges said, for good
  feedback*.json    what people said, see `feedback.py`

A prompt's files are written whole, the trajectory last: where it is, the prompt is done, and a run that was stopped
goes on with the next one. They stay on disk however small they are: a resumed run needs them, and what is read again
soon comes from the operating system's cache.

Axes: P prompts, K candidates, S learned steps, R rewards, J as in `rollout.py`.
"""

import io
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from PIL import Image
from typing_extensions import TypedDict

from dpo_jax.errors import UserError
from dpo_jax.files import read_json, write_whole
from dpo_jax.rounds.rollout import StoredTrajectory
from dpo_jax.sampling.grid import save_png
from dpo_jax.sampling.image_folder import Entry, image_name, write_list


class Rewards(NamedTuple):
    """What judges said of a prompt; NaN where nothing."""

    shown_KR: np.ndarray
    """Of its images."""
    steps_SKR: np.ndarray | None = None
    """Of branching: of what each candidate of each step was about to become."""


class _Said(TypedDict):
    round: int
    step: int
    judges: list[str]
    prompts: list[str]
    scores: list[list[list[float | None]]]


def read_said(file: epath.PathLike) -> dict[str, Any]:
    """What `RoundFolder.write_scores` wrote; ValueError where it is damaged."""
    found: dict[str, Any] = read_json(file, _Said)
    counts = {len(of_prompt) for of_prompt in found["scores"]}
    judged = {len(said) for of_prompt in found["scores"] for said in of_prompt}
    if len(found["scores"]) != len(found["prompts"]) or len(counts) != 1 or judged != {len(found["judges"])}:
        raise UserError(f"{file} is damaged: its scores are not [prompt][candidate][judge]; restore it from a backup")
    return found


class RoundFolder:
    """The files of one round.

    Args:
        workdir: of the run.
        number: of the round, from 0.
        prompts: of the round, in order.
    """

    def __init__(self, workdir: epath.PathLike, number: int, prompts: Sequence[str]):
        self.path = epath.Path(workdir) / "rounds" / f"{number:05d}"
        self.number, self.prompts = number, list(prompts)
        self.images = self.path / "images"
        self._trajectories = self.path / "trajectories"
        self._scores = self.path / "scores.json"

    def missing(self) -> list[int]:
        """The prompts that are not sampled yet."""
        there = {path.name for path in self._trajectories.iterdir()} if self._trajectories.exists() else set()
        return [p for p in range(len(self.prompts)) if self._file(p).name not in there]

    def write_images(self, prompt: int, images_KHWC: np.ndarray) -> None:
        """The prompt's images, for people."""
        for entry, image_HWC in zip(self._entries(prompt, len(images_KHWC)), images_KHWC, strict=True):
            save_png(self.images / entry.image, Image.fromarray(image_HWC))

    def write_trajectory(self, prompt: int, trajectory: StoredTrajectory, rewards: Rewards | None) -> None:
        """The last of a prompt's files."""
        said = {} if rewards is None else {k: v for k, v in rewards._asdict().items() if v is not None}
        buffer = io.BytesIO()
        np.savez(buffer, **trajectory._asdict(), **said)
        write_whole(self._file(prompt), buffer.getvalue())

    def read_trajectory(self, prompt: int) -> StoredTrajectory:
        """ValueError if the file is damaged."""
        arrays = self._read(prompt, StoredTrajectory._fields)
        return StoredTrajectory(*(arrays[field] for field in StoredTrajectory._fields))

    def read_rewards(self) -> list[Rewards]:
        """Of every prompt, from its trajectory's file."""
        return [Rewards(**self._read(p, Rewards._fields)) for p in range(len(self.prompts))]

    def write_list(self, images_a_prompt: int) -> None:
        """`prompts.jsonl`, when all images are there."""
        write_list(self.images, [e for p in range(len(self.prompts)) for e in self._entries(p, images_a_prompt)])

    def write_scores(self, fields: dict[str, Any], shown_PKR: np.ndarray) -> None:
        """`fields` and the scores as `[prompt][candidate][judge]`, null for NaN."""
        scores = [[[None if np.isnan(x) else float(x) for x in said_R] for said_R in said_KR] for said_KR in shown_PKR]
        write_whole(self._scores, json.dumps(fields | {"prompts": self.prompts, "scores": scores}) + "\n")

    def read_scores(self) -> dict[str, Any] | None:
        """What `write_scores` wrote; None if it has not."""
        return read_said(self._scores) if self._scores.exists() else None

    def feedback(self) -> list[epath.Path]:
        """The files in which people scored the images."""
        return sorted(self.path.glob("feedback*.json")) if self.path.exists() else []

    def remove_trajectories(self) -> None:
        if self._trajectories.exists():
            self._trajectories.rmtree()

    def _file(self, prompt: int) -> epath.Path:
        return self._trajectories / f"{prompt:05d}.npz"

    def _entries(self, prompt: int, count: int) -> list[Entry]:
        text = self.prompts[prompt]
        return [Entry(image_name(prompt, text, k), text, k) for k in range(count)]

    def _read(self, prompt: int, fields: Sequence[str]) -> dict[str, np.ndarray]:
        """Those of the arrays that the prompt's file has."""
        file = self._file(prompt)
        try:
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                return {field: arrays[field] for field in fields if field in arrays}
        except Exception as error:  # of whatever class: damaged files raise almost any
            raise UserError(
                f"{file} can't be read ({str(error).splitlines()[0] if str(error) else type(error).__name__}); put it "
                f"back; as long as nothing of round {self.number} is trained on, remove it and run again, to sample it "
                "anew, otherwise begin another --workdir"
            ) from error
