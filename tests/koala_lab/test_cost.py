"""What runs are said to cost: proportional, finished runs before step times, unknown where nothing was seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from koala_lab import data
from koala_lab.bench import steps as bench
from koala_lab.bench import tasks as bench_runs
from koala_lab.bench.cost import SAMPLES, Costs, kind, minutes, samples
from koala_lab.config import RunConfig
from koala_lab.data import DataError
from koala_lab.runs.training import RunResult

BASE = RunConfig(dataset="cifar10", model="resnet18", optimizer="sgd", optimizer_args={"lr": 0.1}, epochs=10)


@pytest.fixture
def rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> float:
    """Seconds a sample of ``BASE`` on the CPU, as if they had been measured."""
    monkeypatch.setenv("KOALA_RESULTS", str(tmp_path))
    section = {"provenance": {"device": "a processor"}, "rows": [{"kind": kind(BASE), "seconds": 0.01}]}
    (tmp_path / "bench.json").write_text(json.dumps({"cpu": {"step_times": section}}))
    return 0.01


def finished(config: RunConfig, seconds: float, **changes: Any) -> RunResult:
    record: dict[str, Any] = {
        "key": config.key,
        "config": config,
        "status": "done",
        "epochs": (),
        "provenance": {"seconds": seconds, "device": "cpu (x)"},
    }
    return RunResult(**(record | changes))


def test_a_run_costs_its_samples_times_its_epochs(rate: float) -> None:
    costs = Costs()
    assert costs.measured == {"device": "a processor"}
    assert costs.seconds(BASE) == pytest.approx(rate * 50_000 * 10)
    assert costs.seconds(BASE.but(epochs=30)) == pytest.approx(rate * 50_000 * 30)
    assert costs.seconds(BASE.but(train_size=128)) == pytest.approx(rate * 128 * 10)
    held_out = BASE.but(task_args={"validation_size": 5000})
    assert costs.seconds(held_out) == pytest.approx(rate * 45_000 * 10)
    assert samples(held_out.but(train_size=1000)) == 1000


@pytest.mark.parametrize(
    "change",
    [
        {"dataset": "cifar100"},
        {"model": "resnet50"},
        {"optimizer": "adam"},
        {"optimizer_args": {"lr": 0.1, "variant": "b"}},
        {"batch_size": 64},
        {"precision": "bfloat16"},
    ],
)
def test_what_was_never_measured_is_unknown(rate: float, change: dict[str, Any]) -> None:
    assert Costs().seconds(BASE.but(**change)) is None


def test_numbers_seed_and_initialisation_cost_nothing(rate: float) -> None:
    other = BASE.but(seed=3, optimizer_args={"lr": 0.5, "momentum": 0.9}, model_args={"init": "orthogonal"})
    assert Costs().seconds(other) == Costs().seconds(BASE)


def test_finished_runs_count_before_step_times(rate: float) -> None:
    seen = [finished(BASE.but(epochs=2, train_size=1000), seconds) for seconds in (20.0, 40.0, 30.0)]
    costs = Costs(seen)
    assert costs.seconds(BASE) == pytest.approx(30 / 2000 * 500_000)
    assert costs.seconds(BASE, max) == pytest.approx(40 / 2000 * 500_000)
    costs.add(finished(BASE.but(epochs=2, train_size=1000), 500.0, status="failed"))  # ended early
    costs.add(finished(BASE, 1.0, provenance={"seconds": 1.0, "device": "cuda (y)"}))
    assert costs.seconds(BASE) == pytest.approx(30 / 2000 * 500_000)


def test_devices_are_kept_apart(rate: float) -> None:
    slow = finished(BASE, 5000.0)
    fast = finished(BASE, 50.0, provenance={"seconds": 50.0, "device": "cuda (y)"})
    assert Costs([slow], device="cuda:1").seconds(BASE) is None
    assert Costs([slow, fast], device="cuda:1").seconds(BASE) == pytest.approx(50)
    assert Costs([slow, fast]).seconds(BASE) == pytest.approx(5000)


def test_a_batch_system_is_asked_for_twice_the_time_and_a_day_at_most() -> None:
    assert minutes(3600) == 10 + 120
    assert minutes(3601) == 10 + 121
    assert minutes(3600, attempt=2) == 10 + 240
    assert minutes(1e6) == minutes(None) == 24 * 60


@pytest.mark.parametrize(
    "name", ["digits", "mnist5k", "fashion-mnist", "tinyshakespeare", "wikitext-2-valid", "multi30k"]
)
def test_sizes_are_those_of_the_data(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pooch.retrieve", lambda *_, **__: pytest.skip(f"{name} is not here"))
    try:
        if name in data.DATASETS:
            size = len(data.load(name).train_labels)
        elif name in data.TEXTS:
            text = data.load_text(name)
            size = len(text.train)
            assert len(text.vocabulary) == bench_runs.VOCABULARY[name]
        else:
            size = len(data.load_pairs(name).train[0])
    except DataError as error:
        pytest.skip(str(error))
    assert size == SAMPLES[name]


RUNS = {
    "classification": BASE.but(dataset="mnist", model="mlp_100", batch_size=32, task_args={"validation_size": 5000}),
    "own forward": BASE.but(dataset="mnist", model="mlp_100", optimizer="meka", optimizer_args={}),
    "gan": BASE.but(task="gan", dataset="mnist", model="dcgan_small", batch_size=32),
    "language_model": BASE.but(
        task="language_model",
        dataset="tinyshakespeare",
        model="lstm",
        model_args={"embedding": 8, "hidden": 8, "layers": 1},
        task_args={"sequence_length": 5, "pieces": 4},
        batch_size=20,
    ),
    "translation": BASE.but(
        task="translation",
        dataset="numbers",
        model="transformer",
        model_args={"width": 16, "heads": 2, "layers": 1},
        task_args={"max_tokens": 600},
        batch_size=8192,
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_step_is_timed_without_its_data(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KOALA_RESULTS", str(tmp_path))
    threads = torch.get_num_threads()
    config = RUNS[name]
    [row] = bench_runs.step_times([config, config.but(seed=1)], seconds=60.0)
    assert row["kind"] == kind(config)
    assert row["batch"] == row["of"] == {"translation": 20, "own forward": 128}.get(name, config.batch_size)
    assert 0 < row["seconds"] < 1
    bench.keep("step_times", lambda: [row], "cpu")
    size = samples(config)
    assert size is not None
    assert Costs().seconds(config) == pytest.approx(row["seconds"] * size * config.epochs)
    assert torch.get_num_threads() == threads


def test_a_long_step_is_a_straight_line_through_two_shorter_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def seconds(config: RunConfig, batch: int, device: str) -> float:
        asked.append(batch)
        return 0.03 + 0.02 * batch  # the optimizer's own part, and the samples'

    monkeypatch.setattr(bench_runs, "_step_seconds", seconds)
    [row] = bench_runs.step_times([BASE], seconds=0.5)
    assert asked == [4, 18]
    assert row == {"kind": kind(BASE), "batch": 18, "of": 128, "seconds": pytest.approx(0.03 / 128 + 0.02, rel=1e-3)}
    [row] = bench_runs.step_times([BASE], seconds=0.01)
    assert asked[2:] == [4, 8]
    assert row["seconds"] == pytest.approx(0.03 / 128 + 0.02, rel=1e-3)
    [row] = bench_runs.step_times([RUNS["language_model"]], seconds=0.5)
    assert row["of"] == 20
    assert row["seconds"] == pytest.approx((0.03 / 20 + 0.02) / 5, rel=1e-3)  # a token
