"""Fixtures shared by several test modules."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pooch
import pytest
import torch

from koala_lab import paths
from koala_lib.optim import apollo
from koala_lib.optim._engine import compiled, passes, products
from koala_lib.optim._engine.compiled import CompiledPass
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


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address under which it is served on this machine."""
    (tmp_path / "served").mkdir()
    handler = functools.partial(QuietHandler, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield tmp_path / "served", f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


@pytest.fixture
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing compiled before the test, and nothing left behind; tensors of twelve elements are long."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(CompiledPass, "compiler_works", None)
    monkeypatch.setattr(compiled, "MIN_COMPILED", 12)
    monkeypatch.setattr(compiled, "MIN_COMPILED_LIST", 12)
    for step in (each for module in (passes, products, apollo) for each in vars(module).values()):
        if isinstance(step, CompiledPass):
            monkeypatch.setattr(step, "_compiled", None)


@pytest.fixture
def kept_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scalars stay tensors, as on an accelerator, where reading them would wait for it."""
    monkeypatch.setattr(passes, "READ_FREELY", frozenset())


@pytest.fixture
def no_compiler(fresh_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.compile`` gives a function that fails when it is called, as on a machine without a compiler."""

    def compile(function: Any, **options: Any) -> Any:
        def fail(**arguments: Any) -> None:
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
