"""MEKA's step sizes against scipy's root finder on the definitions, in exact arithmetic where floats would not do."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from scipy import integrate, optimize, stats
from torch import Tensor

from koala_lib import step_size
from koala_lib.step_size import PredictedChange, ei_step, pi_step, quadratic_step

F64 = torch.float64
CAP = 0.125  # unlike any optimum below


def change(*numbers: float) -> PredictedChange:
    return PredictedChange(*(torch.tensor(x, dtype=F64) for x in numbers))


def random_changes(n: int, decades: float, *, third_order: bool = False, seed: int = 0) -> PredictedChange:
    """Every number log-uniform over 10^+-decades, curvatures of both signs."""
    generator = torch.Generator().manual_seed(seed)
    exponents = (2 * torch.rand(6, n, generator=generator, dtype=F64) - 1) * decades
    a, b, s, p, q, c = 10**exponents
    b[::2] *= -1
    return PredictedChange(a, b, s, p, q, c if third_order else None)


def rows(changes: PredictedChange) -> list[tuple[float, ...]]:
    return list(zip(*(x.tolist() for x in changes if x is not None), strict=True))


# ---- the model (11) ----------------------------------------------------------------------------------------------


def test_mean_and_variance_are_those_of_the_equation() -> None:
    model, alpha = change(2.0, 3.0, 5.0, 7.0, 11.0, 13.0), torch.tensor(0.5, dtype=F64)
    assert float(model.mean(alpha)) == pytest.approx(-2 * 0.5 + 3 / 8)
    assert float(model.variance(alpha)) == pytest.approx(10 + 7 / 4 + 11 / 64 + 13 / 64)
    assert float(model._replace(third_order=None).variance(alpha)) == pytest.approx(10 + 7 / 4 + 11 / 64)
    h = 1e-5
    for each in (model, model._replace(third_order=None)):
        slopes = [(f(alpha + h) - f(alpha - h)) / (2 * h) for f in (each.mean, each.variance)]
        torch.testing.assert_close(torch.stack(each.derivatives(alpha)), torch.stack(slopes), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("b", [2.0, -1.0])
def test_acquisition_functions_are_expectations(alpha: float, b: float) -> None:
    model, at = change(1.0, b, 0.3, 0.5, 0.2), torch.tensor(alpha, dtype=F64)
    normal = stats.norm(float(model.mean(at)), math.sqrt(float(model.variance(at))))
    assert float(step_size.improvement_probability(model, at)) == pytest.approx(normal.cdf(0), rel=1e-12)
    low = normal.mean() - 12 * normal.std()
    expected, _ = integrate.quad(lambda x: -x * normal.pdf(x), min(low, 0), 0, epsabs=1e-13, epsrel=1e-12)
    assert float(step_size.expected_improvement(model, at)) == pytest.approx(expected, rel=1e-9)


# ---- quadratic ---------------------------------------------------------------------------------------------------


def test_quadratic_rule() -> None:
    a, b = torch.tensor([1.0, 3.0, 1.0, 1.0, -1.0, 0.0, 1e3]), torch.tensor([4.0, 2.0, 0.0, -2.0, 1.0, -1.0, 1.0])
    one = torch.ones_like(a)
    assert quadratic_step(PredictedChange(a, b, one, one, one), CAP).tolist() == [0.25, 1.5, CAP, CAP, 0, 0, 1e3]


# ---- probability of improvement ----------------------------------------------------------------------------------


def exact_slope(numbers: tuple[float, ...], alpha: float) -> Fraction:
    """mu' V - mu V' / 2, which has the sign of J', as it is defined and without rounding."""
    a, b, s, p, q, c = (Fraction(x) for x in (*numbers, 0.0)[:6])
    x = Fraction(alpha)
    mu, mu1 = -a * x + b * x**2 / 2, -a + b * x
    V, V1 = 2 * s + p * x**2 + q * x**4 / 4 + c * x**6, 2 * p * x + q * x**3 + 6 * c * x**5
    return mu1 * V - mu * V1 / 2


