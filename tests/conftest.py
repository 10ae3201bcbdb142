"""Fixtures shared by tests of notebooks, command and workflow."""

from __future__ import annotations

from pathlib import Path

import pytest
from sandbox import Project

from koala_lib import paths


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setenv("KOALA_ROOT", str(tmp_path))  # for kernels and other processes
    for variable in ("KOALA_RUNS", "KOALA_REPORT", "KOALA_FIGURES", "KOALA_RESULTS"):
        monkeypatch.delenv(variable, raising=False)
    return Project(tmp_path)
