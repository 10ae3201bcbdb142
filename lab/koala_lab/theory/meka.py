r"""The checkable side of Proposition 1 and Lemma 1 of MEKA (Chen et al., arXiv 2011.04803, section 6 and appendix H).

On the noisy quadratic (14), ``theory.problems.NoisyQuadratic``, the filter (15) has :math:`P_t = \Sigma/(t+1)`
and its error is the average of all gradient noises so far, so everything below is exact, with no random number drawn.
f - f* is called the excess, e_t its expectation, in units of the loss; mu and L are the smallest and the largest
eigenvalue of H. "Derived" marks what the paper does not have.

The paper's inequality (24) leaves out E[grad f_t . (m_t - grad f_t)]. That term is negative, since the noise that is
still in m_t has moved theta_t already; :func:`cross_term` gives it, and :func:`one_step_bound` the inequality with and
without it. The conclusion E[f - f*] = O(1/t) survives with another constant.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def _in_eigenbasis(hessian: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues h of H and the diagonal of the matrix in H's eigenbasis, both (n,)."""
    h, basis = torch.linalg.eigh(hessian)
    return h, (basis * (matrix @ basis)).sum(0)


def filtered_excess(hessian: Tensor, noise: Tensor, gradient: Tensor, step_size: float, steps: int) -> Tensor:
    r"""Return e_t for theta_{t+1} = theta_t - alpha m_t with m_t from the filter (15); derived.

    With :math:`A = I - \alpha H` and :math:`M_t = E[\nabla f_t \nabla f_t^\top]`, and :math:`C_t = -(I - A^t) \Sigma /
    (t + 1)` for the expectation of the gradient times the filter's error,

    .. math::
        M_{t+1} = A M_t A - \alpha A C_t H - \alpha H C_t^\top A + \frac{\alpha^2}{t+1} H \Sigma H,
        \qquad e_t = \tfrac12 \mathrm{tr}(H^{-1} M_t),

    of which the trace needs the diagonal in H's eigenbasis only.

    Args:
        hessian: H, (n, n), positive definite.
        noise: Sigma, (n, n), the covariance of the minibatch gradient.
        gradient: grad f_0, (n,).
        step_size: alpha.
        steps: T.

    Returns:
        e_0, ..., e_T, shape (T + 1,).

    >>> one = torch.eye(1, dtype=torch.float64)
    >>> filtered_excess(one, one, torch.tensor([2.0]).double(), step_size=0.5, steps=1)  # M_1 = 4/4 + 1/4
    tensor([2.0000, 0.6250], dtype=torch.float64)
    """
    h, sigma = _in_eigenbasis(hessian, noise)
    shrink = 1 - step_size * h  # the eigenvalues of A
    power = torch.ones_like(h)  # of A^t
    M = _in_eigenbasis(hessian, torch.outer(gradient, gradient))[1]
    excess = [(M / h).sum() / 2]
    for t in range(steps):
        cross = -(1 - power) * sigma / (t + 1)
        M = shrink**2 * M - 2 * step_size * shrink * cross * h + step_size**2 * h**2 * sigma / (t + 1)
        power = power * shrink
        excess.append((M / h).sum() / 2)
    return torch.stack(excess)


def sgd_excess(hessian: Tensor, noise: Tensor, gradient: Tensor, step_size: float, steps: int) -> Tensor:
    """Return e_0, ..., e_T for theta_{t+1} = theta_t - alpha g_t; arguments as in :func:`filtered_excess`. Derived.

    Noise zero is gradient descent.
    """
    h, sigma = _in_eigenbasis(hessian, noise)
    M = _in_eigenbasis(hessian, torch.outer(gradient, gradient))[1]
    excess = [(M / h).sum() / 2]
    for _ in range(steps):
        M = (1 - step_size * h) ** 2 * M + step_size**2 * h**2 * sigma
        excess.append((M / h).sum() / 2)
    return torch.stack(excess)


def sgd_floor(hessian: Tensor, noise: Tensor, step_size: float) -> float:
    """Return the limit of :func:`sgd_excess`, 1/2 sum_i alpha Sigma_ii / (2 - alpha h_i) in H's eigenbasis.

    It exists for alpha < 2 / L.

    >>> sgd_floor(torch.eye(1), torch.eye(1), step_size=1.0)
    0.5
    """
    h, sigma = _in_eigenbasis(hessian, noise)
    return float((step_size * sigma / (2 - step_size * h)).sum() / 2)


def excess_limit(hessian: Tensor, noise: Tensor) -> float:
    """Return the limit of t e_t, 1/2 tr(H^-1 Sigma), for every step size alpha < 2 / L; derived.

    Late in the run theta_t follows the zero of the filtered gradient, m = 0, whose gradient has the covariance P_t.

    >>> excess_limit(2 * torch.eye(1), torch.eye(1))
    0.25
    """
    return float(torch.linalg.solve(hessian, noise).trace() / 2)


