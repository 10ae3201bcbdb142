r"""How far to go along a direction when loss, slope and curvature are uncertain (MEKA, section 3 and appendix B.2).

Along :math:`\theta + \alpha \delta` the filters of MEKA predict the change of the loss as (eq. 11)

.. math::
    f_{t+1} - f_t \sim \mathcal N(\mu(\alpha), V(\alpha)), \qquad \mu = -a \alpha + \tfrac12 b \alpha^2, \qquad
    V = 2 s + p \alpha^2 + \tfrac14 q \alpha^4 \; [+ c \alpha^6].

A rule picks the step size alpha from these few numbers; the loss is not evaluated again. All functions here are
elementwise over tensors of one shape, stay on their device and never wait for it.

===================  ======================================================================================
a = slope            - delta^T m, the expected decrease per unit of alpha; positive
b = curvature        delta^T B delta
s = value_variance   variance of the filtered loss. It counts twice: the paper takes the two losses as independent,
                     although f_t stands on both sides. Without it the best alpha of "pi" would be 0 for b > 0
p = slope_variance   delta^T P delta
q = curvature_...    delta^T Q delta, the variance of delta^T B delta
c = third_order      lambda^(3) |delta|^6 (eq. 23), the square of a cubic remainder; ``None`` leaves it out. The
                     likelihood argument of eq. 22 gives lambda^(3) = model_error / |d|^6 for the last displacement d
===================  ======================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class PredictedChange(NamedTuple):
    """The five or six numbers of eq. (11), tensors of one shape."""

    slope: Tensor
    curvature: Tensor
    value_variance: Tensor
    slope_variance: Tensor
    curvature_variance: Tensor
    third_order: Tensor | None = None

    def mean(self, alpha: Tensor) -> Tensor:
        """Return mu(alpha), in units of the loss."""
        return alpha * (self.curvature * alpha / 2 - self.slope)

    def variance(self, alpha: Tensor) -> Tensor:
        """Return V(alpha), in squared units of the loss."""
        square = alpha.square()
        cubic = 0.0 if self.third_order is None else self.third_order * square
        inner = self.slope_variance + square * (self.curvature_variance / 4 + cubic)
        return 2 * self.value_variance + square * inner

    def derivatives(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu'(alpha) and V'(alpha)."""
        square = alpha.square()
        cubic = 0.0 if self.third_order is None else 6 * self.third_order * square
        return (
            self.curvature * alpha - self.slope,
            alpha * (2 * self.slope_variance + square * (self.curvature_variance + cubic)),
        )


# ---- the two acquisition functions -------------------------------------------------------------------------------


def improvement_probability(change: PredictedChange, alpha: Tensor) -> Tensor:
    """Return P(f_{t+1} <= f_t) = Phi(- mu / sqrt V) (eq. 12).

    >>> one, zero = torch.ones(1), torch.zeros(1)
    >>> improvement_probability(PredictedChange(one, one, one, zero, zero), zero)
    tensor([0.5000])
    """
    return _Phi(-change.mean(alpha) / _deviation(change, alpha))


def expected_improvement(change: PredictedChange, alpha: Tensor) -> Tensor:
    """Return E[max(0, f_t - f_{t+1})] = - mu Phi(z) + sqrt V phi(z) with z = - mu / sqrt V, in units of the loss.

    With q > 0 it grows like alpha^2 as alpha -> infinity, whatever the curvature.

    >>> one, zero = torch.ones(1), torch.zeros(1)
    >>> expected_improvement(PredictedChange(one, one, one / 2, zero, zero), zero)  # 1 / sqrt(2 pi)
    tensor([0.3989])
    """
    mean, deviation = change.mean(alpha), _deviation(change, alpha)
    z = -mean / deviation
    return deviation * _phi(z) - mean * _Phi(z)


def _deviation(change: PredictedChange, alpha: Tensor) -> Tensor:
    variance = change.variance(alpha)
    return variance.sqrt().clamp(min=torch.finfo(variance.dtype).tiny)  # no uncertainty at all: z = +-infinity, not NaN


def _Phi(z: Tensor) -> Tensor:
    probability: Tensor = torch.special.ndtr(z)
    return probability


def _phi(z: Tensor) -> Tensor:
    return torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)


# ---- the rules ---------------------------------------------------------------------------------------------------


