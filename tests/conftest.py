"""Fixtures shared by several test modules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pooch
import pytest
import torch
from sandbox import Project

from koala_lib import paths
from koala_lib.optim import apollo, koala


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


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before the test, and nothing left behind."""
    caches = (koala._compiled_correct, apollo._compiled_update)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def no_compiler(fresh_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.compile`` gives a function that fails when it is called, as on a machine without a compiler."""

    def compile(function: Any) -> Any:
        def fail(*args: Any) -> None:
            raise RuntimeError("no compiler")

        return fail

    monkeypatch.setattr(torch, "compile", compile)
