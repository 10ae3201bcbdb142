r"""How far ahead a step size should look (MEKA, section 7.1: the "short horizon bias" of Wu et al., arXiv 1803.02021).

On the noisy quadratic (14) with steps fixed in advance, theta_{t+1} = theta_t - alpha_t v_t, the expected excess e_t
is exact for minibatch gradients (v = g) and for filtered ones (v = m of (15)). In H's eigenbasis it needs the diagonals
M of E[grad f grad f^T] and C of E[grad f (v - grad f)^T] and the noise N of v alone:

.. math::
    M' = M - 2 \alpha h (M + C) + \alpha^2 h^2 (M + 2 C + N), \qquad e = \tfrac12 \sum_i M_i / h_i.

For minibatch gradients C = 0 and N = Sigma. For filtered ones N = Sigma / (t + 1), and since their error is the mean of
all noises so far, C' = (t + 1) / (t + 2) [(1 - alpha h) C - alpha h N]. All of it is derived; a constant alpha gives
:func:`koala_lab.theory.meka.filtered_excess` and :func:`koala_lab.theory.meka.sgd_excess`.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor

from koala_lab.theory.problems import NoisyQuadratic

GROWTH: Final = 1e6  # of the excess on the way; a schedule that passes through more is lost in rounding errors


class Moments(NamedTuple):
    """Where the runs are after t steps, in expectation; tensors (n,) in H's eigenbasis."""

    t: int
    h: Tensor  # eigenvalues of H
    sigma: Tensor  # diagonal of Sigma
    M: Tensor
    C: Tensor
    filtered: bool

    @property
    def excess(self) -> Tensor:
        """Expected f - f*."""
        return (self.M / self.h).sum() / 2

    @property
    def noise(self) -> Tensor:
        """N."""
        return self.sigma / (self.t + 1) if self.filtered else self.sigma

    def step(self, alpha: Tensor) -> Moments:
        """Move by one step of a size that does not depend on what was drawn."""
        h, M, C, N = self.h, self.M, self.C, self.noise
        moved = M - 2 * alpha * h * (M + C) + alpha**2 * h**2 * (M + 2 * C + N)
        if self.filtered:
            C = (self.t + 1) / (self.t + 2) * ((1 - alpha * h) * C - alpha * h * N)
        return self._replace(t=self.t + 1, M=moved, C=C)

    def greedy(self) -> Tensor:
        """Return the step with the smallest expected excess after it."""
        h, M, C, N = self.h, self.M, self.C, self.noise
        return (M + C).sum() / (h * (M + 2 * C + N)).sum()


def start(problem: NoisyQuadratic, batch_size: int, *, filtered: bool) -> Moments:
    """Return the moments before the first step, whose gradient is a minibatch's in either case."""
    h, basis = torch.linalg.eigh(problem.hessian)
    sigma = (basis * (problem.gradient_noise(batch_size) @ basis)).sum(0)
    M = (problem.gradient(problem.start) @ basis).square()
    return Moments(0, h, sigma, M, torch.zeros_like(h), filtered)


class Schedule(NamedTuple):
    """Step sizes alpha_0, ..., alpha_{T-1} and the expected excess e_0, ..., e_T."""

    steps: Tensor
    excess: Tensor


def follow(moments: Moments, steps: Tensor) -> Schedule:
    """Return what step sizes (T,) lead to."""
    excess = [moments.excess]
    for alpha in steps:
        moments = moments.step(alpha)
        excess.append(moments.excess)
    return Schedule(steps, torch.stack(excess))


def plan(
    moments: Moments,
    steps: int,
    horizon: int,
    *,
    longest: float = math.inf,
    begin: Tensor | None = None,
    sweeps: int = 30,
) -> Schedule:
    """Choose step sizes for the expected excess at the end of every block of ``horizon`` steps.

    A horizon of 1 is the greedy step; that of the whole run plans it at once. Longer blocks are improved one step size
    at a time, which is exact, since the last excess is a quadratic in each: from the greedy step sizes, from the
    constant 1/L and from a plan that is known, whichever ends lowest. It finds a good schedule, not surely the best.

    Args:
        moments: where to begin.
        steps: T, a multiple of ``horizon``.
        horizon: how many steps are planned at a time.
        longest: bound of the step sizes, in units of 1/L.
        begin: step sizes (T,) to improve, such as those of a shorter horizon.
        sweeps: how often every step size of a block is improved.

    Raises:
        ValueError: if T is no multiple of the horizon.
    """
    if steps % horizon:
        raise ValueError(f"steps={steps} is no multiple of horizon={horizon}")
    first, chosen = moments, []
    bound = longest / float(moments.h.max())
    for t in range(0, steps, horizon):
        begins = [_greedy(moments, horizon, bound)]
        if horizon > 1:
            begins.append((1 / moments.h.max()).expand(horizon))
        if begin is not None:
            begins.append(begin[t : t + horizon])
        found = [_improve(moments, one, bound, sweeps if horizon > 1 else 0) for one in begins]
        block = min(found, key=lambda schedule: float(schedule.excess[-1])).steps
        for alpha in block:
            moments = moments.step(alpha)
        chosen.append(block)
    return follow(first, torch.cat(chosen))


def _greedy(moments: Moments, steps: int, longest: float) -> Tensor:
    chosen = []
    for _ in range(steps):
        chosen.append(moments.greedy().clamp(0, longest))
        moments = moments.step(chosen[-1])
    return torch.stack(chosen)


def _improve(moments: Moments, steps: Tensor, longest: float, sweeps: int) -> Schedule:
    """Minimise the last excess over one step size after the other; return the best schedule on the way."""
    best = follow(moments, steps)
    for _ in range(sweeps):
        steps = _sweep(moments, steps, longest)
        one = follow(moments, steps)
        if not 0 < float(one.excess[-1]) < float(best.excess[-1]) or float(one.excess.max() / one.excess[0]) > GROWTH:
            break
        best = one
    return best


def _sweep(moments: Moments, steps: Tensor, longest: float) -> Tensor:
    """Improve every step size once, from the last to the first."""
    h, places, improved = moments.h, [moments], []
    for alpha in steps[:-1]:
        places.append(places[-1].step(alpha))
    # the last excess is w_M . M + w_C . C and a constant, of the moments after the step that is improved
    w_M, w_C = 1 / (2 * h), torch.zeros_like(h)
    for place in reversed(places):
        N, kept = place.noise, (place.t + 1) / (place.t + 2) if place.filtered else 0.0
        slope = (2 * w_M * h * (place.M + place.C) + kept * w_C * h * (place.C + N)).sum()
        curvature = (2 * w_M * h**2 * (place.M + 2 * place.C + N)).sum()
        alpha = (slope / curvature).clamp(0, longest)
        improved.append(alpha)
        shrink = 1 - alpha * h
        w_M, w_C = shrink**2 * w_M, kept * shrink * w_C - 2 * alpha * h * shrink * w_M
    return torch.stack(improved[::-1])