def quadratic_step(change: PredictedChange, max_step_size: float) -> Tensor:
    """Return a / b, the minimum of mu; ``max_step_size`` where b <= 0 and there is none; 0 where a <= 0.

    >>> one = torch.ones(1)
    >>> quadratic_step(PredictedChange(one, 4 * one, one, one, one), max_step_size=1.0)
    tensor([0.2500])
    """
    a, b = change.slope, change.curvature
    return _guard(torch.where(b > 0, a / b, torch.inf), a, max_step_size)


def pi_step(change: PredictedChange, max_step_size: float) -> Tensor:
    r"""Find the alpha > 0 that makes an improvement most probable (eq. 12): the minimum of J = mu / sqrt V (eq. 13).

    J' = N / V^{3/2} with :math:`N = \tfrac14 a q \alpha^4 + \tfrac12 b p \alpha^3 + 2 b s \alpha - 2 a s
    \; [+ 2 a c \alpha^6 - \tfrac12 b c \alpha^7]`: the products of mu' V and mu V' / 2 in which no variance of mu's own
    order stands cancel. Hence, for a > 0 and s > 0:

    **b > 0: one optimum, in (0, a/b].** N(0) = - 2 a s < 0. All terms but the constant have a positive derivative for
    alpha > 0 (the pair in c, c alpha^6 (2 a - b alpha / 2), as long as alpha < 24/7 a/b; beyond, N falls, and its last
    zero is a maximum of J with mu > 0). N(a/b) >= 0 since 2 b s alpha = 2 a s there. So N has one zero, at or before
    the quadratic step, where J' changes from - to +.

    **b <= 0: one optimum if q > 0 or c > 0, else none.** The coefficients, by falling power, are >= 0 for the powers 7,
    6 and 4 and <= 0 below: one change of sign, one positive zero (Descartes). It may be large. With q = c = 0 no term
    is positive: J falls for ever, and the step is ``max_step_size``.

    **Newton from above.** b > 0: let U be where a single term, with 2 b s alpha, reaches 2 a s. b <= 0: let U be twice
    the point where a single positive term reaches each of the negative ones. Either way N(U) >= 0, so the zero is at or
    below U (and above U / 6). From there to U, N increases and is convex: for b > 0 term by term, for b <= 0 because
    the powers >= 4 outweigh those <= 3 beyond the zero. Newton's steps from U therefore decrease to the zero and never
    pass it, and a fixed number of them, known from the worst case, reaches full precision without a look at the result.

    Limits: p, q -> 0 or s -> infinity gives a/b; s -> 0 gives 0 (b > 0, and p or q > 0). With s = p = q = 0 nothing is
    uncertain and the rule is the quadratic one. A finite optimum is not capped. 0 where a <= 0.

    >>> one, zero = torch.ones(1), torch.zeros(1)
    >>> pi_step(PredictedChange(one, 2 * one, one, zero, zero), max_step_size=1.0)  # a/b
    tensor([0.5000])
    >>> pi_step(PredictedChange(one, one, one, 2 * one, zero), max_step_size=1.0)  # alpha^3 + 2 alpha = 2
    tensor([0.7709])
    """
    a, b, s, p, q, c = change
    k = b / a
    start = torch.where(b > 0, _above_convex(k, s, p, q, c), _above_concave(-k, s, p, q, c))
    # N(start z) / a and its derivative as polynomials in z, which starts at 1. Where s = p = q = 0, N is zero
    # everywhere and z stays 1: `tiny` avoids 0 / 0.
    c0, c1, c3, c4 = -2 * s, 2 * k * s * start, k * p * start**3 / 2, q * start**4 / 4
    d1, d3, d4 = c1 + torch.finfo(c1.dtype).tiny, 3 * c3, 4 * c4
    c6 = None if c is None else 2 * c * start**6
    z = torch.ones_like(start)
    for _ in range(_NEWTON_STEPS if c6 is None else _NEWTON_STEPS_THIRD_ORDER):
        square = z * z
        value = torch.addcmul(c0, torch.addcmul(c1, torch.addcmul(c3, c4, z), square), z)
        rise = torch.addcmul(d1, torch.addcmul(d3, d4, z), square)
        if c6 is not None:
            ratio = k * start * z / 4
            value = value + c6 * z**6 * (1 - ratio)
            rise = rise + c6 * z**5 * (6 - 7 * ratio)
        z = torch.addcdiv(z, value, rise, value=-1)
    return _guard(start * z, a, max_step_size)


