"""The measures of sensitivity against enumeration and by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from koala_lab.claims.sensitivity import expected_best, measures, tolerated_range

errors = st.lists(st.integers(0, 4).map(float), min_size=2, max_size=5)  # few distinct ones, so that there are ties


@given(validation=errors, trials=st.integers(1, 4))
def test_expected_best_is_the_mean_over_all_draws(validation: list[float], trials: int) -> None:
    reported = [float(7 * i % 5) for i in range(len(validation))]
    outcomes = []
    for draws in itertools.product(range(len(validation)), repeat=trials):
        best = min(validation[i] for i in draws)
        winners = {i for i, v in enumerate(validation) if v == best}
        # The winner among equals is any of those drawn; over all draws each of them comes up equally often.
        outcomes.append(np.mean([reported[i] for i in draws if i in winners]))
    assert expected_best(validation, reported, trials) == pytest.approx(np.mean(outcomes), abs=1e-12)


def test_expected_best_falls_to_the_winner_of_the_whole_grid() -> None:
    validation, test = [30.0, 10.0, 20.0], [31.0, 12.0, 11.0]
    values = [expected_best(validation, test, k) for k in (1, 2, 5, 50)]
    assert values[0] == pytest.approx(18.0)
    assert values[-1] == pytest.approx(12.0)  # chosen by validation, although another one has the lower test error
    own = [expected_best(validation, validation, k) for k in (1, 2, 5, 50)]
    assert own == sorted(own, reverse=True)


@given(errors)
def test_tolerated_range_is_the_measure_of_the_sublevel_set(y: list[float]) -> None:
    x = 10.0 ** np.linspace(-2, 2, len(y))
    fine = np.linspace(-2, 2, 400_001)
    below = np.interp(fine, np.log10(x), y) <= min(y) + 0.5
    assert tolerated_range(x.tolist(), y, margin=0.5) == pytest.approx(4 * below.mean(), abs=1e-3)


def test_tolerated_range_by_hand() -> None:
    grid = [1e-2, 1e-1, 1.0, 1e1, 1e2]
    assert tolerated_range(grid, [5.0] * 5, margin=1.0) == pytest.approx(4.0)
    assert tolerated_range(grid, [90.0, 50.0, 10.0, 50.0, 90.0], margin=4.0) == pytest.approx(0.2)
    assert tolerated_range(grid, [10.0, 50.0, 90.0, 50.0, 10.0], margin=4.0) == pytest.approx(0.2)  # two pieces
    assert tolerated_range(grid, [90.0, 90.0, 90.0, 90.0, 10.0], margin=80.0) == pytest.approx(4.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: tolerated_range([1.0, 10.0], [1.0, float("nan")], margin=1.0),
        lambda: tolerated_range([10.0, 1.0], [1.0, 2.0], margin=1.0),
        lambda: tolerated_range([1.0, 10.0], [1.0, 2.0], margin=0.0),
        lambda: expected_best([1.0], [1.0, 2.0], 1),
        lambda: expected_best([1.0, float("nan")], [1.0, 2.0], 1),
        lambda: expected_best([1.0, 2.0], [1.0, 2.0], 0),
    ],
)
def test_impossible_arguments_are_refused(call: Callable[[], float]) -> None:
    with pytest.raises(ValueError, match=r"(tolerated_range|expected_best) needs"):
        call()


def test_measures_of_two_grids_in_any_order() -> None:
    table = pd.DataFrame(
        [
            ("sgd", 0, 10.0, 8.0, 9.0),
            ("sgd", 0, 0.1, 90.0, 80.0),
            ("sgd", 0, 1.0, 10.0, 11.0),
            ("adam", 0, 1.0, 5.0, 6.0),
            ("adam", 0, 10.0, 5.0, 8.0),
        ],
        columns=["method", "seed", "factor", "validation_error", "test_error"],
    )
    found = measures(table, value="factor", by=["method", "seed"], margin=2.0, default=1.0, trials=2)
    found = found.set_index("method")
    assert found.loc["sgd", ["range", "best", "untuned", "tuned"]].tolist() == [1.0, 10.0, 11.0, 9.0]
    assert found.loc["adam", ["range", "best", "untuned", "tuned"]].tolist() == [1.0, 1.0, 6.0, 7.0]
    assert found.loc["sgd", "1 trials"] == pytest.approx(100 / 3)
    assert found.loc["sgd", "2 trials"] == pytest.approx((9 * 5 + 11 * 3 + 80) / 9)
    with pytest.raises(ValueError, match="factor=3, the default, is not among the values of"):
        measures(table, value="factor", by=["method", "seed"], margin=2.0, default=3.0)
