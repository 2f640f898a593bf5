"""`result.json`: the scores of each round, beside the images and UNet evaluations that they took."""

import json
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dpo_jax.files import write_whole
from dpo_jax.rounds.config import RoundSizes
from dpo_jax.rounds.folder import read_said

FIELDS = ("advantage", "update_by", "reference", "candidates", "branching", "best_and_worst", "latent_judge")
"""The fields of `config.online` in which methods differ."""


class Result:
    """Writes `result.json` from the `scores.json` of the rounds, each of which is read once."""

    def __init__(self, workdir: epath.PathLike, config: ConfigDict, plan: RoundSizes):
        self._workdir, self._plan = epath.Path(workdir), plan
        online = config.online
        self._fields = {
            "method": config.loss.name,
            **{name: online[name] for name in FIELDS},
            "judges": list(online.judges),
            "a_round": {"images": plan.images, "unet_evaluations": plan.evaluations, "updates": plan.updates},
        }
        self._rounds: list[dict[str, Any]] = []

    def write(self, last: int) -> None:
        """Write the scores of rounds 0 to `last`.

        `images`, `unet_evaluations` and `updates` count what came before the round's images were drawn, so that the
        scores are those of the policy which these have made. An evaluation is one image at one timestep by one network,
        guided or not; backward passes are not counted.
        """
        for number in range(len(self._rounds), last + 1):
            file = self._workdir / "rounds" / f"{number:05d}" / "scores.json"
            self._rounds.append(_round(file, number, self._plan))
        fields = self._fields | {"rounds": self._rounds}
        write_whole(self._workdir / "result.json", json.dumps(fields, indent=2) + "\n")


def _round(file: epath.Path, number: int, plan: RoundSizes) -> dict[str, Any]:
    found = read_said(file, number)
    scores_NR = np.array(found["scores"], np.float64).reshape(-1, len(found["judges"]))
    return {
        "round": number,
        "images": number * plan.images,
        "unet_evaluations": number * plan.evaluations,
        "updates": number * plan.updates,
        "scores": {
            judge: {"mean": float(np.nanmean(scores_N)), "std": float(np.nanstd(scores_N)), "count": int(counted)}
            for judge, scores_N, counted in zip(
                found["judges"], scores_NR.T, (~np.isnan(scores_NR)).sum(axis=0), strict=True
            )
        },
    }
