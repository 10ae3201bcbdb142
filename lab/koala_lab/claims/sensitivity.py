"""What a method asks of the person who tunes it: measures of errors over a grid of one hyper-parameter.

Errors in %, one number a value of the hyper-parameter; a run that failed has the error of guessing. What is chosen is
chosen by the validation error, and the test error of the choice is what is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

Numbers = Sequence[float] | np.ndarray[Any, Any]


def tolerated_range(values: Numbers, errors: Numbers, *, margin: float) -> float:
    """Return the width, in decades, of the values whose error is at most ``margin`` above the smallest one of the grid.

    Between two values of the grid the error is interpolated linearly in the logarithm of the value. Several separate
    pieces are added up. The grid's ends bound the result: a range that goes on beyond them is measured too small.

    Args:
        values: the grid, positive and increasing.
        errors: one finite error a value.
        margin: in the unit of the errors, above 0.

    >>> tolerated_range([0.01, 0.1, 1.0, 10.0], [90.0, 12.0, 10.0, 50.0], margin=2.0)
    1.05
    """
    x, y = np.log10(np.asarray(values, dtype=float)), np.asarray(errors, dtype=float)
    if len(x) != len(y) or len(x) < 2 or not np.isfinite(y).all() or not (np.diff(x) > 0).all() or margin <= 0:
        raise ValueError("tolerated_range needs increasing positive values, a finite error for each, and a margin > 0")
    limit = y.min() + margin
    low, high = np.minimum(y[:-1], y[1:]), np.maximum(y[:-1], y[1:])
    rise = np.where(high > low, high - low, 1.0)  # a level piece lies below the limit as a whole, or not at all
    below = np.where(high <= limit, 1.0, ((limit - low) / rise).clip(0.0, 1.0))
    return float((np.diff(x) * below).sum())


def expected_best(validation: Numbers, reported: Numbers, trials: int) -> float:
    """Return the expected reported error of the best of ``trials`` random values of the grid, best by validation error.

    The values are drawn with replacement, each with the same probability; among draws with equal validation errors
    chance decides. Closed form after Dodge et al. ("Show Your Work", EMNLP 2019), who report the validation score of
    the winner itself: that is ``expected_best(validation, validation, trials)``.

    Args:
        validation: validation errors, by which the winner is chosen.
        reported: what is reported of the winner, such as test errors.
        trials: how many values are tried, from 1.

    >>> expected_best([10.0, 20.0], [11.0, 19.0], trials=1), expected_best([10.0, 20.0], [11.0, 19.0], trials=2)
    (15.0, 13.0)
    """
    v, r = np.asarray(validation, dtype=float), np.asarray(reported, dtype=float)
    if len(v) != len(r) or not len(v) or not np.isfinite([v, r]).all() or trials < 1:
        raise ValueError("expected_best needs two finite errors for every value, and at least one trial")
    _, group, sizes = np.unique(v, return_inverse=True, return_counts=True)
    worse = 1 - np.cumsum(sizes) / len(v)  # share of the values with a larger validation error than the group
    wins = (worse + sizes / len(v)) ** trials - worse**trials
    return float((wins * np.bincount(group, weights=r) / sizes).sum())


def measures(
    runs: pd.DataFrame, *, value: str, by: Sequence[str], margin: float, default: float, trials: int = 10
) -> pd.DataFrame:
    """Return all measures of every grid in a table of runs.

    Args:
        runs: one row a run, with ``validation_error`` and ``test_error`` (no NaN) and the columns named below.
        value: column of the hyper-parameter.
        by: columns that tell the grids apart, such as data set, method and seed.
        margin: see :func:`tolerated_range`.
        default: the value that somebody takes who does not tune; must be in every grid.
        trials: largest number of trials.

    Returns:
        One row a grid: the columns ``by``, ``range`` (decades), ``best`` (the value with the smallest validation error,
        the first of several), and test errors: ``untuned`` at the default, ``tuned`` at the best value (the mean where
        several are best), and ``1 trials`` to ``<trials> trials``, what so many random values lead one to expect.
    """
    import pandas as pd

    rows = []
    for group, grid in runs.sort_values(value).groupby(list(by), sort=False):
        x, validation, test = (grid[c].to_numpy(dtype=float) for c in (value, "validation_error", "test_error"))
        if default not in x:
            raise ValueError(f"{value}={default:g}, the default, is not among the values of {group}")
        winners = validation == validation.min()
        found = {
            "range": tolerated_range(x, validation, margin=margin),
            "best": x[winners][0],
            "untuned": test[x == default].mean(),
            "tuned": test[winners].mean(),
        }
        expected = {f"{k} trials": expected_best(validation, test, k) for k in range(1, trials + 1)}
        rows.append(dict(zip(by, group, strict=True)) | found | expected)
    return pd.DataFrame(rows)
