"""Readings of MEKA's eq. (11) side by side: what is counted."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from koala_lab.runs import readings
from koala_lab.runs.trace import trace


def test_a_row_per_reading_and_seed() -> None:
    few = {name: readings.READINGS[name] for name in ("mean", "directional")}
    rows = readings.compare(readings=few, seeds=[3, 4], steps=3)
    assert rows[["reading", "seed"]].values.tolist() == [[name, seed] for seed in (3, 4) for name in few]
    assert rows["final_loss"].nunique() == 4
    assert (rows["lost"] == (rows["final_loss"] > math.log(10))).all()
    config = readings.CONFIG.but(seed=4, optimizer_args=few["directional"])
    followed = trace(config, 3)
    peak = int(followed["step_size_optimum"].argmax())
    assert rows["peak_step"].iloc[-1] == peak
    assert rows["peak"].iloc[-1] == followed["step_size_optimum"][peak]
    assert rows["peak_average"].iloc[-1] == followed["step_size"][peak]


def test_a_loss_that_is_not_finite_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = pd.DataFrame({"curvature": [1.0], "slope": [1.0], "step_size_optimum": [1.0], "step_size": [1.0]})
    losses = iter([math.nan, math.inf, 2.3, 2.31])
    monkeypatch.setattr(readings, "follow", lambda *args, **options: (frame, next(losses)))
    rows = readings.compare(readings={"a": {}}, seeds=range(4))
    assert rows["lost"].tolist() == [True, True, False, True]
    assert readings.summary(rows).loc["a", ["runs", "lost"]].tolist() == [4, 3]
