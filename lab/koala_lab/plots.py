"""One look for every figure: a colour per method, every seed visible, files that come out the same twice."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns  # type: ignore[import-untyped]
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from PIL import Image

from koala_lab.claims.statistics import mean_and_half_width as interval
from koala_lab.files import write_bytes

Array = np.ndarray[Any, Any]

DPI = 100  # inline pictures stay readable and small

# Colour-blind safe; one method keeps one colour in all figures of all papers.
_SAFE = list(sns.color_palette("colorblind").as_hex())
PALETTE: dict[str, str] = {
    "koala_m": _SAFE[0],
    "koala_v": _SAFE[9],
    "koala_plus_plus": _SAFE[4],
    "meka": _SAFE[2],
    "apollo": _SAFE[3],
    "apollow": "#e7298a",
    "sgd": _SAFE[7],
    "adam": _SAFE[1],
    "adamw": _SAFE[5],
    "adabelief": _SAFE[8],
    "lookahead": _SAFE[6],
    "radam": "#882255",
    "adahessian": "#332288",
    "paper": "#000000",
}
LABELS = {
    "koala_m": "KOALA-M",
    "koala_v": "KOALA-V",
    "koala_plus_plus": "KOALA++",
    "meka": "MEKA",
    "apollo": "APOLLO",
    "apollo_b0": "APOLLO, B = 0",
    "apollow": "ApolloW",
    "sgd": "SGD",
    "sgd_equivalent": "SGD, equivalent rate",
    "adam": "Adam",
    "adamw": "AdamW",
    "adabelief": "AdaBelief",
    "adabelief_l2": "AdaBelief, L2",
    "adabelief_eps_1e_8": "AdaBelief, ε = 1e-8",
    "adabelief_eps_1e_16": "AdaBelief, ε = 1e-16",
    "radam": "RAdam",
    "adahessian": "AdaHessian",
    "sdlbfgs": "SdLBFGS",
    "lookahead": "Lookahead",
    "paper": "paper",
}


def style() -> None:
    """Set the project's matplotlib style for this process."""
    sns.set_theme(
        context="notebook",
        style="whitegrid",
        rc={
            "figure.dpi": DPI,
            "figure.figsize": (6.0, 3.6),
            "figure.constrained_layout.use": True,
            "axes.titlesize": "medium",
            "legend.frameon": False,
            "pdf.fonttype": 42,
            "svg.hashsalt": "koala",
        },
    )


def colour(method: str) -> str:
    """Return the colour of a method; one without an entry gets the same spare colour everywhere."""
    spare = sns.color_palette("tab20").as_hex()
    return str(PALETTE.get(method, spare[zlib.crc32(method.encode()) % len(spare)]))


def _shade(name: str, colours: Mapping[str, str] | None) -> str:
    return colours[name] if colours else colour(name)


