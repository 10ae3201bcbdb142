"""What notebooks draw with: tables, seeds, curves, steps and pictures of filters, in one look, saved as files.

:mod:`koala_lab.plots.look` has the colours and the names, :mod:`koala_lab.plots.tables` the figures of tables,
:mod:`koala_lab.plots.files` writes PNG, PDF, CSV and JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns  # type: ignore[import-untyped]
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from koala_lab.claims.statistics import mean_and_half_width as interval
from koala_lab.plots.files import drawn, save, versions
from koala_lab.plots.look import LABELS, PALETTE, colour, label, log_y, row_colours, row_markers, setting, style
from koala_lab.plots.tables import gains, judged, table

__all__ = [
    "LABELS", "PALETTE", "FixedLocator", "MaxNLocator", "NullLocator", "colour", "contours", "curves", "drawn",
    "ellipse", "gains", "interval", "judged", "label", "log_y", "plt", "row_colours", "row_markers", "save", "seeds",
    "setting", "sns", "steps", "style", "table", "versions",
]  # fmt: skip

Array = np.ndarray[Any, Any]


def _shade(name: str, colours: Mapping[str, str] | None) -> str:
    return colours[name] if colours else colour(name)


def seeds(
    data: pd.DataFrame,
    *,
    x: str,
    y: str,
    hue: str | None = None,
    order: Sequence[Any] | None = None,
    colours: Mapping[str, str] | None = None,
    log: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draw every seed as a point, beside it the mean and its 95 % t-interval.

    Args:
        data: Tidy results, one row per run.
        x: Column of the categories.
        y: Column of the metric.
        hue: Column of the methods; without it the categories are the methods.
        order: Categories from left to right; default is the order of the data.
        colours: Colour of each method or category where those of :func:`colour` do not tell them apart.
        log: Take mean and interval of the logarithms, for values that are compared by their ratio.
        ax: Where to draw; default is a new figure.

    Returns:
        The axes.
    """
    ax = ax or plt.subplots()[1]
    categories = list(order) if order is not None else list(dict.fromkeys(data[x]))
    methods = list(dict.fromkeys(data[hue])) if hue else [None]
    width = 0.8 / len(methods)
    for m, method in enumerate(methods):
        for c, category in enumerate(categories):
            rows = data[(data[x] == category) & ((data[hue] == method) if hue else True)]
            values = rows[y].to_numpy(dtype=float)
            what = ", ".join(label(str(part)) for part in (method, category) if part is not None)
            centre = c + (m - (len(methods) - 1) / 2) * width
            shade = _shade(str(method if hue else category), colours)
            spread = (np.arange(len(values)) - (len(values) - 1) / 2) * min(0.03, 0.2 / max(len(values), 1)) * width
            ax.plot(centre - 0.1 * width + spread, values, "o", ms=4, alpha=0.6, mew=0, color=shade, gid=what)
            mean, half = interval(np.log(values) if log else values)
            mean, low, high = np.exp([mean, mean - half, mean + half]) if log else (mean, mean - half, mean + half)
            name = label(str(method)) if hue and c == 0 else None
            bar = [[mean - low], [high - mean]]
            ax.errorbar(centre + 0.1 * width, mean, bar, fmt="_", ms=10, lw=2, capsize=4, label=name, color=shade)
    ax.set_xticks(range(len(categories)), [label(str(c)) for c in categories])
    ax.set(xlim=(-0.5, len(categories) - 0.5), ylabel=y.replace("_", " "))
    if hue:
        ax.legend()
    return ax


def curves(
    data: pd.DataFrame,
    *,
    metric: str,
    hue: str = "optimizer",
    colours: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw learning curves: every run thin, the mean over seeds thick.

    Args:
        data: What `Notebook.curves` returns: one row per run, epoch and metric.
        metric: The one to draw.
        hue: Column of the methods.
        colours: As in :func:`seeds`.
        ax: Where to draw; default is a new figure.

    Returns:
        The axes.
    """
    ax = ax or plt.subplots()[1]
    for method, rows in data[data["metric"] == metric].groupby(hue, sort=False):
        shade = _shade(str(method), colours)
        for _, one in rows.groupby("key"):
            ax.plot(one["epoch"], one["value"], lw=0.8, alpha=0.35, color=shade, gid=f"{label(str(method))}: a run")
        mean = rows.groupby("epoch")["value"].mean()
        ax.plot(mean.index, mean.to_numpy(), lw=2, label=label(str(method)), color=shade)
    ax.set(xlabel="epoch", ylabel=metric.replace("_", " "))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend()
    return ax


def steps(
    records: Mapping[str, pd.DataFrame],
    panels: Mapping[str, tuple[str, str, str]],
    *,
    columns: int = 3,
    window: int = 15,
) -> Figure:
    """Draw runs step by step, two quantities per panel on a logarithmic scale: running medians, the first also raw.

    Args:
        records: One row per step by method, with a column ``step``; other columns that are missing are not drawn.
        panels: Title -> column drawn solid, column drawn dashed, unit.
        columns: Panels side by side.
        window: Steps of the running median.

    Returns:
        The figure.
    """
    rows = -(-len(panels) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(3.9 * columns, 3.1 * rows), sharex=True, squeeze=False)
    for ax, (title, (solid, dashed, unit)) in zip(axes.flat, panels.items(), strict=False):
        for method, record in records.items():
            x, smooth = record["step"], record.rolling(window, center=True, min_periods=1).median()
            if solid in record:
                ax.semilogy(x, record[solid], lw=0.6, alpha=0.4, color=colour(method))
                ax.semilogy(x, smooth[solid], lw=2, color=colour(method), label=label(method))
            if dashed in record:
                ax.semilogy(x, smooth[dashed], lw=1.4, ls="--", color=colour(method))
        ax.set(title=title, xlabel="step $k$", ylabel=unit)
        log_y(ax)
    axes.flat[0].legend()
    return fig


def contours(
    ax: Axes, function: Callable[[Array], Array], x: tuple[float, float], y: tuple[float, float], lines: int = 10
) -> None:
    """Draw grey contour lines of a positive function of two variables, evenly spaced in its logarithm.

    Args:
        ax: Where to draw.
        function: Points (N, 2) to values (N,).
        x: Range of the first variable.
        y: Range of the second.
        lines: How many.
    """
    first, second = np.meshgrid(np.linspace(*x, 100), np.linspace(*y, 100))
    values = np.asarray(function(np.stack([first.ravel(), second.ravel()], axis=1))).reshape(first.shape)
    levels = np.geomspace(values.min(), values.max(), lines + 2)[1:-1]
    ax.contour(first, second, values, levels=levels, colors="0.8", linewidths=0.8)
    ax.set(xlim=x, ylim=y)


def ellipse(ax: Axes, mean: Array, covariance: Array, **line: Any) -> None:
    """Draw the points two standard deviations from the mean (2,) of a Gaussian with that covariance (2, 2)."""
    angle = np.linspace(0, 2 * np.pi, 200)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    ax.plot(*(np.asarray(mean)[:, None] + 2 * np.linalg.cholesky(np.asarray(covariance)) @ circle), **line)
