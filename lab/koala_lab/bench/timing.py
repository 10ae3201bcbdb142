"""A clock, and jobs timed in turn."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

Row = dict[str, Any]


def now(device: str = "cpu") -> float:
    """Read a clock, in seconds.

    It is the processor time of this thread if torch uses no other, so that the machine's other work counts little; else
    elapsed time, with a GPU once it has done all it was given.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.thread_time()
    return time.perf_counter()


def interleave(
    jobs: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    device: str = "cpu",
    seconds: float = 0.0,
    least: float = 0.0,
) -> dict[str, list[float]]:
    """Time jobs in turn: return the seconds of every job in each round, without the first, which makes states.

    Args:
        jobs: What to time, by name.
        rounds: How many rounds.
        device: torch device; its queue is waited for.
        seconds: Go on with more rounds until this time is over.
        least: A turn of a job lasts so many seconds at least, and the mean of its calls counts: what the job before
            left in the caches and the allocator matters less.
    """
    times: dict[str, list[float]] = {name: [] for name in jobs}
    calls = {name: math.ceil(least / _second(job, device)) if least else 1 for name, job in jobs.items()}
    end = time.monotonic() + seconds
    done = -1
    while done < rounds or time.monotonic() < end:
        for name, job in jobs.items():
            start = now(device)
            for _ in range(calls[name]):
                job()
            times[name].append((now(device) - start) / calls[name])
        done += 1
    return {name: t[1:] for name, t in times.items()}


def _second(job: Callable[[], object], device: str) -> float:
    """Return the seconds of the second call of a job."""
    job()
    start = now(device)
    job()
    return now(device) - start


def spread(name: str, values: Iterable[float]) -> Row:
    """Return the median and quartiles, as columns ``name``, ``name_q1`` and ``name_q3``."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {name: median, f"{name}_q1": q1, f"{name}_q3": q3}
