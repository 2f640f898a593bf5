"""The plots of an evaluation's report, as SVG in data URLs with a text for those who cannot see them.

A model has one colour in all of them.
"""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpo_jax.evaluation.winrate import describe_win_rate, win_rate_in

COLOURS = (
    *("#4477aa", "#ee6677", "#228833", "#aa3377", "#66ccee", "#ccbb44"),
    *("#332288", "#cc6677", "#117733", "#882255", "#44aa99", "#999933"),
)
"""Paul Tol's bright and muted schemes, which people with colour blindness can tell apart."""
CURVES: dict[str, tuple[str, ...]] = {
    "loss": ("train/loss",),
    "accuracy on training pairs": ("pair/accuracy",),
    "accuracy on held-out pairs": ("validation/pair_accuracy",),
    "margin of the implicit reward": ("reward/margin",),
    "error on training pairs": ("error/winner", "error/loser"),
    "error on held-out pairs": ("validation/error_winner", "validation/error_loser"),
}
"""Metrics that share a plot, by its title."""
Metrics = Sequence[Mapping[str, float]]
"""Rows of a run's metrics.jsonl."""


class Plot(NamedTuple):
    """An image for a page."""

    source: str
    """A data URL."""
    text: str
    """What it shows, in words."""


def colours(names: Sequence[str]) -> dict[str, str]:
    """Return a colour for each name; after twelve names they repeat."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(names))}


def win_rates(judge: str, rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> Plot:
    """Plot win rates with their intervals, each in the colour of the model whose win rate it is."""
    figure = Figure(figsize=(5, 0.8 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(rows):
        error = [[row["rate"] - row["low"]], [row["high"] - row["rate"]]]
        axes.errorbar(row["rate"], y, xerr=error, fmt="o", capsize=4, color=colours[row["of"]])
    axes.axvline(0.5, color="grey", linewidth=1, linestyle="--")
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5), xlabel="win rate, 95% confidence interval")
    axes.set_yticks(range(len(rows)), [_plain(f"{row['of']} over {row['over']}") for row in rows])
    said = "; ".join(describe_win_rate(row["of"], row["over"], win_rate_in(row)) for row in rows)
    return _plot(figure, f"Win rates by {judge}: {said}.")


def histogram(judge: str, scores: Mapping[str, np.ndarray], colours: Mapping[str, str]) -> Plot:
    """Plot the distribution of each model's scores."""
    figure = Figure(figsize=(5, 2.6), layout="constrained")
    axes = figure.subplots()
    bins = np.histogram_bin_edges(np.concatenate(list(scores.values())), bins=30).tolist()
    for name, scores_N in scores.items():
        axes.hist(scores_N, bins=bins, histtype="step", linewidth=1.6, color=colours[name], label=_plain(name))
    axes.set(xlabel=f"score by {judge}", ylabel="images")
    axes.legend(frameon=False)
    medians = "; ".join(f"{name}: median {np.median(scores_N):.4g}" for name, scores_N in scores.items())
    return _plot(figure, f"Distribution of the scores by {judge}. {medians}.")


def curves(metrics: Mapping[str, Metrics], colours: Mapping[str, str]) -> list[Plot]:
    """Plot what is there of `CURVES`, for all runs together; losers are dashed."""
    plots = []
    for title, names in (CURVES | _of_samples(metrics)).items():
        figure = Figure(figsize=(5, 2.6), layout="constrained")
        axes = figure.subplots()
        last, relative = [], False
        for run, rows in metrics.items():
            for metric, style in zip(names, ("-", "--"), strict=False):
                label = f"{run}, {re.split('[/_]', metric)[-1]}" if len(names) > 1 else run
                points, is_relative = _points(rows, metric)
                if points:
                    relative |= is_relative
                    last.append(f"{label}: {points[-1][1]:.4g} at step {points[-1][0]:.0f}")
                    axes.plot(*zip(*points, strict=True), f".{style}", color=colours[run], label=_plain(label))
        if last:
            if relative:
                axes.axhline(0, color="grey", linewidth=1)
            _label(axes, f"{title}, minus the reference's" if relative else title)
            plots.append(_plot(figure, f"Training curves: {title} by step. {'; '.join(last)}."))
    return plots


def _of_samples(metrics: Mapping[str, Metrics]) -> dict[str, tuple[str, ...]]:
    """Return the plots of the scores that judges gave to the image grids of training, as in `CURVES`."""
    names = dict.fromkeys(name for rows in metrics.values() for row in rows for name in row)
    judges = dict.fromkeys(name.split("/")[1] for name in names if name.startswith("samples/"))
    return {
        f"mean score of the samples in training by {judge}": (f"samples/{judge}/policy", f"samples/{judge}/{compared}")
        for judge in judges
        for compared in ("reference", "base")
        if f"samples/{judge}/{compared}" in names
    }


def _points(rows: Metrics, metric: str) -> tuple[list[tuple[float, float]], bool]:
    """Return (step, value) of a metric, and whether it is relative: the reference's value subtracted, if recorded."""
    reference = re.sub(r"(error[/_])", r"\1reference_", metric)
    pairs = [
        (row["step"], row[metric] - row[reference])
        for row in rows
        if metric != reference and {metric, reference} <= row.keys()
    ]
    return pairs or [(row["step"], row[metric]) for row in rows if metric in row], bool(pairs)


def _label(axes: Axes, title: str) -> None:
    axes.set_xlabel("step")
    axes.set_title(title, fontsize="medium")
    axes.legend(frameon=False)


def _plain(name: str) -> str:
    """The name without what Matplotlib would read as mathematics, or as a label to leave out."""
    return f" {name}".replace("$", r"\$")


def _plot(figure: Figure, text: str) -> Plot:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    data = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "dpo_jax"}):  # or the names of clipping paths would be random
        figure.savefig(data, format="svg", metadata={"Date": None})
    return Plot(f"data:image/svg+xml;base64,{base64.b64encode(data.getvalue()).decode()}", text)
