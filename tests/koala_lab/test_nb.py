"""Strict parameters, execution in the own interpreter, normal form, figures."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
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
        ({"lrr": 0.1}, "; did you mean 'lr'?"),
        ({"lr": "1e-3"}, "parameter lr: expected float, got str '1e-3' (YAML needs 1.0e-3)"),
        ({"lr": "1e3"}, "(YAML needs 1.0e+3)"),
        ({"seed": True}, "parameter seed: expected int, got bool True"),
        ({"seed": 1.0}, "parameter seed: expected int, got float 1.0"),
        ({"note": False}, "parameter note: expected str, got bool False"),  # YAML's `no`
        ({"widths": 3}, "parameter widths: expected list[int], got int 3"),
        ({"widths": [3.5]}, "parameter widths: expected int, got float 3.5"),
        ({"name": 3}, "parameter name: expected str, got int 3"),
        ({"preset": "papers"}, "parameter preset: 'papers' is unknown; known are quick, desktop, paper"),
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
        ("preset: desktop\nseeds: 3\n", "parameter 'seeds' is unknown"),
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
    assert start.splitlines()[0] == "koala/20_tiny: preset=quick device=cpu seed=0 n_seeds=2 lr=0.001 widths=[5]"
    assert start.splitlines()[1].startswith("custom: not the parameters of preset quick")
    assert out.read_text() == nbformat.writes(execute.normal_form(done)) + "\n"
    assert "papermill" not in out.read_text().replace("# Parameters", "")
    assert [p.name for p in out.parent.iterdir()] == ["x.ipynb"]


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
        (["-p", "stpes=20"], "parameter 'stpes' is unknown"),
        (["-p", "lr=fast"], "parameter lr: expected float, got str 'fast'"),
        (["-p", "lr"], "-p lr: expected name=value"),
        (["--preset", "desktop"], "koala/20_tiny has no preset 'desktop'"),
        (["--preset", "tiny"], "preset 'tiny' is unknown"),
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
        ({"stpes": 20}, "ValueError: parameter 'stpes' is unknown"),
        ({"lr": "1e-3"}, "ValueError: parameter lr: expected float, got str '1e-3'"),
    ],
)
def test_plain_papermill_fails_in_the_start_cell(project: Project, given: dict[str, object], message: str) -> None:
    path, out = project.notebook("koala/20_tiny"), project.root / "x.ipynb"
    with pytest.raises(papermill.PapermillExecutionError) as caught:
        papermill.execute_notebook(path, out, given, kernel_name="python3", progress_bar=False)
    assert message in str(caught.value)


def test_a_notebook_needs_no_screen_and_keeps_its_assertions(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment says: a backend of windows in a profile, or -O."""
    monkeypatch.setenv("MPLBACKEND", "TkAgg")
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")
    monkeypatch.delenv("DISPLAY", raising=False)
    path = project.notebook("koala/20_tiny", "import matplotlib.pyplot as plt\nfigure = plt.figure()", "assert False")
    with pytest.raises(execute.NotebookFailed, match=r"cell \[4\] 'assert False' failed with AssertionError"):
        execute.execute(path, project.root / "x.ipynb", {})


@pytest.mark.parametrize("room", [100, 4000])
def test_a_disk_that_is_full_for_an_output_leaves_what_is_there(project: Project, room: int) -> None:
    """As `koala notebook` meets it: no file may grow beyond ``room`` bytes."""
    path, out = project.notebook("koala/20_tiny", "print('x' * 5000)"), project.root / "out.ipynb"
    out.write_text("of the last time")

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    command = [sys.executable, "-m", "koala_lab.cli", "notebook", str(path), "-o", str(out)]
    done = subprocess.run(command, preexec_fn=full, capture_output=True, text=True)
    assert done.returncode == 2
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("koala: cannot write ")
    assert line.endswith("out.ipynb is as it was; make room and start again")
    assert out.read_text() == "of the last time"
    assert [p.name for p in project.root.glob("*") if p.is_file()] == ["out.ipynb"]


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


