"""One pytest run, one fresh store: notebooks under nbval train again and leave no trace in the repository.

Kernels and xdist workers inherit the environment, so that all of them share the store and train each run once. The
verdicts are copied to where KOALA_KEEP_VERDICTS says, if it is set: `tests/processors.sh` compares them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

_FOLDER = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # an xdist worker: the controller has done this
        return
    folder = config.stash[_FOLDER] = Path(tempfile.mkdtemp(prefix="koala-"))
    for variable, name in (("KOALA_RUNS", "runs"), ("KOALA_REPORT", "report"), ("KOALA_FIGURES", "figures")):
        os.environ[variable] = str(folder / name)
    os.environ["KOALA_BATCH"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_unconfigure(config: pytest.Config) -> None:
    if _FOLDER in config.stash:
        verdicts, kept = config.stash[_FOLDER] / "report" / "verdicts", os.environ.get("KOALA_KEEP_VERDICTS")
        if kept and verdicts.exists():
            shutil.copytree(verdicts, Path(kept) / "verdicts", dirs_exist_ok=True)
        shutil.rmtree(config.stash[_FOLDER], ignore_errors=True)