def reference_pi(numbers: tuple[float, ...]) -> float:
    """The first sign change of J' by brentq in log alpha, from a bracket found by doubling."""
    a, b, s = numbers[:3]
    scale = Fraction(2 * a * s)

    def slope(log_alpha: float) -> float:
        value = exact_slope(numbers, math.exp(log_alpha)) / scale  # -1 at alpha = 0
        return float(max(min(value, Fraction(10**300)), Fraction(-(10**300))))

    high = math.log(a / b) if b > 0 else -100.0
    while slope(high) < 0:
        high += 1.0
    return math.exp(optimize.brentq(slope, high - 200 if b > 0 else high - 1.0, high, xtol=1e-14, rtol=1e-15))


@pytest.mark.parametrize("third_order", [False, True])
@pytest.mark.parametrize("decades", [1.0, 5.0, 15.0])
def test_pi_is_the_root_that_brentq_finds(decades: float, third_order: bool) -> None:
    changes = random_changes(60, decades, third_order=third_order)
    found = pi_step(changes, CAP).tolist()
    for numbers, alpha in zip(rows(changes), found, strict=True):
        assert alpha == pytest.approx(reference_pi(numbers), rel=1e-12), numbers
        a, b = numbers[:2]
        assert b < 0 or 0 < alpha <= a / b * (1 + 1e-15)


@pytest.mark.parametrize("third_order", [False, True])
def test_nothing_on_a_wide_grid_is_more_probable_than_the_root(third_order: bool) -> None:
    changes = random_changes(400, 2.0, third_order=third_order)
    best = pi_step(changes, CAP)
    wide = PredictedChange(*(None if x is None else x[:, None] for x in changes))  # type: ignore[arg-type]

    def criterion(alpha: Tensor) -> Tensor:  # J of (13); the probability itself is 1 to all digits for many
        return wide.mean(alpha) / wide.variance(alpha).sqrt()

    grid = best[:, None] * torch.logspace(-8, 8, 801, dtype=F64)
    low = criterion(best[:, None])
    assert bool((criterion(grid) >= low - 1e-12 * low.abs()).all())


def test_newton_comes_from_above_and_the_worst_case_has_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    # all ratios of the terms of N at the starting point, of which the largest is 1
    side = [0.0, 1e-3, 0.01, 0.1, 0.3, 0.6, 0.9, 1.0]
    terms = torch.tensor([t for t in itertools.product(side, repeat=4) if max(t) == 1 and max(t[:3]) > 0], dtype=F64).T
    linear, cubic, quartic, sixth = terms.clamp(min=1e-12)
    # N / (2 a s) = -1 +- (k alpha + p k / (4 s) alpha^3) + q / (8 s) alpha^4 + c / s alpha^6 (1 -+ k alpha / 4)
    one = torch.ones_like(linear)
    for sign, c in itertools.product([1, -1], [None, sixth]):
        changes = PredictedChange(one, sign * linear, one, 4 * cubic / linear, 8 * quartic, c)
        name = "_NEWTON_STEPS" if c is None else "_NEWTON_STEPS_THIRD_ORDER"
        used = getattr(step_size, name)
        iterates = []
        for count in [*range(used + 1), 2 * used]:
            monkeypatch.setattr(step_size, name, count)
            iterates.append(pi_step(changes, CAP))
        monkeypatch.undo()
        for before, after in itertools.pairwise(iterates):
            assert bool((after <= before * (1 + 1e-14)).all())
        torch.testing.assert_close(iterates[-2], iterates[-1], rtol=1e-14, atol=0)
        assert bool((iterates[0] <= 6 * iterates[-1]).all())


