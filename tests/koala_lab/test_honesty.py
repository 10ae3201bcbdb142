"""The controls of the honesty tests pass where the model is right and fail where it is not; trainings are watched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from koala_lab.theory import honesty
from koala_lib import KoalaV, Meka
from koala_lib.moments import sample_moments

LOW, HIGH = honesty.band(20, 10)


def mean_nees(method: str, scale: float = 1.0) -> float:
    return float(np.mean(honesty.nees(method, runs=20, steps=25, scale=scale)))


@pytest.mark.parametrize("model", ["v", "m"])
def test_the_dense_filter_is_inside_the_band(model: str) -> None:
    assert LOW < mean_nees(f"dense_{model}") < HIGH


def test_the_dense_filter_with_another_noise_is_outside() -> None:
    assert mean_nees("dense_v", 10.0) < LOW
    assert mean_nees("dense_v", 0.1) > HIGH


def test_koala_on_one_weight_is_the_dense_filter() -> None:
    one: dict[str, Any] = {"runs": 5, "steps": 10, "n": 1}
    for model in ("v", "m"):
        assert honesty.nees(f"koala_{model}", **one) == pytest.approx(honesty.nees(f"dense_{model}", **one), rel=1e-9)


def test_the_best_gain_is_white_and_a_tenth_of_it_is_not() -> None:
    right, small = honesty.follow_drift(0.2, 0.2), honesty.follow_drift(0.02, 0.2)
    assert (right["momentum"] == "right").mean() > 0.95
    assert (small["momentum"] == "too large").mean() > 0.95
    assert 0.94 < right["white"].mean() < 0.96
    assert abs(right["best"].mean() - 0.2) < 0.02


@pytest.fixture(scope="module")
def task() -> honesty.Task:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 5, generator=generator)
    labels = (inputs.sum(1) + 0.5 * torch.randn(60, generator=generator) > 0).long()
    return honesty.Task(lambda: nn.Linear(5, 2), inputs, labels, batch_size=8)


def test_minibatches_repeat_samples_and_are_those_of_the_seed(task: honesty.Task) -> None:
    first, again = list(task.batches(20, 3)), list(task.batches(20, 3))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert any(len({tuple(row) for row in x.tolist()}) < 8 for x, _ in first)


def test_a_watched_training_has_its_losses_beside_it(task: honesty.Task) -> None:
    table = honesty.watched(task, lambda m: KoalaV(m.parameters(), blocks="global"), 10, seed=0, full=True)
    [(x, y), *_] = task.batches(10, 1000)
    model = task.start(0)
    assert table["loss"][0] == pytest.approx(float(honesty.losses(model(x), y).mean().detach()))
    assert table["fell"].tolist() == [bool(v) for v in np.diff([task.loss(model), *table["full"]]) < 0]
    assert table[["promised", "delivered", "loss_nis"]].notna().all(axis=None)


def test_mekas_probability_can_be_told_from_its_parts(task: honesty.Task) -> None:
    table = honesty.watched(task, lambda m: Meka(m, honesty.losses, lr=0.3), 10, seed=0)
    z = torch.tensor((table["predicted"] / table["predicted_variance"] ** 0.5).to_numpy())
    assert torch.special.ndtr(z).tolist() == pytest.approx(table["probability"].tolist(), rel=1e-9)
    assert (table["predicted_variance"] > 2 * table["value_variance"]).all()
    (x, y), model = next(task.batches(10, 1000)), task.start(0)
    first = sample_moments(model, honesty.losses, x, y)
    assert table["loss"][0] == pytest.approx(float(first.loss))


def test_steering_changes_the_gain_to_what_whiteness_asks_for(task: honesty.Task) -> None:
    fixed, steered = (honesty.steered(task, 0.3, 100, 0, steer=steer, start=0.0) for steer in (False, True))
    assert fixed["gain"].unique().tolist() == [1.0]
    assert fixed["loss"][:25].tolist() == steered["loss"][:25].tolist()
    assert steered["gain"][25:].round(9).nunique() > 1
    assert steered["gain"].between(0.01 - 1e-9, 1).all()
    assert np.isfinite(fixed["full"].iloc[-1])
    assert fixed["full"].iloc[:-1].isna().all()
