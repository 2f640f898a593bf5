"""The folder of a round, `WORKDIR/rounds/00003`: its images, trajectories and scores.

  images/           PNG files and `prompts.jsonl`, as `dpo_jax.sample` writes them: people vote on these
  trajectories/     one .npz file per prompt, with the rewards of judges; removed when no checkpoint needs them
  scores.json       the scores that the round is trained on, and the figures that are only watched; it stays
  best_and_worst.png  some prompts' best and worst images
  feedback*.json    scores by people, see `feedback.py`

A prompt's files are written whole, the trajectory last: a prompt with a trajectory is done, and a stopped run continues
with the next prompt. Trajectories are always written to the disk: a resumed run needs them, and the operating system's
cache makes reading them cheap.

Axes: P prompts, K candidates, S learned steps, R rewards, W watched judges, J as in `rollout.py`.
"""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NotRequired

import numpy as np
import pydantic
from etils import epath
from PIL import Image
from typing_extensions import TypedDict

from dpo_jax.errors import UserError
from dpo_jax.files import check_regular, read_json, what_it_is, write_whole
from dpo_jax.rounds.rollout import StoredImages, StoredTrajectory
from dpo_jax.sampling.grid import save_png
from dpo_jax.sampling.image_folder import Entry, image_name, write_list


class Rewards(NamedTuple):
    """Rewards of one prompt; NaN where there is none."""

    shown_KR: np.ndarray
    """Rewards of its images."""
    steps_SKR: np.ndarray | None = None
    """With branching: rewards of the image or latents that each candidate of each step predicts."""
    watched_KW: np.ndarray | None = None
    """Scores of its images by judges that are only watched, if there are any."""


class _Said(TypedDict):
    round: int
    step: int
    judges: list[str]
    prompts: list[str]
    scores: list[list[list[pydantic.FiniteFloat | None]]]
    watched_judges: NotRequired[list[str]]
    watched: NotRequired[list[list[list[pydantic.FiniteFloat]]]]
    diversity: NotRequired[list[pydantic.FiniteFloat | None]]
    drift: NotRequired[pydantic.FiniteFloat]


def read_said(file: epath.PathLike, number: int) -> dict[str, Any]:
    """Read what `RoundFolder.write_scores` wrote; UserError if the file is damaged or belongs to another round."""
    found: dict[str, Any] = read_json(file, _Said)
    if found["round"] != number:
        raise UserError(f"{file} belongs to round {found['round']}, not {number}. Restore it from a backup")
    for scores, judges in (("scores", "judges"), ("watched", "watched_judges")):
        if scores != "scores" and scores not in found:
            continue
        counts = {len(of_prompt) for of_prompt in found[scores]}
        judged = {len(said) for of_prompt in found[scores] for said in of_prompt}
        is_whole = len(found[scores]) == len(found["prompts"]) and judged == {len(found.get(judges, ()))}
        if not is_whole or len(counts) != 1:
            raise UserError(
                f"{file} is damaged: its {scores} are not [prompt][candidate][judge]. Restore it from a backup"
            )
    if len(found.get("diversity", found["prompts"])) != len(found["prompts"]):
        raise UserError(f"{file} is damaged: its diversity is not [prompt]. Restore it from a backup")
    return found


