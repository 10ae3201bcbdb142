"""MEKA's two filters against the Gaussian distribution they stand for, conditioned in one go."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from torch import Tensor

from koala_lib import kalman

F64 = torch.float64
prop = settings(deadline=None, derandomize=True, max_examples=50)
variances = st.floats(-6, 6).map(lambda exponent: 10.0**exponent)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


def random_covariance(n: int, generator: torch.Generator) -> Tensor:
    root = torch.randn(n, n, generator=generator, dtype=F64)
    return root @ root.T + 0.1 * torch.eye(n, dtype=F64)


def conditioned(prior: Tensor, P0: Tensor, shifts: Tensor, Qs: Tensor, seen: Tensor, Sigmas: Tensor) -> tuple:
    """Mean and covariance of the last gradient given all observations: one joint normal, no recursion.

    Gradient t is the first one plus all shifts and process noises up to t; shifts and Qs of t = 0 do not count.
    """
    steps, n = seen.shape
    mean = prior + torch.cat([torch.zeros(1, n, dtype=F64), shifts[1:]]).cumsum(0)  # (steps, n)
    hidden = torch.zeros(steps, n, steps, n, dtype=F64)
    for i in range(steps):
        for j in range(steps):
            hidden[i, :, j, :] = P0 + Qs[1 : min(i, j) + 1].sum(0)
    hidden = hidden.reshape(steps * n, steps * n)
    observed = hidden + torch.block_diag(*Sigmas)
    weight = hidden[-n:] @ torch.linalg.inv(observed)
    return mean[-1] + weight @ (seen - mean).reshape(-1), hidden[-n:, -n:] - weight @ hidden[:, -n:]


@pytest.mark.parametrize("seed", range(4))
def test_the_matrix_filter_is_the_conditional_distribution(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    steps, n = 6, 3
    prior, P0 = torch.randn(n, generator=generator, dtype=F64), random_covariance(n, generator)
    shifts, seen = torch.randn(2, steps, n, generator=generator, dtype=F64)
    Qs, Sigmas = (torch.stack([random_covariance(n, generator) for _ in range(steps)]) for _ in range(2))
    mean, P = prior, P0
    for t in range(steps):
        if t:
            mean, P = mean + shifts[t], P + Qs[t]
        mean, P, K = kalman.condition_gradient(mean, P, seen[t], Sigmas[t])
        torch.testing.assert_close(K @ Sigmas[t], P, rtol=1e-10, atol=1e-12)
    expected = conditioned(prior, P0, shifts, Qs, seen, Sigmas)
    torch.testing.assert_close((mean, P), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("seed", range(4))
def test_the_scalar_filter_is_the_matrix_filter_of_multiples_of_the_identity(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    steps, n = 8, 4
    identity = torch.eye(n, dtype=F64)
    p, mean = scalar(3.0), torch.zeros(n, dtype=F64)
    P, matrix_mean = 3.0 * identity, mean
    for _ in range(steps):
        shift, seen = torch.randn(2, n, generator=generator, dtype=F64)
        q, sigma = torch.rand(2, generator=generator, dtype=F64)
        p = kalman.predict_position(p, q)
        k = kalman.gain(p, sigma)
        mean = (1 - k) * (mean + shift) + k * seen
        p = kalman.condition_variance(p, sigma)
        matrix_mean, P, K = kalman.condition_gradient(matrix_mean + shift, P + q * identity, seen, sigma * identity)
        torch.testing.assert_close((mean, p * identity, k * identity), (matrix_mean, P, K), rtol=1e-12, atol=1e-13)


def test_runs_side_by_side_share_their_covariances() -> None:
    generator = torch.Generator().manual_seed(0)
    P, Sigma = random_covariance(3, generator), random_covariance(3, generator)
    means, seen = torch.randn(2, 5, 3, generator=generator, dtype=F64)
    together = kalman.condition_gradient(means, P, seen, Sigma)[0]
    for i in range(5):
        torch.testing.assert_close(together[i], kalman.condition_gradient(means[i], P, seen[i], Sigma)[0])


@prop
@given(variances, variances)
def test_information_adds_up(p: float, sigma: float) -> None:
    k, posterior = kalman.gain(scalar(p), scalar(sigma)), kalman.condition_variance(scalar(p), scalar(sigma))
    assert 1 / float(posterior) == pytest.approx(1 / p + 1 / sigma, rel=1e-12)
    assert float(k) == pytest.approx(1 / (1 + sigma / p), rel=1e-12)


def test_the_first_observation_keeps_its_digits_under_a_wide_prior() -> None:
    # 1 - k is 1e-13 here: (1 - k) p would have three digits
    assert float(kalman.condition_variance(scalar(1e4), scalar(1e-9))) == pytest.approx(1e-9, rel=1e-12)


def test_exact_quantities_do_not_divide_zero_by_zero() -> None:
    zero, one = scalar(0.0), scalar(1.0)
    assert [float(kalman.gain(*pair)) for pair in ((zero, zero), (zero, one), (one, zero))] == [1, 0, 1]
    assert [float(kalman.condition_variance(*pair)) for pair in ((zero, zero), (zero, one), (one, zero))] == [0, 0, 0]
    # an exact prediction and an exact observation that disagree: the observation is right, the model was wrong
    assert kalman.condition_value(one, zero, 3 * one, zero) == (3 * one, zero, 4 * one)
    assert kalman.condition_value(one, zero, one, zero) == (one, zero, zero)


# ---- the function-value filter ---------------------------------------------------------------------------------------


def test_the_predicted_value_is_that_of_a_quadratic_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    H, theta, d = random_covariance(4, generator), *torch.randn(2, 4, generator=generator, dtype=F64)
    gradient = H @ theta  # at the old weights; the transported one at the new weights would add d H d once more
    value, variance = kalman.predict_value(theta @ H @ theta / 2, 0.5, gradient @ d, d @ H @ d, 0.0, 0.0)
    torch.testing.assert_close(value, (theta + d) @ H @ (theta + d) / 2, rtol=1e-12, atol=1e-12)
    assert variance == 0.5


def test_the_predicted_variance_is_that_of_the_sum() -> None:
    """f + m.d + 1/2 d.h for independent f, m ~ N(., P) and h = B d ~ N(., Q): a linear function of (f, m, h)."""
    generator = torch.Generator().manual_seed(1)
    P, Q, d = random_covariance(3, generator), random_covariance(3, generator), torch.tensor([1.0, -2.0, 0.5]).double()
    joint, weights = torch.block_diag(scalar(0.7), P, Q), torch.cat([torch.ones(1).double(), d, d / 2])
    variance = kalman.predict_value(0.0, 0.7, 0.0, 0.0, float(d @ P @ d), float(d @ Q @ d))[1]
    assert variance == pytest.approx(float(weights @ joint @ weights), rel=1e-12)


@prop
@given(st.floats(-5, 5), variances, variances)
def test_the_model_error_makes_the_observation_most_likely(innovation: float, variance: float, r: float) -> None:
    value, y = 1.5, 1.5 + innovation
    estimate = kalman.condition_value(scalar(value), scalar(variance), scalar(y), scalar(r))
    error = float(estimate.model_error)

    def surprise(extra: float) -> float:
        return float(-stats.norm.logpdf(y, value, math.sqrt(extra + variance + r)))

    best = optimize.minimize_scalar(surprise, bounds=(0, innovation**2 + 1e-3), method="bounded", options={"xatol": 0})
    assert surprise(error) <= best.fun + 1e-12 * abs(best.fun) + 1e-12
    if error:
        assert error == pytest.approx(best.x, rel=1e-4, abs=1e-4 * (variance + r))
    # given lambda, the rest is the product of two normal densities
    prior = variance + error
    assert float(estimate.variance) == pytest.approx(1 / (1 / prior + 1 / r), rel=1e-9)
    assert float(estimate.value) == pytest.approx((value / prior + y / r) / (1 / prior + 1 / r), rel=1e-9, abs=1e-9)


def test_the_model_error_contains_the_noise_of_the_observation() -> None:
    zero, one = scalar(0.0), scalar(1.0)
    errors = [float(kalman.condition_value(zero, one, y * one, one).model_error) for y in (-2, -1.4, 1, 1.5, 3)]
    assert errors == pytest.approx([2, 0, 0, 0.25, 7])  # y^2 - (1 + 1), clipped


# ---- averages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_corrected_averages_are_weighted_means(decay: float) -> None:
    values = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=F64)
    average, weight = scalar(7.0), scalar(0.0)  # what it starts from does not matter
    for t in range(30):
        weight = kalman.running_average(weight, scalar(1.0), decay)
        average = kalman.corrected_average(average, values[t], weight, decay)
        weights = decay ** torch.arange(t, -1, -1, dtype=F64)
        torch.testing.assert_close(average, (weights * values[: t + 1]).sum() / weights.sum(), rtol=1e-11, atol=1e-13)
