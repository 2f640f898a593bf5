"""`result.json`: the score of each round, against the images that judges saw and the UNet evaluations it took."""

import json
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dpo_jax.files import write_whole
from dpo_jax.rounds.config import Plan


def write_result(workdir: epath.PathLike, config: ConfigDict, plan: Plan, last: int) -> None:
    """Of the rounds 0 to `last`, by their `scores.json`.

    `images`, `unet_evaluations` and `updates` are what went before the round's images were sampled: its score is that
    of the policy which so much made. An evaluation is one image at one timestep by one network, guided or not; what
    backward passes cost is not in it.
    """
    workdir = epath.Path(workdir)
    rounds = [_round(workdir / "rounds" / f"{number:05d}" / "scores.json", plan) for number in range(last + 1)]
    totals = {"images": plan.images, "unet_evaluations": plan.evaluations, "updates": plan.updates}
    fields = {"method": config.loss.name, "branching": config.online.branching, "a_round": totals, "rounds": rounds}
    write_whole(workdir / "result.json", json.dumps(fields, indent=2) + "\n")


def _round(file: epath.Path, plan: Plan) -> dict[str, Any]:
    found = json.loads(file.read_text())
    scores_NR = np.array(found["scores"], np.float64).reshape(-1, len(found["judges"]))
    number = found["round"]
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
