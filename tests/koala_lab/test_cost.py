"""What runs are said to cost: proportional to finished runs, unknown where nothing was seen."""

from __future__ import annotations

from typing import Any

import pytest

from koala_lab import data
from koala_lab.bench.cost import Costs, minutes, samples
from koala_lab.config import RunConfig
from koala_lab.data import DataError
from koala_lab.runs.training import RunResult

BASE = RunConfig(dataset="cifar10", model="resnet18", optimizer="sgd", optimizer_args={"lr": 0.1}, epochs=10)


def finished(config: RunConfig, seconds: float, **changes: Any) -> RunResult:
    record: dict[str, Any] = {
        "key": config.key,
        "config": config,
        "status": "done",
        "epochs": (),
        "provenance": {"seconds": seconds, "device": "cpu (x)"},
    }
    return RunResult(**(record | changes))


RATE = 0.01  # seconds per sample


def measured() -> Costs:
    return Costs([finished(BASE, RATE * 50_000 * 10)])


def test_a_run_costs_its_samples_times_its_epochs() -> None:
    costs, rate = measured(), RATE
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
def test_what_was_never_measured_is_unknown(change: dict[str, Any]) -> None:
    assert measured().seconds(BASE.but(**change)) is None


def test_numbers_seed_and_initialisation_cost_nothing() -> None:
    other = BASE.but(seed=3, optimizer_args={"lr": 0.5, "momentum": 0.9}, model_args={"init": "orthogonal"})
    assert measured().seconds(other) == measured().seconds(BASE)


def test_the_median_of_finished_runs_counts() -> None:
    seen = [finished(BASE.but(epochs=2, train_size=1000), seconds) for seconds in (20.0, 40.0, 30.0)]
    costs = Costs(seen)
    assert costs.seconds(BASE) == pytest.approx(30 / 2000 * 500_000)
    costs.add(finished(BASE.but(epochs=2, train_size=1000), 500.0, status="failed"))  # ended early
    costs.add(finished(BASE, 1.0, provenance={"seconds": 1.0, "device": "cuda (y)"}))
    assert costs.seconds(BASE) == pytest.approx(30 / 2000 * 500_000)


def test_devices_are_kept_apart() -> None:
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
        size = data.load(name).size
    except DataError as error:
        pytest.skip(str(error))
    assert size == data.DATASETS[name].samples
