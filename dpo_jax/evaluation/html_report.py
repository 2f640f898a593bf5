"""The report of an evaluation: one HTML file that holds its tables, plots and images, and needs nothing else."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from etils import epath
from matplotlib.figure import Figure
from PIL import Image

from dpo_jax.data.images import read_image
from dpo_jax.evaluation.compare import Contest, Scores
from dpo_jax.files import write_whole

PIXELS = 256
"""Images are shown no larger than this, and take no more room than they need for it."""
CASES = 6
"""Of the best, of the worst, and of neither."""
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
"""Paul Tol's bright scheme, which the colour-blind can tell apart."""
CURVES = {
    "train/loss": "loss",
    "pair/accuracy": "accuracy on the batches' pairs",
    "validation/pair_accuracy": "accuracy on held-out pairs",
    "reward/margin": "margin of the implicit reward",
}
Metrics = Sequence[Mapping[str, float]]
"""Rows of a run's metrics.jsonl."""


def write_report(
    path: epath.PathLike,
    result: Mapping[str, Any],
    contest: Contest,
    scores: Scores,
    settings: Mapping[str, Any],
    curves: Mapping[str, Metrics] | None = None,
) -> None:
    """Writes the report, whole or not at all.

    Args:
        path: of the HTML file.
        result: what `compare.compare` returned.
        contest: what was judged.
        scores: by all judges, of all models.
        settings: what the images were made with, to be shown.
        curves: for each run whose training is to be shown its metrics.
    """
    loader = jinja2.FileSystemLoader(str(epath.Path(__file__).parent))
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": lambda share: f"{share:.1%}", "number": lambda value: f"{value:.4g}"}
    write_whole(
        path,
        environment.get_template("report.html").render(
            result=result,
            settings=settings,
            names=list(contest.images),
            categories=contest.categories,
            plots={judge: _plots(result["judges"][judge], scores[judge]) for judge in scores},
            cases={judge: _cases(contest, scores[judge]) for judge in scores},
            curves=_curve_plots(curves or {}),
        ),
    )


def _plots(judged: Mapping[str, Any], scores: Mapping[str, np.ndarray]) -> list[str]:
    return [_win_rate_plot(judged["win_rates"]), _histogram(scores)]


def _win_rate_plot(rows: Sequence[Mapping[str, Any]]) -> str:
    figure = Figure(figsize=(5, 0.8 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(rows):
        error = [[row["rate"] - row["low"]], [row["high"] - row["rate"]]]
        axes.errorbar(row["rate"], y, xerr=error, fmt="o", capsize=4, color=COLOURS[y % len(COLOURS)])
    axes.axvline(0.5, color="grey", linewidth=1, linestyle="--")
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5), xlabel="win rate, 95% interval over prompts")
    axes.set_yticks(range(len(rows)), [f"{row['of']} over {row['over']}" for row in rows])
    return _svg(figure)


def _histogram(scores: Mapping[str, np.ndarray]) -> str:
    figure = Figure(figsize=(5, 2.6), layout="constrained")
    axes = figure.subplots()
    bins = np.histogram_bin_edges(np.concatenate(list(scores.values())), bins=30)
    for colour, (name, scores_N) in zip(COLOURS, scores.items(), strict=False):
        axes.hist(scores_N, bins=bins.tolist(), histtype="step", linewidth=1.6, color=colour, label=name)
    axes.set(xlabel="score", ylabel="images")
    axes.legend(frameon=False)
    return _svg(figure)


def _curve_plots(curves: Mapping[str, Metrics]) -> list[str]:
    found = [name for name in CURVES if any(name in row for rows in curves.values() for row in rows)]
    plots = []
    for metric in found:
        figure = Figure(figsize=(5, 2.6), layout="constrained")
        axes = figure.subplots()
        for colour, (run, rows) in zip(COLOURS, curves.items(), strict=False):
            points = [(row["step"], row[metric]) for row in rows if metric in row]
            axes.plot(*np.array(points).reshape(-1, 2).T, ".-", color=colour, label=run)
        axes.set(xlabel="step", ylabel=CURVES[metric])
        axes.legend(frameon=False)
        plots.append(_svg(figure))
    return plots


def _cases(contest: Contest, scores: Mapping[str, np.ndarray]) -> dict[str, list[dict[str, Any]]]:
    """Where the last model is furthest ahead of the first, where furthest behind, and others; of a prompt one each."""
    first, *_, last = scores
    lead_N = scores[last] - scores[first]
    spread = np.random.default_rng(0).permutation(len(lead_N))
    orders = {
        f"{last} furthest ahead of {first}": (np.argsort(-lead_N, kind="stable"), lead_N > 0),
        f"{last} furthest behind {first}": (np.argsort(lead_N, kind="stable"), lead_N < 0),
        "drawn by lot": (spread, np.full(len(lead_N), True)),
    }
    cases = {}
    for title, (order, is_such_N) in orders.items():
        _, firsts = np.unique(contest.prompt_N[order], return_index=True)
        chosen = [n for n in order[np.sort(firsts)] if is_such_N[n]][:CASES]
        if chosen:
            cases[title] = [_case(contest, scores, int(n)) for n in chosen]
    return cases


def _case(contest: Contest, scores: Mapping[str, np.ndarray], n: int) -> dict[str, Any]:
    images = [
        {"model": name, "score": float(scores[name][n]), "source": _data_url(files[n])}
        for name, files in contest.images.items()
    ]
    return {"prompt": contest.prompts[contest.prompt_N[n]].text, "images": images}


def _data_url(path: epath.Path) -> str:
    image = Image.fromarray(read_image(path))
    small = max(image.size) <= PIXELS / 2
    image.thumbnail((PIXELS, PIXELS))
    if small:  # a tiny model's, whose pixels one wants to see
        scale = PIXELS // 2 // max(image.size)
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    data = io.BytesIO()
    image.save(data, "PNG" if small else "JPEG", **({} if small else {"quality": 88}))
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(data.getvalue()).decode()}"


def _svg(figure: Figure) -> str:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    data = io.BytesIO()
    figure.savefig(data, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(data.getvalue()).decode()}"
