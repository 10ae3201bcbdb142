"""What runs will take: from finished runs of the same kind, else from step times that ``koala bench`` has measured.

All of it is proportional: seconds = seconds a sample * samples of an epoch * epochs. A finished run also counts its
evaluations, a measured step does not. Nothing is guessed for a kind of run that was never measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from statistics import median
from typing import Any

from koala_lab.bench import steps as bench
from koala_lab.config import RunConfig
from koala_lab.runs.training import RunResult

# What train_size counts (images, tokens, pairs of sentences) in the whole training part. WMT14's depends on the copy.
SAMPLES = {
    "digits": 1_297,
    "mnist5k": 4_000,
    "mnist5k-t10k": 5_000,
    "mnist": 60_000,
    "fashion-mnist": 60_000,
    "cifar10": 50_000,
    "cifar100": 50_000,
    "imagenet32": 1_281_167,
    "imagenet": 1_281_167,
    "tinyshakespeare": 1_003_855,
    "wikitext-2": 2_088_628,
    "wikitext-2-valid": 195_881,
    "one-billion-words": 829_250_940,  # as published, both ends of a sentence included
    "numbers": 3_000,
    "multi30k": 29_000,
    "wmt14-en-de": 4_500_000,
}


def kind(config: RunConfig) -> str:
    """What decides the cost of a step, in words; the runs of a kind differ in numbers that do not."""
    network = {k: v for k, v in dict(config.model_args).items() if k != "init"}
    variant = {k: v for k, v in dict(config.optimizer_args).items() if isinstance(v, str)}
    parts = [config.dataset, _call(config.model, network), _call(config.optimizer, variant), str(config.batch_size)]
    return ", ".join(parts + [config.precision] * (config.precision != "float32"))


def _call(name: str, arguments: Mapping[str, Any]) -> str:
    return f"{name}({', '.join(f'{k}={v}' for k, v in arguments.items())})" if arguments else name


def samples(config: RunConfig) -> int | None:
    """Samples of a training epoch, dropped last batches included; ``None`` for a data set of unknown size."""
    if config.train_size is not None:
        return config.train_size
    whole = SAMPLES.get(config.dataset)
    return whole and whole - dict(config.task_args).get("validation_size", 0)


class Costs:
    """Seconds of runs on one kind of device.

    Args:
        results: finished runs; those of another kind of device are passed over.
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Attributes:
        measured: where the step times were measured (:func:`koala_lab.bench.steps.provenance`), empty without any.
    """

    def __init__(self, results: Iterable[RunResult] = (), *, device: str = "cpu") -> None:
        section = bench.stored(device).get("step_times", {"provenance": {}, "rows": []})
        self.measured: dict[str, Any] = section["provenance"]
        self._steps = {row["kind"]: [row["seconds"]] for row in section["rows"]}
        self._runs: dict[str, list[float]] = {}
        self._device = device.partition(":")[0]
        for result in results:
            self.add(result)

    def add(self, result: RunResult) -> None:
        """Learn from a finished run."""
        size = samples(result.config)
        if result.status == "done" and size and result.provenance["device"].startswith(self._device):
            rate = result.provenance["seconds"] / (size * result.config.epochs)
            self._runs.setdefault(kind(result.config), []).append(rate)

    def seconds(self, config: RunConfig, choose: Callable[[list[float]], float] = median) -> float | None:
        """What a run takes, from its first step to its last; ``None`` if nothing like it was measured.

        Args:
            config: the run.
            choose: one of the rates of finished runs of its kind.
        """
        size, name = samples(config), kind(config)
        rates = self._runs.get(name) or self._steps.get(name)
        return choose(rates) * size * config.epochs if rates and size else None


def minutes(seconds: float | None, *, attempt: int = 1, start: int = 10, most: int = 24 * 60) -> int:
    """The time to ask a batch system for: twice the estimate and the start, more with every attempt.

    At most ``most``, since a run that was stopped goes on from its checkpoint; that also for a run of unknown cost.
    """
    return most if seconds is None else min(most, start + math.ceil(attempt * 2 * seconds / 60))
