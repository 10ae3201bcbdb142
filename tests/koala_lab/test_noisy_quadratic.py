"""MEKA's theory on the noisy quadratic: exact recursions against full matrices, enumeration and Monte Carlo."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from koala_lab.theory import meka as theory_meka
from koala_lab.theory import meka_runs
from koala_lab.theory.meka_runs import descend
from koala_lab.theory.problems import NoisyQuadratic, noisy_quadratic
from koala_lib import Meka, kalman

F64 = torch.float64


def small(seed: int = 0, n: int = 3) -> NoisyQuadratic:
    """Neither H nor C diagonal; eigenvalues of H from 0.2 to 1."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, generator=generator, dtype=F64)
    hessian = noisy_quadratic(n, condition=5.0, seed=seed).hessian
    start = torch.randn(n, generator=generator, dtype=F64)
    return NoisyQuadratic(hessian, root @ root.T / n + 0.1 * torch.eye(n, dtype=F64), start)


# ---- the problem -----------------------------------------------------------------------------------------------------


def test_the_problem_is_what_autograd_and_samples_say() -> None:
    problem, B = small(), 2
    theta = problem.start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(problem.excess(theta), theta)
    torch.testing.assert_close(problem.gradient(theta.detach()), gradient)
    model = problem.model()
    xi = problem.draw(150_000, B, generator=torch.Generator().manual_seed(0))
    losses = problem.loss_fn(model(xi), xi).mean(1).detach()
    gradients = ((theta.detach() - xi) @ problem.hessian).mean(1)
    torch.testing.assert_close(torch.cov(gradients.T), problem.gradient_noise(B), rtol=0.03, atol=0.01)
    torch.testing.assert_close(gradients.mean(0), gradient, rtol=0.01, atol=0.005)
    torch.testing.assert_close(losses.var(), problem.loss_noise(theta.detach(), B), rtol=0.02, atol=0)
    floor = (problem.hessian @ problem.covariance).trace() / 2  # f*
    torch.testing.assert_close(losses.mean() - floor, problem.excess(theta.detach()), rtol=0.03, atol=0.01)


def test_the_random_hessian_has_the_condition_asked_for() -> None:
    problem = noisy_quadratic(20, condition=1500.0, noise=0.5, distance=2.0, seed=3)
    eigenvalues = torch.linalg.eigvalsh(problem.hessian)
    assert float(eigenvalues[-1] / eigenvalues[0]) == pytest.approx(1500.0)
    assert float(eigenvalues[-1]) == pytest.approx(1.0)
    assert torch.equal(problem.covariance, 0.5 * torch.eye(20, dtype=F64))
    assert torch.equal(problem.start, 2 * noisy_quadratic(20, seed=3).start)
    assert float(torch.tril(problem.hessian, -1).abs().max()) > 0.01
    straight = noisy_quadratic(20, condition=1500.0, turned=False, seed=3)
    torch.testing.assert_close(straight.hessian.diagonal().sort().values, eigenvalues)
    assert float(torch.tril(straight.hessian, -1).abs().max()) == 0


# ---- the filter (15) -------------------------------------------------------------------------------------------------


