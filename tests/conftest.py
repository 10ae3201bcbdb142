"""Fixtures shared by several test modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pooch
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


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty KOALA_DATA and an empty download folder, no network, no permission."""

    def unreachable(url: str, *args: Any, **kwargs: Any) -> str:
        raise ConnectionError(f"no route to {url}")

    (tmp_path / "given").mkdir()
    monkeypatch.setenv("KOALA_DATA", str(tmp_path / "given"))
    monkeypatch.delenv("KOALA_ALLOW_UNVERIFIED_DATA", raising=False)
    monkeypatch.setattr(paths, "raw_dir", lambda: tmp_path / "raw")
    monkeypatch.setattr(pooch, "retrieve", unreachable)
    return tmp_path / "given"
