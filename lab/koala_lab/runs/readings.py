"""Which reading of MEKA's eq. (11) trains: every reading on the same weights and minibatches, over many seeds.

What is run and what is counted stands here before the runs: rows ``READINGS``, loss after the last step over the whole
training set, a run is lost if that is above log(classes) (an even guess) or not finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, Final

import pandas as pd
import torch

from koala_lab.config import RunConfig
from koala_lab.runs.trace import _batches, _meka_step, _training_set
from koala_lab.runs.training import TrainingRun
from koala_lib.optim import Meka

AVERAGED: Final = {"curvature_smoothing": 0.999}
CUBIC: Final = {"third_order": True}
READINGS: Final[dict[str, dict[str, Any]]] = {
    "mean": {},
    "sum": {"variances": "sum"},
    "directional": {"variances": "directional"},
    "mean, third order": CUBIC,
    "sum, third order": {"variances": "sum"} | CUBIC,
    "directional, third order": {"variances": "directional"} | CUBIC,
    "mean, curvature averaged": AVERAGED,
    "sum, curvature averaged": {"variances": "sum"} | AVERAGED,
    "directional, curvature averaged": {"variances": "directional"} | AVERAGED,
    "directional, nothing averaged": {"variances": "directional", "smoothing": 0.0},
    "directional, averages of 0.9": {"variances": "directional", "smoothing": 0.9},
    "quadratic": {"step_size": "quadratic"},
}
CONFIG: Final = RunConfig(dataset="digits", model="mlp_100", optimizer="meka", epochs=1, batch_size=64)


def follow(config: RunConfig, steps: int, *, device: str = "cpu") -> tuple[pd.DataFrame, float]:
    """Train MEKA for some steps; what its filter said at each, and the loss over the training set afterwards."""
    run = TrainingRun(config, torch.device(device))
    optimizer = run.optimizers["network"]
    assert isinstance(optimizer, Meka)
    rows = [_meka_step(run, optimizer, batch, False) for batch in islice(_batches(run), steps)]
    with torch.no_grad():
        losses = torch.cat([run.task.sample_losses(batch) for batch in _training_set(run)])
    return pd.DataFrame(rows), float(losses.double().mean())


def compare(
    config: RunConfig = CONFIG,
    *,
    readings: Mapping[str, Mapping[str, Any]] = READINGS,
    seeds: Iterable[int] = range(1000, 1020),
    steps: int = 60,
    device: str = "cpu",
) -> pd.DataFrame:
    """One row per reading and seed.

    Args:
        config: data set, network, batch size; options of the optimizer that all readings share.
        readings: options of :class:`koala_lib.optim.Meka` by the reading's name.
        seeds: of weights and order of the samples.
        steps: per run.
        device: torch device.

    Returns:
        ``reading``, ``seed``, ``final_loss`` (mean over the training set after the last step), ``lost``, and of the
        step where alpha* was largest: ``peak_step`` (from 0), ``peak`` (alpha*), ``peak_curvature`` (delta^T B
        delta / |slope|, in units of the run's median), ``peak_average`` (alpha as used), ``negative``, the number of
        steps with a curvature that was not positive.
    """
    classes = 10  # of every data set of the MEKA paper and of digits
    rows = []
    for seed in seeds:
        for name, options in readings.items():
            arguments = dict(config.optimizer_args) | dict(options)
            trace, loss = follow(config.but(optimizer_args=arguments, seed=seed), steps, device=device)
            relative = trace["curvature"] / trace["slope"].abs()
            peak = int(trace["step_size_optimum"].fillna(math.inf).argmax())
            rows.append(
                {
                    "reading": name,
                    "seed": seed,
                    "final_loss": loss,
                    "lost": not loss <= math.log(classes),
                    "peak_step": peak,
                    "peak": trace["step_size_optimum"][peak],
                    "peak_curvature": relative[peak] / relative.median(),
                    "peak_average": trace["step_size"][peak],
                    "negative": int((trace["curvature"] <= 0).sum()),
                }
            )
    return pd.DataFrame(rows)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row per reading: runs, lost runs, quartiles of the final loss of all runs."""
    groups = rows.groupby("reading", sort=False)
    quartiles = {"best": 0.0, "q1": 0.25, "median": 0.5, "q3": 0.75, "worst": 1.0}
    columns = {name: groups["final_loss"].quantile(q) for name, q in quartiles.items()}
    return pd.DataFrame({"runs": groups["lost"].size(), "lost": groups["lost"].sum()} | columns)
