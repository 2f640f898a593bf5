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
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pydantic
from etils import epath
from PIL import Image
from typing_extensions import TypedDict

from dpo_jax.errors import UserError
from dpo_jax.files import check_regular, read_json, what_it_is, write_whole
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
    scores: list[list[list[pydantic.FiniteFloat | None]]]


def read_said(file: epath.PathLike, number: int) -> dict[str, Any]:
    """What `RoundFolder.write_scores` wrote of a round; ValueError where it is damaged or of another one."""
    found: dict[str, Any] = read_json(file, _Said)
    if found["round"] != number:
        raise UserError(f"{file} is of round {found['round']}, not {number}; restore it from a backup")
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

    def read_trajectory(self, prompt: int, steps: int, candidates: int, beginnings: int) -> StoredTrajectory:
        """S, K and J as given; ValueError if the file is damaged or of another round."""
        SJ, SK = (steps, beginnings), (steps, candidates)
        shapes = {"x_SJhwC": (*SJ, 0, 0, 0), "next_x_SKhwC": (*SK, 0, 0, 0), "log_prob_SK": SK}
        found = StoredTrajectory(**self._read(prompt, shapes))
        if found.x_SJhwC.shape[2:] != found.next_x_SKhwC.shape[2:] or not all(np.isfinite(x).all() for x in found):
            raise self._damaged(prompt, "its numbers are not finite, or its latents of several sizes")
        return found

    def read_rewards(self, shown: tuple[int, int], steps: tuple[int, int, int] | None) -> list[Rewards]:
        """Rewards of every prompt, from its trajectory's file.

        Args:
            shown: the shape K, R of `shown_KR`.
            steps: the shape S, K, R of `steps_SKR`, of branching.

        Raises ValueError if a file is damaged or of another round.
        """
        shapes: dict[str, tuple[int, ...]] = {"shown_KR": shown} | ({} if steps is None else {"steps_SKR": steps})
        return [Rewards(**self._read(p, shapes)) for p in range(len(self.prompts))]

    def write_list(self, images_a_prompt: int) -> None:
        """`prompts.jsonl`, when all images are there."""
        write_list(self.images, [e for p in range(len(self.prompts)) for e in self._entries(p, images_a_prompt)])

    def write_scores(self, fields: dict[str, Any], shown_PKR: np.ndarray) -> None:
        """`fields` and the scores as `[prompt][candidate][judge]`, null for NaN."""
        scores = [[[None if np.isnan(x) else float(x) for x in said_R] for said_R in said_KR] for said_KR in shown_PKR]
        write_whole(self._scores, json.dumps(fields | {"prompts": self.prompts, "scores": scores}) + "\n")

    def is_scored(self) -> bool:
        """Whether `write_scores` was called."""
        return self._scores.exists()

    def read_scores(self, shape_KR: tuple[int, int]) -> np.ndarray | None:
        """The scores [P, K, R] that `write_scores` wrote, of these K and R; None if it has not.

        Raises ValueError if the file is damaged or of another round.
        """
        if not self.is_scored():
            return None
        found = read_said(self._scores, self.number)
        scores_PKR = np.array(found["scores"], np.float64)
        if found["prompts"] != self.prompts or scores_PKR.shape[1:] != shape_KR:
            raise UserError(
                f"{self._scores} has other prompts, candidates or judges than round {self.number}; restore it from a "
                "backup, or begin another --workdir"
            )
        return scores_PKR

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

    def _read(self, prompt: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        """Arrays of the prompt's file, of these shapes; 0 stands for any size."""
        file = self._file(prompt)
        try:
            with check_regular(file).open("rb") as stream:
                head = stream.read(64)
                if not head.startswith(b"PK"):  # NumPy would advise to unpickle whatever it is
                    raise UserError(f"it is {what_it_is(head) or 'not an .npz file'}")
                stream.seek(0)
                with np.load(stream, allow_pickle=False) as arrays:
                    found = {name: arrays[name] for name in shapes}
        except Exception as error:  # of whatever class: damaged files raise almost any
            raise self._damaged(prompt, str(error).splitlines()[0] if str(error) else type(error).__name__) from error
        for name, shape in shapes.items():
            array = found[name]
            fits = array.ndim == len(shape) and all(n in (0, size) for n, size in zip(shape, array.shape, strict=True))
            if array.dtype.kind != "f" or not fits:
                needed = ", ".join(str(size or "any") for size in shape)
                raise self._damaged(prompt, f"{name} is {array.dtype} {list(array.shape)}, not float [{needed}]")
        return found

    def _damaged(self, prompt: int, problem: str) -> UserError:
        return UserError(
            f"{self._file(prompt)} can't be read ({problem}); put it back; as long as nothing of round {self.number} "
            "is trained on, remove it and run again, to sample it anew, otherwise begin another --workdir"
        )
