"""Fixtures shared by several test modules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pooch
import pytest
import torch

from koala_lab import paths
from koala_lib.optim import apollo, koala
from koala_lib.optim._engine import compiled as _fused
from koala_lib.optim._engine import lists as _lists
from koala_lib.optim._engine.compiled import Pass
from tests.support.sandbox import Project


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
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing compiled before the test, and nothing left behind; tensors of twelve elements are long."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(Pass, "compiler_works", None)
    for module in (_lists, _fused):
        monkeypatch.setattr(module, "LONG", 12)
    for step in (each for module in (koala, apollo) for each in vars(module).values() if isinstance(each, Pass)):
        monkeypatch.setattr(step, "_compiled", None)


@pytest.fixture
def no_compiler(fresh_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.compile`` gives a function that fails when it is called, as on a machine without a compiler."""

    def compile(function: Any, **options: Any) -> Any:
        def fail(*args: Any) -> None:
            raise RuntimeError("no compiler")

        return fail

    monkeypatch.setattr(torch, "compile", compile)


@pytest.fixture
def traced_passes(fresh_compiler: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The passes are traced as for compiling, but what was traced is executed by torch's own kernels: quick."""
    compile = torch.compile
    traced = {"backend": "aot_eager", "options": None}
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, **options | traced))
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
