"""Where things lie. The only module that knows a folder of the repository.

Each folder that is written to can be moved with an environment variable, so that tests and batch systems never
touch the committed files.
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(os.environ.get("KOALA_ROOT") or Path(__file__).resolve().parents[2]).expanduser().resolve()

FOLDERS = ("KOALA_RUNS", "KOALA_REPORT", "KOALA_FIGURES", "KOALA_RESULTS", "KOALA_DATA")  # variables that name some


def root() -> Path:
    """Return the checkout of the repository.

    Raises:
        RuntimeError: Where the package lies outside one: papers, notebooks and results are not part of a distribution.
    """
    if not ((ROOT / "notebooks").is_dir() and (ROOT / "data" / "claims").is_dir()):
        raise RuntimeError(
            f"koala_lab works inside a checkout of its repository, but {ROOT} has no notebooks and claims: clone the "
            "repository and run `make setup` there, or name a checkout in KOALA_ROOT"
        )
    return ROOT


def _folder(variable: str, *default: str) -> Path:
    given = os.environ.get(variable)
    return Path(given).expanduser().resolve() if given else root().joinpath(*default)


def settle() -> None:
    """Make the environment's relative paths absolute, before kernels that run in other folders inherit them."""
    for variable in ("KOALA_ROOT", *FOLDERS):
        if given := os.environ.get(variable):
            parts = [str(Path(p).expanduser().resolve()) for p in given.split(os.pathsep) if p]
            os.environ[variable] = os.pathsep.join(parts)


def notebooks() -> Path:
    """Return the folder of the notebooks."""
    return root() / "notebooks"


def presets() -> Path:
    """Return the folder of what larger presets override, by preset."""
    return notebooks() / "presets"


def claims_dir() -> Path:
    """Return the folder of the papers' claims."""
    return root() / "data" / "claims"


def equations() -> Path:
    """Return the file of the papers' numbered equations."""
    return root() / "data" / "equations.yaml"


def results_dir() -> Path:
    """Return the folder of committed results of the larger presets."""
    return _folder("KOALA_RESULTS", "data", "results")


def runs_dir() -> Path:
    """Return the store of runs; ignored by git."""
    return _folder("KOALA_RUNS", "data", "runs")


def raw_dir() -> Path:
    """Return where downloads go; ignored by git."""
    return root() / "data" / "raw"


def data_dirs() -> list[Path]:
    """Return the folders searched for data sets, first match wins."""
    given = [Path(p).expanduser() for p in os.environ.get("KOALA_DATA", "").split(os.pathsep) if p]
    return [*given, raw_dir()]


def report_dir() -> Path:
    """Return the folder that `make reproduce` writes; ignored by git."""
    return _folder("KOALA_REPORT", "report")


def figures_dir() -> Path:
    """Return the report's folder of figures; ``make figures`` points this at the committed one."""
    return _folder("KOALA_FIGURES") if os.environ.get("KOALA_FIGURES") else report_dir() / "figures"