def test_pi_limits() -> None:
    def pi(*numbers: float) -> float:
        return float(pi_step(change(*numbers), CAP))

    a, b, s, p, q = 2.0, 4.0, 0.3, 0.7, 0.9
    newton = a / b
    assert pi(a, b, s, 0, 0) == newton  # p, q -> 0
    assert pi(a, b, s, 1e-12, 1e-12) == pytest.approx(newton, rel=1e-9)
    assert pi(a, b, 1e14, p, q) == pytest.approx(newton, rel=1e-9)  # s -> infinity
    assert pi(a, b, 0, p, q) == pi(a, b, 0, p, 0) == pi(a, b, 0, 0, q) == 0  # s -> 0
    assert pi(a, b, 1e-15, p, q) < 1e-3
    assert pi(a, b, 0, 0, 0) == pi(a, b, 0, 0, 0, 0) == newton  # nothing is uncertain
    assert pi(a, b, s, 1e-9, 0, 0) == pytest.approx(pi(a, b, s, 1e-9, 0))  # c -> 0
    assert pi(a, b, s, p, 1e300) < 1e-50  # q -> infinity
    assert pi(0, b, s, p, q) == pi(-1, b, s, p, q) == pi(-1, -b, s, p, q) == 0
    # b -> 0 from either side is b = 0, where q alpha^4 = 8 s
    assert pi(a, 0, s, p, q) == pytest.approx((8 * s / q) ** 0.25, rel=1e-14)
    for tiny in (1e-13, -1e-13):
        assert pi(a, tiny, s, p, q) == pytest.approx((8 * s / q) ** 0.25, rel=1e-9)


def test_pi_under_negative_curvature() -> None:
    def pi(*numbers: float) -> float:
        return float(pi_step(change(*numbers), CAP))

    a, b, s, p = 2.0, -4.0, 0.3, 0.7
    steps = [pi(a, b, s, p, q) for q in (1.0, 1e-2, 1e-4, 1e-8)]  # no cap on a finite optimum, however large
    assert steps == sorted(steps)
    assert steps[-1] > 1e6
    assert pi(a, b, s, p, 0) == pi(a, 0, s, p, 0) == CAP  # q -> 0: the best step is infinite
    assert pi(a, b, s, p, 0, 0) == CAP
    assert 0 < pi(a, b, s, p, 0, 0.5) < 10  # the third-order term makes it finite
    assert pi(a, b, s, p, 1.0, 0.5) < pi(a, b, s, p, 1.0)
    assert pi(a, b, 0, p, 0.9) == pytest.approx(2 * 2 * p / 0.9)  # s -> 0: q alpha / 4 = |b| p / (2 a)


@pytest.mark.parametrize("rule", [pi_step, ei_step, quadratic_step])
def test_steps_follow_the_units(rule: step_size.Callable) -> None:  # type: ignore[type-arg]
    changes = random_changes(50, 1.0, third_order=True)
    a, b, s, p, q, c = changes
    assert c is not None
    steps = rule(changes, torch.inf)
    u = 8.0  # the loss in other units
    scaled = PredictedChange(u * a, u * b, u**2 * s, u**2 * p, u**2 * q, u**2 * c)
    torch.testing.assert_close(rule(scaled, torch.inf), steps, rtol=1e-12, atol=0)
    scaled = PredictedChange(u * a, u**2 * b, s, u**2 * p, u**4 * q, u**6 * c)  # the direction u times as long
    torch.testing.assert_close(rule(scaled, torch.inf), steps / u, rtol=1e-12, atol=0)


# ---- expected improvement ----------------------------------------------------------------------------------------


def reference_ei(numbers: tuple[float, ...]) -> float:
    """The first maximum on (0, 2 a/b] of EI as integrated over the normal density, by brentq on its slope."""
    a, b, s, p, q = numbers

    def slope(alpha: float) -> float:
        mu, V = -a * alpha + b * alpha**2 / 2, 2 * s + p * alpha**2 + q * alpha**4 / 4
        z = -mu / math.sqrt(V)
        density, cumulated = math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi), math.erfc(-z / math.sqrt(2)) / 2
        return (2 * p * alpha + q * alpha**3) / (2 * math.sqrt(V)) * density - (b * alpha - a) * cumulated

    points = [2 * a / b * i / 1000 for i in range(1, 1001)]
    for low, high in itertools.pairwise(points):
        if slope(high) <= 0:
            return float(optimize.brentq(slope, low, high, xtol=1e-15, rtol=1e-14))
    return points[-1]


