"""The recursions, the optimizers and Theorem 1's ingredients against what the equations imply, for random inputs."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from koala_lab.theory import koala as theory
from koala_lab.theory import problems
from koala_lab.theory.koala import Bounds
from koala_lib import KoalaM, KoalaV, kalman

F64 = torch.float64
prop = settings(deadline=None, derandomize=True, max_examples=50)


def log_floats(low: float, high: float) -> st.SearchStrategy[float]:
    """Positive floats, every decade equally likely."""
    return st.floats(math.log10(low), math.log10(high)).map(lambda exponent: 10.0**exponent)


variances = log_floats(1e-3, 1e3)
norms = log_floats(1e-3, 1e3)
seeds = st.integers(0, 2**31 - 1)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


def random_covariance(A: float, B: float, correlation: float) -> kalman.MomentumCovariance:
    return kalman.MomentumCovariance(scalar(A), scalar(correlation * math.sqrt(A * B)), scalar(B))


def matrix(P: kalman.MomentumCovariance) -> Tensor:
    A, C, B = P
    return torch.stack([torch.stack([A, C]), torch.stack([C, B])])


# ---- the covariance recursions ---------------------------------------------------------------------------------------


@prop
@given(st.lists(st.one_of(st.just(0.0), norms), min_size=1, max_size=60), variances, variances, variances)
def test_scalar_variance_stays_positive_and_an_observation_never_increases_it(
    gradient_norms: list[float], P: float, Q: float, R: float
) -> None:
    for c in gradient_norms:
        predicted = kalman.predict_position(P, Q)
        P = kalman.condition_position(predicted, c**2, R)
        assert 0 < P <= predicted
        assert predicted == P if c == 0 else c**2 * P <= R * (1 + 1e-12)


@prop
@given(
    st.lists(st.one_of(st.just(0.0), norms), min_size=1, max_size=60),
    st.tuples(log_floats(1e-2, 1e2), log_floats(1e-2, 1e2), st.floats(-0.9, 0.9)),
    st.floats(0.0, 0.99),
    log_floats(1e-2, 1e1),
    log_floats(1e-2, 1e1),
    variances,
)
def test_momentum_covariance_stays_positive_definite(
    gradient_norms: list[float], start: tuple[float, float, float], kappa: float, q_x: float, q_p: float, R: float
) -> None:
    P = random_covariance(*start)
    for c in gradient_norms:
        predicted = kalman.predict_momentum(P, kappa, scalar(q_x), q_p)
        P = kalman.condition_momentum(predicted, scalar(c**2), scalar(R))
        for covariance in (predicted, P):
            A, C, B = covariance
            assert A > 0
            assert B > 0
            assert A * B - C**2 > 0
        # the observation removes variance in every direction
        shrink = torch.linalg.eigvalsh(matrix(predicted) - matrix(P))
        assert shrink.min() >= -1e-9 * matrix(predicted).abs().max()


@prop
@given(variances, norms, variances)
def test_information_form_of_the_scalar_recursion(P: float, c: float, R: float) -> None:
    posterior = kalman.condition_position(P, c**2, R)
    assert 1 / posterior == pytest.approx(1 / P + c**2 / R, rel=1e-12)


@prop
@given(variances, variances, st.floats(-0.9, 0.9), log_floats(1e-2, 1e2), variances)
def test_information_form_of_the_momentum_recursion(A: float, B: float, rho: float, c: float, R: float) -> None:
    predicted = random_covariance(A, B, rho)
    posterior = kalman.condition_momentum(predicted, scalar(c**2), scalar(R))
    information = torch.linalg.inv(matrix(predicted)) + torch.diag(torch.tensor([c**2 / R, 0.0], dtype=F64))
    torch.testing.assert_close(matrix(posterior) @ information, torch.eye(2, dtype=F64), rtol=1e-8, atol=1e-8)


@prop
@given(variances, variances, st.floats(-0.9, 0.9), st.lists(norms, min_size=1, max_size=5), variances)
def test_the_largest_layer_stands_for_all_layers(A: float, B: float, rho: float, cs: list[float], R: float) -> None:
    """Eq. (25): the shared update with eta = max_i |g_i|^2 / S_i is the update of the layer with the largest norm."""
    eta = max(c**2 / (A * c**2 + R) for c in cs)
    assert kalman.condition_position(A, max(cs) ** 2, R) == pytest.approx(A - eta * A**2, rel=1e-7, abs=1e-12 * A)
    predicted = random_covariance(A, B, rho)
    posterior = kalman.condition_momentum(predicted, scalar(max(cs) ** 2), scalar(R))
    C = float(predicted.covariance)
    expected = torch.tensor([A - eta * A**2, C - eta * A * C, B - eta * C**2], dtype=F64)
    torch.testing.assert_close(torch.stack(tuple(posterior)), expected, rtol=1e-7, atol=1e-12 * max(A, B))


# ---- the optimizers --------------------------------------------------------------------------------------------------


def one_linear_step(optimizer: KoalaV | KoalaM, tensors: list[Tensor], gradients: list[Tensor], loss: float) -> None:
    """A step on a loss that has these gradients everywhere and this value at the predicted point."""
    optimizer.predict()
    for x, g in zip(tensors, gradients, strict=True):
        x.grad = g.clone()
    optimizer.step(loss=scalar(loss))


def random_tensors(seed: int, sizes: list[int]) -> tuple[list[torch.nn.Parameter], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(2, size, generator=generator, dtype=F64) for size in sizes]
    return [torch.nn.Parameter(pair[0].clone()) for pair in draw], [pair[1] for pair in draw]


@prop
@given(seeds, st.integers(1, 10), variances, variances, st.floats(0.1, 100.0), st.floats(0.01, 1.0))
def test_a_linear_loss_contracts_by_r_over_s(seed: int, n: int, Q: float, R: float, loss: float, lr: float) -> None:
    tensors, gradients = random_tensors(seed, [n])
    before = tensors[0].detach().clone()
    optimizer = KoalaV(tensors, lr, process_noise=Q, measurement_noise=R, blocks="global")
    one_linear_step(optimizer, tensors, gradients, loss)
    S = (0.1 + Q) * float(gradients[0].square().sum()) + R
    after = loss + float(gradients[0] @ (tensors[0].detach() - before))
    target = (1 - lr) * loss
    assert after - target == pytest.approx(R / S * (loss - target), rel=1e-9, abs=1e-11 * loss)


@prop
@given(seeds, st.integers(1, 10), log_floats(0.1, 100.0), st.floats(0.1, 10.0))
def test_small_noise_gives_the_polyak_step_whatever_the_variance(seed: int, n: int, Q: float, loss: float) -> None:
    tensors, gradients = random_tensors(seed, [n])
    expected = tensors[0].detach() - loss / gradients[0].square().sum() * gradients[0]
    optimizer = KoalaV(tensors, process_noise=Q, measurement_noise=1e-14, blocks="global")
    one_linear_step(optimizer, tensors, gradients, loss)
    torch.testing.assert_close(tensors[0].detach(), expected, rtol=1e-7, atol=1e-7)


@prop
@given(seeds, st.integers(1, 10), log_floats(0.1, 100.0), st.floats(0.1, 10.0))
def test_large_noise_gives_sgd_with_rate_p_e_over_r(seed: int, n: int, Q: float, loss: float) -> None:
    tensors, gradients = random_tensors(seed, [n])
    before, R = tensors[0].detach().clone(), 1e10
    optimizer = KoalaV(tensors, process_noise=Q, measurement_noise=R, blocks="global")
    one_linear_step(optimizer, tensors, gradients, loss)
    rate = (0.1 + Q) * loss / R
    torch.testing.assert_close((tensors[0].detach() - before) / rate, -gradients[0], rtol=1e-4, atol=1e-4)


@prop
@given(seeds, st.lists(st.integers(1, 6), min_size=1, max_size=4), variances, st.booleans())
def test_the_optimizers_condition_on_the_layer_with_the_largest_gradient(
    seed: int, sizes: list[int], R: float, momentum: bool
) -> None:
    tensors, gradients = random_tensors(seed, sizes)
    largest = max(gradients, key=lambda g: float(g.norm()))
    alone = [torch.nn.Parameter(torch.zeros_like(largest))]
    make = KoalaM if momentum else KoalaV
    both = [make(p, process_noise=0.5, measurement_noise=R) for p in (tensors, alone)]
    for _ in range(3):
        one_linear_step(both[0], tensors, gradients, 1.0)
        one_linear_step(both[1], alone, [largest], 1.0)
    assert both[0].filter_state() == pytest.approx(both[1].filter_state(), rel=1e-12)


def nonlinear_loss(x: Tensor) -> Tensor:
    weights = torch.arange(1, len(x) + 1, dtype=F64)
    return torch.log1p(torch.exp((weights * x).sum())) + 0.5 * (weights * (x - 1) ** 2).sum()


def loss_and_row_gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    loss = nonlinear_loss(leaf)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0][None, :]


def run_class(optimizer: KoalaV | KoalaM, x: torch.nn.Parameter, steps: int) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nonlinear_loss(x)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def dense_filter(
    n: int, state: Tensor, P: Tensor, F: Tensor, Q: Tensor, R: float, lr: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Table 1 on full matrices; the weights are the first n entries of the state.

    The one approximation is H^T H ~ |H|^2 I on the weights, (11) and (21).
    """
    N = len(state)
    observed = torch.diag((torch.arange(N) < n).to(F64))
    for _ in range(steps):
        state, P = F @ state, F @ P @ F.T + Q
        loss, row = loss_and_row_gradient(state[:n])
        H = torch.cat([row, torch.zeros(1, N - n, dtype=F64)], dim=1)
        S = H @ P @ H.T + R
        target = (1 - lr) * loss
        state = state + (P @ H.T / S).squeeze(1) * (target - loss)
        P = P - P @ (H.square().sum() * observed) @ P / S
    return state, P


