"""The judge itself on trial: planted truths, false verdicts at their nominal level, power that grows with n."""

from __future__ import annotations

from collections import Counter
from functools import cache

import numpy as np
import pytest
from scipy import stats

from koala_lab.claims import Claim, Criterion, judge

REPEATS = 500


def claim(test: str, margin: float, rows: int) -> Claim:
    """On errors of a against b, c, ...; of all pairs; or of a mean of 0."""
    names = tuple("abcdefgh"[: rows + 1])
    ranked = {"among": names} if test == "insensitive" else {"subject": "a", "against": names[1:]}
    return Claim(
        id="koala.test.planted", where="here", kind="value" if test == "value" else "ordering", metric="x", unit="",
        direction="lower", expected=0.0, spread=None, n=None, text="a beats b", notebook="koala/20_x",
        judge={"quick": Criterion(test, margin)}, **({} if test == "value" else ranked),  # type: ignore[arg-type]
    )  # fmt: skip


@cache
def shares(test: str, margin: float, gain: float, n: int, rows: int = 1) -> Counter[str]:
    """How often each status comes out of experiments in which a is better than every other row by ``gain``.

    Seeds share a component, as runs from the same weights do; the differences have standard deviation 1.
    """
    rng = np.random.default_rng([len(test), n, rows, round(1e3 * margin), round(1e3 * abs(gain))])
    c, found = claim(test, margin, rows), Counter[str]()
    for _ in range(REPEATS):
        shared, noise = 3 * rng.standard_normal(n), rng.standard_normal((rows + 1, n)) / np.sqrt(2)
        if test == "value":
            found[judge(c, preset="quick", values=dict(enumerate(gain + np.sqrt(2) * noise[0]))).status] += 1
            continue
        arms = {r: dict(enumerate(shared + noise[i] + gain * (i > 0))) for i, r in enumerate("abcdefgh"[: rows + 1])}
        found[judge(c, preset="quick", arms=arms).status] += 1
    return found


def at_most(count: int, level: float) -> bool:
    """Whether a count of false verdicts is compatible with a rate of at most ``level``, at one in a thousand."""
    return bool(stats.binom.sf(count - 1, REPEATS, level) > 1e-3)


def about(count: int, level: float) -> bool:
    return at_most(count, level) and bool(stats.binom.cdf(count, REPEATS, level) > 1e-3)


# Where the truth lies exactly on the edge of what a test asks for, and the level that it promises there.
EDGES = [("better", 0.0, 0.0, 0.025), ("better", 1.0, 1.0, 0.025), ("no_worse", 0.5, -0.5, 0.05)]


@pytest.mark.parametrize("n", [5, 12])
@pytest.mark.parametrize(("test", "margin", "gain", "level"), EDGES)
def test_on_the_edge_both_false_verdicts_have_their_nominal_rate(
    test: str, margin: float, gain: float, level: float, n: int
) -> None:
    found = shares(test, margin, gain, n)
    assert about(found["reproduced"], level), found
    assert about(found["contradicted"], level), found


@pytest.mark.parametrize("n", [5, 12])
@pytest.mark.parametrize(("test", "level"), [("on_par", 0.05), ("value", 0.025)])
def test_equivalence_is_false_at_most_as_often_as_promised(test: str, level: float, n: int) -> None:
    for edge in (-1.0, 1.0):
        found = shares(test, 1.0, edge, n)
        assert at_most(found["reproduced"], level), found
        assert at_most(found["contradicted"], level), found


@pytest.mark.parametrize(("test", "margin", "gain"), [("better", 0.0, 0.0), ("no_worse", 0.5, -0.5)])
def test_several_comparisons_do_not_raise_the_rate_of_false_contradictions(
    test: str, margin: float, gain: float
) -> None:
    found = shares(test, margin, gain, 6, rows=5)
    assert at_most(found["contradicted"], 0.025 if test == "better" else 0.05), found
    assert at_most(found["reproduced"], 0.025 if test == "better" else 0.05), found


def test_insensitivity_of_many_pairs_is_contradicted_no_more_often_than_one() -> None:
    assert at_most(shares("insensitive", 0.3, 0.0, 6, rows=3)["contradicted"], 0.10)


@pytest.mark.parametrize(
    ("test", "margin", "true", "false"),
    [("better", 0.0, 1.0, -1.0), ("no_worse", 0.5, 0.5, -1.5), ("on_par", 1.0, 0.0, 2.0), ("value", 1.0, 0.0, 2.0)],
)
def test_power_grows_with_the_seeds(test: str, margin: float, true: float, false: float) -> None:
    """Printed with -s: the share of right verdicts over n, for effects of one standard deviation."""
    sizes = (5, 10, 20)
    right = [shares(test, margin, true, n)["reproduced"] / REPEATS for n in sizes]
    wrong = [shares(test, margin, false, n)["contradicted"] / REPEATS for n in sizes]
    print(f"\n{test:9} reproduced where true {right}, contradicted where false {wrong}, n = {sizes}")
    for rates in (right, wrong):
        assert rates[0] < rates[1] < rates[2]
        assert rates[2] > 0.9
    # and hardly ever the other way round
    assert max(shares(test, margin, true, n)["contradicted"] for n in sizes) <= 0.02 * REPEATS
    assert max(shares(test, margin, false, n)["reproduced"] for n in sizes) <= 0.02 * REPEATS


def test_power_of_better_is_that_of_the_t_test() -> None:
    """The probability that a one-sided t test at 2.5 % sees a gain of one standard deviation (noncentral t)."""
    for n in (5, 10):
        exact = stats.nct.sf(stats.t.ppf(0.975, n - 1), n - 1, np.sqrt(n))
        assert about(shares("better", 0.0, 1.0, n)["reproduced"], float(exact))