# The zero lies between z = 1/3 (b > 0), 1/2 (b <= 0) or 1/6 (with c) and z = 1.
_NEWTON_STEPS = 8
_NEWTON_STEPS_THIRD_ORDER = 20


def _above_convex(k: Tensor, s: Tensor, p: Tensor, q: Tensor, c: Tensor | None) -> Tensor:
    """Return a point at or above the zero of N for k = b/a > 0: where one term alone equals 2 s."""
    start = 1 / k
    start = torch.where(p > 0, torch.minimum(start, (4 * s / (k * p)) ** (1 / 3)), start)
    start = torch.where(q > 0, torch.minimum(start, (8 * s / q) ** (1 / 4)), start)
    # here the term is c alpha^6 / s (1 - k alpha / 4), which with k alpha is >= 1 still
    return start if c is None else torch.where(c > 0, torch.minimum(start, (s / c) ** (1 / 6)), start)


def _above_concave(k: Tensor, s: Tensor, p: Tensor, q: Tensor, c: Tensor | None) -> Tensor:
    """Bound the zero of N from above for k = -b/a >= 0: twice where one positive term equals every negative one."""

    def beyond(constant: Tensor, linear: Tensor, cubic: Tensor, power: int) -> Tensor:
        parts = constant ** (1 / power), linear ** (1 / (power - 1)), cubic ** (1 / (power - 3))
        return 2 * torch.maximum(torch.maximum(parts[0], parts[1]), parts[2])

    start = beyond(8 * s / q, 8 * k * s / q, 2 * k * p / q, 4)  # q = 0: infinity or NaN, left out by fmin
    if c is not None:
        start = torch.fmin(start, beyond(s / c, k * s / c, k * p / (4 * c), 6))
        start = torch.fmin(start, beyond(4 * s / (k * c), 4 * s / c, p / c, 7))
    return start


def ei_step(change: PredictedChange, max_step_size: float) -> Tensor:
    """Find the first maximum of the expected improvement on (0, 2 a/b].

    For alpha < a/b it increases, since mu falls and V rises, so the search is on [a/b, 2 a/b], where mu <= 0: the first
    of 256 equal parts at whose end the derivative is not positive, that part again in 256, and so on.
    Where it increases throughout, the step is the end, 2 a/b. For b <= 0 it increases for ever, third-order term or
    not, and the step is ``max_step_size``. 0 where a <= 0.

    >>> one, zero = torch.ones(1), torch.zeros(1)
    >>> ei_step(PredictedChange(one, 2 * one, one, zero, zero), max_step_size=1.0)  # certain slope and curvature: a/b
    tensor([0.5000])
    """
    a, b = change.slope, change.curvature
    wide = PredictedChange(*(None if x is None else x[..., None] for x in change))  # type: ignore[arg-type]
    grid = torch.linspace(0, 1, 257, dtype=a.dtype, device=a.device)
    newton = (a / b)[..., None]
    low, width = torch.ones_like(newton), torch.ones_like(newton)  # in units of a/b
    for _ in range(7):  # 56 bits
        points = low + width * grid
        falling = _improvement_slope(wide, newton * points)[..., 1:] <= 0
        last = torch.ones_like(falling[..., -1:])
        part = torch.cat([falling[..., :-1], last], dim=-1).to(torch.int8).argmax(-1, keepdim=True)
        low, width = points.gather(-1, part), width / 256
    return _guard(torch.where(b > 0, (newton * (low + width))[..., 0], torch.inf), a, max_step_size)


def _improvement_slope(change: PredictedChange, alpha: Tensor) -> Tensor:
    """Return d EI / d alpha = - mu' Phi(z) + V' / (2 sqrt V) phi(z): the derivatives of z cancel."""
    deviation = _deviation(change, alpha)
    z = -change.mean(alpha) / deviation
    mean_slope, variance_slope = change.derivatives(alpha)
    return variance_slope / (2 * deviation) * _phi(z) - mean_slope * _Phi(z)


def _guard(alpha: Tensor, slope: Tensor, max_step_size: float) -> Tensor:
    """Replace what is not a finite optimum."""
    return torch.where(alpha.isfinite(), alpha, max_step_size).masked_fill(slope <= 0, 0.0)


RULES: dict[str, Callable[[PredictedChange, float], Tensor]] = {
    "quadratic": quadratic_step,
    "pi": pi_step,
    "ei": ei_step,
}