@prop
@given(st.integers(1, 10), seeds, log_floats(1e-2, 1e1), log_floats(1e-1, 1e2), st.floats(0.05, 1.0))
def test_koala_v_is_the_dense_extended_kalman_filter(n: int, seed: int, Q: float, R: float, lr: float) -> None:
    (x,), _ = random_tensors(seed, [n])
    eye = torch.eye(n, dtype=F64)
    state, P = dense_filter(n, x.detach().clone(), 0.1 * eye, eye, Q * eye, R, lr, 5)
    optimizer = KoalaV([x], lr, process_noise=Q, measurement_noise=R, blocks="global")
    run_class(optimizer, x, 5)
    torch.testing.assert_close(x.detach(), state, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(optimizer.filter_state()["variance"] * eye, P, rtol=1e-10, atol=1e-12)


@prop
@given(st.integers(1, 10), seeds, st.floats(0.0, 0.95), log_floats(1e-1, 1e2), st.floats(0.05, 0.5))
def test_koala_m_is_the_dense_extended_kalman_filter(n: int, seed: int, kappa: float, R: float, lr: float) -> None:
    (x,), _ = random_tensors(seed, [n])
    eye = torch.eye(n, dtype=F64)
    blocks = [[1.0, 1.0], [0.0, kappa]], [[0.1, 0.02], [0.02, 0.2]], [[0.3, 0.0], [0.0, 0.05]]
    F, P, Q = (torch.kron(torch.tensor(block, dtype=F64), eye) for block in blocks)
    start = torch.cat([x.detach(), torch.zeros(n, dtype=F64)])
    state, P = dense_filter(n, start, P, F, Q, R, lr, 5)
    optimizer = KoalaM(
        [x], lr, momentum=kappa, initial_variance=0.1, initial_covariance=0.02, initial_velocity_variance=0.2,
        process_noise=0.3, velocity_noise=0.05, measurement_noise=R, blocks="global",
    )  # fmt: skip
    run_class(optimizer, x, 5)
    torch.testing.assert_close(torch.cat([x.detach(), optimizer.state[x]["velocity"]]), state, rtol=1e-9, atol=1e-9)
    entries = optimizer.filter_state()
    A, C, B = (entries[name] for name in kalman.MomentumCovariance._fields)
    torch.testing.assert_close(torch.kron(torch.tensor([[A, C], [C, B]], dtype=F64), eye), P, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("target", ["absolute", "relative"])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_step_form_is_the_optimizer(target: str, threshold: float) -> None:
    """Eq. (26) iterated by hand, skip rule included, and KoalaV walk the same path."""
    problem = problems.quadratic([0.5, 1.5], minimum=0.5, start=[2.0, 1.0])
    run = problems.follow(
        problem,
        lambda p: KoalaV(
            p, process_noise=0.7, measurement_noise=1.3, target_risk=target, blocks="global", min_grad_norm=threshold
        ),
        60,
        epsilon=lambda k: 1 / k,
    )
    x, variance = scalar(0.0) + torch.tensor(problem.start, dtype=F64), scalar(0.1 + 0.7)
    for k in range(1, 61):
        torch.testing.assert_close(run.points[k - 1], x, rtol=1e-12, atol=1e-13)
        assert float(run.filter["variance"][k - 1]) == pytest.approx(float(variance), rel=1e-12)
        losses, gradients = problem.at(x)
        x, variance = theory.descent_step(
            x, variance, losses[0], gradients[0], epsilon=1 / k, process_noise=0.7, measurement_noise=1.3,
            target_risk=target, min_grad_norm=threshold,
        )  # fmt: skip
    skipped = run.gradient_norms < threshold
    assert bool(skipped.any()) == (threshold > 0)


# ---- bounds on the variance ------------------------------------------------------------------------------------------

intervals = st.tuples(log_floats(1e-2, 1e2), log_floats(1e-2, 1e2)).map(lambda pair: Bounds(min(pair), max(pair)))


@prop
@given(seeds, variances, variances, intervals, intervals)
def test_predicted_variance_and_gain_stay_within_their_bounds(
    seed: int, P0: float, Q: float, gradient_norms: Bounds, R: Bounds
) -> None:
    """R constant where the interval is a point, which is one of the cases, and anything in [R-, R+] otherwise."""
    generator = torch.Generator().manual_seed(seed)
    constant_noise = seed % 2 == 0
    R = Bounds(R.low, R.low) if constant_noise else R
    uniform = torch.rand(80, 2, generator=generator, dtype=F64).round(decimals=1)  # reaches both ends
    cs = gradient_norms.low * (gradient_norms.high / gradient_norms.low) ** uniform[:, 0]
    Rs = R.low * (R.high / R.low) ** uniform[:, 1]
    predicted, gains, posteriors = [], [], []
    P = P0
    for c, r in zip(cs.tolist(), Rs.tolist(), strict=True):
        predicted.append(kalman.predict_position(P, Q))
        gains.append(predicted[-1] / kalman.innovation_variance(predicted[-1], c**2, r))
        P = kalman.condition_position(predicted[-1], c**2, r)
        posteriors.append(P)
    tight = theory.variance_bounds(P0, Q, R, gradient_norms)
    assert tight.violation(torch.tensor(predicted, dtype=F64)) < 1e-12
    coarse = theory.coarse_variance_bounds(Q, R, gradient_norms)
    assert coarse.violation(torch.tensor(predicted[1:], dtype=F64)) < 1e-12
    assert min(predicted) >= Q
    assert max(posteriors) <= R.high / gradient_norms.low**2 * (1 + 1e-12)
    rho = theory.gain_bounds(tight, R, gradient_norms)
    assert rho.violation(torch.tensor(gains, dtype=F64)) < 1e-12


@prop
@given(log_floats(1e-1, 1e1), log_floats(1e-1, 1e1), log_floats(1e-1, 1e1))
def test_bounds_are_tight(Q: float, R: float, c: float) -> None:
    """A constant gradient drives the variance to its fixed point, and to nothing inside it."""
    fixed = theory.variance_fixed_point(c, Q, R)
    assert theory.next_variance(fixed, c, Q, R) == pytest.approx(fixed, rel=1e-12)
    for start in (0.01 * fixed, 100 * fixed):
        P = start
        for _ in range(2000):
            P = theory.next_variance(P, c, Q, R)
        assert fixed == pytest.approx(P, rel=1e-6)
    bounds = theory.variance_bounds(fixed - Q if fixed > Q else 0.0, Q, Bounds(R, R), Bounds(c, c))
    assert bounds.low == pytest.approx(bounds.high, rel=1e-9)


def test_without_a_smallest_gradient_the_variance_grows_like_k_q() -> None:
    Q, steps = 0.3, 400
    slopes = torch.full((steps, 1), 1e-6, dtype=F64)
    run = problems.follow(
        problems.linear(slopes, torch.ones(steps)),
        lambda p: KoalaV(p, process_noise=Q, measurement_noise=1.0, blocks="global", min_grad_norm=0.0),
        steps,
        epsilon=lambda k: 1 / k,
        samples=torch.arange(steps),
    )
    expected = 0.1 + Q * torch.arange(1, steps + 1, dtype=F64)
    torch.testing.assert_close(run.filter["variance"], expected, rtol=1e-3, atol=0.0)
    assert theory.variance_fixed_point(0.0, Q, 1.0) == math.inf
    # the same with gradients of norm 1 stays below Q + R
    assert theory.variance_bounds(0.1, Q, Bounds(1.0, 1.0), Bounds(1.0, 1.0)).high < Q + 1.0


# ---- minibatches -----------------------------------------------------------------------------------------------------


def rests(problem: problems.FiniteSum, Q: float, R: float, target: str) -> list[theory.Rest]:
    def drift(x: float) -> float:
        losses, gradients = problem.at([x])
        return float(theory.mean_drift(losses, gradients, process_noise=Q, measurement_noise=R, target_risk=target))

    grid = torch.linspace(-1.5, 1.5, 32, dtype=F64).tolist()
    return theory.resting_points(drift, grid, iterations=20)


def test_smallest_mean_and_mean_squared_loss_of_the_two_samples() -> None:
    problem = problems.two_samples()
    x = torch.linspace(-1, 1, 20001, dtype=F64)
    losses = torch.stack([problem.losses(point[None]) for point in x])
    assert float(x[losses.mean(1).argmin()]) == pytest.approx(-0.333, abs=6e-4)
    assert float(x[losses.square().mean(1).argmin()]) == pytest.approx(-0.191, abs=6e-4)


@pytest.mark.parametrize(
    ("target", "R", "expected"),
    [
        ("absolute", 100.0, [(-1 / 3, True)]),
        ("absolute", 1.0, [(-1 / 3, True)]),
        ("absolute", 0.01, [(-0.609, True), (-1 / 3, False), (0.602, True)]),
        ("relative", 100.0, [(-0.190, True)]),
        ("relative", 1.0, [(-0.181, True)]),
        ("relative", 0.01, [(-0.077, True)]),
    ],
)
def test_where_the_mean_drift_of_the_two_samples_vanishes(
    target: str, R: float, expected: list[tuple[float, bool]]
) -> None:
    found = rests(problems.two_samples(), 1e-3, R, target)
    assert [r.stable for r in found] == [stable for _, stable in expected]
    assert [r.x for r in found] == pytest.approx([x for x, _ in expected], abs=1e-3)


@prop
@given(st.floats(-0.9, 0.9), st.sampled_from(["absolute", "relative"]), log_floats(1e-2, 1e2))
def test_mean_drift_is_the_average_over_a_long_run_of_the_filter(x: float, target: str, R: float) -> None:
    """The stationary distribution against 4000 random draws, at a frozen x."""
    losses, gradients = problems.bounded_slopes().at([x])
    Q = 1e-2
    computed = theory.mean_drift(losses, gradients, process_noise=Q, measurement_noise=R, target_risk=target)
    P, total, count = math.sqrt(Q * R), 0.0, 4000
    g = gradients.flatten().tolist()
    weight = losses.tolist() if target == "relative" else [1.0] * 3
    generator = torch.Generator().manual_seed(7)
    for i in torch.randint(3, (count,), generator=generator).tolist():
        predicted = kalman.predict_position(P, Q)
        rho = [predicted / kalman.innovation_variance(predicted, c**2, R) for c in g]
        total += sum(r * w * c for r, w, c in zip(rho, weight, g, strict=True)) / 3 / count
        P = kalman.condition_position(predicted, g[i] ** 2, R)
    scale = max(abs(r * w * c) for r, w, c in zip(rho, weight, g, strict=True))
    assert float(computed) == pytest.approx(total, abs=0.02 * scale)


def test_all_hypotheses_of_the_theorem_and_yet_no_stationary_point() -> None:
    """Slopes between g and G at every x, and the drift of target (a) vanishes left of the minimum, or nowhere."""
    problem = problems.bounded_slopes()
    for x in torch.linspace(-20, 20, 81).tolist():
        slopes = problem.at([x])[1].abs()
        assert 0.5 - 1e-12 <= float(slopes.min()) <= float(slopes.max()) <= 2.5 + 1e-12
    (near,) = rests(problem, 1e-3, 1.0, "absolute")
    (far,) = rests(problem, 1e-2, 1.0, "absolute")
    assert -0.12 < near.x < -0.07
    assert -0.40 < far.x < -0.30
    assert rests(problem, 1.0, 1.0, "absolute") == []
    assert abs(float(problem.gradient([0.0]))) < 1e-12


def test_all_gradients_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="all gradients are zero"):
        theory.stationary_variance(torch.zeros(3), 0.1, 1.0)


def test_unknown_target_is_refused() -> None:
    with pytest.raises(ValueError, match="target_risk 'both' is unknown; known are absolute, relative"):
        theory.mean_drift(torch.ones(2), torch.ones(2, 1), process_noise=0.1, measurement_noise=1.0, target_risk="both")


# ---- Theorem 1, full batch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["absolute", "relative"])
@pytest.mark.parametrize("threshold", [0.0, 0.05])
@pytest.mark.parametrize(
    "problem",
    [problems.quadratic([0.5, 1.5], minimum=0.5, start=[2.0, 1.0]), problems.logistic()],
    ids=["quadratic", "logistic"],
)
def test_full_batch_gradient_vanishes_without_the_skip_and_freezes_with_it(
    problem: problems.FiniteSum, target: str, threshold: float
) -> None:
    run = problems.follow(
        problem,
        lambda p: KoalaV(
            p, process_noise=1.0, measurement_noise=1.0, target_risk=target, blocks="global", min_grad_norm=threshold
        ),
        400,
        epsilon=lambda k: 1 / k,
    )
    tail = run.gradient_norms[-40:]
    if threshold:
        assert float(tail.max()) == float(tail.min()) <= threshold
        assert float(tail.min()) > 1e-3  # frozen, not converged
    else:
        assert float(tail.max()) < 1e-3 * float(run.gradient_norms[0])
    assert all(later < earlier + 1e-3 for earlier, later in pairwise(run.losses[10:].tolist()))


def test_follow_shows_step_k_the_samples_of_row_k() -> None:
    slopes = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]], dtype=F64)
    problem = problems.linear(slopes, torch.tensor([1.0, 2.0, 3.0]), start=[1.0, 1.0])
    run = problems.follow(problem, torch.optim.SGD, 3, epsilon=lambda k: k / 10, samples=torch.tensor([0, 2, 1]))
    assert run.gradient_norms.tolist() == pytest.approx([5.0, 2.0, 1.0])
    x = [[1.0, 1.0], [0.7, 0.6], [0.7, 0.2], [0.4, 0.2]]  # minus k/10 times (3, 4), (0, 2), (1, 0)
    torch.testing.assert_close(torch.cat([run.points, run.last[None]]), torch.tensor(x, dtype=F64))
    assert run.losses.tolist() == pytest.approx([8.0, 4.2, 2.7])
    assert run.filter == {}


def test_follow_wants_one_row_of_samples_a_step() -> None:
    with pytest.raises(ValueError, match="samples has 3 rows for 4 steps"):
        problems.follow(
            problems.two_samples(), KoalaV, 4, epsilon=lambda k: 1.0, samples=torch.zeros(3, dtype=torch.long)
        )
