r"""The checkable side of Theorems 2 and 3 and Corollary 2.1 of APOLLO (Ma, 2020, arXiv 2009.13586, section 3.5).

The theorems are about Algorithm 1 without bias correction, :func:`online_run`: in round t = 1, 2, ... the gradient
:math:`g_t` of :math:`f_t` at :math:`\theta_t` is seen, and

.. math::
    m_t = \beta_t m_{t-1} + (1 - \beta_t) g_t, \qquad D_t = \max(|B_t|, \sigma), \qquad
    \theta_{t+1} = \theta_t - \eta_t m_t / D_t, \qquad \eta_t = \eta / \sqrt t.

Their proofs are in an appendix that the text at hand does not have. "Derived" marks what is not in the text:

* The second term of (12) needs D_t >= 1. With a floor sigma it is :math:`\eta G^2 (1 + 1/\sigma) / (2 (1-\beta))`.
* The first term needs D_t / eta_t to increase in every coordinate, as Theorem 3 assumes; that its 1-norm increases, as
  Theorem 2 says, is not enough (:func:`weighted_sum`). Algorithm 1 does not ensure either.
* 1 / (1 - beta) must exist, so beta < 1; and beta_t must be monotone for 1 / (1 - beta_t) to leave the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from koala_lab.theory.problems import FiniteSum
from koala_lib.optim.apollo import weak_secant_update

Oracle = Callable[[int, Tensor], tuple[Tensor, Tensor]]  # round t, theta (n,) -> f_t, its gradient (n,)


class OnlineRun(NamedTuple):
    """What happened in the rounds t = 1, ..., T; float64.

    Attributes:
        points: theta_1, ..., theta_{T+1} (T + 1, n).
        losses: f_t(theta_t) (T,).
        gradients: g_t (T, n).
        floors: D_t (T, n).
        rates: eta_t (T,).
        betas: beta_t (T,).
    """

    points: Tensor
    losses: Tensor
    gradients: Tensor
    floors: Tensor
    rates: Tensor
    betas: Tensor

    @property
    def weights(self) -> Tensor:
        """D_t / eta_t (T, n), which the theorems want to increase."""
        return self.floors / self.rates[:, None]

    def rounds_of_decrease(self, *, elementwise: bool = True) -> int:
        """Count the rounds in which D_t / eta_t decreased in a coordinate, or its 1-norm did."""
        weights = self.weights if elementwise else self.weights.sum(1, keepdim=True)
        fell = weights[1:] < weights[:-1] * (1 - 1e-12)  # rounding
        return int(fell.any(1).sum())


def rounds_of(problem: FiniteSum) -> Oracle:
    """Return the online problem whose round t shows the t-th sample loss."""

    def oracle(t: int, theta: Tensor) -> tuple[Tensor, Tensor]:
        gradient, loss = torch.func.grad_and_value(lambda x: problem.losses(x)[t - 1])(theta)
        return loss, gradient

    return oracle


def online_run(
    oracle: Oracle,
    start: Tensor,
    rounds: int,
    *,
    lr: float,
    beta: Callable[[int], float] | float = 0.9,
    sigma: float = 1.0,
    eps: float = 1e-4,
    monotone: bool = True,
    ceiling: float = math.inf,
) -> OnlineRun:
    """Run Algorithm 1 as the theorems have it, for one tensor.

    Args:
        oracle: f_t and its gradient.
        start: theta_1 (n,).
        rounds: T.
        lr: eta, of eta_t = eta / sqrt t.
        beta: t -> beta_t, or a number for all.
        sigma: the floor.
        eps: epsilon of the update of B, as printed.
        monotone: raise D_t to D_{t-1} eta_t / eta_{t-1} where it is smaller, which is the theorems' condition.
        ceiling: cut D_t off there, the condition |D_t|_inf < L of Theorem 3. Without it D_t may become as large as a
            difference of noisy gradients over a tiny d, and once large, a monotone D_t / eta_t keeps it so.

    >>> run = online_run(lambda t, x: (x.sum(), torch.ones_like(x)), torch.zeros(1).double(), 4, lr=1.0, beta=0.0)
    >>> run.points.flatten()  # a constant slope has no curvature: steps 1 / sqrt t
    tensor([ 0.0000, -1.0000, -1.7071, -2.2845, -2.7845], dtype=torch.float64)
    """
    theta = start.double()
    m, d, B, D = (torch.zeros_like(theta) for _ in range(4))
    eta = math.inf
    rows: list[tuple[Tensor, ...]] = []
    for t in range(1, rounds + 1):
        loss, g = oracle(t, theta)
        beta_t, previous_eta, eta = beta(t) if callable(beta) else beta, eta, lr / math.sqrt(t)
        change = (1 - beta_t) * (g - m)
        B = B.clone()
        weak_secant_update([B], [d], [change], eps)
        m = m + change
        least = D * (eta / previous_eta) if monotone else torch.zeros_like(D)
        D = torch.maximum(B.abs().clamp(min=sigma), least).clamp(max=ceiling)
        d = m / D
        rows.append((theta, loss, g, D, theta.new_tensor(eta), theta.new_tensor(beta_t)))
        theta = theta - eta * d
    points, *rest = (torch.stack(column) for column in zip(*rows, strict=True))
    return OnlineRun(torch.cat([points, theta[None]]), *rest)


# ---- Theorem 2 and its corollary -------------------------------------------------------------------------------------


class RegretBound(NamedTuple):
    """The three terms on the right of (12): the start, the gradients, the momentum."""

    start: float
    gradients: float
    momentum: float

    @property
    def total(self) -> float:
        """The whole right side of (12)."""
        return sum(self)


def regret(run: OnlineRun, problem: FiniteSum) -> float:
    """Return R_T = sum_t f_t(theta_t) - min_theta sum_t f_t(theta), for a convex problem of T sample losses."""
    return float(run.losses.sum() - problem.losses(problem.minimiser()).sum())


def regret_bound(run: OnlineRun, comparator: Tensor, *, sigma: float = 1.0) -> RegretBound:
    """Evaluate (12) with the D, G, beta and D_T that a run had.

    Args:
        run: with monotone D_t / eta_t and monotone beta_t.
        comparator: theta*, (n,): it belongs to the points whose distances D bounds.
        sigma: the floor; for another than 1 the second term is derived, see above.
    """
    T = len(run.losses)
    eta, beta = float(run.rates[0]), float(run.betas.max())
    points = torch.cat([run.points[:-1], comparator[None]])
    squared_diameter = float(torch.cdist(points, points).max()) ** 2
    squared_gradient = float(run.gradients.square().sum(1).max())
    return RegretBound(
        math.sqrt(T) * squared_diameter * float(run.floors[-1].sum()) / (2 * eta * (1 - beta)),
        eta * squared_gradient * (1 + 1 / sigma) / (2 * (1 - beta)) * (2 * math.sqrt(T) - 1),
        squared_diameter / (2 * (1 - beta)) * float((run.betas**2 / run.rates).sum()),
    )


def corollary_term(squared_diameter: float, lr: float, beta: float, decay: float) -> float:
    """Return the last term of (13), which bounds that of (12) for beta_t = beta decay^(t-1), whatever T is.

    It is D^2 beta^2 / (2 eta (1 - beta) (1 - lambda^2)^2), since sum_t sqrt t lambda^(2(t-1)) <= (1 - lambda^2)^-2.

    >>> corollary_term(1.0, lr=1.0, beta=0.5, decay=0.0)
    0.25
    """
    return squared_diameter * beta**2 / (2 * lr * (1 - beta) * (1 - decay**2) ** 2)


def weighted_sum(weights: Tensor, distances: Tensor) -> float:
    r"""Return what the proof of (12) has to bound by :math:`D^2 \|D_T\|_1 / \eta_T`; derived.

    With :math:`w_t = D_t / \eta_t`, :math:`w_0 = 0` and :math:`x_t = \theta_t - \theta^*` it is :math:`\sum_t
    (w_t - w_{t-1})^\top x_t^2`, and it can be bounded so if no :math:`w_t - w_{t-1}` has a negative entry. Else it may
    grow without limit while the 1-norm of :math:`w_t` stays:

    Args:
        weights: w_1, ..., w_T, (T, n).
        distances: x_1, ..., x_T, (T, n).

    >>> w = torch.tensor([[9.0, 1.0], [1.0, 9.0]]).repeat(50, 1)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(50, 1)
    >>> weighted_sum(w, x), 2 * w[-1].sum().item()  # D^2 = 2 with the two points, and fewer than with theta*
    (801.0, 20.0)
    """
    first = torch.zeros_like(weights[:1])
    return float((torch.diff(weights, dim=0, prepend=first) * distances**2).sum())


# ---- Theorem 3 -------------------------------------------------------------------------------------------------------


def rate_envelope(rounds: Tensor) -> Tensor:
    """Return (1 + log T) / sqrt T, the trend of (14) with its unspecified constants left out.

    >>> rate_envelope(torch.tensor([1.0, 100.0]))
    tensor([1.0000, 0.5605])
    """
    return (1 + rounds.log()) / rounds.sqrt()


def constant_of_the_rate(squared_gradients: Tensor) -> Tensor:
    """Return the least C with min_{t <= T} E |grad f(theta_t)|^2 <= C (1 + log T) / sqrt T for every T.

    (14) says that it is bounded.

    Args:
        squared_gradients: |grad f(theta_t)|^2 of several runs, (runs, T); their mean stands for the expectation.

    Returns:
        (T,): the ratio for T = 1, 2, ....
    """
    best = squared_gradients.double().mean(0).cummin(0).values
    return best / rate_envelope(torch.arange(1, len(best) + 1, dtype=torch.float64))
