"""`result.json`: the scores of each round, beside the images and UNet evaluations that they took."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dpo_jax.files import write_whole
from dpo_jax.rounds.config import RoundSizes
from dpo_jax.rounds.folder import read_said
from dpo_jax.rounds.guard import RoundFigures, Verdict

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
            "watched_judges": list(online.watched_judges),
            "a_round": {"images": plan.images, "unet_evaluations": plan.evaluations, "updates": plan.updates},
        }
        self._rounds: list[dict[str, Any]] = []
        self._history: list[RoundFigures] = []

    def read(self, last: int) -> Sequence[RoundFigures]:
        """Return the figures of rounds 0 to `last`."""
        for number in range(len(self._rounds), last + 1):
            found = read_said(self._workdir / "rounds" / f"{number:05d}" / "scores.json", number)
            self._rounds.append(_round(found, number, self._plan))
            self._history.append(_figures(found))
        return self._history

    def row(self, number: int) -> Mapping[str, Any]:
        """Return what `result.json` says about a round that was read."""
        return self._rounds[number]

    def write(self, verdict: Verdict | None) -> None:
        """Write the scores of the rounds that `read` has read, and the conclusions from them, if there are judges.

        `images`, `unet_evaluations` and `updates` count what came before the round's images were drawn, so that the
        scores are those of the policy which these have made. An evaluation is one image at one timestep by one network,
        guided or not; backward passes are not counted.
        """
        fields = self._fields | {"rounds": self._rounds}
        if verdict:
            fields["best"] = {"round": verdict.best, "step": verdict.best * self._plan.updates}
            fields["stopped"] = verdict.stop or None
        write_whole(self._workdir / "result.json", json.dumps(fields, indent=2) + "\n")


def _round(found: Mapping[str, Any], number: int, plan: RoundSizes) -> dict[str, Any]:
    row = {
        "round": number,
        "images": number * plan.images,
        "unet_evaluations": number * plan.evaluations,
        "updates": number * plan.updates,
        "scores": _summaries(found["judges"], found["scores"]),
    }
    if "watched" in found:
        row["watched"] = _summaries(found["watched_judges"], found["watched"])
    diversity = _figures(found).diversity_P
    if diversity is not None:
        row["diversity"] = float(np.nanmean(diversity))
    return row | ({"drift": found["drift"]} if "drift" in found else {})


def _summaries(judges: Sequence[str], scores: Sequence[Any]) -> dict[str, dict[str, float]]:
    scores_NR = np.array(scores, np.float64).reshape(-1, len(judges))
    return {
        judge: {"mean": float(np.nanmean(scores_N)), "std": float(np.nanstd(scores_N)), "count": int(counted)}
        for judge, scores_N, counted in zip(judges, scores_NR.T, (~np.isnan(scores_NR)).sum(axis=0), strict=True)
    }


def _figures(found: Mapping[str, Any]) -> RoundFigures:
    """Return the figures of a round by prompt, from what `read_said` returned."""

    def by_judge(scores: str, judges: str) -> dict[str, np.ndarray]:
        means_PR = np.array([_known_mean(said_KR) for said_KR in np.array(found[scores], np.float64)])
        return dict(zip(found[judges], means_PR.T, strict=True))

    diversity_P = np.array(found.get("diversity", []), np.float64)
    return RoundFigures(
        found["prompts"],
        by_judge("scores", "judges"),
        by_judge("watched", "watched_judges") if "watched" in found else {},
        diversity_P if (~np.isnan(diversity_P)).any() else None,
    )


def _known_mean(said_KR: np.ndarray) -> np.ndarray:
    """Return the mean of each judge's known scores [R]; NaN where none is known."""
    known_KR = ~np.isnan(said_KR)
    sums_R, counts_R = np.where(known_KR, said_KR, 0).sum(axis=0), known_KR.sum(axis=0)
    return np.where(counts_R > 0, sums_R / np.maximum(counts_R, 1), np.nan)
