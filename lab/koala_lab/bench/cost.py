"""What runs will take, from finished runs of the same kind.

All of it is proportional: seconds = seconds per sample * samples of an epoch * epochs, evaluations included. Nothing is
guessed for a kind of run of which none has finished.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from koala_lab import data
from koala_lab.config import RunConfig
from koala_lab.runs.training import RunResult


def kind(config: RunConfig) -> str:
    """Return what decides the cost of a step, in words; the runs of a kind differ in numbers that do not."""
    network = {k: v for k, v in dict(config.model_args).items() if k != "init"}
    variant = {k: v for k, v in dict(config.optimizer_args).items() if isinstance(v, str)}
    parts = [config.dataset, _call(config.model, network), _call(config.optimizer, variant), str(config.batch_size)]
    return ", ".join(parts + [config.precision] * (config.precision != "float32"))


def _call(name: str, arguments: Mapping[str, Any]) -> str:
    return f"{name}({', '.join(f'{k}={v}' for k, v in arguments.items())})" if arguments else name


def samples(config: RunConfig) -> int | None:
    """Return the samples of a training epoch, dropped last batches included; ``None`` where that is unknown."""
    if config.train_size is not None:
        return config.train_size
    whole = data.DATASETS[config.dataset].samples
    return whole and whole - dict(config.task_args).get("validation_size", 0)


class Costs:
    """Seconds of runs on one kind of device.

    Args:
        results: Finished runs; those of another kind of device are passed over.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
    """

    def __init__(self, results: Iterable[RunResult] = (), *, device: str = "cpu") -> None:
        self._runs: dict[str, list[float]] = {}
        self._device = device.partition(":")[0]
        for result in results:
            self.add(result)

    def add(self, result: RunResult) -> None:
        """Learn from a finished run."""
        size, seconds = samples(result.config), result.provenance.get("seconds")
        here = result.provenance.get("device", "").startswith(self._device)
        if result.status == "done" and size and seconds and here:
            rate = seconds / (size * result.config.epochs)
            self._runs.setdefault(kind(result.config), []).append(rate)

    def seconds(self, config: RunConfig) -> float | None:
        """Estimate a run from its first step to its last; ``None`` if nothing like it has finished."""
        size, rates = samples(config), self._runs.get(kind(config))
        return median(rates) * size * config.epochs if rates and size else None


def minutes(seconds: float | None, *, attempt: int = 1, start: int = 10, most: int = 24 * 60) -> int:
    """Return the time to ask a batch system for: twice the estimate and the start, more with every attempt.

    At most ``most``, since a run that was stopped goes on from its checkpoint; that also for a run of unknown cost.
    """
    return most if seconds is None else min(most, start + math.ceil(attempt * 2 * seconds / 60))
