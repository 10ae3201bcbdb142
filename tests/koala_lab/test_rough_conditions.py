"""What the pipeline does with damaged files, stray notebooks, stores of others and arguments out of range."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from koala_lab import claims, data, paths, report, runs
from koala_lab import notebook as nb
from koala_lab.bench import steps
from koala_lab.claims import Verdict
from koala_lab.claims.references import Reference
from koala_lab.cli import app
from koala_lab.config import RunConfig
from koala_lab.files import read_yaml
from koala_lab.parameters import declared, resolve
from koala_lab.report import shown
from koala_lab.runs import references
from koala_lab.runs.provenance import provenance
from koala_lab.runs.training import RunResult


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All that is written to lies in a folder of its own."""
    for name in ("RESULTS", "RUNS", "REPORT", "FIGURES"):
        monkeypatch.setenv(f"KOALA_{name}", str(tmp_path / name.lower()))
    return tmp_path


def koala(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


# ---- damaged files


def test_one_damaged_file_of_results_leaves_the_others_alone(elsewhere: Path) -> None:
    damaged = runs.results_file("desktop", "koala/20_table2_dynamics_and_noise")
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{")
    with pytest.warns(UserWarning, match=r"20_table2_dynamics_and_noise.json is no file of results .*restore it"):
        code, output = koala("list", "--preset", "desktop", "--only", "apollo/26*")
    assert code == 0
    assert "apollo/26_sdlbfgs" in output


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("preset: desktop\nepochs: [1\n", "line 3"),
        ("preset: desktop\nepochs: 1\nepochs: 2\n", "'epochs' appears twice"),
    ],
)
def test_a_preset_that_is_no_yaml_is_named(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "preset.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"preset.yaml: not readable as YAML: .*{problem}") as error:
        read_yaml(file)
    assert "\n" not in str(error.value)


def verdict(claim_id: str, paper: str | None = None, status: str = "reproduced") -> Verdict:
    if paper is None:
        paper = claims.find(claim_id).paper
    return Verdict(claim_id=claim_id, preset="quick", paper=paper, measured="", n=5, status=status, detail="")


def test_damaged_and_stale_verdicts_do_not_block_a_report(elsewhere: Path) -> None:
    known, changed, moved, *_ = (c for c in claims.load("koala").values() if "quick" in c.judge)
    claims.save([verdict("koala.table99.was_renamed", "")], "koala/99_old")
    claims.save([verdict(changed.id, "another number")], "koala/98_changed")
    claims.save([verdict(moved.id)], "koala/97_moved")
    assert known.notebook == moved.notebook
    claims.save([verdict(known.id), verdict(moved.id, status="contradicted")], moved.notebook)
    (elsewhere / "report" / "verdicts" / "koala" / "21_cut.json").write_text("")
    with pytest.warns(UserWarning, match="verdicts|damaged") as caught:
        found = claims.saved()
    assert {(v.claim_id, v.status) for v in found} == {(known.id, "reproduced"), (moved.id, "contradicted")}
    assert claims.scoreboard(found)
    texts = " ".join(str(w.message) for w in caught)
    assert "21_cut.json is damaged" in texts
    assert "run its notebook again" in texts
    assert "99_old.json has verdicts on claims that are no more" in texts
    for name in ("koala.table99.was_renamed", changed.id, moved.id):
        assert name in texts


def test_damaged_committed_verdicts_do_not_block_a_report(elsewhere: Path) -> None:
    report.committed().parent.mkdir()
    report.committed().write_text('{"verdicts": [{"claim_id": 1}]}')
    with pytest.warns(
        UserWarning, match=r"verdicts.json is no file of verdicts .*restore it from git; the report does"
    ):
        report.assemble(elsewhere / "sources", elsewhere / "extra")


@pytest.mark.parametrize("content", ["", "[]", '{"references": []}', '{"references": {"a": {"metric": "x"}}}', "\xff"])
def test_damaged_references_are_named(elsewhere: Path, content: str) -> None:
    paths.results_dir().mkdir()
    (paths.results_dir() / "references.json").write_bytes(content.encode("latin1"))
    code, output = koala("references", "--only", "apollo/26*")
    assert code == 2
    assert "references.json is no file of references" in output
    assert "restore it from git" in output
    assert len(output.strip().splitlines()) == 1


@pytest.mark.parametrize("content", ["", "[]", "\xff"])
def test_a_damaged_benchmark_is_named_before_anything_is_measured(
    elsewhere: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths.results_dir().mkdir()
    (paths.results_dir() / "bench.json").write_bytes(content.encode("latin1"))
    monkeypatch.setattr(steps, "_sections", lambda *_: {"step": lambda: pytest.fail("was measured")})
    code, output = koala("bench")
    assert code == 2
    assert "bench.json is not" in output


CHANGES: list[tuple[list[str | int], Any]] = [
    (["config", "seed"], "x"),
    (["config", "seed"], {}),
    (["config", "augment"], [1]),
    (["config", "optimizer_args"], {"lr": {}}),
    (["config", "milestones"], 5),
    (["config"], []),
    (["status"], "x"),
    (["epochs"], None),
    (["epochs", 0], "x"),
    (["epochs", 0, "lr"], None),
    (["failed_step"], "x"),
    (["provenance"], 5),
    (["provenance", "data"], "x"),
    (["provenance", "seconds"], "x"),
    (["key"], 5),
    (["key"], "0123456789abcdef"),  # a whole record, of another run
]


@pytest.mark.parametrize(("path", "value"), CHANGES, ids=str)
def test_a_record_that_is_json_of_another_kind_is_set_aside(elsewhere: Path, path: list[str | int], value: Any) -> None:
    config = RunConfig(dataset="digits", model="mlp_100", optimizer="sgd", optimizer_args={"lr": 0.1}, epochs=1)
    origin = {"data": {"tag": ""}, "device": "cpu", "seconds": 1.0}
    store = runs.Store()
    store.put(RunResult(config.key, config, "done", ({"lr": 0.1, "test_error": 5.0},), provenance=origin))
    assert store.get(config.key) is not None
    file = store.root / config.key / "run.json"
    record = node = json.loads(file.read_text())
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = value
    file.write_text(json.dumps(record))
    with pytest.warns(
        UserWarning, match=r"run.json is damaged .*kept as run.json.damaged, and the run will be repeated"
    ):
        assert store.get(config.key) is None
    assert not file.exists()


def test_a_damaged_record_in_a_folder_of_others_is_told_and_stays(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    file = runs.Store().root / "key" / "run.json"
    file.parent.mkdir(parents=True)
    file.write_text("")
    monkeypatch.setattr(os, "replace", refused)
    with pytest.warns(UserWarning, match=r"run.json is damaged .*kept as run.json, and"):
        assert runs.Store().get("key") is None
    assert file.exists()


@pytest.mark.parametrize("content", ["", "null", '{"notebook": 5, "runs": []}', '{"notebook": "koala/27_cost"}'])
def test_a_damaged_sidecar_does_not_block_a_report(elsewhere: Path, content: str) -> None:
    folder = paths.figures_dir() / "koala"
    folder.mkdir(parents=True)
    (folder / "cut.json").write_text(content)
    (folder / "whole.json").write_text(json.dumps({"notebook": "koala/27_cost", "runs": []}))
    (folder / "whole.png").touch()
    with pytest.warns(UserWarning, match=r"cut.json is no file of a figure .*run its notebook"):
        names = [picture.name for picture in shown.figures()]
    assert "koala/whole" in names
    assert "koala/cut" not in names


def test_a_damaged_notebook_is_named_and_takes_no_other_down(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebooks = nb.all_notebooks() | {"koala/99_cut": elsewhere / "99_cut.ipynb"}
    notebooks["koala/99_cut"].write_text('{"cells": [')
    monkeypatch.setattr(nb, "all_notebooks", lambda: notebooks)
    code, output = koala("list", "--only", "koala/99*")
    assert code == 2
    assert "99_cut.ipynb is no notebook" in output
    assert koala("list", "--only", "apollo/26*")[0] == 0
    monkeypatch.setattr(nb, "all_notebooks", lambda: {n: f for n, f in notebooks.items() if "99" in n or "26" in n})
    report.assemble(elsewhere / "sources", elsewhere / "extra")
    page = (elsewhere / "sources" / "index.md").read_text(encoding="utf-8")
    assert "99_cut.ipynb is no notebook" in page
    assert "26_sdlbfgs" in page


# ---- verdicts of another processor


def test_the_report_lists_verdicts_that_differ_from_the_committed_ones(elsewhere: Path) -> None:
    here, same, *_ = (c for c in claims.load("koala").values() if "quick" in c.judge)
    claims.write_verdicts([verdict(here.id, status="contradicted"), verdict(same.id)], report.committed())
    claims.save([verdict(here.id), verdict(same.id)], here.notebook)
    line = f"{here.id} at quick: reproduced here, contradicted there"
    assert report.differences() == [line]
    report.assemble(elsewhere / "sources", elsewhere / "extra")
    assert line in (elsewhere / "sources" / "index.md").read_text(encoding="utf-8")
    assert koala("report", "--compare", str(elsewhere / "report" / "verdicts")) == (0, "")
    code, output = koala("report", "--compare", str(elsewhere / "nowhere"))
    assert (code, len(output.strip().splitlines())) == (2, 1)
    assert "nowhere is no folder of verdicts" in output


def test_what_is_measured_names_the_processor_and_its_kernels(elsewhere: Path) -> None:
    """As runs and benchmarks do: the same key has other digits on another processor."""
    config = RunConfig(dataset="digits", model="mlp_100", optimizer="sgd", optimizer_args={"lr": 0.1}, epochs=1)
    references.store([config], lambda _: None)
    [entry] = json.loads((paths.results_dir() / "references.json").read_text())["references"].values()
    assert entry["provenance"] == provenance("cpu")
    assert entry["provenance"]["kernels"]


# ---- stray notebooks, stores of others


def test_stray_notebooks_are_no_notebooks_of_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    (tmp_path / "data" / "claims").mkdir(parents=True)
    (tmp_path / "notebooks" / "koala").mkdir(parents=True)
    for name in ("Untitled", "koala/10_one", "koala/10_one-Copy1", "koala/10_one.failed", "koala/notes"):
        (tmp_path / "notebooks" / f"{name}.ipynb").write_text("{}")
    assert list(nb.all_notebooks()) == ["koala/10_one"]


def test_lock_files_can_be_taken_by_other_users(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        store = runs.Store(tmp_path)
        with store.lock("key"):
            assert (tmp_path / "key" / "lock").stat().st_mode & 0o777 == 0o666
    finally:
        os.umask(before)


def test_a_store_that_cannot_be_written_is_told_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match=r"cannot write .*: .*; name another store in KOALA_RUNS"),
        runs.Store(tmp_path / "file").lock("key"),
    ):
        pass


def test_relative_paths_of_the_environment_are_settled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KOALA_RUNS", "here/runs")
    monkeypatch.setenv("KOALA_DATA", os.pathsep.join(["one", "two"]))
    assert koala("list", "--only", "meka/16*")[0] == 0
    monkeypatch.chdir("/")  # as a kernel does
    assert paths.runs_dir() == tmp_path / "here" / "runs"
    assert paths.data_dirs()[:2] == [tmp_path / "one", tmp_path / "two"]


def test_a_record_that_somebody_keeps_to_himself_stays_and_takes_nothing_down(elsewhere: Path) -> None:
    file = runs.Store().root / "key" / "run.json"
    file.mkdir(parents=True)  # it cannot be read either
    with pytest.warns(UserWarning, match=r"run.json cannot be read: Is a directory; it counts as a run without"):
        assert runs.Store().get("key") is None
    assert file.exists()


def test_two_that_measure_at_once_keep_what_both_found(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(dataset="digits", model="mlp_100", optimizer="sgd", optimizer_args={"lr": 0.1}, epochs=1)
    configs = [config, config.but(train_size=100)]

    def measure(asked: RunConfig) -> Reference:
        if asked is configs[0]:  # meanwhile another process measures the other one
            references.store(configs[1:], lambda _: None)
        return Reference("test_error", 5.0, "toy")

    monkeypatch.setattr(references, "measure", measure)
    references.store(configs[:1], lambda _: None)
    found = json.loads((paths.results_dir() / "references.json").read_text())["references"]
    assert set(found) == {references.key_of(c) for c in configs}

    monkeypatch.setattr(steps, "_show", lambda *_: None)
    steps.keep("one", lambda: steps.keep("other", lambda: [], "cpu") or [], "cpu")
    assert set(steps.stored()) == {"one", "other"}


def test_a_relative_root_is_settled_for_kernels(tmp_path: Path) -> None:
    script = "import os; from koala_lab import paths; paths.settle(); print(paths.ROOT, os.environ['KOALA_ROOT'])"
    environment = os.environ | {"KOALA_ROOT": "a checkout"}
    shown = subprocess.check_output([sys.executable, "-c", script], cwd=tmp_path, env=environment, text=True)
    assert shown.strip() == f"{tmp_path / 'a checkout'} {tmp_path / 'a checkout'}"


# ---- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("list", "--device", "foo"), "--device foo cannot be used"),
        (("run", "--device", "foo"), "--device foo cannot be used"),
        (("bench", "--device", "foo"), "--device foo cannot be used"),
        (("run", "--device", "meta"), "--device meta cannot be used here (meta is neither cpu nor cuda)"),
        (("notebook", "apollo/26_sdlbfgs", "-o", "x.ipynb", "-p", "seed=-1"), "seed: expected a whole number >= 0"),
        (("notebook", "apollo/26_sdlbfgs", "-o", "x.ipynb", "-p", f"seed={2**32}"), "below 2^32, got 4294967296"),
        (("notebook", "apollo/26_sdlbfgs", "-o", "x.ipynb", "-p", "device=foo"), "-p device=foo cannot be used here"),
        (("notebook", "apollo/26_sdlbfgs", "-o", "."), "-o . is a folder: name a file in it"),
        (("run", "--time-budget", "nan"), "--time-budget nan: expected a number of seconds above 0"),
        (("run", "--time-budget", "-1"), "--time-budget -1.0: expected"),
        (
            ("notebook", "koala/10_kalman_view_of_training", "-o", "x.ipynb", "-p", "n_seeds=1", "-p", "n_seeds=2"),
            "twice",
        ),
        (("notebook", "koala/31_sensitivity", "-o", "x.ipynb", "-p", "n_seeds=0"), "expected at least 1 seed, got 0"),
    ],
)
def test_arguments_out_of_range_are_one_sentence(arguments: tuple[str, ...], message: str, elsewhere: Path) -> None:
    code, output = koala(*arguments)
    assert code == 2
    assert message in output
    assert len(output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "koala: interrupted; what is finished is kept, and the same command goes on"),
        (PermissionError(13, "Permission denied", "/of/others"), 2, "koala: cannot use /of/others: Permission denied"),
        (OSError("cannot write x:\n make room"), 2, "koala: cannot write x: make room"),
        (RuntimeError("one\ntwo"), 2, "koala: one two"),
    ],
)
@pytest.mark.parametrize("command", [("list",), ("run",), ("report",), ("references",), ("bench",), ("data", "mnist")])
def test_no_command_shows_a_traceback(
    command: tuple[str, ...], error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    for module, name in [(nb, "all_notebooks"), (report, "build"), (steps, "main"), (data, "fetch")]:
        monkeypatch.setattr(module, name, fails)
    assert koala(*command) == (code, f"{message}\n")


@pytest.mark.parametrize("value", [1e999, float("nan")])
def test_parameters_are_finite_numbers(value: Any) -> None:
    parameters = declared("lr: float = 0.1\nrates: list[float] = [0.1]")
    with pytest.raises(ValueError, match=r"parameter lr: expected a finite number, got (inf|nan)"):
        resolve(parameters, {"lr": value})
    with pytest.raises(ValueError, match="parameter rates: expected a finite number"):
        resolve(parameters, {"rates": [0.1, value]})
