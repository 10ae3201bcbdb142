"""Intervals of means: the one place where they are computed, for verdicts and figures alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special  # type: ignore[import-untyped]

Numbers = Sequence[float] | np.ndarray[Any, Any]


def interval(sample: Numbers, confidence: float = 0.95) -> tuple[float, float, float]:
    """Return mean and Student t interval ``(mean, low, high)`` of n >= 2 independent values.

    >>> tuple(round(v, 3) for v in interval([1.0, 2.0, 3.0]))
    (2.0, -0.484, 4.484)
    """
    x = np.asarray(sample, dtype=float)
    if len(x) < 2:
        raise ValueError(f"an interval needs at least 2 values, got {len(x)}")
    mean, error = float(x.mean()), float(x.std(ddof=1)) / math.sqrt(len(x))
    half = float(special.stdtrit(len(x) - 1, 0.5 + confidence / 2)) * error  # Student t quantile
    return mean, mean - half, mean + half


def mean_and_half_width(values: Numbers, confidence: float = 0.95) -> tuple[float, float]:
    """Return the mean of the finite values and half the width of its interval, NaN for fewer than two of them."""
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    if finite.size < 2:
        return (float(finite.mean()) if finite.size else math.nan), math.nan
    mean, low, _ = interval(finite, confidence)
    return mean, mean - low


def spreads(sample: Numbers) -> bool:
    """Say whether values differ by more than rounding; an interval of width 0 decides nothing."""
    x = np.asarray(sample, dtype=float)
    return bool(np.ptp(x) > 1e-12 * max(1.0, float(np.abs(x).max())))
