"""The checkable side of Theorem 1 of KOALA (Davtyan et al., AAAI 2022, arXiv 2107.03331).

The theorem is about KOALA-V in the form of eq. (26), x_k = x_{k-1} - epsilon_k rho_k g_k under target (a), eq. (27),
and x_k = x_{k-1} - epsilon_k rho_k L_k g_k under target (b), eq. (28), with the gain rho_k = P^_k / (P^_k |g_k|^2 + R).
Its proof needs P^_k between two positive bounds. The paper gives no formula for them (its proof is in a supplement);
those here are derived from the recursion, as is everything about minibatches.

Symbols: P^ = ``variance``, Q = ``process_noise``, R = ``measurement_noise``, g <= |g_k| <= G = ``gradient_norms``,
epsilon = ``epsilon``. P^ and Q are in units of x^2, R in units of loss^2, gradients in loss / x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from koala_lab.checks import check_known
from koala_lib import kalman


class Bounds(NamedTuple):
    """A closed interval."""

    low: float
    high: float

    def violation(self, values: Tensor) -> float:
        """Return how far the farthest value lies outside, relative to the bound it breaks; 0 if none does.

        >>> Bounds(1.0, 4.0).violation(torch.tensor([0.9, 2.0, 5.0]))
        0.25
        """
        below = (self.low - float(values.min())) / self.low
        return max(0.0, below, (float(values.max()) - self.high) / self.high)


def next_variance(variance: float, gradient_norm: float, process_noise: float, measurement_noise: float) -> float:
    """Return P^_{k+1} = Q + R P^_k / (P^_k |g_k|^2 + R), eq. (13) and the prediction after it.

    Increasing in P^ and R, decreasing in |g|.

    >>> next_variance(1.0, gradient_norm=1.0, process_noise=0.5, measurement_noise=1.0)
    1.0
    """
    return kalman.predict_position(
        kalman.condition_position(variance, gradient_norm**2, measurement_noise), process_noise
    )


def variance_fixed_point(gradient_norm: float, process_noise: float, measurement_noise: float) -> float:
    """Return pi(c) = (Q + sqrt(Q^2 + 4 Q R / c^2)) / 2, where P^ settles if every gradient has the norm c.

    Infinite for c = 0: without an observation P^ grows by Q a step.

    >>> variance_fixed_point(1.0, process_noise=0.5, measurement_noise=1.0)
    1.0
    """
    Q, R = process_noise, measurement_noise
    return (Q + math.sqrt(Q**2 + 4 * Q * R / gradient_norm**2)) / 2 if gradient_norm else math.inf


def variance_bounds(
    initial_variance: float, process_noise: float, measurement_noise: Bounds, gradient_norms: Bounds
) -> Bounds:
    """Bound P^_k for all k >= 1, for any gradients with norms in [g, G] and any R_k in [R-, R+].

    min(P_0 + Q, pi(G; R-)) <= P^_k <= max(P_0 + Q, pi(g; R+)): the map of :func:`next_variance` is monotone, so no
    sequence gets past the fixed points of the extreme ones. Tight: constant sequences reach both.

    >>> variance_bounds(0.1, 0.5, Bounds(1.0, 1.0), Bounds(0.5, 1.0))
    Bounds(low=0.6, high=1.6861406616345072)
    """
    first = initial_variance + process_noise
    low = variance_fixed_point(gradient_norms.high, process_noise, measurement_noise.low)
    high = variance_fixed_point(gradient_norms.low, process_noise, measurement_noise.high)
    return Bounds(min(first, low), max(first, high))


def coarse_variance_bounds(process_noise: float, measurement_noise: Bounds, gradient_norms: Bounds) -> Bounds:
    """Bound P^_k for k >= 2, whatever P_0 was: Q + Q R- / (R- + Q G^2) <= P^_k <= Q + R+ / g^2.

    >>> coarse_variance_bounds(0.5, Bounds(1.0, 1.0), Bounds(0.5, 1.0))
    Bounds(low=0.8333333333333333, high=4.5)
    """
    Q, (R_low, R_high), (g, G) = process_noise, measurement_noise, gradient_norms
    return Bounds(Q + Q * R_low / (R_low + Q * G**2), Q + R_high / g**2)


def gain_bounds(variance: Bounds, measurement_noise: Bounds, gradient_norms: Bounds) -> Bounds:
    """Bound rho_k = P^_k / (P^_k |g_k|^2 + R_k), the gain of eq. (12) per unit of residual.

    Increasing in P^, decreasing in |g| and R. These two numbers make epsilon_k rho_k a step size as (26) needs it.

    >>> gain_bounds(Bounds(0.5, 2.0), Bounds(1.0, 1.0), Bounds(0.5, 1.0))
    Bounds(low=0.3333333333333333, high=1.3333333333333333)
    """
    (P_low, P_high), (R_low, R_high), (g, G) = variance, measurement_noise, gradient_norms
    return Bounds(P_low / (P_low * G**2 + R_high), P_high / (P_high * g**2 + R_low))


def gain(variance: Tensor, squared_norm: Tensor, measurement_noise: float) -> Tensor:
    """Return rho = P^ / (P^ |g|^2 + R), elementwise."""
    return variance / kalman.innovation_variance(variance, squared_norm, variance.new_tensor(measurement_noise))


def descent_step(
    x: Tensor,
    variance: Tensor,
    loss: Tensor,
    gradient: Tensor,
    *,
    epsilon: float,
    process_noise: float,
    measurement_noise: float,
    target_risk: str,
    min_grad_norm: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Make a step of KOALA-V in the form (26), with one block; a skipped one leaves x alone and adds Q to P.

    Args:
        x: x_{k-1}, shape (n,).
        variance: P^_k (the predicted variance; P_0 + Q at first), 0-dim.
        loss: L_k(x_{k-1}), 0-dim.
        gradient: g_k, shape (n,).
        epsilon: epsilon_k.
        process_noise: Q.
        measurement_noise: R.
        target_risk: ``"absolute"`` is target (a), a residual of epsilon; ``"relative"`` is (b), epsilon L_k.
        min_grad_norm: the skip threshold g.

    Returns:
        x_k and P^_{k+1}.

    >>> start, half = torch.tensor([2.0]), torch.tensor(0.5)
    >>> descent_step(start, half, loss=torch.tensor(2.0), gradient=start, epsilon=1.0,
    ...              process_noise=0.5, measurement_noise=2.0, target_risk="relative")
    (tensor([1.5000]), tensor(0.7500))
    """
    squared_norm = gradient.square().sum()
    if squared_norm.sqrt() < min_grad_norm:
        return x, variance + process_noise
    residual = _residual(loss, target_risk) * epsilon
    moved = x - residual * gain(variance, squared_norm, measurement_noise) * gradient
    posterior = kalman.condition_position(variance, squared_norm, variance.new_tensor(measurement_noise))
    return moved, kalman.predict_position(posterior, variance.new_tensor(process_noise))