# ---------------------------------------------------------------- inside a notebook


def context(**params: object) -> nb.Notebook:
    return nb.Notebook("koala/20_tiny", "quick", {"device": "cpu", **params}, runs.Store())


def instant(config: RunConfig, **_: object) -> RunResult:
    """A run of no time: the first seed is done, the others fail."""
    epochs = ({"train_loss": 1.0, "test_error": 4.0, "lr": 0.01},)
    return RunResult(config.key, config, "failed" if config.seed else "done", epochs, provenance={"device": "cpu"})


def test_run_shows_progress_to_a_person_and_leaves_one_stable_line(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    declared = nb.declared_grid(project.notebook("koala/20_tiny", grid=True))
    assert declared is not None
    shown: list[str] = []

    class Line:
        def update(self, data: dict[str, str], raw: bool) -> None:
            shown.append(data["text/plain"])

    monkeypatch.setattr("koala_lab.runs.store.train", instant)
    monkeypatch.setattr("IPython.display.display", lambda *_, **__: Line())
    monkeypatch.delenv("KOALA_BATCH", raising=False)
    ctx = context(seed=0, n_seeds=2)
    frame = ctx.run(declared.grid)
    config = declared.grid["sgd"]
    assert shown == [f"run 1/2: {config.label}", f"run 2/2: {config.but(seed=1).label}", ""]
    assert capsys.readouterr().out == "2 runs: 1 done, 1 failed\n"
    assert frame[["row", "seed", "candidate", "status", "lr"]].values.tolist() == [
        ["sgd", 0, 0, "done", 0.1], ["sgd", 1, 0, "failed", 0.1]
    ]  # fmt: skip
    assert frame["test_error"].isna().tolist() == [False, True]
    assert [r.config.seed for r in ctx.results(frame)] == [0, 1]
    assert set(ctx.curves(frame)["metric"]) == {"train_loss", "test_error", "lr"}
    assert ctx.summary(frame, ["test_error"]).loc[("digits", "sgd"), ("runs", "failed")] == 1


def test_stored_runs_get_the_names_of_the_grid_at_their_preset(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    path = project.notebook("koala/20_tiny", grid=True)
    project.preset("desktop", "koala/20_tiny", "preset: desktop\nn_seeds: 3\nlr: 1\n")
    ctx = context(seed=0, n_seeds=2)
    assert ctx.stored("desktop").empty
    grid = nb.grid_of(path, "desktop")
    runs.merge_results(runs.results_file("desktop", "koala/20_tiny"), grid, [instant(c) for c in grid[:2]])
    stored = ctx.stored("desktop")
    assert stored[["row", "seed", "lr"]].values.tolist() == [["sgd", 0, 1.0], ["sgd", 1, 1.0]]
    assert capsys.readouterr().out == "desktop: 0 of 3 runs stored\ndesktop: 2 of 3 runs stored, cpu\n"
    assert ctx.stored("paper").empty  # the notebook has no such preset


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ({}, "quick"),
        ({"device": "cuda"}, "quick"),  # where it runs, not what
        ({"lr": 0.2}, "custom"),
        ({"n_seeds": 1}, "custom"),
        ({"preset": "desktop"}, "custom"),  # quick parameters under another name
        ({"preset": "desktop", "n_seeds": 3, "lr": 1.0}, "desktop"),
        ({"preset": "paper"}, "custom"),  # the notebook has no such preset
    ],
)
def test_a_scale_is_a_presets_only_where_all_parameters_are(
    project: Project, values: dict[str, object], scale: str
) -> None:
    path = project.notebook("koala/20_tiny")
    project.preset("desktop", "koala/20_tiny", "preset: desktop\nn_seeds: 3\nlr: 1\n")
    assert nb.scale_of("koala/20_tiny", resolve(nb.declared_in(path), values)) == scale
    assert nb.scale_of("koala/21_unsaved", resolve(nb.declared_in(path), values)) == "custom"