def test_the_filter_averages_all_noises() -> None:
    """P_t = Sigma / (t + 1), K_t = I / (t + 1) and m_t - grad f_t = mean of the gradient noises, whatever the steps."""
    problem = small()
    H, Sigma, n = problem.hessian, problem.gradient_noise(4), len(problem.start)
    generator = torch.Generator().manual_seed(1)
    theta, noises = problem.start, torch.randn(30, n, generator=generator, dtype=F64)
    displacements = torch.randn(30, n, generator=generator, dtype=F64)
    m, P = problem.gradient(theta) + noises[0], Sigma
    for t in range(1, 30):
        theta = theta + displacements[t]
        observed = problem.gradient(theta) + noises[t]
        m, P, K = kalman.condition_gradient(m + H @ displacements[t], P, observed, Sigma)
        torch.testing.assert_close(P, Sigma / (t + 1), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(K, torch.eye(n, dtype=F64) / (t + 1), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(m - problem.gradient(theta), noises[: t + 1].mean(0), rtol=1e-9, atol=1e-12)


def test_a_wide_prior_forgets_itself() -> None:
    # the optimizer starts from p_0 = 1e4 instead of sigma: after t + 1 observations p = sigma / (t + 1 + sigma / p_0)
    p, sigma = torch.tensor(1e4, dtype=F64), torch.tensor(0.3, dtype=F64)
    for t in range(50):
        p = kalman.condition_variance(p, sigma)
        assert float(p) == pytest.approx(0.3 / (t + 1 + 0.3e-4), rel=1e-12)


# ---- exact recursions ------------------------------------------------------------------------------------------------


def as_linear_map(problem: NoisyQuadratic, alpha: float, steps: int, *, filtered: bool) -> tuple[Tensor, list[Tensor]]:
    """theta_t = M theta_0 + sum_i N_i nu_i, by following unit vectors: no expectation and no eigenbasis is used."""
    H, n = problem.hessian, len(problem.start)
    identity = torch.eye(n, dtype=F64)
    state = torch.zeros(steps + 1, n, n, dtype=F64)  # theta as a function of theta_0 and of nu_0, ..., nu_{steps-1}
    state[0] = identity
    noise = torch.zeros_like(state)  # the filtered noise, likewise
    for t in range(steps):
        noise = noise * (t / (t + 1)) if filtered else torch.zeros_like(state)
        noise[t + 1] = identity / (t + 1) if filtered else identity
        state = state - alpha * (H @ state + noise)
    return state[0], list(state[1:])


@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_the_recursions_are_exact(filtered: bool, alpha: float) -> None:
    problem = small()
    H, Sigma, start = problem.hessian, problem.gradient_noise(2), problem.start
    exact = theory_meka.filtered_excess if filtered else theory_meka.sgd_excess
    excess = exact(H, Sigma, problem.gradient(start), alpha, 12)
    for steps in range(13):
        M, Ns = as_linear_map(problem, alpha, steps, filtered=filtered)
        variance = sum((N @ Sigma @ N.T for N in Ns), torch.zeros_like(H))
        expected = (M @ start) @ H @ (M @ start) / 2 + (H @ variance).trace() / 2
        torch.testing.assert_close(excess[steps], expected, rtol=1e-11, atol=1e-13)


def test_the_cross_term_is_exact() -> None:
    problem, alpha = small(), 0.4
    H, Sigma = problem.hessian, problem.gradient_noise(2)
    for t in range(8):
        _, Ns = as_linear_map(problem, alpha, t, filtered=True)
        # m_t - grad f_t = sum_{i <= t} nu_i / (t + 1), and nu_t is not in theta_t
        expected = sum((H @ N @ Sigma).trace() / (t + 1) for N in Ns)
        assert theory_meka.cross_term(H, Sigma, alpha, t) == pytest.approx(float(expected), rel=1e-11, abs=1e-14)
    assert theory_meka.cross_term(H, Sigma, alpha, 7) < 0


def test_monte_carlo_agrees_with_the_recursions() -> None:
    problem, alpha, steps, runs = small(), 0.7, 40, 20_000
    H, Sigma, gradient = problem.hessian, problem.gradient_noise(2), problem.gradient(problem.start)
    for kind, exact in (("filtered", theory_meka.filtered_excess), ("sample", theory_meka.sgd_excess)):
        seen = descend(problem, steps, alpha, gradient=kind, batch_size=2, runs=runs)
        expected = exact(H, Sigma, gradient, alpha, steps)
        assert seen.shape == (steps + 1, runs)
        error = seen.std(1) / math.sqrt(runs)
        assert bool(((seen.mean(1) - expected).abs() <= 5 * error + 1e-12).all())
        torch.testing.assert_close(seen.mean(1), expected, rtol=0.05, atol=0)
    descent = descend(problem, steps, alpha, gradient="full")[:, 0]
    torch.testing.assert_close(descent, theory_meka.sgd_excess(H, 0 * Sigma, gradient, alpha, steps))


# ---- slope and limit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_the_excess_falls_like_one_over_t_to_the_known_limit(alpha: float) -> None:
    problem = small()
    H, Sigma = problem.hessian, problem.gradient_noise(1)
    excess = theory_meka.filtered_excess(H, Sigma, problem.gradient(problem.start), alpha, 4000)
    limit = theory_meka.excess_limit(H, Sigma)
    assert limit == pytest.approx(float((torch.linalg.inv(H) @ Sigma).trace()) / 2)
    assert 4000 * float(excess[4000]) == pytest.approx(limit, rel=0.02)
    slope = math.log(float(excess[4000] / excess[400])) / math.log(10)
    assert slope == pytest.approx(-1, rel=0.05)


def test_monte_carlo_reaches_the_limit_within_five_percent() -> None:
    problem, steps = small(), 400
    H, Sigma = problem.hessian, problem.gradient_noise(1)
    seen = descend(problem, steps, 1.0, gradient="filtered", runs=4000, seed=1)
    late = (torch.arange(100, steps + 1)[:, None] * seen[100:]).mean()
    assert float(late) == pytest.approx(theory_meka.excess_limit(H, Sigma), rel=0.05)
    t = torch.arange(50, steps + 1).double().log()
    design = torch.stack([torch.ones_like(t), t], dim=1)
    slope = torch.linalg.lstsq(design, seen[50:].mean(1).log()[:, None]).solution[1]
    assert float(slope) == pytest.approx(-1, rel=0.05)


def test_sgd_stops_at_its_floor() -> None:
    problem, alpha = small(), 0.5
    H, Sigma = problem.hessian, problem.gradient_noise(1)
    floor = theory_meka.sgd_floor(H, Sigma, alpha)
    excess = theory_meka.sgd_excess(H, Sigma, problem.gradient(problem.start), alpha, 2000)
    assert float(excess[-1]) == pytest.approx(floor, rel=1e-9)
    filtered = theory_meka.filtered_excess(H, Sigma, problem.gradient(problem.start), alpha, 2000)
    assert float(filtered[-1]) < floor / 100


# ---- Proposition 1 and Lemma 1 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.03, 1 / 3, 0.5, 0.9])
@pytest.mark.parametrize("d", [0.01, 2.0])
@pytest.mark.parametrize("first", [0.0, 50.0])
def test_lemma_1(c: float, d: float, first: float) -> None:
    a, bound = theory_meka.lemma_sequence(c, d, first, 3000), theory_meka.lemma_bound(c, d, first)
    for t in range(3000):
        assert float(a[t + 1]) == pytest.approx((1 - c) * float(a[t]) + d / (t + 1), rel=1e-14)
    t = torch.arange(bound.start, 3001)
    assert bool((a[t] <= bound.at(t) * (1 + 1e-12)).all())
    assert float(bound.at(t[7])) == pytest.approx(bound.constant / (bound.start + 7))
    assert c - (1 - c) / bound.start > 0
    assert bound.start == 1 or c - (1 - c) / (bound.start - 1) <= 0
    # (31), and one of the two reasons for M is not idle
    assert bool((bound.constant * (c - (1 - c) / t.double()) >= d * (1 - 1e-9)).all())
    at_start = bound.start * float(a[bound.start])
    assert bound.constant == pytest.approx(max(at_start, d / (c - (1 - c) / bound.start)))


def test_bad_input_is_named() -> None:
    H = torch.eye(2, dtype=F64)
    with pytest.raises(ValueError, match=r"needs 0 < c < 1 and d > 0, got c=1.0"):
        theory_meka.lemma_bound(1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"needs 0 < step_size <= 1 / L = 0.5, got 0.6"):
        theory_meka.proposition_bound(2 * H, H, torch.ones(2, dtype=F64), 0.6)
    with pytest.raises(ValueError, match=r"gradient 'mean' is unknown; known are full, .*, measured"):
        descend(small(), 1, 0.1, gradient="mean")
    with pytest.raises(ValueError, match="step_size 'best' is unknown; known are quadratic, pi, ei"):
        descend(small(), 1, "best", gradient="full")


@pytest.mark.parametrize(("seed", "alpha"), [*itertools.product(range(3), [0.05, 0.5, 0.999])])
def test_proposition_1_with_the_cross_term(seed: int, alpha: float) -> None:
    problem = small(seed)
    H, Sigma, gradient = problem.hessian, problem.gradient_noise(1), problem.gradient(problem.start)
    excess = theory_meka.filtered_excess(H, Sigma, gradient, alpha, 500)
    right = theory_meka.one_step_bound(excess, H, Sigma, alpha, with_cross_term=True)
    assert bool((excess[1:] <= right[:-1] * (1 + 1e-12)).all())
    bound = theory_meka.proposition_bound(H, Sigma, gradient, alpha)
    mu, L = torch.linalg.eigvalsh(H)[[0, -1]].tolist()
    constant = alpha * (1 - L * alpha / 2) * float(Sigma.trace())
    assert bound == pytest.approx(theory_meka.lemma_bound(alpha * mu, constant, float(excess[0])))
    t = torch.arange(bound.start, 501)
    assert bool((excess[t] <= bound.at(t)).all())


def test_the_printed_inequality_fails_without_the_cross_term() -> None:
    one, alpha = torch.eye(1, dtype=F64), 0.3
    excess = theory_meka.filtered_excess(one, one, torch.zeros(1, dtype=F64), alpha, 200)
    printed = theory_meka.one_step_bound(excess, one, one, alpha, with_cross_term=False)
    assert float(printed[3]) == pytest.approx(0.7 * float(excess[3]) + 0.09 / 2 / 4)
    assert int((excess[1:] > printed[:-1]).sum()) > 100
    kept = theory_meka.one_step_bound(excess, one, one, alpha, with_cross_term=True)
    assert float(kept[3]) == pytest.approx(0.7 * float(excess[3]) + 0.3 * 0.85 / 4)
    # in one dimension the whole chain of (24) is an equality but for -alpha + alpha^2 / 2 <= -alpha / 2
    cross = torch.tensor([theory_meka.cross_term(one, one, alpha, t) for t in range(200)], dtype=F64)
    torch.testing.assert_close(excess[1:] - printed[:-1], -alpha * (1 - alpha) * (excess[:-1] + cross))


@pytest.mark.parametrize("direction", ["gradient", "adam"])
@pytest.mark.parametrize("step_size", [0.5, "pi"])
def test_measured_runs_are_those_of_the_optimizer(step_size: float | str, direction: str) -> None:
    problem, rule = small(), {"step_size": step_size} if step_size == "pi" else {"lr": 0.5, "step_size": "constant"}
    generator, model = torch.Generator().manual_seed(3), problem.model()
    optimizer = Meka(model, problem.loss_fn, smoothing=0.9, direction=direction, **rule)
    seen = [problem.start]
    for _ in range(12):
        xi = problem.draw(1, 4, generator=generator)[0]
        optimizer.step(xi, xi)
        seen.append(model.theta.detach().clone())
    options = dict(gradient="measured", batch_size=4, seed=3, smoothing=0.9, direction=direction)
    path = meka_runs.trajectories(problem, 12, step_size, **options)
    torch.testing.assert_close(path[:, 0], torch.stack(seen), rtol=1e-9, atol=1e-11)
    with pytest.raises(ValueError, match="measured variances need batch_size >= 2, got 1"):
        meka_runs.trajectories(problem, 1, step_size, gradient="measured")


def test_the_tracked_loss_is_that_of_the_matrix_filter() -> None:
    """Against the equations (16)-(18) on the run's own weights, one run at a time."""
    problem, B, alpha, steps = small(), 3, 0.4, 8
    H, floor = problem.hessian, float((problem.hessian @ problem.covariance).trace() / 2)
    track = meka_runs.value_track(problem, steps, alpha, batch_size=B, runs=2, seed=5)
    path = meka_runs.trajectories(problem, steps, alpha, gradient="filtered", batch_size=B, runs=2, seed=5)
    generator = torch.Generator().manual_seed(5)
    draws = torch.stack([problem.draw(2, B, generator=generator) for _ in range(steps)])
    for run in range(2):
        for t in range(steps):
            shift = path[t, run] - draws[t, run]
            y, r = float(problem.excess(shift).mean()), float(problem.loss_noise(path[t, run], B))
            f = float(problem.excess(path[t, run])) + floor
            if t == 0:
                u, s = y, r
            else:
                d = path[t, run] - path[t - 1, run]
                m, P = -d / alpha, problem.gradient_noise(B) / t
                predicted, c = u + float(m @ d + d @ H @ d / 2), s + float(d @ P @ d) + r
                assert float(track.innovation[t, run]) == pytest.approx(y - predicted)
                assert float(track.predicted_variance[t, run]) == pytest.approx(c)
                u, s = predicted + (c - r) / c * (y - predicted), (c - r) * r / c
            seen = [float(x[t, run]) for x in (track.truth, track.value, track.variance)]
            assert seen == pytest.approx([f, u, s])
            assert bool(track.covered()[t, run]) is (abs(f - u) <= s**0.5)


def test_momentum_is_that_of_torch() -> None:
    problem, generator, model = small(), torch.Generator().manual_seed(1), small().model()
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.04, momentum=0.9), [problem.start]
    for _ in range(6):
        xi = problem.draw(1, 2, generator=generator)[0]
        optimizer.zero_grad()
        problem.loss_fn(model(xi), xi).mean().backward()
        optimizer.step()
        seen.append(model.theta.detach().clone())
    path = meka_runs.trajectories(problem, 6, 0.4, gradient="momentum", batch_size=2, seed=1)
    torch.testing.assert_close(path[:, 0], torch.stack(seen))


# ---- adaptive steps --------------------------------------------------------------------------------------------------


def test_adaptive_steps_need_the_filter() -> None:
    """Figure 4 in one number: the exact line search helps gradient descent, and MEKA, and hurts SGD."""
    problem, steps = noisy_quadratic(20, condition=1000.0, distance=10.0), 200

    def late(kind: str, rule: float | str) -> float:
        return float(descend(problem, steps, rule, gradient=kind, runs=20)[-50:].mean())

    start = float(problem.excess(problem.start))
    assert late("full", "quadratic") < late("full", 1.0)
    assert late("full", "pi") == pytest.approx(late("full", "quadratic"))  # nothing is uncertain
    assert late("filtered", "pi") < late("filtered", 1.0) < late("sample", 1.0)
    assert late("sample", "quadratic") > late("sample", 1.0)
    assert start > late("filtered", "pi")
