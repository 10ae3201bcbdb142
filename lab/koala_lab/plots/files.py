"""Figures as files that come out the same twice: PNG and PDF, what they show as CSV, where they come from as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.container import Container
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from koala_lab.files import write_bytes
from koala_lab.plots.look import DPI


def versions() -> dict[str, str]:
    """Return the versions that a figure depends on."""
    packages = ("koala-lib", "torch", "numpy", "matplotlib")
    return {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}}


def drawn(fig: Figure) -> pd.DataFrame:
    """Return points, lines, bands and bars of a figure: ``panel``, ``series`` (its name, if it has one), ``x``, ``y``.

    A series is called by its id where it has one (rows of tables, which no legend lists), else by its label.

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
        series: list[tuple[Artist | Container, Any]] = []
        for line in ax.lines:
            x, y = (np.atleast_1d(values) for values in line.get_data())
            series.append((line, zip(x, y, strict=True)))
        for shape in ax.collections:
            if isinstance(shape, PathCollection):
                series.append((shape, np.asarray(shape.get_offsets())))
            elif isinstance(shape, PolyCollection):  # bands
                series += [(shape, path.vertices) for path in shape.get_paths()]
        for bars in ax.containers:
            patches = [bar for bar in bars if isinstance(bar, Rectangle)]
            ends = [(bar.get_x() + bar.get_width() / 2, bar.get_y() + bar.get_height()) for bar in patches]
            series.append((bars, ends))
        for artist, points in series:
            name = getattr(artist, "get_gid", str)() or str(artist.get_label())
            name = "" if name.startswith("_") else " ".join(name.split())
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