def test_ei_is_the_first_maximum_that_brentq_finds() -> None:
    changes = random_changes(60, 1.5, seed=1)
    found = ei_step(changes, CAP)
    ends = 0
    for numbers, alpha in zip(rows(changes), found.tolist(), strict=True):
        a, b = numbers[:2]
        if b < 0:
            assert alpha == CAP
        else:
            assert alpha == pytest.approx(reference_ei(numbers), rel=1e-11), numbers
            assert a / b * (1 - 1e-12) <= alpha <= 2 * a / b
            ends += alpha == 2 * a / b
    assert 0 < ends < 20  # some increase throughout, some do not


def test_ei_is_a_maximum_of_the_expected_improvement() -> None:
    changes = random_changes(200, 1.0, third_order=True, seed=2)
    best = ei_step(changes, CAP)
    inside = (changes.curvature > 0) & (best < 2 * changes.slope / changes.curvature * (1 - 1e-9))
    assert int(inside.sum()) > 20
    values = [step_size.expected_improvement(changes, best * factor)[inside] for factor in (0.999, 1.0, 1.001)]
    assert bool((values[1] > values[0]).all())
    assert bool((values[1] > values[2]).all())


def test_ei_without_uncertainty_is_newton_and_without_a_maximum_the_cap() -> None:
    assert float(ei_step(change(2.0, 4.0, 0.0, 0.0, 0.0), CAP)) == pytest.approx(0.5, rel=1e-15)
    assert float(ei_step(change(2.0, 4.0, 1e-9, 0.0, 0.0), CAP)) == pytest.approx(0.5, rel=1e-12)
    assert float(ei_step(change(2.0, -4.0, 1.0, 1.0, 1.0), CAP)) == CAP
    assert float(ei_step(change(2.0, 0.0, 1.0, 1.0, 1.0, 1.0), CAP)) == CAP
    assert float(ei_step(change(-2.0, 4.0, 1.0, 1.0, 1.0), CAP)) == 0


def test_ei_grows_for_ever() -> None:
    """EI ~ sqrt(q) / 2 alpha^2 (phi(z) - z Phi(-z)) with z = b / sqrt(q): unbounded although b > 0."""
    model = change(1.0, 1.5, 0.5, 0.8, 0.6)
    z = 1.5 / math.sqrt(0.6)
    rate = math.sqrt(0.6) / 2 * (stats.norm.pdf(z) - z * stats.norm.cdf(-z))
    alpha = torch.tensor(1e6, dtype=F64)
    assert float(step_size.expected_improvement(model, alpha) / alpha**2) == pytest.approx(rate, rel=1e-4)


# ---- how it is computed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [pi_step, ei_step, quadratic_step])
def test_elementwise_in_any_shape_and_dtype(rule: step_size.Callable) -> None:  # type: ignore[type-arg]
    changes = random_changes(12, 1.0)
    together = rule(changes, CAP)
    square = PredictedChange(*(None if x is None else x.view(3, 4) for x in changes))  # type: ignore[arg-type]
    torch.testing.assert_close(rule(square, CAP), together.view(3, 4), rtol=1e-14, atol=0)
    for i, numbers in enumerate(rows(changes)):
        torch.testing.assert_close(rule(change(*numbers), CAP), together[i], rtol=1e-14, atol=0)
    single = rule(PredictedChange(*(None if x is None else x.float() for x in changes)), CAP)  # type: ignore[arg-type]
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), together, rtol=1e-4, atol=0)
