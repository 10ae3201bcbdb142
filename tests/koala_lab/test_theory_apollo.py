"""Theorem 2, Corollary 2.1 and the trend of Theorem 3 of APOLLO, under the conditions that their proofs need."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from koala_lab import claims
from koala_lab.theory.apollo import (
    OnlineRun,
    constant_of_the_rate,
    corollary_term,
    online_run,
    rate_envelope,
    regret,
    regret_bound,
    rounds_of,
    weighted_sum,
)
from koala_lab.theory.problems import FiniteSum, noisy_wells, random_online, two_samples, wells_slope
from koala_lib import Apollo

ROUNDS = 150


def convex(kind: str, seed: int) -> FiniteSum:
    return random_online(kind, ROUNDS, seed=seed)


BETAS: dict[str, Callable[[int], float] | float] = {
    "constant": 0.9,
    "none": 0.0,
    "geometric": lambda t: 0.9 * 0.95 ** (t - 1),
    "harmonic": lambda t: 0.9 / t,
}


def run_on(problem: FiniteSum, **options: Any) -> OnlineRun:
    return online_run(rounds_of(problem), torch.tensor(problem.start), ROUNDS, **options)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", ["squares", "logistic", "alternating", "absolute"])
def test_the_regret_stays_below_the_bound(kind: str, beta: str) -> None:
    for seed in range(3):
        problem = convex(kind, seed)
        best = problem.minimiser()
        assert float(problem.gradient(best).norm()) < 1e-6
        for lr, sigma in ((0.03, 1.0), (0.3, 1.0), (0.03, 0.1)):
            run = run_on(problem, lr=lr, beta=BETAS[beta], sigma=sigma)
            assert run.rounds_of_decrease() == 0
            bound = regret_bound(run, best, sigma=sigma)
            assert min(bound) >= 0
            assert regret(run, problem) <= bound.total
            # so it is for any other comparator: the proof does not use that theta* is the best
            other = best + 0.1
            assert float(run.losses.sum() - problem.losses(other).sum()) <= regret_bound(run, other, sigma=sigma).total


@pytest.mark.parametrize("beta", BETAS)
def test_the_inequalities_behind_the_bound(beta: str) -> None:
    """The bound is loose; this chain, with what the run really had in place of D and G, is not (derived):

    R_T <= 1 / (2 (1 - beta)) sum_t [(w_t - w_{t-1}) x_t^2 + eta_t (m_t^2 / D_t + m_{t-1}^2) + beta_t^2 x_t^2 / eta_t]
           - w_T x_{T+1}^2 / 2; for linear f_t and beta = 0 the two sides are equal.
    """
    for kind in ("squares", "logistic", "alternating"):
        problem = convex(kind, 0)
        best = problem.minimiser()
        run = run_on(problem, lr=0.1, beta=BETAS[beta])
        x2 = (run.points[:-1] - best) ** 2
        d = -torch.diff(run.points, dim=0) / run.rates[:, None]
        m2 = (d * run.floors) ** 2
        previous = torch.cat([torch.zeros_like(m2[:1]), m2[:-1]])
        chain = weighted_sum(run.weights, x2.sqrt())
        chain += float((run.rates[:, None] * (m2 / run.floors + previous * (run.betas[:, None] > 0))).sum())
        chain += float((run.betas[:, None] ** 2 * x2 / run.rates[:, None]).sum())
        chain /= 2 * (1 - float(run.betas.max()))
        assert chain <= regret_bound(run, best).total
        chain -= float(run.weights[-1] @ (run.points[-1] - best) ** 2) / 2
        assert regret(run, problem) <= chain
        linear = float((run.gradients * (run.points[:-1] - best)).sum())
        assert regret(run, problem) <= linear <= chain + 1e-9 * abs(chain)
        if beta == "none":
            assert linear == pytest.approx(chain, rel=1e-6)


def test_an_online_problem_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind 'cubes' is unknown; known are squares, logistic, alternating, absolute"):
        random_online("cubes", 3)


def test_the_run_is_the_algorithm_with_another_average() -> None:
    """With beta = 0 there is no bias to correct, and the optimizer goes the same way."""
    problem = convex("squares", 0)
    run = run_on(problem, lr=0.02, beta=0.0, sigma=0.1, monotone=False)
    x = nn.Parameter(torch.tensor(problem.start).double())
    optimizer = Apollo([x], 0.02, beta=0.0, eps=1e-4, eps_scaling="literal", sigma=0.1, warmup_steps=0)
    for t, point in enumerate(run.points[:50], start=1):
        torch.testing.assert_close(x.detach(), point, rtol=1e-9, atol=1e-9)
        optimizer.param_groups[0]["lr"] = 0.02 / math.sqrt(t)
        x.grad = rounds_of(problem)(t, x.detach())[1]
        optimizer.step()


def test_the_terms_of_the_bound() -> None:
    """By hand: one round, f(x) = x^2 / 2 from 3, beta = 1/2, eta = 0.1: D = 3, G = 3, D_1 = 2."""
    problem = FiniteSum(lambda x: (x**2 / 2).sum()[None], (3.0,))
    run = online_run(rounds_of(problem), torch.tensor([3.0]), 1, lr=0.1, beta=0.5, sigma=2.0)
    bound = regret_bound(run, torch.zeros(1).double(), sigma=2.0)
    wanted = (9 * 2 / (0.2 * 0.5), 0.1 * 9 * 1.5 / (2 * 0.5), 9 / (2 * 0.5) * 0.25 / 0.1)
    assert tuple(bound) == pytest.approx(wanted)
    assert bound.total == pytest.approx(sum(wanted))
    assert regret(run, problem) == pytest.approx(4.5)


def test_algorithm_1_itself_need_not_be_monotone() -> None:
    for elementwise in (True, False):
        runs = [run_on(convex("alternating", seed), lr=10.0, monotone=False) for seed in range(3)]
        assert sum(run.rounds_of_decrease(elementwise=elementwise) for run in runs) > 0


@pytest.mark.parametrize("seed", range(5))
def test_elementwise_growth_is_enough_for_the_first_term(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(40, 3, generator=generator, dtype=torch.float64).cumsum(0)
    distances = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    largest = float(distances.square().sum(1).max())
    assert weighted_sum(weights, distances) <= largest * float(weights[-1].sum())


def test_growth_of_the_1_norm_is_not_enough_for_the_first_term() -> None:
    """Weights that change places keep their 1-norm; the points stay within a ball, and the sum grows with T."""

    def ratio(rounds: int) -> float:
        weights = torch.tensor([[9.0, 1.0], [1.0, 9.0]]).repeat(rounds // 2, 1)
        distances = torch.eye(2).repeat(rounds // 2, 1)
        assert bool((weights.sum(1).diff() >= 0).all())
        squared_diameter = 2.0  # of the two points and theta*
        return weighted_sum(weights, distances) / (squared_diameter * float(weights[-1].sum()))

    assert ratio(2) < 1
    assert ratio(10) > 3
    assert ratio(1000) > 300


def test_the_sum_of_the_corollary() -> None:
    for decay in (0.0, 0.3, 0.9, 0.99, 0.999):
        t = torch.arange(1, 20_001, dtype=torch.float64)
        assert float((t.sqrt() * decay ** (2 * (t - 1))).sum()) <= (1 - decay**2) ** -2
    decay = 0.95
    run = run_on(convex("squares", 0), lr=0.1, beta=lambda t: 0.9 * decay ** (t - 1))
    bound = regret_bound(run, convex("squares", 0).minimiser())
    squared_diameter = bound.start * 2 * 0.1 * (1 - 0.9) / (math.sqrt(ROUNDS) * float(run.floors[-1].sum()))
    assert bound.momentum <= corollary_term(squared_diameter, 0.1, 0.9, decay)


def test_the_bound_grows_with_the_root_of_the_rounds_under_the_corollary() -> None:
    """(13) over sqrt T stays, while for a constant beta the last term of (12) grows faster."""

    def over_root(T: int, beta: Callable[[int], float] | float) -> float:
        run = online_run(lambda t, x: (x.sum() * 0, torch.ones_like(x)), torch.zeros(2), T, lr=0.1, beta=beta)
        bound = regret_bound(run, torch.zeros(2).double())
        return bound.momentum / (bound.start + bound.gradients)

    assert over_root(400, lambda t: 0.9 * 0.9 ** (t - 1)) < over_root(100, lambda t: 0.9 * 0.9 ** (t - 1))
    assert over_root(400, 0.9) > 1.5 * over_root(100, 0.9)


def test_the_minimiser_of_a_problem() -> None:
    problem = random_online("squares", 30)
    x = problem.minimiser()
    assert float(problem.gradient(x).norm()) < 1e-7
    hessian = torch.func.hessian(lambda y: problem.losses(y).mean())(x)
    newton = x - torch.linalg.solve(hessian, problem.gradient(x))  # exact on a quadratic
    torch.testing.assert_close(x, newton, rtol=1e-6, atol=1e-6)
    assert two_samples().minimiser().item() == pytest.approx(-1 / 3, abs=1e-9)


def test_the_trend_of_theorem_3() -> None:
    """f = sum_j x_j^2 / (1 + x_j^2) with bounded noise in its gradient, all D_t in [1, L] and D_t / eta_t monotone."""

    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(torch.func.grad(lambda y: (y**2 / (1 + y**2)).sum())(x), wells_slope(x))
    squares = []
    for seed in range(3):
        run = wells_run(seed, ceiling=2.0)
        assert run.rounds_of_decrease() == 0
        assert float(run.floors.min()) >= 1
        assert float(run.floors.max()) <= 2
        squares.append(wells_slope(run.points[:-1]).square().sum(1))
    curves = torch.stack(squares)
    assert verdict(curves) == "reproduced"
    constants = constant_of_the_rate(curves)
    torch.testing.assert_close(constants[:1], curves[:, :1].mean(0))
    assert constants[-1] < constants[299] < constants[29]


def wells_run(seed: int, ceiling: float) -> OnlineRun:
    generator = torch.Generator().manual_seed(seed)
    start = 1.5 * torch.randn(10, generator=generator, dtype=torch.float64)
    return online_run(noisy_wells(generator), start, 3000, lr=1.0, beta=lambda t: 0.9 / t, ceiling=ceiling)


def verdict(curves: Tensor) -> str:
    """What the claim on Theorem 3 makes of squared gradients (runs, 3000)."""
    smallest = curves.mean(0).cummin(0).values
    horizons = {T: float(smallest[T - 1]) for T in (30, 300, 3000)}
    return claims.judge("apollo.theorem3.trend", preset="quick", measured=horizons).status


def test_a_run_that_stalls_does_not_pass_for_the_trend() -> None:
    """The real one, without the ceiling on D_t, and planted ones: standing still from some round on."""
    curves = torch.stack([wells_slope(wells_run(s, math.inf).points[:-1]).square().sum(1) for s in range(3)])
    assert verdict(curves) == "contradicted"
    t = torch.arange(1, 3001, dtype=torch.float64)
    assert verdict((1 / t.sqrt())[None]) == "reproduced"
    assert verdict((1 / t.clamp(max=30).sqrt())[None]) == "contradicted"
    assert verdict((1 / t.clamp(max=300).sqrt())[None]) == "contradicted"
    assert verdict((1 / t.clamp(max=1000).sqrt())[None]) != "reproduced"


def test_the_envelope() -> None:
    assert rate_envelope(torch.tensor([1.0])).tolist() == [1.0]
    assert float(rate_envelope(torch.tensor(math.e**2))) == pytest.approx(3 / math.e)
