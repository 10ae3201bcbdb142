"""Where things lie. The only module that knows a folder of the repository.

Each folder that is written to can be moved with an environment variable, so that tests and batch systems never
touch the committed files.
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(os.environ.get("KOALA_ROOT", Path(__file__).resolve().parents[2]))


def _folder(variable: str, default: Path) -> Path:
    return Path(os.environ[variable]).expanduser().resolve() if os.environ.get(variable) else default


def notebooks() -> Path:
    return ROOT / "notebooks"


def presets() -> Path:
    return notebooks() / "presets"


def claims_dir() -> Path:
    return ROOT / "data" / "claims"


def results_dir() -> Path:
    """Committed results of the larger presets."""
    return _folder("KOALA_RESULTS", ROOT / "data" / "results")


def runs_dir() -> Path:
    """The store of runs; ignored by git."""
    return _folder("KOALA_RUNS", ROOT / "data" / "runs")


def raw_dir() -> Path:
    """Where downloads go; ignored by git."""
    return ROOT / "data" / "raw"


def data_dirs() -> list[Path]:
    """Folders searched for data sets, first match wins."""
    given = [Path(p).expanduser() for p in os.environ.get("KOALA_DATA", "").split(os.pathsep) if p]
    return [*given, raw_dir()]


def report_dir() -> Path:
    return _folder("KOALA_REPORT", ROOT / "report")


def figures_dir() -> Path:
    """Figures of an ordinary run go into the report; ``make figures`` points this at the committed folder."""
    return _folder("KOALA_FIGURES", report_dir() / "figures")