def log_y(ax: Axes) -> None:
    """Make the y axis logarithmic, with at least three plain numbers on it, in steps of about 10, 2 or 1.3.

    Args:
        ax: An axes on which all is drawn: the ticks are those of its present limits.
    """
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    first, last = math.floor(math.log10(low)), math.floor(math.log10(high))
    decades = range(first, last + 1, 1 + (last - first) // 8)
    for digits in ((1,), (1, 2, 5), (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)):
        ticks = [digit * 10.0**k for k in decades for digit in digits if low <= digit * 10.0**k <= high]
        if len(ticks) >= 3:
            break
    ax.yaxis.set(major_locator=FixedLocator(ticks), major_formatter="{x:g}", minor_locator=NullLocator())


def label(method: str) -> str:
    """Return the name of a method as the papers print it."""
    return LABELS.get(method, method)


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
            centre = c + (m - (len(methods) - 1) / 2) * width
            shade = _shade(str(method if hue else category), colours)
            spread = (np.arange(len(values)) - (len(values) - 1) / 2) * min(0.03, 0.2 / max(len(values), 1)) * width
            ax.plot(centre - 0.1 * width + spread, values, "o", ms=4, alpha=0.6, mew=0, color=shade)
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
            ax.plot(one["epoch"], one["value"], lw=0.8, alpha=0.35, color=shade)
        mean = rows.groupby("epoch")["value"].mean()
        ax.plot(mean.index, mean.to_numpy(), lw=2, label=label(str(method)), color=shade)
    ax.set(xlabel="epoch", ylabel=metric.replace("_", " "))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend()
    return ax


_STRONG = [*_SAFE[:5], "#882255", _SAFE[7], "#332288", _SAFE[9]]  # pink and yellow are too pale for thin lines
_MARKERS = "osD^vPX<>*"


def row_colours(rows: Sequence[str]) -> dict[str, str]:
    """Return a colour per row of a table, by its place; colour-blind safe for up to nine."""
    wheel = _STRONG if len(rows) <= len(_STRONG) else sns.color_palette("husl", len(rows)).as_hex()
    return dict(zip(rows, wheel, strict=False))


def row_markers(rows: Sequence[str]) -> dict[str, str]:
    """Return a marker per row of a table, by its place, so that colour alone tells no rows apart."""
    return {row: _MARKERS[place % len(_MARKERS)] for place, row in enumerate(rows)}


def table(
    frame: pd.DataFrame,
    metric: str,
    *,
    curves: pd.DataFrame | None = None,
    curve_metric: str = "train_loss",
    printed: Mapping[str, float] | None = None,
    printed_on: str = "",
    labels: Mapping[str, str] | None = None,
    unit: str = "test error (%)",
    curve_unit: str = "training loss (nats)",
    limit: float | None = None,
    curve_limit: float | None = None,
) -> Figure:
    """Draw a table: its rows from top to bottom, and a line of panels per data set and network.

    From left to right: the paper's printed values as black squares, where there are any; every seed as a point with
    the mean and its 95 % t-interval; the learning curves, where they are given, with the colours and markers of the
    points.

    Args:
        frame: Table of runs, one line per row and run.
        metric: The column to draw.
        curves: What `Notebook.curves` returns.
        curve_metric: Which of them to draw, on a logarithmic axis.
        printed: The paper's values by row, what `Notebook.printed` returns.
        printed_on: The data set and network of these values.
        labels: Names of rows for people.
        unit: What the horizontal axes say.
        curve_unit: What the vertical axis of the curves says.
        limit: Where the horizontal axes end; what lies beyond is a triangle there, and has no interval.
        curve_limit: Losses above it are drawn at it.

    Returns:
        The figure.
    """
    rows, names = list(dict.fromkeys(frame["row"])), labels or {}
    shades, cases = row_colours(rows), list(frame.groupby(["dataset", "model"], sort=False))
    widths = [1.6] * bool(printed) + [2.4] + [2.8] * (curves is not None)
    height = max(2.7, 0.32 * len(rows) + 0.9)
    size = (1.9 * sum(widths), height * len(cases))
    fig, grid = plt.subplots(len(cases), len(widths), figsize=size, width_ratios=widths, squeeze=False)
    for axes, ((dataset, model), case) in zip(grid, cases, strict=True):
        panels = list(axes)
        if printed:
            _printed(panels.pop(0), printed, rows)
            axes[0].set(xlabel=unit, title=f"paper: {printed_on}" if printed_on else "paper")
        _dots(panels[0], case, metric, rows, shades, limit)
        panels[0].set(xlabel=unit, title=f"{dataset}, {model}, n = {case['seed'].nunique()}")
        axes[0].set_yticks(range(len(rows)), [names.get(row, row) for row in rows])
        if curves is not None:
            one = curves[(curves["dataset"] == dataset) & (curves["model"] == model)]
            drawn = one[one["metric"] == curve_metric]
            _mean_curves(panels[1], drawn.assign(value=drawn["value"].clip(upper=curve_limit)), shades)
            panels[1].set(xlabel="epoch", ylabel=curve_unit)
    return fig


def _row_axis(ax: Axes, rows: Sequence[str]) -> None:
    ax.set(ylim=(len(rows) - 0.5, -0.5), yticks=range(len(rows)), yticklabels=[])


def _printed(ax: Axes, printed: Mapping[str, float], rows: Sequence[str]) -> None:
    """Draw the paper's numbers of the rows that it has."""
    known = [(printed[row], place) for place, row in enumerate(rows) if row in printed]
    ax.plot(*zip(*known, strict=True), "s", color=PALETTE["paper"], ms=6)
    ax.margins(x=0.15)
    _row_axis(ax, rows)


def _dots(
    ax: Axes, case: pd.DataFrame, metric: str, rows: Sequence[str], shades: Mapping[str, str], limit: float | None
) -> None:
    """Draw every seed, and the mean of each row with its interval."""
    end = math.inf if limit is None else limit
    markers = row_markers(rows)
    for place, row in enumerate(rows):
        values = case.loc[case["row"] == row, metric].to_numpy(dtype=float)
        inside, beyond = values[values <= end], values[values > end]
        look: dict[str, Any] = {"marker": markers[row], "ls": "", "ms": 5, "alpha": 0.6, "mew": 0, "color": shades[row]}
        ax.plot(inside, np.full(len(inside), place + 0.2), **look)
        if len(beyond):  # an empty line that is not clipped would disturb the layout
            ax.plot(np.full(len(beyond), end), np.full(len(beyond), place), ">", ms=7, clip_on=False, color=shades[row])
        else:
            mean, half = interval(values)
            ax.errorbar(mean, place - 0.12, xerr=half, fmt="|", ms=9, lw=2, capsize=3, color=shades[row])
    if limit is not None:
        ax.set_xlim(right=limit)
    _row_axis(ax, rows)


def _mean_curves(ax: Axes, data: pd.DataFrame, shades: Mapping[str, str]) -> None:
    """Draw the mean over the seeds per epoch, one colour and marker per row as in the panel beside it."""
    markers = row_markers(list(shades))
    for row, mine in data.groupby("row", sort=False):
        mean = mine.groupby("epoch")["value"].mean()
        every = 1 + len(mean) // 10
        look: dict[str, Any] = {"marker": markers[str(row)], "markevery": every, "ms": 6, "color": shades[str(row)]}
        ax.plot(mean.index, mean.to_numpy(), lw=1.6, alpha=0.8, **look)
    log_y(ax)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


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


def versions() -> dict[str, str]:
    """Return the versions that a figure depends on."""
    packages = ("koala-lib", "torch", "numpy", "matplotlib")
    return {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}}