def _residual(losses: Tensor, target_risk: str) -> Tensor:
    """Return the residual of eqs. (27), (28) at epsilon = 1."""
    check_known("target_risk", target_risk, ("absolute", "relative"))
    return losses if target_risk == "relative" else torch.ones_like(losses)


# ---- minibatches: where KOALA-V drifts on average ------------------------------------------------------------------


def stationary_variance(
    gradient_norms: Tensor, process_noise: float, measurement_noise: float, points: int = 200
) -> tuple[Tensor, Tensor]:
    """Find where P^_k settles at a fixed x if every step draws one of m samples at random.

    P^_k is then a Markov chain, one map :func:`next_variance` a sample. Its stationary distribution is computed on a
    logarithmic grid, each map's image shared between its two neighbours; no random number is drawn.

    Args:
        gradient_norms: |g_i| of the samples, shape (m,), not all zero.
        process_noise: Q.
        measurement_noise: R.
        points: size of the grid.

    Returns:
        Grid of P^ and its probabilities, both (points,).

    Raises:
        ValueError: if all gradients are zero, where P^ grows for ever.

    >>> grid, probability = stationary_variance(torch.tensor([1.0, 1.0]), 0.5, 1.0)
    >>> round(float(grid @ probability), 6)
    1.0
    """
    Q, R = process_noise, measurement_noise
    norms = gradient_norms.double()
    steepest, flattest = float(norms.max()), float(norms.min())
    if steepest == 0:
        raise ValueError("all gradients are zero: the variance grows by the process noise a step, for ever")
    low = variance_fixed_point(steepest, Q, R)
    # A flat sample could push P^ arbitrarily far, but 40 m steps without the steepest one have probability e^-40.
    high = min(variance_fixed_point(flattest, Q, R), Q + R / steepest**2 + 40 * len(norms) * Q)
    low, high = low * (1 - 1e-9), high * (1 + 1e-9)
    grid = torch.logspace(math.log10(low), math.log10(high), points, dtype=torch.float64)
    transition = torch.zeros(points, points, dtype=torch.float64)
    rows = torch.arange(points)
    for norm in norms.tolist():
        image = Q + R * grid / (grid * norm**2 + R)
        left = (torch.searchsorted(grid, image) - 1).clamp(0, points - 2)
        share = ((image - grid[left]) / (grid[left + 1] - grid[left])).clamp(0, 1)
        transition.index_put_((rows, left), (1 - share) / len(norms), accumulate=True)
        transition.index_put_((rows, left + 1), share / len(norms), accumulate=True)
    balance = transition.T - torch.eye(points, dtype=torch.float64)
    balance[-1] = 1.0  # one equation is redundant; the probabilities add up to one instead
    right = torch.zeros(points, dtype=torch.float64)
    right[-1] = 1.0
    return grid, torch.linalg.solve(balance, right)


