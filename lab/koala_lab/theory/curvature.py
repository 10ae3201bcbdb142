r"""What B of APOLLO knows of the Hessian, on problems where the Hessian is known exactly (Ma, 2020, section 3).

On its floor APOLLO goes its way whatever B is. So one run can be replayed with other equations for B
(:func:`estimates`), and every estimate compared with the diagonal of the Hessian at the same weights. B is asked to
fulfil :math:`d^\top B d = -d^\top y`; :func:`secant_signals` says how far :math:`-d^\top y` is from the curvature along
the step that it stands for, :math:`\eta\, d^\top H d`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from koala_lab.checks import check_known
from koala_lab.theory.problems import FiniteSum, follow
from koala_lib import Apollo

EQUATIONS = ("element", "tensor", "network")  # of what the weak secant equation is asked


def groups_of(sizes: Sequence[int], equation: str) -> Tensor:
    """Return the number of the group of each weight, (n,): one equation per group.

    Args:
        sizes: lengths of the tensors.
        equation: of :data:`EQUATIONS`: every weight by itself, every tensor, or all weights together.

    >>> groups_of([2, 1], "tensor")
    tensor([0, 0, 1])
    """
    check_known("equation", equation, EQUATIONS)
    if equation == "element":
        return torch.arange(sum(sizes))
    counts = sizes if equation == "tensor" else [sum(sizes)]
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts), output_size=sum(sizes))


def secant_update(B: Tensor, d: Tensor, y: Tensor, groups: Tensor, eps: float) -> Tensor:
    r"""Return B after (8), asked of groups of weights; all (n,).

    .. math:: B - \frac{d^\top y + d^\top B d}{(\|d\|_4 + \epsilon)^4}\, d^2 \quad\text{with sums over the group.}

    With a group per weight and eps = 0 it is -y / d, the secant equation of a diagonal matrix. Where d = 0 B stays.

    >>> d, y = torch.tensor([1.0, 2.0]), torch.tensor([-3.0, -8.0])
    >>> secant_update(torch.zeros(2), d, y, groups_of([2], "element"), 0.0)
    tensor([3., 4.])
    """

    def summed(t: Tensor) -> Tensor:
        return torch.zeros_like(t).index_add(0, groups, t)[groups]

    scale = (summed(d**4) ** 0.25 + eps) ** 4
    return B - d**2 * summed(d * y + d * B * d) / torch.where(scale > 0, scale, 1.0)


class Recorded(NamedTuple):
    """A run of APOLLO on a problem, float64: theta_0 ... theta_T (T + 1, n), m_1 ... m_T and B_1 ... B_T (T, n)."""

    points: Tensor
    means: Tensor
    curvatures: Tensor


def recorded(problem: FiniteSum, steps: int, *, lr: float, samples: Tensor | None = None, **options: Any) -> Recorded:
    """Run APOLLO without warm-up and keep everything.

    Args:
        problem: what to minimise.
        steps: T.
        lr: eta.
        samples: (T, batch), the sample losses of each step; ``None`` is full batch.
        options: of :class:`koala_lib.Apollo`.
    """
    kept: list[tuple[Tensor, Tensor]] = []

    def make(params: list[torch.nn.Parameter]) -> Apollo:
        optimizer = Apollo(params, warmup_steps=0, **options)

        def keep(*_: Any) -> None:
            states = [optimizer.state[p] for p in params]
            mean, curvature = (torch.cat([s[name].flatten() for s in states]) for name in ("mean", "curvature"))
            kept.append((mean, curvature))

        optimizer.register_step_post_hook(keep)
        return optimizer

    run = follow(problem, make, steps, epsilon=lr, samples=samples)
    means, curvatures = (torch.stack(column) for column in zip(*kept, strict=True))
    return Recorded(torch.cat([run.points, run.last[None]]), means, curvatures)


def estimates(run: Recorded, groups: Tensor, *, lr: float, eps: float) -> Tensor:
    """Return B_1, ..., B_T (T, n) that an equation would have had on the way of a run.

    Args:
        run: whose displacements and averages are taken.
        groups: of :func:`groups_of`.
        lr: eta of the run.
        eps: epsilon of the update, as in Algorithm 1.
    """
    directions = -run.points.diff(dim=0) / lr  # d_1, ..., d_T
    found = [torch.zeros_like(run.means[0])]
    for d, y in zip(directions[:-1], run.means.diff(dim=0), strict=True):
        found.append(secant_update(found[-1], d, y, groups, eps))
    return torch.stack(found)


# ---- exact answers ---------------------------------------------------------------------------------------------------


def hessian_diagonal(problem: FiniteSum, x: Tensor) -> Tensor:
    """Return the diagonal (n,) of the Hessian of the mean loss at x (n,), exactly; n^2 numbers are alive meanwhile.

    >>> from koala_lab.theory.problems import quadratic
    >>> hessian_diagonal(quadratic([1.0, 4.0]), torch.zeros(2).double())
    tensor([1., 4.], dtype=torch.float64)
    """
    found: Tensor = torch.func.hessian(lambda t: problem.losses(t).mean())(x)
    return found.diagonal()


def hutchinson(problem: FiniteSum, x: Tensor, probes: int, generator: torch.Generator, samples: Tensor) -> Tensor:
    """Return Hutchinson's estimate (n,) of that diagonal on a minibatch: the mean of z * H z, z of random signs.

    Args:
        problem: whose losses are taken.
        x: weights (n,).
        probes: number of z.
        generator: that draws them.
        samples: numbers of the sample losses of the minibatch.
    """
    gradient = torch.func.grad(lambda t: problem.losses(t)[samples].mean())
    signs = torch.randint(0, 2, (probes, len(x)), generator=generator).to(x) * 2 - 1
    products = torch.func.vmap(lambda z: torch.func.jvp(gradient, (x,), (z,))[1])(signs)
    found: Tensor = (signs * products).mean(0)
    return found


def error(estimate: Tensor, diagonal: Tensor) -> float:
    """Return |c b - h| / |h| for b = |estimate|, h = |diagonal| and the best number c: 0 if they are parallel.

    The scale is left free, since rates are tuned, and signs do not count, since (10) takes the absolute value.

    >>> round(error(torch.tensor([1.0, -1.0]), torch.tensor([3.0, 4.0])), 3)
    0.141
    """
    cosine = torch.cosine_similarity(estimate.abs(), diagonal.abs(), dim=0)  # 0 for an estimate of zero
    return math.sqrt(max(0.0, 1 - float(cosine) ** 2))


def errors(
    problem: FiniteSum, x: Tensor, guesses: Mapping[str, Tensor], samples: Tensor, generator: torch.Generator
) -> dict[str, float]:
    """Return the :func:`error` of several estimates at x, and of what they are to be compared with.

    Args:
        problem: whose mean loss has the Hessian that is meant.
        x: weights (n,).
        guesses: estimates (n,) by name.
        samples: numbers of the sample losses of a minibatch.
        generator: of Hutchinson's signs.

    Returns:
        By name; added are ``constant``, one number for all weights, and, on the minibatch, ``Hutchinson, 1`` and
        ``Hutchinson, 10`` (probes), and ``minibatch, exact``.
    """
    batch = FiniteSum(lambda t: problem.losses(t)[samples], problem.start)
    beside = {"constant": torch.ones_like(x)}
    beside |= {f"Hutchinson, {n}": hutchinson(problem, x, n, generator, samples) for n in (1, 10)}
    beside["minibatch, exact"] = hessian_diagonal(batch, x)
    truth = hessian_diagonal(problem, x)
    return {name: error(b, truth) for name, b in (dict(guesses) | beside).items()}


# ---- signal and noise ------------------------------------------------------------------------------------------------


class Signal(NamedTuple):
    """-d^T y over d^T H d eta, of one step: its mean over the minibatches, and its standard deviation."""

    mean: float
    sd: float

    @property
    def rms_error(self) -> float:
        """Root mean square of its distance from 1."""
        return math.hypot(self.mean - 1, self.sd)


def secant_signals(
    problem: FiniteSum, before: Tensor, after: Tensor, mean: Tensor, *, weight: float, batch_size: int
) -> dict[str, Signal]:
    """Say how well the change of the gradient over a step tells the curvature along it.

    Args:
        problem: whose sample losses minibatches are drawn from, with replacement.
        before: weights theta_t (n,).
        after: weights theta_{t+1} (n,).
        mean: m_t (n,), of the gradients up to the one at ``before``.
        weight: a of (9), of the next gradient in the average.
        batch_size: samples of a minibatch.

    Returns:
        For three ways to measure y: ``same batch`` at both ends of the step; ``different batches``; and ``averages``,
        APOLLO's m_{t+1} - m_t = a (g_{t+1} - m_t), in which m_t is what it is and g_{t+1} is drawn.
    """
    step = after - before

    def slopes(x: Tensor) -> Tensor:
        """Slopes (m,) of the sample losses along the step."""
        found: Tensor = torch.func.jvp(problem.losses, (x,), (step,))[1]
        return found

    curvature = float(torch.func.jvp(lambda x: slopes(x).mean(), (before,), (step,))[1])  # s^T H s
    first, last = slopes(before), slopes(after)
    old = float(mean @ step)
    measured = {
        "same batch": (last.mean() - first.mean(), (last - first).var()),
        "different batches": (last.mean() - first.mean(), last.var() + first.var()),
        "averages": (weight * (last.mean() - old), weight**2 * last.var()),
    }
    scale = batch_size**-0.5 / abs(curvature)
    return {name: Signal(float(m) / curvature, float(v) ** 0.5 * scale) for name, (m, v) in measured.items()}