def cross_term(hessian: Tensor, noise: Tensor, step_size: float, t: int) -> float:
    """Return E[grad f_t . (m_t - grad f_t)] = - tr[(I - (I - alpha H)^t) Sigma] / (t + 1), 0 in (24); derived.

    >>> cross_term(torch.eye(1), torch.eye(1), step_size=0.5, t=1)
    -0.25
    """
    h, sigma = _in_eigenbasis(hessian, noise)
    return -float(((1 - (1 - step_size * h) ** t) * sigma).sum()) / (t + 1)


def one_step_bound(
    excess: Tensor, hessian: Tensor, noise: Tensor, step_size: float, *, with_cross_term: bool
) -> Tensor:
    r"""Return the right side of (25), which is to bound :math:`e_{t+1}` given :math:`e_t`.

    Printed: :math:`(1 - \alpha\mu) e_t + \frac{L\alpha^2}2 \mathrm{tr} P_t` with :math:`P_t = \Sigma/(t+1)` (26, 27),
    which has the form of Lemma 1 (28, 29). With the cross term: :math:`(1 - \alpha\mu) e_t + \frac{C}{t+1}`,
    :math:`C = \alpha (1 - \frac{L\alpha}2) \mathrm{tr}\Sigma`
    (derived; the chain of (24) with the cross term kept and :math:`I - A^t` bounded by I). Holds for alpha <= 1 / L.

    Args:
        excess: e_0, ..., e_T, (T + 1,).
        hessian: H.
        noise: Sigma.
        step_size: alpha.
        with_cross_term: which of the two.

    Returns:
        Bounds on e_1, ..., e_{T+1}, (T + 1,).
    """
    h: Tensor = torch.linalg.eigvalsh(hessian)
    factor = step_size * (1 - h[-1] * step_size / 2) if with_cross_term else h[-1] * step_size**2 / 2
    t = torch.arange(len(excess), dtype=excess.dtype)
    return (1 - step_size * h[0]) * excess + factor * noise.trace() / (t + 1)


class HyperbolicBound(NamedTuple):
    """a_t <= constant / t for all t >= start."""

    start: int
    constant: float

    def at(self, t: Tensor) -> Tensor:
        """Return constant / t, elementwise, in float64."""
        return self.constant / t.double()


def lemma_sequence(c: float, d: float, first: float, steps: int) -> Tensor:
    """Iterate a_0 = first, a_{t+1} = (1 - c) a_t + d / (t + 1) (Lemma 1); shape (steps + 1,), float64.

    >>> lemma_sequence(0.5, 1.0, 4.0, 2)
    tensor([4., 3., 2.], dtype=torch.float64)
    """
    values = [first]
    for t in range(steps):
        values.append((1 - c) * values[-1] + d / (t + 1))
    return torch.tensor(values, dtype=torch.float64)


def lemma_bound(c: float, d: float, first: float) -> HyperbolicBound:
    """Return the constants of Lemma 1's proof (30), for 0 < c < 1 and d > 0.

    t_0 is the first index with c - (1 - c) / t > 0, and M = max(t_0 a_{t_0}, d / (c - (1 - c) / t_0)). Then
    M (c - (1 - c) / t) >= d for t >= t_0 (31), so that a_t <= M / t implies a_{t+1} <= M / (t + 1) (32).

    Raises:
        ValueError: for c or d out of range.

    >>> lemma_bound(0.5, 1.0, 4.0)  # t_0 = 2, a_2 = 2
    HyperbolicBound(start=2, constant=4.0)
    """
    if not (0 < c < 1 and d > 0):
        raise ValueError(f"Lemma 1 needs 0 < c < 1 and d > 0, got c={c}, d={d}")
    start = 1
    while c - (1 - c) / start <= 0:
        start += 1
    at_start = float(lemma_sequence(c, d, first, start)[-1])
    return HyperbolicBound(start, max(start * at_start, d / (c - (1 - c) / start)))


def proposition_bound(hessian: Tensor, noise: Tensor, gradient: Tensor, step_size: float) -> HyperbolicBound:
    """Evaluate Proposition 1: :func:`lemma_bound` for c = alpha mu and the C of :func:`one_step_bound`.

    Raises:
        ValueError: unless 0 < alpha <= 1 / L, or where alpha mu = 1, for which the lemma says nothing.
    """
    h = torch.linalg.eigvalsh(hessian)
    mu, L = float(h[0]), float(h[-1])
    if not 0 < step_size <= 1 / L:
        raise ValueError(f"Proposition 1 needs 0 < step_size <= 1 / L = {1 / L:.4g}, got {step_size}")
    first = float(gradient @ torch.linalg.solve(hessian, gradient)) / 2
    return lemma_bound(step_size * mu, step_size * (1 - L * step_size / 2) * float(noise.trace()), first)
