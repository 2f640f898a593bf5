"""Compares models by judges' scores of images of the same prompts: win rates and mean scores with their intervals.

Axes: N images of each model (the n-th images of all models have one prompt and one seed), P prompts.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from dpo_jax.errors import UserError
from dpo_jax.evaluation.drift import diversity, frechet_distance
from dpo_jax.evaluation.winrate import mean_over_prompts, rate_over_prompts
from dpo_jax.sampling.image_folder import Entry, read_list
from dpo_jax.sampling.prompts import Prompt, distinct

Scores = Mapping[str, Mapping[str, np.ndarray]]
"""scores_N by judge and by model."""


class Contest(NamedTuple):
    """Images of the same prompts by all models, matched one to one."""

    prompts: list[Prompt]
    prompt_N: np.ndarray
    """The index of each image's prompt."""
    images: dict[str, list[epath.Path]]
    """The N files of each model."""
    left_out: int
    """The number of prompts that some model has no image of."""

    @property
    def captions(self) -> list[str]:
        return [self.prompts[p].text for p in self.prompt_N]

    @property
    def categories(self) -> list[str]:
        """The categories of the prompts, in their order."""
        return list(dict.fromkeys(prompt.category for prompt in self.prompts if prompt.category))

    def by_prompt(self, values_N: np.ndarray, category: str = "") -> list[np.ndarray]:
        """Return the values of each prompt, or only of the prompts in one category."""
        chosen = [p for p, prompt in enumerate(self.prompts) if not category or prompt.category == category]
        return [values_N[self.prompt_N == p] for p in chosen]


def match(folders: Mapping[str, epath.PathLike], prompts: Sequence[Prompt] = ()) -> Contest:
    """Match the images of these folders, by model: those that have a counterpart in every other folder.

    Images of one prompt are matched in the order of their seeds; images without a counterpart are left out.

    Args:
        folders: read by `image_folder.read_list`.
        prompts: the prompts to compare, with their categories. Default: all prompts of the first folder. Since images
            may be named by prompts' numbers, lines that repeat a prompt belong here too.

    Raises UserError where fewer than two prompts are left, for which there is no interval.
    """
    listed = {name: _by_prompt(read_list(folder, prompts)) for name, folder in folders.items()}
    first = next(iter(listed.values()))
    wanted = distinct(prompts) or [Prompt(text, entries[0].category) for text, entries in first.items()]
    common = [prompt for prompt in wanted if all(prompt.text in entries for entries in listed.values())]
    if len(common) < 2:
        found = f"only one prompt in common ({common[0].text!r})" if common else "no prompt in common"
        among = f" among the {len(prompts)} of --prompts" if prompts else ""
        raise UserError(
            f"{' and '.join(map(str, folders.values()))} have {found}{among}; confidence intervals need two or more"
        )
    counts = [min(len(entries[prompt.text]) for entries in listed.values()) for prompt in common]
    images = {
        name: [
            epath.Path(folders[name]) / entry.image
            for prompt, count in zip(common, counts, strict=True)
            for entry in entries[prompt.text][:count]
        ]
        for name, entries in listed.items()
    }
    return Contest(common, np.repeat(np.arange(len(common)), counts), images, len(wanted) - len(common))


def _by_prompt(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for entry in sorted(entries, key=lambda entry: entry.seed):
        found.setdefault(entry.prompt, []).append(entry)
    return found


def compare(contest: Contest, scores: Scores, features: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the figures of `result.json`.

    Args:
        contest: the images.
        scores: of all judges and models.
        features: features_ND by model, for the distances of `drift`.
    """
    base = next(iter(contest.images))
    models = {
        name: {
            "diversity": diversity(of_model, contest.prompt_N),
            "distance_to_first": frechet_distance(of_model, features[base]),
        }
        for name, of_model in features.items()
    }
    return {
        "prompts": len(contest.prompts),
        "prompts_left_out": contest.left_out,
        "images": len(contest.prompt_N),
        "models": models,
        "judges": {judge: _judged(contest, of_judge) for judge, of_judge in scores.items()},
    }


def _judged(contest: Contest, scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return each model's mean score, also by category, and each later model's win rate over each earlier one."""
    models: dict[str, dict[str, Any]] = {}
    for name, scores_N in scores.items():
        by_category = {category: contest.by_prompt(scores_N, category) for category in contest.categories}
        means = {category: _mean(values) for category, values in by_category.items() if len(values) > 1}
        models[name] = _mean(contest.by_prompt(scores_N)) | {"median": float(np.median(scores_N)), "categories": means}
        if means:  # as GenEval reports its overall score
            models[name]["mean_of_categories"] = float(np.mean([of_category["mean"] for of_category in means.values()]))
    return {
        "models": models,
        "win_rates": [
            {"of": of, "over": over} | _win_rate(contest, scores[of], scores[over])
            for over, of in itertools.combinations(scores, 2)
        ],
    }


def _mean(values: Sequence[np.ndarray]) -> dict[str, float]:
    mean, low, high = mean_over_prompts(values)
    return {"mean": mean, "low": low, "high": high}


def _win_rate(contest: Contest, scores_N: np.ndarray, other_N: np.ndarray) -> dict[str, Any]:
    wins_N = (1 + np.sign(scores_N - other_N)) / 2
    by_category = {category: contest.by_prompt(wins_N, category) for category in contest.categories}
    return rate_over_prompts(contest.by_prompt(wins_N))._asdict() | {
        "categories": {
            category: rate_over_prompts(wins)._asdict() for category, wins in by_category.items() if len(wins) > 1
        }
    }
