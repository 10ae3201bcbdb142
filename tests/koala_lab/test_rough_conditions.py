"""What the pipeline does with damaged files, stray notebooks, stores of others and arguments out of range."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from koala_lab import claims, paths, report, runs
from koala_lab import notebook as nb
from koala_lab.claims import Verdict
from koala_lab.cli import app
from koala_lab.files import read_yaml
from koala_lab.parameters import declared, resolve
from koala_lab.report import shown


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


def verdict(claim_id: str) -> Verdict:
    told = dict.fromkeys(("paper", "measured", "detail"), "")
    return Verdict(claim_id=claim_id, preset="quick", status="reproduced", n=5, **told)


def test_damaged_and_stale_verdicts_do_not_block_a_report(elsewhere: Path) -> None:
    known = next(iter(claims.load("koala")))
    claims.save([verdict(known)], "koala/20_good")
    claims.save([verdict("koala.table99.was_renamed")], "koala/99_old")
    (elsewhere / "report" / "verdicts" / "koala" / "21_cut.json").write_text("")
    with pytest.warns(UserWarning, match="verdicts|damaged") as caught:
        found = claims.saved()
    assert [v.claim_id for v in found] == [known]
    texts = " ".join(str(w.message) for w in caught)
    assert "21_cut.json is damaged" in texts
    assert "run its notebook again" in texts
    assert "99_old.json has verdicts on claims that are no more" in texts
    assert "koala.table99.was_renamed" in texts


def test_a_damaged_sidecar_does_not_block_a_report(elsewhere: Path) -> None:
    folder = paths.figures_dir() / "koala"
    folder.mkdir(parents=True)
    (folder / "cut.json").write_text("")
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


# ---- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("list", "--device", "foo"), "--device foo cannot be used"),
        (("run", "--device", "foo"), "--device foo cannot be used"),
        (("bench", "--device", "foo"), "--device foo cannot be used"),
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


@pytest.mark.parametrize("value", [1e999, float("nan")])
def test_parameters_are_finite_numbers(value: Any) -> None:
    parameters = declared("lr: float = 0.1\nrates: list[float] = [0.1]")
    with pytest.raises(ValueError, match=r"parameter lr: expected a finite number, got (inf|nan)"):
        resolve(parameters, {"lr": value})
    with pytest.raises(ValueError, match="parameter rates: expected a finite number"):
        resolve(parameters, {"rates": [0.1, value]})
