"""Figures of tables: what the paper prints, every seed, the learning curves, and what the verdicts are read from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from koala_lab.claims.statistics import mean_and_half_width as interval
from koala_lab.plots.look import PALETTE, colour, label, log_y, row_colours, row_markers, setting

Array = np.ndarray[Any, Any]


def table(
    frame: pd.DataFrame,
    metric: str,
    *,
    curves: pd.DataFrame | None = None,
    curve_metric: str = "train_loss",
    printed: Mapping[str, float] | None = None,
    printed_on: str = "",
    compared: pd.DataFrame | None = None,
    labels: Mapping[str, str] | None = None,
    unit: str = "test error (%)",
    curve_unit: str = "training loss (nats)",
    limit: float | None = None,
    curve_limit: float | None = None,
) -> Figure:
    """Draw a table: its rows from top to bottom, and a line of panels per data set and network.

    From left to right: the paper's printed values as black squares, where there are any; every seed as a point with
    the mean and its 95 % t-interval; the learning curves, where they are given, with the colours and markers of the
    points. Below them, where claims rank rows, what their verdicts are read from: see :func:`judged`.

    Args:
        frame: Table of runs, one line per row and run.
        metric: The column to draw.
        curves: What `Notebook.curves` returns.
        curve_metric: Which of them to draw, on a logarithmic axis.
        printed: The paper's values by row, what `Notebook.printed` returns.
        printed_on: The data set and network of these values.
        compared: The differences that claims are judged by, what `Notebook.compared` returns.
        labels: Names of rows for people.
        unit: What the horizontal axes say.
        curve_unit: What the vertical axis of the curves says.
        limit: Where the horizontal axes end; what lies beyond is a triangle there, and has no interval.
        curve_limit: Losses above it are drawn at it.

    Returns:
        The figure; its axes are, per data set and network, the panels from left to right, then that below.
    """
    names = _names(frame, labels)
    printed = {row: value for row, value in (printed or {}).items() if row in names}
    widths = [1.6] * bool(printed) + [2.4] + [2.8] * (curves is not None)
    height = max(2.7, 0.32 * len(names) + 0.9)
    parts: list[tuple[float, pd.DataFrame, bool]] = []  # height, rows of a table, and whether they are differences
    for at, case in frame.groupby(["dataset", "model"], sort=False):
        parts.append((height, case, False))
        mine = _of(compared, at)
        if len(mine):
            parts.append((1.1 + 0.36 * mine.groupby(["claim", "subject", "other"]).ngroups, mine, True))
    heights = [part[0] for part in parts]
    fig = plt.figure(figsize=(1.9 * sum(widths), sum(heights)))
    places = fig.subfigures(len(parts), 1, height_ratios=heights, squeeze=False).ravel()
    for place, (_, case, differences) in zip(places, parts, strict=True):
        if differences:
            judged(place.subplots(), case, names, unit)
            continue
        panels = list(place.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0])
        first, at = panels[0], (str(case["dataset"].iloc[0]), str(case["model"].iloc[0]))
        if printed:
            _printed(panels.pop(0), printed, names)
            first.set(xlabel=unit, title=f"paper: {printed_on}" if printed_on else "paper")
        _dots(panels[0], case, metric, names, limit)
        panels[0].set(xlabel=unit, title=f"{setting(*at)}, n = {case['seed'].nunique()}")
        first.set_yticks(range(len(names)), list(names.values()))
        if curves is not None:
            one = _of(curves, at)
            drawn = one[one["metric"] == curve_metric]
            _mean_curves(panels[1], drawn.assign(value=drawn["value"].clip(upper=curve_limit)), names)
            panels[1].set(xlabel="epoch", ylabel=curve_unit)
    return fig


def _of(frame: pd.DataFrame | None, at: Any) -> pd.DataFrame:
    """Return the part of a table that is of one data set and network."""
    if frame is None or frame.empty:
        return pd.DataFrame()
    part: pd.DataFrame = frame[(frame["dataset"] == at[0]) & (frame["model"] == at[1])]
    return part


def _names(frame: pd.DataFrame, labels: Mapping[str, str] | None) -> dict[str, str]:
    """Return the names of a table's rows for people, in the table's order."""
    return {row: (labels or {}).get(row, label(row)) for row in dict.fromkeys(frame["row"])}


def _row_axis(ax: Axes, rows: Sequence[str]) -> None:
    ax.set(ylim=(len(rows) - 0.5, -0.5), yticks=range(len(rows)), yticklabels=[])


def _printed(ax: Axes, printed: Mapping[str, float], names: Mapping[str, str]) -> None:
    """Draw the paper's numbers of the rows that it has."""
    for place, (row, name) in enumerate(names.items()):
        if row in printed:
            ax.plot(printed[row], place, "s", color=PALETTE["paper"], ms=6, gid=f"{name}: paper")
    ax.margins(x=0.15)
    _row_axis(ax, list(names))