CLAIMS_OF = "koala/30_schedules_and_targets"


def judged(scale: str) -> nb.Notebook:
    """A context of a real notebook in which everything that has a test at quick is judged."""
    ctx = nb.Notebook(CLAIMS_OF, "quick", {"device": "cpu"}, runs.Store(), scale)
    evidence: dict[str, dict[str, object]] = {"holds": {"holds": True}, "no_worse": {}}
    for claim in claims.of(CLAIMS_OF):
        if criterion := claim.criterion("quick"):
            evidence["no_worse"]["arms"] = {row: {0: 1.0, 1: 2.0} for row in claim.arms}
            ctx.judge(claim.id, **evidence.get(criterion.test, {"measured": 0.0}))
    return ctx


@pytest.mark.usefixtures("project")
def test_verdicts_print_what_is_decided_and_are_written_for_the_scoreboard(capsys: pytest.CaptureFixture[str]) -> None:
    judged("quick").verdicts()
    mine = claims.of(CLAIMS_OF)
    assert {v.claim_id for v in claims.saved()} == {c.id for c in mine if c.criterion("quick")}
    printed = capsys.readouterr().out
    assert "at any scale\n  reproduced: schedules.target_b_is_rate_along_schedules: 0" in printed
    assert "quick: 1 not run at this scale" in printed
    assert printed.endswith(f"{len(mine)} claims in all\n")
    assert max(map(len, printed.splitlines())) <= 100


def test_a_custom_run_leaves_verdicts_and_figures_of_the_standard_run_alone(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("IPython.display.display", lambda *_, **__: None)
    standard, custom = judged("quick"), judged("custom")
    standard.verdicts()
    standard.figure(_figure(), "a")
    before = {p: p.read_bytes() for p in project.root.rglob("report/**/*") if p.is_file()}
    custom.verdicts()
    custom.figure(_figure(), "a")
    after = {p: p.read_bytes() for p in project.root.rglob("report/**/*") if p.is_file()}
    assert {p: after[p] for p in before} == before
    new = {p.relative_to(project.root / "report" / "custom" / CLAIMS_OF).as_posix() for p in after.keys() - before}
    assert new == {"verdicts.json", *(f"figures/koala/a.{suffix}" for suffix in ("png", "pdf", "csv", "json"))}


@pytest.mark.usefixtures("project")
def test_a_claim_that_has_a_test_and_was_not_judged_is_an_error() -> None:
    ctx = judged("quick")
    ctx._verdicts.pop()
    with pytest.raises(RuntimeError, match=rf"{CLAIMS_OF} does not judge koala\.schedules\.\w+, which have a test"):
        ctx.verdicts()


@pytest.mark.parametrize(("preset", "saved"), [("quick", True), ("paper", False)])
def test_quick_parameters_under_the_name_of_paper_store_no_verdict(project: Project, preset: str, saved: bool) -> None:
    source = "ctx = run\nctx.judge('koala.text.minibatch_loss_noise', holds=True)\nctx.verdicts()"
    path = project.notebook("koala/40_tiny", source)
    out = project.root / "x.ipynb"
    result = CliRunner().invoke(app, ["notebook", str(path), "-o", str(out), "-p", f"preset={preset}"])
    assert result.exit_code == 0, result.output
    assert bool(claims.saved()) == saved


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
    for suffix in (".png", ".pdf", ".csv", ".json"):
        one, two = (p.parent / f"v1.5{suffix}" for p in (first, second))
        assert one.read_bytes() == two.read_bytes(), suffix
    assert json.loads((tmp_path / "a" / "v1.5.json").read_text()) == {"figure": "v1.5", **origin}


def test_methods_keep_their_colour() -> None:
    assert len(set(plots.PALETTE.values())) == len(plots.PALETTE)
    assert plots.colour("something new") == plots.colour("something new")