def mean_drift(
    losses: Tensor, gradients: Tensor, *, process_noise: float, measurement_noise: float, target_risk: str
) -> Tensor:
    """Return the mean of -dx/d(sum epsilon) at a fixed x: E[rho_k g_k], target (a), or E[rho_k L_k g_k], target (b).

    As epsilon_k -> 0, x moves ever more slowly and P^_k has the time to settle, so KOALA-V follows this field. It is
    **not** parallel to the gradient of the mean loss, since the gain rho_k belongs to the same minibatch as g_k.

    Args:
        losses: sample losses, shape (m,), equally probable.
        gradients: their gradients, shape (m, n).
        process_noise: Q.
        measurement_noise: R.
        target_risk: ``"absolute"`` (a) or ``"relative"`` (b).

    Returns:
        The drift, shape (n,).
    """
    norms = torch.linalg.vector_norm(gradients, dim=1)
    grid, probability = stationary_variance(norms, process_noise, measurement_noise)
    mean_gain = probability @ gain(grid[:, None], norms.square(), measurement_noise)
    return ((mean_gain * _residual(losses, target_risk))[:, None] * gradients).mean(0)


class Rest(NamedTuple):
    """A point where a one-dimensional drift vanishes; it attracts where the drift increases."""

    x: float
    stable: bool


def resting_points(drift: Callable[[float], float], grid: Sequence[float], iterations: int = 50) -> list[Rest]:
    """Find the zeros of a drift of one variable: sign changes on the grid, halved ``iterations`` times.

    >>> resting_points(lambda x: x * (x - 1) * (x + 1), [-1.5, -0.5, 0.5, 1.5])
    [Rest(x=-1.0, stable=True), Rest(x=0.0, stable=False), Rest(x=1.0, stable=True)]
    """
    values = [drift(x) for x in grid]
    rests = []
    for low, high, f_low, f_high in zip(grid, grid[1:], values, values[1:], strict=False):
        if f_low == 0 or f_low * f_high >= 0:
            continue
        left, right = low, high
        for _ in range(iterations):
            middle = (left + right) / 2
            left, right = (middle, right) if drift(middle) * f_low > 0 else (left, middle)
        rests.append(Rest(right, stable=f_high > f_low))
    return rests