def _spread(
    ax: Axes, values: Array, place: float, name: str, limit: float | None, confidence: float = 0.95, **look: Any
) -> None:
    """Draw every seed below a line of a panel, and on it the mean with its interval; beyond the limit a triangle."""
    end = math.inf if limit is None else limit
    inside, shade = values[np.abs(values) <= end], look["color"]
    ax.plot(inside, np.full(len(inside), place + 0.2), ls="", ms=5, alpha=0.6, mew=0, gid=f"{name}: seeds", **look)
    mean, half = interval(values, confidence)
    if len(inside) < len(values):  # an empty line that is not clipped would disturb the layout
        edge, mark = (end, ">") if np.nanmax(values) > end else (-end, "<")
        beyond = f"{name}: beyond the axis, with a mean of {mean:.3g}"
        ax.plot(edge, place, mark, ms=7, clip_on=False, color=shade, gid=beyond)
        return
    bar = ax.errorbar(mean, place - 0.12, xerr=half, fmt="|", ms=9, lw=2, capsize=3, color=shade)
    bar.lines[0].set_gid(f"{name}: mean")
    for cap in bar.lines[1]:
        cap.set_gid(f"{name}: end of the {confidence:.0%} interval")


def _dots(ax: Axes, case: pd.DataFrame, metric: str, names: Mapping[str, str], limit: float | None) -> None:
    """Draw every seed, and the mean of each row with its interval."""
    shades, markers = row_colours(list(names)), row_markers(list(names))
    for place, (row, name) in enumerate(names.items()):
        values = case.loc[case["row"] == row, metric].to_numpy(dtype=float)
        if len(values):
            _spread(ax, values, place, name, limit, color=shades[row], marker=markers[row])
    if limit is not None:
        ax.set_xlim(right=limit)
    _row_axis(ax, list(names))


def gains(
    ax: Axes,
    samples: Mapping[str, Any],
    *,
    paper: Mapping[str, float] | None = None,
    confidence: Mapping[str, float] | None = None,
    colours: Mapping[str, str] | None = None,
    limit: float | None = None,
) -> None:
    """Draw paired differences from top to bottom: every seed, the mean with its t-interval, the paper's as a square.

    Args:
        ax: Where to draw.
        samples: Differences per seed by name.
        paper: The same differences of the paper's numbers, where it has them.
        confidence: Of the intervals; default is 0.95.
        colours: By name; default is one colour for all.
        limit: The axis ends there on both sides; a name with a seed beyond has its mean written there.
    """
    for place, (name, sample) in enumerate(samples.items()):
        values, shade = np.asarray(sample, dtype=float), (colours or {}).get(name, colour("koala_m"))
        _spread(ax, values, place, name, limit, (confidence or {}).get(name, 0.95), color=shade, marker="o")
        if limit is not None and np.abs(values).max() > limit:
            mean = float(values.mean())
            x, side = (0.97, "right") if mean > 0 else (0.03, "left")
            ax.text(x, place, f"{mean:+.2g}", ha=side, va="center", transform=ax.get_yaxis_transform())
        if paper and math.isfinite(paper.get(name, math.nan)):
            ax.plot(paper[name], place - 0.3, "s", color=PALETTE["paper"], ms=5, gid=f"{name}: paper")
    ax.axvline(0, color="0.3", lw=1)
    if limit is not None:
        ax.set_xlim(-limit, limit)
    _row_axis(ax, list(samples))
    ax.set_yticks(range(len(samples)), list(samples))


