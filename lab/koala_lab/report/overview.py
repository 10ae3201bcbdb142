"""The picture of the README: how many claims of each paper reproduce, drawn from the README's own count rows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from koala_lab import claims, paths, plots

COLOURS = {"reproduced": "#0173b2", "mixed": "#8ab8d8", "inconclusive": "#cfcfcf", "contradicted": "#d55e00"}


class Row(NamedTuple):
    """The verdicts on one paper at one preset: its number of claims, and how many of them have each status."""

    paper: str
    claims: int
    preset: str
    counts: dict[str, int]


def count_rows(readme: str) -> list[Row]:
    """Read the counts between the scoreboard markers of a README.

    Returns:
        One row per paper and scale with a verdict, paper by paper, what has no scale first.
    """
    block = readme.split(claims.BEGIN)[1].split(claims.END)[0]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in block.splitlines() if line.startswith("|")]
    header, _, *lines = cells
    found: dict[str, list[Row]] = {}
    name, total = "", 0
    for first, scale, *numbers in lines:
        if first:
            name, total = first.split(",")[0], int(re.findall(r"\d+", first)[0])
        counts = {s: int(n) for s, n in zip(header[2:], numbers, strict=True) if s in COLOURS and int(n)}
        found.setdefault(name, []).extend([Row(name, total, scale, counts)] * bool(counts))
    for name, text in re.findall(r"^- (\S+), without a scale, settled once: (.*)", block, re.MULTILINE):
        counts = {s: sum(map(int, re.findall(rf"(\d+) {s}\b", text))) for s in COLOURS}
        total = sum(map(int, re.findall(r"\d+", re.sub(r"\(.*?\)", "", text))))
        found.setdefault(name, []).insert(0, Row(name, total, "exact", {s: n for s, n in counts.items() if n}))
    return [row for rows in found.values() for row in rows]


def draw(rows: list[Row]) -> Figure:
    """Draw one bar per paper and preset, cut into what reproduced, what cannot be told, and what is contradicted."""
    plots.style()
    fig, ax = plt.subplots(figsize=(8, 0.42 * len(rows) + 1.1))
    for y, row in enumerate(rows):
        left = 0
        for status, colour in COLOURS.items():
            count = row.counts.get(status, 0)
            ax.barh(y, count, left=left, color=colour, height=0.72)
            if count:
                ink = "white" if status in ("reproduced", "contradicted") else "black"
                ax.text(left + count / 2, y, str(count), ha="center", va="center", color=ink, fontweight="bold")
            left += count
        ax.text(left + 1, y, f"of {row.claims} claims", va="center", color="0.4", fontsize="small")
    ax.set_yticks(range(len(rows)), [f"{row.paper}, {row.preset}" for row in rows])
    ax.invert_yaxis()
    ax.set(xticks=[], xlim=(0, 1.22 * max(sum(row.counts.values()) for row in rows)))
    ax.set_title("What of the papers reproduces, in small runs", loc="left", fontweight="bold")
    shown = [status for status in COLOURS if any(status in row.counts for row in rows)]
    handles = [Patch(color=COLOURS[status], label=status) for status in shown]
    fig.legend(handles=handles, loc="outside lower center", ncols=len(shown))
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    return fig


def save() -> Path:
    """Draw ``figures/overview.png`` from the README as it stands, with the numbers in its sidecar."""
    rows = count_rows((paths.ROOT / "README.md").read_text(encoding="utf-8"))
    origin = {"drawn from": "README.md", "rows": [row._asdict() for row in rows], "versions": plots.versions()}
    return plots.save(draw(rows), paths.figures_dir() / "overview", origin)
