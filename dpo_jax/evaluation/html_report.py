"""The report of an evaluation: one HTML file with its tables, plots and images, which needs no other file.

Axes: N images of each model.
"""

import base64
import functools
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np
from etils import epath
from PIL import Image

from dpo_jax.data.images import read_image
from dpo_jax.evaluation import plots
from dpo_jax.evaluation.compare import Contest, Scores
from dpo_jax.evaluation.winrate import verdict, win_rate_in
from dpo_jax.files import write_whole

PIXELS = 256
"""The largest side of an image in the report, in CSS pixels and as it is stored."""
CASES = 6
"""Prompts shown of each kind of case."""


class Shown(NamedTuple):
    """One image of a case."""

    model: str
    score: float
    source: str
    """A data URL."""


class Case(NamedTuple):
    """A prompt, and the models' images of it for one seed."""

    prompt: str
    images: list[Shown]


class Pair(NamedTuple):
    """Cases of two models: by title."""

    of: str
    over: str
    cases: dict[str, list[Case]]


def write_report(
    path: epath.PathLike,
    result: Mapping[str, Any],
    contest: Contest,
    scores: Scores,
    settings: Mapping[str, Any],
    curves: Mapping[str, plots.Metrics] | None = None,
) -> None:
    """Write the report, whole or not at all.

    Args:
        path: of the HTML file.
        result: what `compare.compare` returned; with `sources`, `version`, `date` and `pair_accuracies` of result.json
            where these are known.
        contest: the images that were judged.
        scores: of all judges and models.
        settings: the settings that the images were drawn with, to be shown.
        curves: the metrics of training runs, by name; a run with a model's name is shown in its colour.
    """
    curves = curves or {}
    colours = plots.colours([*contest.images, *curves])
    loader = jinja2.FileSystemLoader(str(epath.Path(__file__).parent))
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": lambda share: f"{share:.1%}", "number": lambda value: f"{value:.4g}"}
    show = functools.cache(_data_url)  # an image may be shown for several judges and pairs
    write_whole(
        path,
        environment.get_template("report.html").render(
            result=result,
            settings={name: value for name, value in settings.items() if name != "models" and value not in ("", None)},
            fingerprints=settings.get("models", {}),
            names=list(contest.images),
            categories=contest.categories,
            colours=colours,
            verdicts=_verdicts(result),
            plots={
                judge: [
                    plots.win_rates(judge, judged["win_rates"], colours),
                    plots.histogram(judge, scores[judge], colours),
                ]
                for judge, judged in result["judges"].items()
            },
            pairs={judge: _pairs(contest, scores[judge], show) for judge in scores},
            curves=plots.curves(curves, colours),
        ),
    )


def _verdicts(result: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each judge and pair of models; the first one is about the second model over the first."""
    return [
        verdict(row["of"], row["over"], win_rate_in(row), judge)
        for judge, judged in result["judges"].items()
        for row in judged["win_rates"]
    ]


def _pairs(contest: Contest, scores: Mapping[str, np.ndarray], show: Callable[[epath.Path], str]) -> list[Pair]:
    """Return the cases of each two models: where the later one is furthest ahead, furthest behind, and closest."""
    pairs = []
    for over, of in itertools.combinations(scores, 2):
        lead_N = scores[of] - scores[over]
        kinds = {
            f"Best for {of}": (-lead_N, lead_N > 0),
            f"Worst for {of}": (lead_N, lead_N < 0),
            "Most contested": (abs(lead_N), np.full(len(lead_N), True)),
        }
        cases = {}
        for title, (key_N, is_such_N) in kinds.items():
            chosen = [n for n in _one_per_prompt(contest, key_N) if is_such_N[n]][:CASES]
            if chosen:
                cases[title] = [_case(contest, scores, (over, of), n, show) for n in chosen]
        pairs.append(Pair(of, over, cases))
    return pairs


def _one_per_prompt(contest: Contest, key_N: np.ndarray) -> list[int]:
    """Return the image with the smallest key of each prompt, in the order of the keys."""
    order = np.argsort(key_N, kind="stable")
    _, firsts = np.unique(contest.prompt_N[order], return_index=True)
    return [int(n) for n in order[np.sort(firsts)]]


def _case(
    contest: Contest,
    scores: Mapping[str, np.ndarray],
    models: Sequence[str],
    n: int,
    show: Callable[[epath.Path], str],
) -> Case:
    images = [Shown(name, float(scores[name][n]), show(contest.images[name][n])) for name in models]
    return Case(contest.prompts[contest.prompt_N[n]].text, images)


def _data_url(path: epath.Path) -> str:
    image = Image.fromarray(read_image(path))
    small = max(image.size) <= PIXELS / 2
    image.thumbnail((PIXELS, PIXELS))
    if small:  # the image of a tiny model, whose pixels should be seen
        scale = PIXELS // 2 // max(image.size)
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    data = io.BytesIO()
    image.save(data, "PNG" if small else "JPEG", **({} if small else {"quality": 88}))
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(data.getvalue()).decode()}"
