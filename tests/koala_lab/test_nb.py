"""Strict parameters, execution in the own interpreter, normal form, figures."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
from typer.testing import CliRunner

from koala_lab import claims, plots, runs
from koala_lab import notebook as nb
from koala_lab.cli import app
from koala_lab.config import RunConfig
from koala_lab.notebook import execute
from koala_lab.parameters import declared, from_text, resolve
from koala_lab.runs.training import RunResult
from tests.support.sandbox import PARAMETERS, Project

SCHEMA = declared(PARAMETERS + '\nname: Optional[str] = None\nnote: str = "x"\nflag: bool = False')


# ---------------------------------------------------------------- parameters


def test_parameters_cell_is_read_in_order_with_types_and_defaults() -> None:
    optional = "from typing import Optional\nd: Optional[int] = None"
    parsed = declared("a: int = -1\nb: float = 2\nc: list[str] = ['x']\n" + optional)
    assert [(p.name, p.kind, p.default) for p in parsed.values()] == [
        ("a", "int", -1), ("b", "float", 2.0), ("c", "list[str]", ["x"]), ("d", "Optional[int]", None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("lr = 0.1", "write 'lr = 0.1' as"),
        ("lr: float = 1 / 3", "needs a literal"),
        ("n: int = 0.5", "parameter n: expected int, got float 0.5"),
        ("n: dict = {}", "type dict is none of"),
        ("import os", "write 'import os'"),
    ],
)
def test_a_line_outside_the_grammar_is_named(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"cell|parameter") as caught:
        declared(source)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lrr": 0.1}, "unknown parameter lrr, did you mean lr?"),
        ({"lr": "1e-3"}, "parameter lr: expected float, got str '1e-3' (YAML needs 1.0e-3)"),
        ({"lr": "1e3"}, "(YAML needs 1.0e+3)"),
        ({"seed": True}, "parameter seed: expected int, got bool True"),
        ({"seed": 1.0}, "parameter seed: expected int, got float 1.0"),
        ({"note": False}, "parameter note: expected str, got bool False"),  # YAML's `no`
        ({"widths": 3}, "parameter widths: expected list[int], got int 3"),
        ({"widths": [3.5]}, "parameter widths: expected int, got float 3.5"),
        ({"name": 3}, "parameter name: expected str, got int 3"),
        ({"preset": "papers"}, "parameter preset: 'papers' is none of quick, desktop, paper"),
    ],
)
def test_an_unknown_or_ill_typed_parameter_is_named(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match="parameter") as caught:
        resolve(SCHEMA, given)
    assert message in str(caught.value)


def test_an_integer_becomes_a_float_where_one_is_declared() -> None:
    value = resolve(SCHEMA, {"lr": 1})["lr"]
    assert type(value) is float
    assert value == 1.0


def test_command_line_texts_are_read_as_the_declared_type() -> None:
    texts = {"lr": "1e-3", "widths": "[4]", "note": "3", "flag": "True", "name": "None", "seed": "x"}
    assert from_text(SCHEMA, texts) == {
        "lr": 1e-3, "widths": [4], "note": "3", "flag": True, "name": "None", "seed": "x",
    }  # fmt: skip


# ---------------------------------------------------------------- presets and grids


def test_the_grid_follows_the_preset(project: Project) -> None:
    path = project.notebook("koala/20_tiny", grid=True)
    project.preset("desktop", "koala/20_tiny", "preset: desktop\nn_seeds: 3\nlr: 1\n")
    assert [c.seed for c in nb.grid_of(path)] == [0, 1]
    grid = nb.grid_of(path, "desktop")
    assert [c.seed for c in grid] == [0, 1, 2]
    assert {dict(c.optimizer_args)["lr"] for c in grid} == {1.0}
    assert nb.grid_of(project.notebook("koala/10_theory")) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_seeds: 3\n", "'preset: desktop'"),
        ("preset: paper\n", "'preset: desktop'"),
        ("- 1\n", "expected 'name: value' lines"),
        ("preset: desktop\nlr: 1e-3\n", "YAML needs 1.0e-3"),
        ("preset: desktop\nseeds: 3\n", "unknown parameter seeds"),
    ],
)
def test_a_wrong_preset_file_is_refused(project: Project, text: str, message: str) -> None:
    path = project.notebook("koala/20_tiny", grid=True)
    project.preset("desktop", "koala/20_tiny", text)
    with pytest.raises(ValueError, match=r"preset|parameter") as caught:
        nb.grid_of(path, "desktop")
    assert message in str(caught.value)
    with pytest.raises(ValueError, match="has no preset 'paper'"):
        nb.grid_of(path, "paper")


# ---------------------------------------------------------------- execution


def test_koala_notebook_executes_in_this_interpreter_and_writes_the_normal_form(project: Project) -> None:
    path = project.notebook("koala/20_tiny", "import sys\nprint(sys.executable)\nprint(lr, widths)", "lr")
    out = project.root / "out" / "x.ipynb"
    result = CliRunner().invoke(app, ["notebook", str(path), "-o", str(out), "-p", "lr=1e-3", "-p", "widths=[5]"])
    assert result.exit_code == 0, result.output
    done = nbformat.read(out, as_version=4)
    codes = [c for c in done.cells if c.cell_type == "code"]
    assert codes[3].outputs[0].text == f"{sys.executable}\n0.001 [5]\n"
    start = codes[2].outputs[0].text
    assert start == "koala/20_tiny: preset=quick device=cpu seed=0 n_seeds=2 lr=0.001 widths=[5]\n"
    assert out.read_text() == nbformat.writes(execute.normal_form(done)) + "\n"
    assert "papermill" not in out.read_text().replace("# Parameters", "")
    assert "0.001 [5]" in out.with_suffix(".html").read_text()
    assert [p.name for p in sorted(out.parent.iterdir())] == ["x.html", "x.ipynb"]


def test_a_failing_notebook_is_kept_and_named(project: Project) -> None:
    path = project.notebook("koala/20_tiny", "assert lr > 1, 'too small'")
    out = project.root / "x.ipynb"
    result = CliRunner().invoke(app, ["notebook", str(path), "-o", str(out)])
    assert result.exit_code == 1
    assert "koala/20_tiny: cell [3] 'assert lr > 1, 'too small'' failed with AssertionError: too small" in result.output
    assert not out.exists()
    kept = nbformat.read(project.root / "x.failed.ipynb", as_version=4)
    assert kept.cells[-1].outputs[0].ename == "AssertionError"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "stpes=20"], "unknown parameter stpes"),
        (["-p", "lr=fast"], "parameter lr: expected float, got str 'fast'"),
        (["-p", "lr"], "-p lr: expected name=value"),
        (["--preset", "desktop"], "koala/20_tiny has no preset 'desktop'"),
        (["--preset", "tiny"], "preset 'tiny' is none of"),
    ],
)
def test_koala_notebook_refuses_before_a_kernel_starts(
    project: Project, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    path = project.notebook("koala/20_tiny")
    monkeypatch.setattr(papermill, "execute_notebook", lambda *a, **k: pytest.fail("started"))
    result = CliRunner().invoke(app, ["notebook", str(path), "-o", "x.ipynb", *arguments])
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stpes": 20}, "ValueError: unknown parameter stpes"),
        ({"lr": "1e-3"}, "ValueError: parameter lr: expected float, got str '1e-3'"),
    ],
)
def test_plain_papermill_fails_in_the_start_cell(project: Project, given: dict[str, object], message: str) -> None:
    path, out = project.notebook("koala/20_tiny"), project.root / "x.ipynb"
    with pytest.raises(papermill.PapermillExecutionError) as caught:
        papermill.execute_notebook(path, out, given, kernel_name="python3", progress_bar=False)
    assert message in str(caught.value)


def test_a_kernel_that_does_not_start_is_tried_once_more(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = project.notebook("koala/20_tiny"), []

    def flaky(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("Kernel died before replying to kernel_info")
        return nbformat.read(path, as_version=4)

    monkeypatch.setattr(papermill, "execute_notebook", flaky)
    execute.execute(path, project.root / "x.ipynb", {})
    assert len(calls) == 2


def test_normal_form_forgets_what_differs_between_two_executions() -> None:
    def executed(start: int, python: str, pieces: list[str]) -> nbformat.NotebookNode:
        cell = nbformat.v4.new_code_cell("print(1)", id="a", execution_count=start)
        cell.metadata = {"execution": {"iopub.execute_input": python}, "papermill": {"duration": start}}
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=piece) for piece in pieces]
        cell.outputs.append(nbformat.v4.new_output("display_data", {"text/plain": ""}))
        cell.outputs.append(nbformat.v4.new_output("execute_result", {"text/plain": "1"}, execution_count=start))
        about = {"papermill": {"duration": start}, "language_info": {"name": "python", "version": python}}
        return execute.normal_form(nbformat.v4.new_notebook(metadata=about, cells=[cell]))

    one, other = executed(1, "3.11", ["a\n", "b\n"]), executed(7, "3.13", ["a\nb\n"])
    assert nbformat.writes(one) == nbformat.writes(other)
    assert [o.output_type for o in one.cells[0].outputs] == ["stream", "execute_result"]


def test_nb_start_outside_a_notebook_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"nb\.start works inside a notebook"):
        nb.start("x")


def test_the_page_shows_formulas_and_links_without_the_network(tmp_path: Path) -> None:
    text = "$\\hat x_k$ and `$code$` [index](../00.ipynb#top) [paper](https://arxiv.org/a.ipynb)\n\n"
    text += "| a |\n|---|\n| $|g|^2$ |\n"
    text += "\n$$\\begin{aligned}a&=b\\\\c&=d\\end{aligned}$$\n\n$\\begin{nonsense}1&2\\end{nonsense}$"
    book = execute.normal_form(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)]))
    nbformat.write(book, tmp_path / "x.ipynb")
    page = execute.to_html(tmp_path / "x.ipynb").read_text()
    assert page.count("<math") == 3
    assert "<code>$code$</code>" in page
    assert "<code>\\begin{nonsense}1&amp;2\\end{nonsense}</code>" in page
    assert 'href="../00.html#top"' in page
    assert 'href="https://arxiv.org/a.ipynb"' in page
    assert not re.findall(r'(?:src|href)="https?://(?!arxiv)', page)


# ---------------------------------------------------------------- inside a notebook


def context(**params: object) -> nb.Notebook:
    return nb.Notebook("koala/20_tiny", "quick", {"device": "cpu", **params}, runs.Store())


def test_run_shows_progress_to_a_person_and_leaves_one_stable_line(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = nb.grid_of(project.notebook("koala/20_tiny", grid=True))
    shown: list[str] = []

    class Line:
        def update(self, data: dict[str, str], raw: bool) -> None:
            shown.append(data["text/plain"])

    def train(config: RunConfig, **_: object) -> RunResult:
        return RunResult(config.key, config, "failed" if config.seed else "done", (), provenance={})

    monkeypatch.setattr("koala_lab.runs.store.train", train)
    monkeypatch.setattr("IPython.display.display", lambda *_, **__: Line())
    monkeypatch.delenv("KOALA_BATCH", raising=False)
    results = context().run(grid)
    assert [r.status for r in results] == ["done", "failed"]
    assert shown == [f"run 1/2: {grid[0].label}", f"run 2/2: {grid[1].label}", ""]
    assert capsys.readouterr().out == "2 runs: 1 done, 1 failed\n"


def test_verdicts_are_printed_and_written_for_the_scoreboard(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    (project.root / "data").mkdir()
    (project.root / "data" / "claims").symlink_to(Path(__file__).resolve().parents[2] / "data" / "claims")
    known = claims.load("koala").values()
    claim = next(c for c in known if "quick" in c.judge and c.judge["quick"].test == "holds")
    other = next(c for c in known if "paper" in c.judge and "quick" not in c.judge)
    notebook = context()
    notebook.judge(claim.id, holds={"first": True, "second": True})
    notebook.judge(other.id)
    notebook.verdicts()
    assert [(v.claim_id, v.status) for v in claims.saved()] == [(claim.id, "reproduced"), (other.id, claims.NOT_RUN)]
    printed = capsys.readouterr().out
    assert claim.id in printed
    assert "reproduced" in printed


# ---------------------------------------------------------------- figures


def _figure() -> plt.Figure:
    plots.style()
    data = pd.DataFrame({"optimizer": ["sgd"] * 3 + ["adam"] * 3, "seed": [0, 1, 2] * 2, "error": [1.0, 2, 3, 2, 3, 7]})
    return plots.seeds(data, x="optimizer", y="error").figure


def test_a_figure_shows_every_seed_the_mean_and_the_interval() -> None:
    axes = _figure().axes[0]
    points = [line.get_ydata() for line in axes.lines if line.get_marker() == "o"]
    np.testing.assert_array_equal(np.concatenate(points), [1, 2, 3, 2, 3, 7])
    assert [t.get_text() for t in axes.get_xticklabels()] == ["SGD", "Adam"]
    mean, half = plots.interval([1.0, 2.0, 3.0, float("nan")])
    assert mean == 2.0
    assert half == pytest.approx(4.302652729911275 / np.sqrt(3))  # Student's t, 2 degrees of freedom, 97.5 %
    assert np.isnan(plots.interval([1.0])[1])
    plt.close("all")


def test_the_same_figure_gives_the_same_bytes_and_a_sidecar(tmp_path: Path) -> None:
    origin = {"notebook": "koala/20_tiny", "runs": ["b", "a"], "parameters": {"lr": 0.1}}
    first, second = (plots.save(_figure(), tmp_path / folder / "v1.5", origin) for folder in ("a", "b"))
    for suffix in (".png", ".pdf", ".json"):
        one, two = (p.parent / f"v1.5{suffix}" for p in (first, second))
        assert one.read_bytes() == two.read_bytes(), suffix
    assert json.loads((tmp_path / "a" / "v1.5.json").read_text()) == {"figure": "v1.5", **origin}


def test_methods_keep_their_colour() -> None:
    assert len(set(plots.PALETTE.values())) == len(plots.PALETTE)
    assert plots.colour("something new") == plots.colour("something new")