def drawn(fig: Figure) -> pd.DataFrame:
    """Return the points, lines and bars of a figure: ``panel``, ``series`` (its label, if it has one), ``x``, ``y``.

    >>> fig, ax = plt.subplots()
    >>> _ = ax.plot([1, 2], [3.0, 4.0], label="loss")
    >>> drawn(fig)
      panel series  x    y
    0     1   loss  1  3.0
    1     1   loss  2  4.0
    """
    rows: list[tuple[str, str, Any, Any]] = []
    for number, ax in enumerate(fig.axes, start=1):
        panel = " / ".join(filter(None, (str(number), ax.get_title() or ax.get_title("left"), ax.get_ylabel())))
        series: list[tuple[object, Any]] = []
        for line in ax.lines:
            points = zip(np.asarray(line.get_xdata()), np.asarray(line.get_ydata()), strict=True)
            series.append((line.get_label(), points))
        series += [(dots.get_label(), np.asarray(dots.get_offsets())) for dots in ax.collections]
        for bars in ax.containers:
            patches = [bar for bar in bars if isinstance(bar, Rectangle)]
            ends = [(bar.get_x() + bar.get_width() / 2, bar.get_y() + bar.get_height()) for bar in patches]
            series.append((bars.get_label(), ends))
        for label, points in series:
            name = "" if str(label).startswith("_") else " ".join(str(label).split())
            rows += [(" ".join(panel.split()), name, x, y) for x, y in points]
    return pd.DataFrame(rows, columns=["panel", "series", "x", "y"])


def save(fig: Figure, stem: Path, origin: Mapping[str, Any]) -> Path:
    """Write a figure as PNG and PDF, what it shows as CSV, and a JSON sidecar that says where it comes from; close it.

    The files carry neither date nor software version: the same figure gives the same bytes.

    Args:
        fig: The figure.
        stem: Path without suffix; missing folders are made.
        origin: Where the figure comes from (runs, parameters, versions), JSON-able.

    Returns:
        The PNG file.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    png, pdf = stem.parent / f"{stem.name}.png", stem.parent / f"{stem.name}.pdf"
    with mpl.rc_context({"savefig.bbox": "tight"}):
        fig.savefig(png, dpi=DPI, metadata={"Software": None})
        fig.savefig(pdf, metadata={"CreationDate": None, "Creator": None, "Producer": None})
    with Image.open(png) as picture:  # 256 colours look the same and take a third of the bytes in a notebook
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(png, optimize=True)
    write_bytes(stem.parent / f"{stem.name}.csv", drawn(fig).to_csv(index=False, float_format="%.6g").encode())
    plt.close(fig)
    sidecar = json.dumps({"figure": stem.name, **origin}, indent=1, sort_keys=True, ensure_ascii=False)
    write_bytes(stem.parent / f"{stem.name}.json", f"{sidecar}\n".encode())
    return png
