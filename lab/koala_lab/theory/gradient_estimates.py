r"""Estimates of the full gradient side by side: MEKA's filter, its diagonal form, implicit gradient transport.

Each estimate drives a run of its own, :math:`\theta_{t+1} = \theta_t - \alpha v_t`, from the same weights and with the
same minibatches, and its distance to the gradient of all samples is recorded. For networks of a few thousand weights:
gradients and Hessian-vector products come sample by sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from koala_lab.checks import check_known
from koala_lib import kalman


class Batch(NamedTuple):
    """Samples: inputs and targets, first dimension B."""

    inputs: Tensor
    targets: Tensor


class Problem:
    """The mean loss of a network over samples, as a function of all its weights in one vector.

    Args:
        model: the network; it is not changed.
        loss_fn: outputs and targets to one loss per sample, (B,).
        samples: all of them.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor], samples: Batch) -> None:
        self.model, self.loss_fn, self.samples = model, loss_fn, samples
        self.names = [name for name, _ in model.named_parameters()]
        self.shapes = [p.shape for p in model.parameters()]

    def start(self) -> Tensor:
        """Return the weights of the network (n,)."""
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def loss(self, theta: Tensor, batch: Batch) -> Tensor:
        """Return the mean loss of samples."""
        parts = torch.split(theta, [shape.numel() for shape in self.shapes])
        weights = {n: p.view(s) for n, p, s in zip(self.names, parts, self.shapes, strict=True)}
        outputs = torch.func.functional_call(self.model, weights, (batch.inputs,))
        mean: Tensor = self.loss_fn(outputs, batch.targets).mean()
        return mean

    def gradient(self, theta: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the gradient (n,) of the mean loss, and that loss."""
        both: Any = torch.func.grad_and_value(self.loss)(theta, batch)
        return both[0], both[1]

    def moments(self, theta: Tensor, batch: Batch, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Return every sample's gradient and Hessian times a direction, both (B, n)."""

        def one(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            gradient = torch.func.grad(lambda w: self.loss(w, Batch(x[None], y[None])))
            both: Any = torch.func.jvp(gradient, (theta,), (direction,))
            return both[0], both[1]

        gradients, products = torch.func.vmap(one)(*batch)
        return gradients, products


# An estimate is a function of problem, theta_t, theta_t - theta_{t-1} and the minibatch, called once a step.
Estimate = Callable[[Problem, Tensor, Tensor, Batch], Tensor]


def minibatch(problem: Problem, theta: Tensor, moved: Tensor, batch: Batch) -> Tensor:
    """Return g_t: SGD."""
    return problem.gradient(theta, batch)[0]


@dataclass
class Filtered:
    """MEKA's filter (6)-(8) with variances that are measured in the minibatch.

    Attributes:
        diagonal: a variance for every weight, (n,), or else their average for all. Nothing else differs.
        smoothing: coefficient of the corrected average of Sigma, as in :class:`koala_lib.Meka`.
        prior_variance: p_0.
    """

    diagonal: bool
    smoothing: float = 0.999
    prior_variance: float = 1e4
    mean: Tensor | float = 0.0
    variance: Tensor | None = None
    noise: Tensor | None = None
    weight: float = 0.0

    def __call__(self, problem: Problem, theta: Tensor, moved: Tensor, batch: Batch) -> Tensor:
        """Return m_t."""
        gradients, products = problem.moments(theta, batch, moved)
        sigma, q = (self._variance(rows) for rows in (gradients, products))
        before = torch.full_like(sigma, self.prior_variance) if self.variance is None else self.variance
        noise = torch.zeros_like(sigma) if self.noise is None else self.noise
        self.weight = self.smoothing * self.weight + 1 - self.smoothing
        self.noise = kalman.corrected_average(noise, sigma, sigma.new_tensor(self.weight), self.smoothing)
        p = kalman.predict_position(before, q)
        k = kalman.gain(p, self.noise).to(theta.dtype)
        self.variance = kalman.condition_variance(p, self.noise)
        self.mean = torch.lerp(self.mean + products.mean(0), gradients.mean(0), k)
        return self.mean

    def _variance(self, rows: Tensor) -> Tensor:
        each = rows.double().var(0) / len(rows)
        return each if self.diagonal else each.mean()


@dataclass
class Implicit:
    r"""Implicit gradient transport (Arnold et al. 2019): no Hessian, but minibatch gradients at a point far ahead.

    .. math::
        v_t = \gamma_t v_{t-1} + (1 - \gamma_t) \, g\Big(\theta_t + \frac{\gamma_t}{1 - \gamma_t}
        (\theta_t - \theta_{t-1})\Big)

    is a weighted mean of all minibatch gradients as if each had been taken at theta_t, if one Hessian serves all
    samples and places.

    Attributes:
        share: c; the mean reaches over the last c t gradients, its noise has the variance of one over c t. 1 is the
            plain mean, gamma_t = (t - 1) / t at step t = 1, 2, ...
    """

    share: float = 1.0
    step: int = 0
    mean: Tensor | float = 0.0

    def __call__(self, problem: Problem, theta: Tensor, moved: Tensor, batch: Batch) -> Tensor:
        """Return v_t."""
        self.step += 1
        decay = kept_share(self.step, self.share)
        ahead = problem.gradient(theta + decay / (1 - decay) * moved, batch)[0]
        self.mean = decay * self.mean + (1 - decay) * ahead
        return self.mean


def kept_share(t: int, share: float) -> float:
    """Return gamma_t of "anytime tail averaging" (Le Roux 2019), after which the mean has the variance 1 / (c t).

    From gamma^2 V_{t-1} + (1 - gamma)^2 = V_t with V_t = 1 / (c t), for 1/c an integer; 0 as long as c (t - 1) < 1.

    >>> [kept_share(t, 1.0) for t in (1, 2, 4)]
    [0.0, 0.5, 0.75]
    """
    reach = share * (t - 1)
    if reach < 1:
        return 0.0
    return reach / (1 + reach) * (1 - math.sqrt((1 - share) / (t * (t - 1))) / share)


ESTIMATES: Final[dict[str, Callable[[], Estimate]]] = {
    "minibatch": lambda: minibatch,
    "scalar": lambda: Filtered(diagonal=False),
    "diagonal": lambda: Filtered(diagonal=True),
    "implicit": Implicit,
    "implicit_tail": lambda: Implicit(share=0.5),
}


def follow(
    problem: Problem, estimate: str, steps: int, step_size: float, *, batch_size: int, seed: int
) -> pd.DataFrame:
    """Train along an estimate, with a constant step; slow, since every step takes the gradient of all samples.

    Args:
        problem: what to train, from the weights of its network.
        estimate: a name of ``ESTIMATES``.
        steps: T.
        step_size: alpha.
        batch_size: B; minibatches are drawn without replacement, epoch after epoch.
        seed: of the minibatches; the same for every estimate.

    Returns:
        One row per step: ``step``, ``loss`` (of all samples), ``error`` (distance of v_t to the full gradient) and
        ``minibatch_error`` (that of the minibatch gradient there).
    """
    check_known("estimate", estimate, ESTIMATES)
    theta, v, rows = problem.start(), ESTIMATES[estimate](), []
    moved = torch.zeros_like(theta)
    for step, batch in zip(range(1, steps + 1), _minibatches(problem.samples, batch_size, seed), strict=False):
        full, loss = problem.gradient(theta, problem.samples)
        estimated = v(problem, theta, moved, batch)
        errors = (estimated - full).norm(), (minibatch(problem, theta, moved, batch) - full).norm()
        rows.append([step, float(loss), *map(float, errors)])
        moved = -step_size * estimated
        theta = theta + moved
    return pd.DataFrame(rows, columns=["step", "loss", "error", "minibatch_error"])


def _minibatches(samples: Batch, size: int, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order: Any = torch.randperm(len(samples.targets), generator=generator)
        for rows in order[: len(order) // size * size].split(size):
            yield Batch(samples.inputs[rows], samples.targets[rows])
