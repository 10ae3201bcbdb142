"""Estimates of the full gradient: MEKA's optimizer, hand-made diagonals, and implicit transport where it is exact."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from koala_lab.theory import gradient_estimates as estimates
from koala_lab.theory.gradient_estimates import Batch, Filtered, Implicit, Problem, follow, kept_share
from koala_lab.theory.problems import noisy_quadratic
from koala_lib import Meka

F64 = torch.float64


def squared(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).square().sum(1)


@pytest.fixture
def problem() -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return Problem(model, squared, Batch(torch.randn(24, 3, dtype=F64), torch.randn(24, 2, dtype=F64)))


def test_moments_are_those_of_single_samples(problem: Problem) -> None:
    theta, direction = problem.start(), torch.randn(len(problem.start()), dtype=F64)
    batch = Batch(*(x[:5] for x in problem.samples))
    gradients, products = problem.moments(theta, batch, direction)
    for i in range(5):
        one = Batch(*(x[i : i + 1] for x in batch))
        torch.testing.assert_close(gradients[i], problem.gradient(theta, one)[0])
        hessian = torch.autograd.functional.hessian(lambda w, one=one: problem.loss(w, one), theta)
        torch.testing.assert_close(products[i], hessian @ direction)
    torch.testing.assert_close(gradients.mean(0), problem.gradient(theta, batch)[0])


def test_the_scalar_filter_is_the_optimizer(problem: Problem) -> None:
    run = follow(problem, "scalar", 9, 0.05, batch_size=8, seed=3)
    optimizer = Meka(problem.model, squared, lr=0.05, step_size="constant")
    for batch, row in zip(estimates._minibatches(problem.samples, 8, 3), run.itertuples(), strict=False):
        full, loss = problem.gradient(problem.start(), problem.samples)
        assert row.loss == pytest.approx(float(loss), rel=1e-9)
        optimizer.step(*batch)
        mean = torch.cat([optimizer.state[p]["mean"].flatten() for p in problem.model.parameters()])
        assert row.error == pytest.approx(float((mean - full).norm()), rel=1e-7)


def test_the_diagonal_filter_is_a_filter_for_every_weight(problem: Problem) -> None:
    diagonal, moved = Filtered(diagonal=True, smoothing=0.5), 0.1 * torch.randn(len(problem.start()), dtype=F64)
    first, second = (Batch(*(x[rows] for x in problem.samples)) for rows in (slice(6), slice(6, 12)))
    diagonal(problem, problem.start(), 0 * moved, first)
    m = diagonal(problem, problem.start() + moved, moved, second)
    (g1, _), (g2, h) = (problem.moments(problem.start(), first, moved),
                        problem.moments(problem.start() + moved, second, moved))  # fmt: skip
    for i in (0, 7, 20):
        sigma1, new, q = (float(x[:, i].var()) / 6 for x in (g1, g2, h))
        p1 = 1e4 * sigma1 / (1e4 + sigma1)
        m1 = 1e4 / (1e4 + sigma1) * float(g1[:, i].mean())
        sigma2 = (0.25 * sigma1 + 0.5 * new) / 0.75
        k = (p1 + q) / (p1 + q + sigma2)
        expected = (1 - k) * (m1 + float(h[:, i].mean())) + k * float(g2[:, i].mean())
        assert float(m[i]) == pytest.approx(expected, rel=1e-10)
    # the scalar filter has one variance, their mean
    scalar = Filtered(diagonal=False, smoothing=0.5)
    scalar(problem, problem.start(), moved, first)
    assert isinstance(scalar.noise, torch.Tensor)
    assert float(scalar.noise) == pytest.approx(float(g1.var(0).mean()) / 6)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_implicit_transport_is_a_mean_of_noises_where_all_hessians_are_the_same(share: float) -> None:
    quadratic = noisy_quadratic(4, condition=10.0, seed=2)
    model, generator = quadratic.model(), torch.Generator().manual_seed(4)
    xi = quadratic.draw(60, generator=generator)
    problem = Problem(model, lambda out, _: quadratic.loss_fn(out, out), Batch(xi, xi))
    transport, theta, moved = Implicit(share), problem.start(), torch.zeros(4, dtype=F64)
    weights: list[float] = []
    for t in range(1, 13):
        batch = Batch(xi[5 * t - 5 : 5 * t], xi[5 * t - 5 : 5 * t])
        v = transport(problem, theta, moved, batch)
        decay = kept_share(t, share)
        weights = [decay * w for w in weights] + [1 - decay]
        noises = torch.stack([-xi[5 * s : 5 * s + 5].mean(0) @ quadratic.hessian for s in range(t)])
        expected = quadratic.gradient(theta) + torch.tensor(weights, dtype=F64) @ noises
        torch.testing.assert_close(v, expected)
        moved = torch.randn(4, generator=generator, dtype=F64)
        theta = theta + moved


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
def test_the_tail_mean_has_the_variance_of_its_share(share: float) -> None:
    variance = 0.0
    for t in range(1, 60):
        decay = kept_share(t, share)
        variance = decay**2 * variance + (1 - decay) ** 2
        assert variance == pytest.approx(min(1.0, 1 / (share * t)), rel=1e-12)
    assert kept_share(59, 1.0) == 58 / 59


def test_a_run_is_the_same_again_and_names_what_it_does_not_know(problem: Problem) -> None:
    one = follow(problem, "minibatch", 5, 0.1, batch_size=8, seed=0)
    assert one.equals(follow(problem, "minibatch", 5, 0.1, batch_size=8, seed=0))
    assert one["error"].equals(one["minibatch_error"])
    assert math.isfinite(one["loss"].iloc[-1])
    with pytest.raises(ValueError, match="estimate 'mean' is unknown; known are minibatch, scalar, diagonal"):
        follow(problem, "mean", 1, 0.1, batch_size=8, seed=0)
