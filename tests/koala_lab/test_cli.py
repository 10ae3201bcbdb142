"""The command: listing, training what is missing within a time budget, merging, and the workflow on top of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from koala_lab import cli, paths, report, runs
from koala_lab.config import RunConfig
from koala_lab.runs.training import RunResult, Stopped
from tests.support.sandbox import Project

REPOSITORY = Path(__file__).resolve().parents[2]
Trained = list[RunConfig]


def koala(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture
def trained(project: Project, monkeypatch: pytest.MonkeyPatch) -> Trained:
    """A notebook with two runs at quick and three at desktop, and a training that takes no time and notes its calls."""
    project.notebook("koala/20_tiny", grid=True)
    project.notebook("koala/10_theory")
    project.preset("desktop", "koala/20_tiny", "preset: desktop\nn_seeds: 3\nlr: 0.5\n")
    calls: Trained = []

    def train(config: RunConfig, *, on_step: Callable[[int, int], None], until: float, **_: object) -> RunResult:
        if time.monotonic() >= until:
            raise Stopped("stopped after step 1")
        calls.append(config)
        on_step(1, 1)
        metrics = {"train_loss": 1.0, "test_loss": 1.0, "test_error": 10.0, "test_error_top5": 1.0, "lr": 0.1}
        provenance = {"seconds": 100.0, "device": "cpu (x)", "data": {"tag": ""}}
        return RunResult(config.key, config, "done", (metrics,), None, provenance)

    monkeypatch.setattr("koala_lab.runs.store.train", train)
    return calls


def merged(preset: str = "desktop") -> list[int]:
    file = paths.results_dir() / preset / "koala" / "20_tiny.json"
    return [r["config"]["seed"] for r in json.loads(file.read_text())["runs"]] if file.exists() else []


def test_what_another_process_is_at_comes_last(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    first = koala("list", "--preset", "desktop").output.split()[0]
    monkeypatch.setattr(runs.Store, "busy", lambda self, key: key == first)
    assert koala("run", "--preset", "desktop").exit_code == 0
    assert [c.seed for c in trained] == [1, 2, 0]
    assert merged() == [0, 1, 2]


def test_list_shows_one_line_a_run_and_its_status(trained: Trained) -> None:
    assert koala("run", "--key", koala("list").output.split()[0]).exit_code == 0
    lines = koala("list").stdout.splitlines()
    assert [line.split()[1] for line in lines] == ["koala/20_tiny"] * 2
    assert [line.split()[-1] for line in lines] == ["done", "pending"]
    assert lines[0].split()[0] == trained[0].key
    assert koala("list", "--pending").stdout.splitlines() == lines[1:]
    assert len(koala("list", "--preset", "desktop").stdout.splitlines()) == 3
    assert koala("list", "--preset", "paper").stdout == ""


def test_list_ends_with_the_hours_that_pending_runs_will_take(trained: Trained) -> None:
    unknown = koala("list", "--preset", "desktop").stderr
    assert re.search(r"koala/20_tiny +3 runs, +3 pending +0\.0 h and 3 runs of unknown cost\n", unknown)
    assert "unknown: no run of the same kind has finished here" in unknown
    keys = [line.split()[0] for line in koala("list", "--preset", "desktop").stdout.splitlines()]
    koala("run", "--preset", "desktop", "--key", keys[0])
    known = koala("list", "--preset", "desktop").stderr.splitlines()
    assert [re.sub(" +", " ", line) for line in known] == [
        "koala/20_tiny 3 runs, 2 pending 0.1 h",  # 100 s each
        "all 3 runs, 2 pending 0.1 h",
    ]
    assert "2 runs of unknown cost" in koala("list", "--preset", "desktop", "--device", "cuda").stderr


def test_run_trains_each_run_once(trained: Trained) -> None:
    assert "2 done, 0 failed, 0 broken, 0 left for later" in koala("run").output
    assert "2 done" in koala("run", "--only", "koala/2*").output
    assert "0 done" in koala("run", "--pending").output
    assert [c.seed for c in trained] == [0, 1]


@pytest.mark.parametrize("device", ["foo", "cuda:99"])
def test_a_device_that_is_not_there_is_one_sentence(trained: Trained, device: str) -> None:
    result = koala("run", "--device", device)
    assert result.exit_code == 2
    assert f"--device {device} cannot be used here" in result.output
    assert trained == []


def test_results_of_desktop_are_merged_and_those_of_quick_are_not(trained: Trained) -> None:
    koala("run")
    assert not paths.results_dir().exists()
    keys = [line.split()[0] for line in koala("list", "--preset", "desktop").stdout.splitlines()]
    koala("run", "--preset", "desktop", "--key", keys[2])
    assert merged() == [2]
    koala("run", "--preset", "desktop")
    assert merged() == [0, 1, 2]
    before = (paths.results_dir() / "desktop" / "koala" / "20_tiny.json").read_bytes()
    koala("run", "--preset", "desktop")
    assert (paths.results_dir() / "desktop" / "koala" / "20_tiny.json").read_bytes() == before


def test_runs_that_the_grid_no_longer_has_leave_the_merged_file(trained: Trained, project: Project) -> None:
    koala("run", "--preset", "desktop")
    project.preset("desktop", "koala/20_tiny", "preset: desktop\nn_seeds: 2\nseed: 1\nlr: 0.5\n")
    koala("run", "--preset", "desktop")
    assert merged() == [1, 2]
    assert len(trained) == 3


def test_a_time_budget_stops_a_run_behind_its_checkpoint(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 2.0, 3.0, 61.0, 62.0, 63.0])  # the second run is at work when the time is over
    with monkeypatch.context() as context:
        context.setattr("time.monotonic", lambda: next(clock))
        result = koala("run", "--preset", "desktop", "--time-budget", "60")
    assert result.exit_code == 0
    assert "stopped after step 1, for the time is over; the same command goes on" in result.output
    assert "1 done, 0 failed, 0 broken, 2 left for later" in result.output
    assert merged() == [0]
    koala("run", "--preset", "desktop", "--pending", "--time-budget", "1000")
    assert merged() == [0, 1, 2]


def test_a_diverged_run_is_a_result_with_its_own_exit_code(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(config: RunConfig, **_: object) -> RunResult:
        return RunResult(config.key, config, "failed", (), 7, {"seconds": 1.0, "data": {"tag": ""}})

    monkeypatch.setattr("koala_lab.runs.store.train", diverge)
    result = koala("run", "--preset", "desktop")
    assert result.exit_code == cli.FAILED
    assert "0 done, 3 failed, 0 broken" in result.output
    assert merged() == [0, 1, 2]
    assert koala("list", "--preset", "desktop").output.count("failed") == 3
    assert koala("run", "--preset", "desktop").exit_code == cli.FAILED
    assert koala("run", "--preset", "desktop", "--pending").exit_code == 0


def test_a_broken_run_does_not_stop_the_others(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    real = runs.train

    def fragile(config: RunConfig, **options: object) -> RunResult:
        if config.seed == 0:
            raise MemoryError("too big")
        return real(config, **options)

    monkeypatch.setattr("koala_lab.runs.store.train", fragile)
    result = koala("run")
    assert result.exit_code == 1
    assert "broken: MemoryError: too big" in result.output
    assert "1 done, 0 failed, 1 broken, 0 left for later" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "--preset", "huge"], "preset 'huge' is unknown; known are quick, desktop, paper"),
        (["list", "--only", "meka/*"], "no notebook matches 'meka/*'; there are: koala/10_theory, koala/20_tiny"),
        (["run", "--key", "abc"], "no run of preset quick has the key abc"),
        (["notebook", "koala/99"], "no notebook 'koala/99'"),
        (["notebook", "koala/20_tiny"], "-o OUTPUT.ipynb, or --in-place"),
        (["notebook", "koala/20_tiny", "-o", "x.html"], "expected a name that ends in .ipynb"),
        (["data", "imagenets"], "data set 'imagenets' is unknown; known are"),
        (["data", "imagenet"], "ImageNet (ILSVRC 2012) is not in"),
    ],
)
def test_bad_input_ends_with_one_sentence(trained: Trained, arguments: list[str], message: str) -> None:
    result = koala(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


# ---------------------------------------------------------------- outside a checkout


@pytest.mark.parametrize("arguments", [["list"], ["report"], ["data", "digits"], ["bench"], ["notebook", "koala/10"]])
def test_outside_a_checkout_every_command_says_that_it_needs_one(tmp_path: Path, arguments: list[str]) -> None:
    """As from a wheel: a copy of both packages in a folder that has neither notebooks nor claims."""
    site = tmp_path / "lib" / "site-packages"
    for package in (REPOSITORY / "lab" / "koala_lab", REPOSITORY / "koala_lib"):
        shutil.copytree(package, site / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("KOALA_", "PYTHON"))}

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        call = [sys.executable, "-m", "koala_lab.cli", *words]
        environment = {**variables, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True)

    before = sorted(tmp_path.rglob("*"))
    refused = command(*arguments)
    assert refused.returncode == 2
    [line] = refused.stderr.splitlines()
    assert line.startswith("koala: koala_lab works inside a checkout of its repository")
    assert str(site.parent) in line
    assert command("--help").returncode == 0
    assert sorted(tmp_path.rglob("*")) == before


# ---------------------------------------------------------------- report


def test_the_report_shows_every_notebook_as_it_is_and_every_figure(project: Project, tmp_path: Path) -> None:
    for name in ("koala/10_done", "koala/11_failed", "koala/12_missing"):
        project.notebook(name, "print('as committed')")
    executed = paths.report_dir() / "notebooks" / "koala"
    executed.mkdir(parents=True)
    shutil.copy(project.notebook("koala/10_done", "print('executed')"), executed)
    shutil.copy(project.notebook("koala/11_failed", "1 / 0"), executed / "11_failed.failed.ipynb")
    (paths.figures_dir() / "koala").mkdir(parents=True)
    sidecar = {"figure": "f", "notebook": "koala/10_done", "runs": ["a", "b"]}
    (paths.figures_dir() / "koala" / "f.json").write_text(json.dumps(sidecar))
    shutil.copy(REPOSITORY / "figures" / "overview.png", paths.figures_dir() / "koala" / "f.png")
    sources = tmp_path / "sources"
    report.assemble(sources, tmp_path / "extra")

    def text(page: str) -> str:
        return (sources / page).read_text(encoding="utf-8")

    landing = text("index.md")
    assert "- [koala/11_failed](notebooks/koala/11_failed.ipynb): failed" in landing
    assert "- [koala/12_missing](notebooks/koala/12_missing.ipynb): not executed" in landing
    assert "- [koala/10_done]" not in landing
    assert "not run yet" in landing
    assert "print('executed')" in text("notebooks/koala/10_done.ipynb")
    assert "This notebook **failed** here" in text("notebooks/koala/11_failed.ipynb")
    assert "1 / 0" in text("notebooks/koala/11_failed.ipynb")
    assert "**Not executed** here" in text("notebooks/koala/12_missing.ipynb")
    assert "10_done.ipynb) |" in text("koala.md")
    assert '<span class="contradicted">failed</span>' in text("theory.md")
    assert ":img-top: figures/koala/f.png" in text("figures.md")
    assert "2 runs" in text("figures.md")


def test_without_anything_executed_the_report_shows_what_is_committed(project: Project, tmp_path: Path) -> None:
    project.notebook("koala/10_done", "print('as committed')")
    report.assemble(tmp_path / "sources", tmp_path / "extra")
    landing = (tmp_path / "sources" / "index.md").read_text(encoding="utf-8")
    assert "Shown are the committed notebooks" in landing
    assert "Not everything ran" not in landing
    assert "Not executed" not in (tmp_path / "sources" / "notebooks" / "koala" / "10_done.ipynb").read_text()


def test_a_site_is_made_anew_and_leaves_other_reports_alone(project: Project) -> None:
    project.notebook("koala/10_done", "print('as committed')")
    old = paths.report_dir() / "notebooks" / "koala" / "09_renamed.html"
    other = paths.report_dir() / "desktop" / "index.html"
    for page in (old, other):
        page.parent.mkdir(parents=True)
        page.touch()
    first = report.build()
    assert first == paths.report_dir() / "index.html"
    assert "10_done.html" in first.read_text(encoding="utf-8")
    assert other.exists()
    assert not old.exists()
    assert not list(project.root.glob("jupyter_execute"))


# ---------------------------------------------------------------- workflow


def command(project: Project, *arguments: str) -> dict[str, Any]:
    words = [sys.executable, "-m", "snakemake", "-s", str(REPOSITORY / "Snakefile"), "--cores", "1", *arguments]
    environment = {**os.environ, "KOALA_ROOT": str(project.root), "XDG_CACHE_HOME": str(project.root / "cache")}
    return {"args": words, "cwd": project.root, "env": environment}


def snakemake(project: Project, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(**command(project, *arguments), capture_output=True, text=True)


def test_the_workflow_plans_a_job_for_each_notebook_and_at_desktop_for_each_run(project: Project) -> None:
    project.notebook("koala/20_tiny", grid=True)
    project.notebook("koala/10_theory")
    project.preset("desktop", "koala/20_tiny", "preset: desktop\nn_seeds: 3\n")
    quick = snakemake(project, "-n")
    assert quick.returncode == 0, quick.stderr
    assert "notebook koala/20_tiny" in quick.stdout + quick.stderr
    assert "notebook koala/10_theory" in quick.stdout + quick.stderr
    desktop = snakemake(project, "-n", "--config", "preset=desktop")
    plan = desktop.stdout + desktop.stderr
    assert plan.count(": run ") == 3
    assert plan.count(": notebook ") == 1
    misspelt = snakemake(project, "-n", "--config", "presett=desktop")
    assert misspelt.returncode != 0
    assert "--config has no presett; it has preset and device" in misspelt.stdout + misspelt.stderr


def test_a_killed_batch_goes_on_with_what_is_missing_from_its_checkpoint(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = project.notebook("koala/20_tiny", grid=True)
    notebook.write_text(notebook.read_text().replace("epochs=1,", "epochs=1 + 3 * i,"))
    project.preset("desktop", "koala/20_tiny", "preset: desktop\n")
    # Every python of the batch writes a checkpoint after every step.
    (project.root / "sitecustomize.py").write_text(
        "from koala_lab.runs.training import train\n\ntrain.__kwdefaults__['checkpoint_seconds'] = 0.0\n"
    )
    python_path = [str(project.root), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, python_path)))
    [short, long] = cli.plan("desktop")["koala/20_tiny"]
    store = runs.Store()
    batch = [
        "--workflow-profile",
        str(REPOSITORY / "profiles" / "local"),
        "--config",
        "preset=desktop",
        "--until",
        "run",
    ]

    quiet = subprocess.DEVNULL
    first = subprocess.Popen(**command(project, *batch), stdout=quiet, stderr=quiet, start_new_session=True)
    checkpoint = store.checkpoint(long.key)
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert checkpoint.exists()
    missing = [c for c in (short, long) if store.get(c.key) is None]
    assert long in missing

    plan = snakemake(project, "-n", *batch)
    assert plan.returncode == 0, plan.stderr
    shown = plan.stdout + plan.stderr
    assert sorted(re.findall(r": run (\w+)", shown)) == sorted(c.key for c in missing)

    state = torch.load(checkpoint, weights_only=True)
    torch.save(state | {"seconds": 5000.0}, checkpoint)  # a run that started anew would not know
    again = snakemake(project, *batch)
    assert again.returncode == 0, again.stderr
    result = store.get(long.key)
    assert result is not None
    assert result.provenance["seconds"] >= 5000
    assert result.provenance["weights_sha256"] == runs.train(long).provenance["weights_sha256"]
    assert not checkpoint.exists()
    assert merged() == [0, 1]