class RoundFolder:
    """The files of one round.

    Args:
        workdir: work directory of the run.
        number: number of the round, from 0.
        prompts: prompts of the round, in order.
    """

    def __init__(self, workdir: epath.PathLike, number: int, prompts: Sequence[str]):
        self.path = epath.Path(workdir) / "rounds" / f"{number:05d}"
        self.number, self.prompts = number, list(prompts)
        self.images = self.path / "images"
        self._trajectories = self.path / "trajectories"
        self._scores = self.path / "scores.json"

    def missing(self) -> list[int]:
        """Return the numbers of the prompts that are not sampled yet."""
        there = {path.name for path in self._trajectories.iterdir()} if self._trajectories.exists() else set()
        return [p for p in range(len(self.prompts)) if self._file(p).name not in there]

    def write_images(self, prompt: int, images_KHWC: np.ndarray) -> None:
        """Write the images of a prompt, for people."""
        for entry, image_HWC in zip(self._entries(prompt, len(images_KHWC)), images_KHWC, strict=True):
            save_png(self.images / entry.image, Image.fromarray(image_HWC))

    def write_trajectory(
        self, prompt: int, trajectory: StoredTrajectory | StoredImages, rewards: Rewards | None
    ) -> None:
        """Write the trajectory of a prompt, or its end alone, the last of its files."""
        said = {} if rewards is None else {k: v for k, v in rewards._asdict().items() if v is not None}
        buffer = io.BytesIO()
        stored = {name: value for name, value in trajectory._asdict().items() if value is not None}
        np.savez(buffer, **stored, **said)
        write_whole(self._file(prompt), buffer.getvalue())

    def read_trajectory(
        self, prompt: int, steps: int, candidates: int, beginnings: int, *, with_means: bool = False
    ) -> StoredTrajectory:
        """Read the trajectory of a prompt, with S, K and J as given; UserError if it is damaged or of another round."""
        SJ, SK = (steps, beginnings), (steps, candidates)
        shapes = {"x_SJhwC": (*SJ, 0, 0, 0), "next_x_SKhwC": (*SK, 0, 0, 0), "log_prob_SK": SK}
        if with_means:
            shapes["mean_SJhwC"] = shapes["x_SJhwC"]
        found = self._read(prompt, shapes)
        sizes = {x.shape[2:] for x in found.values() if x.ndim == 5}
        if len(sizes) > 1 or not all(np.isfinite(x).all() for x in found.values()):
            raise self._damaged(prompt, "its numbers are not finite, or its latents differ in size")
        return StoredTrajectory(**found)

    def read_latents(self, prompt: int, candidates: int) -> np.ndarray:
        """Read the clean latents of a prompt, [K, h, w, C]; UserError if they are damaged or of another round."""
        (x0_KhwC,) = self._read(prompt, {"x0_KhwC": (candidates, 0, 0, 0)}).values()
        if not np.isfinite(x0_KhwC).all():
            raise self._damaged(prompt, "its numbers are not finite")
        return x0_KhwC

    def read_rewards(
        self, shown: tuple[int, int], steps: tuple[int, int, int] | None, watched: tuple[int, int] | None = None
    ) -> list[Rewards]:
        """Read the rewards of every prompt from the files of the trajectories.

        Args:
            shown: shape K, R of `shown_KR`.
            steps: shape S, K, R of `steps_SKR`; None without branching.
            watched: shape K, W of `watched_KW`; None without watched judges.

        Raises:
            UserError: a file is damaged or belongs to another round.
        """
        shapes: dict[str, tuple[int, ...]] = {"shown_KR": shown}
        shapes |= {} if steps is None else {"steps_SKR": steps}
        shapes |= {} if watched is None else {"watched_KW": watched}
        return [Rewards(**self._read(p, shapes)) for p in range(len(self.prompts))]

    def image_files(self, images_per_prompt: int) -> list[epath.Path]:
        """Return the files of the round's images, prompt after prompt."""
        return [self.images / e.image for p in range(len(self.prompts)) for e in self._entries(p, images_per_prompt)]

    def write_list(self, images_per_prompt: int) -> None:
        """Write `prompts.jsonl`, when all images are there."""
        write_list(self.images, [e for p in range(len(self.prompts)) for e in self._entries(p, images_per_prompt)])

    def write_scores(self, fields: dict[str, Any], shown_PKR: np.ndarray) -> None:
        """Write `fields` and the scores as `[prompt][candidate][judge]`, with null for NaN."""
        scores = [[[None if np.isnan(x) else float(x) for x in said_R] for said_R in said_KR] for said_KR in shown_PKR]
        write_whole(self._scores, json.dumps(fields | {"prompts": self.prompts, "scores": scores}) + "\n")

    def is_scored(self) -> bool:
        """Whether `write_scores` was called."""
        return self._scores.exists()

    def read_scores(self, shape_KR: tuple[int, int]) -> np.ndarray | None:
        """Return the scores [P, K, R] that `write_scores` wrote, with K and R as given; None if there are none yet.

        Raises:
            UserError: the file is damaged or belongs to another round.
        """
        if not self.is_scored():
            return None
        found = read_said(self._scores, self.number)
        scores_PKR = np.array(found["scores"], np.float64)
        if found["prompts"] != self.prompts or scores_PKR.shape[1:] != shape_KR:
            raise UserError(
                f"{self._scores} has other prompts, candidates or judges than round {self.number}. Restore it from a "
                "backup, or start in another --workdir"
            )
        return scores_PKR

    def feedback(self) -> list[epath.Path]:
        """Return the files with scores by people."""
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
        """Read arrays of these shapes from the prompt's file; 0 stands for any size."""
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
            if np.isinf(array).any():  # NaN stands for a reward that is not known
                raise self._damaged(prompt, f"{name} contains an infinite number")
        return found

    def _damaged(self, prompt: int, problem: str) -> UserError:
        return UserError(
            f"{self._file(prompt)} cannot be read ({problem}). Restore it from a backup. Without one, remove the "
            f"file and run again to sample it anew, if round {self.number} is not trained on yet; otherwise start in "
            "another --workdir"
        )