def judged(ax: Axes, compared: pd.DataFrame, names: Mapping[str, str], unit: str) -> None:
    """Draw what verdicts are read from: paired differences with the interval that decides, and where it has to lie.

    A line per comparison. Its grey box is what the claim says: it is reproduced if every whole interval lies inside,
    and contradicted if one lies outside, of several comparisons at a stricter level; anything else decides nothing.
    Black squares are the paper's own differences.

    Args:
        ax: Where to draw.
        compared: What `Notebook.compared` returns, of one data set and network.
        names: Names of rows for people; rows at their own rates are called after the row without the ending.
        unit: Of the compared metric.
    """
    wheel = {"better": "better than", "no_worse": "as good as", "on_par": "on par with", "insensitive": "like"}
    samples, paper, confidence, boxes = {}, {}, {}, []
    for _, part in compared.groupby(["claim", "subject", "other"], sort=False):
        test, margin, subject, other = part[["test", "margin", "subject", "other"]].iloc[0]
        own = " (own rates)" if subject.endswith("_own") and subject not in names else ""
        first, second = (names.get(row, names.get(row.removesuffix("_own"), label(row))) for row in (subject, other))
        name = f"{first} {wheel[test]} {second}{own}"
        while name in samples:  # two claims on the same rows, at other rates
            name += " (another claim)"
        samples[name], paper[name] = part["gain"].to_numpy(dtype=float), float(part["paper"].iloc[0])
        confidence[name] = float(part["confidence"].iloc[0])
        boxes.append((margin if test == "better" else -margin, margin if test in ("on_par", "insensitive") else None))
    gains(ax, samples, paper=paper, confidence=confidence)
    low, high = ax.get_xlim()
    low, high = min(low, -0.3 * high), max(high, -0.3 * low)
    for place, (start, end) in enumerate(boxes):
        start, end = max(start, low), high if end is None else min(end, high)
        ax.add_patch(Rectangle((start, place - 0.42), end - start, 0.84, color="0.92", zorder=0.5))
    ax.set_xlim(low, high)
    ranked = "to the right: the first is better" if set(compared["test"]) - {"insensitive"} else "first less second"
    levels = " or ".join(f"{level:.0%}" for level in sorted(set(confidence.values()), reverse=True))
    ax.set(xlabel=f"paired difference of the {unit.replace('(%)', '(points)')}; {ranked}")
    ax.set_title(f"what is judged: does the {levels} interval lie in the grey box?", fontsize="small")


def _mean_curves(ax: Axes, data: pd.DataFrame, names: Mapping[str, str]) -> None:
    """Draw the mean over the seeds per epoch, one colour and marker per row as in the panel beside it."""
    shades, markers = row_colours(list(names)), row_markers(list(names))
    for row, mine in data.groupby("row", sort=False):
        mean = mine.groupby("epoch")["value"].mean()
        every = 1 + len(mean) // 10
        look: dict[str, Any] = {"marker": markers[str(row)], "markevery": every, "ms": 6, "color": shades[str(row)]}
        ax.plot(mean.index, mean.to_numpy(), lw=1.6, alpha=0.8, gid=f"{names[str(row)]}: mean of the seeds", **look)
    log_y(ax)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
