"""MEKA, SGD and gradient descent on the noisy quadratic (MEKA, section 6), many runs side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from koala_lab.checks import check_known
from koala_lab.theory.problems import NoisyQuadratic
from koala_lib import kalman
from koala_lib.step_size import RULES, PredictedChange

ADAM_EPS: Final = 1e-8  # epsilon of eq. (9)
DIRECTIONS: Final = ("gradient", "adam")


class Minibatch(NamedTuple):
    """What a step sees; all runs side by side."""

    problem: NoisyQuadratic
    theta: Tensor  # weights (runs, n)
    moved: Tensor  # d, their last displacement (runs, n)
    losses: Tensor  # of the samples (runs, B)
    gradients: Tensor  # of the samples (runs, B, n)
    smoothing: float  # beta, of corrected averages
    weight: Tensor  # 1 - beta^t, of the average at this step t = 1, 2, ...

    @property
    def loss(self) -> Tensor:
        """Minibatch loss y (runs,)."""
        return self.losses.mean(1)

    @property
    def gradient(self) -> Tensor:
        """Minibatch gradient g (runs, n)."""
        return self.gradients.mean(1)

    def average(self, before: Tensor, value: Tensor) -> Tensor:
        """Return the corrected average of what one run after the other saw."""
        return kalman.corrected_average(before, value, self.weight, self.smoothing)


class Belief(NamedTuple):
    """What is followed, and what is believed about it; all runs side by side."""

    gradient: Tensor  # m (runs, n)
    covariance: Tensor  # P (n, n), or its scalar (runs,)
    value: Tensor  # u (runs,)
    value_variance: Tensor  # s (runs,)
    noises: tuple[Tensor, Tensor] | None = None  # sigma and r (runs,), where they are measured


def _along(covariance: Tensor, direction: Tensor) -> Tensor:
    """Return v^T P v (runs,) of directions v (runs, n), for P (n, n) or P = p I with p (runs,)."""
    if covariance.dim() == 1:
        return covariance * (direction * direction).sum(1)
    return (direction @ covariance * direction).sum(1)


def _predict_value(batch: Minibatch, before: Belief, u: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of the loss after the displacement (16); Q = 0 here."""
    d, zero = batch.moved, torch.zeros_like(u)
    slope, curvature = (before.gradient * d).sum(1), (d @ batch.problem.hessian * d).sum(1)
    return kalman.predict_value(u, s, slope, curvature, _along(before.covariance, d), zero)


def _filter_value(batch: Minibatch, before: Belief, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return u and s by the function-value filter (16) and (20)."""
    predicted = _predict_value(batch, before, before.value, before.value_variance)
    after = kalman.condition_value(*predicted, batch.loss, noise)
    return after.value, after.variance


def _full(batch: Minibatch, before: Belief | None) -> Belief:
    """Return grad f: gradient descent."""
    zero = torch.zeros_like(batch.loss)
    return Belief(batch.problem.gradient(batch.theta), torch.zeros_like(batch.problem.hessian), zero, zero)


def _sample(batch: Minibatch, before: Belief | None) -> Belief:
    """Return the minibatch gradient: SGD."""
    problem, size = batch.problem, batch.losses.shape[1]
    noise = problem.loss_noise(batch.theta, size)
    return Belief(batch.gradient, problem.gradient_noise(size), batch.loss, noise)


def _momentum(batch: Minibatch, before: Belief | None) -> Belief:
    """Return 0.9 m + 0.1 g from m = 0: momentum SGD with the rate alpha / 10, so that alpha means the same."""
    average = torch.zeros_like(batch.theta) if before is None else before.gradient
    return _sample(batch, before)._replace(gradient=torch.lerp(batch.gradient, average, 0.9))


def _filtered(batch: Minibatch, before: Belief | None) -> Belief:
    """Return m_t of MEKA by (15), from m_0 = g_0, P_0 = Sigma, with all covariances known and full."""
    seen = _sample(batch, before)
    if before is None:
        return seen
    u, s = _filter_value(batch, before, seen.value_variance)
    transported = before.gradient + batch.moved @ batch.problem.hessian
    m, P, _ = kalman.condition_gradient(transported, before.covariance, batch.gradient, seen.covariance)
    return Belief(m, P, u, s)


def _measured(batch: Minibatch, before: Belief | None) -> Belief:
    """Return m_t of the optimizer :class:`koala_lib.Meka`, with scalar covariances from the minibatch."""
    if before is None:
        zero = torch.zeros_like(batch.loss)
        before = Belief(torch.zeros_like(batch.theta), zero + 1e4, zero, zero + 1e4, (zero, zero))
    size = batch.losses.shape[1]
    spread = batch.gradients.var(1).mean(1) / size, batch.losses.var(1) / size
    assert before.noises is not None
    sigma, r = (batch.average(old, new) for old, new in zip(before.noises, spread, strict=True))
    u, s = _filter_value(batch, before, r)
    transported = before.gradient + batch.moved @ batch.problem.hessian
    m = torch.lerp(transported, batch.gradient, kalman.gain(before.covariance, sigma)[:, None])
    return Belief(m, kalman.condition_variance(before.covariance, sigma), u, s, (sigma, r))


GRADIENTS: Final[dict[str, Callable[[Minibatch, Belief | None], Belief]]] = {
    "full": _full,
    "sample": _sample,
    "momentum": _momentum,
    "filtered": _filtered,
    "measured": _measured,
}


def descend(problem: NoisyQuadratic, steps: int, step_size: float | str, **options: Any) -> Tensor:
    """Run on the noisy quadratic, side by side; return f(theta_t) - f* for t = 0, ..., T, shape (T + 1, runs).

    Arguments and errors are those of :func:`walk`.
    """
    return problem.excess(trajectories(problem, steps, step_size, **options))


class Step(NamedTuple):
    """One step of all runs."""

    batch: Minibatch
    before: Belief | None
    belief: Belief
    theta: Tensor  # after the step


def trajectories(problem: NoisyQuadratic, steps: int, step_size: float | str, **options: Any) -> Tensor:
    """Return theta_t for t = 0, ..., T, shape (T + 1, runs, n); arguments are those of :func:`walk`."""
    path = [step.theta for step in walk(problem, steps, step_size, **options)]
    return torch.stack([problem.start.expand_as(path[0]), *path])


def walk(
    problem: NoisyQuadratic,
    steps: int,
    step_size: float | str,
    *,
    gradient: str,
    batch_size: int = 1,
    runs: int = 1,
    seed: int = 0,
    smoothing: float = 0.0,
    direction: str = "gradient",
) -> Iterator[Step]:
    """Run on the noisy quadratic, side by side.

    Args:
        problem: The problem.
        steps: T.
        step_size: A fixed alpha, or ``"pi"``, ``"quadratic"`` or ``"ei"`` (at most 1 without an optimum).
        gradient: What is followed, a name of ``GRADIENTS``: ``"full"`` (gradient descent), ``"sample"`` (SGD),
            ``"momentum"``, ``"filtered"`` (MEKA with known covariances), ``"measured"`` (MEKA as it is; B >= 2).
        batch_size: B.
        runs: Number of independent runs.
        seed: Of all samples; the same for every kind of gradient.
        smoothing: Coefficient of the corrected average of the chosen alpha, and of the measured variances.
        direction: ``"gradient"``, -m, or ``"adam"``, that of AdaMEKA (9).

    Yields:
        The T steps.

    Raises:
        ValueError: For another ``gradient``, ``direction`` or ``step_size``, or variances to be measured in one sample.
    """
    check_known("gradient", gradient, GRADIENTS)
    check_known("direction", direction, DIRECTIONS)
    if isinstance(step_size, str):
        check_known("step_size", step_size, RULES)
    if gradient == "measured" and batch_size < 2:
        raise ValueError(f"measured variances need batch_size >= 2, got {batch_size}")
    generator = torch.Generator().manual_seed(seed)
    theta = problem.start.expand(runs, -1)
    d, alpha, belief = torch.zeros_like(theta), theta.new_zeros(runs), None
    for t in range(1, steps + 1):
        shift = theta[:, None] - problem.draw(runs, batch_size, generator=generator)
        weight = theta.new_tensor(1 - smoothing**t)
        batch = Minibatch(problem, theta, d, problem.excess(shift), problem.gradient(shift), smoothing, weight)
        before, belief = belief, GRADIENTS[gradient](batch, belief)
        delta = _direction(belief, direction)
        if isinstance(step_size, str):
            alpha = batch.average(alpha, _optimum(step_size, belief, delta, problem.hessian))
            d = alpha[:, None] * delta
        else:
            d = step_size * delta
        theta = theta + d
        yield Step(batch, before, belief, theta)


def _direction(belief: Belief, kind: str) -> Tensor:
    """Return -m, or -m / (sqrt(m^2 + diag P) + eps) (9); (runs, n)."""
    m, P = belief.gradient, belief.covariance
    if kind == "gradient":
        return -m
    variance = P[:, None] if P.dim() == 1 else P.diagonal()
    return -m / ((m.square() + variance).sqrt() + ADAM_EPS)


def _optimum(rule: str, belief: Belief, delta: Tensor, hessian: Tensor) -> Tensor:
    """Return the step size of a rule along a direction, at most 1 where there is no optimum; (runs,)."""
    slope, curvature = -(delta * belief.gradient).sum(1), (delta @ hessian * delta).sum(1)
    variance = _along(belief.covariance, delta)
    change = PredictedChange(slope, curvature, belief.value_variance, variance, torch.zeros_like(slope))
    return RULES[rule](change, 1.0)


class ValueTrack(NamedTuple):
    """The filter of the loss beside the loss; all (T, runs)."""

    truth: Tensor  # f
    value: Tensor  # u
    variance: Tensor  # s
    innovation: Tensor  # y - u^; 0 in the first step, which has no prediction
    predicted_variance: Tensor  # c of eq. (18), without the model error

    def covered(self) -> Tensor:
        """Say where |f - u| <= sqrt s."""
        return (self.truth - self.value).abs() <= self.variance.sqrt()


def value_track(
    problem: NoisyQuadratic, steps: int, step_size: float, *, batch_size: int, **options: Any
) -> ValueTrack:
    """Filter the loss along filtered runs with fixed steps, with the true r and without a model error (16)-(18).

    Arguments are those of :func:`walk`. The first belief is the first observation.
    """
    floor, rows = (problem.hessian @ problem.covariance).trace() / 2, []  # f*
    for batch, before, _, _ in walk(problem, steps, step_size, gradient="filtered", batch_size=batch_size, **options):
        y, r = batch.loss, problem.loss_noise(batch.theta, batch_size)
        if before is None:
            predicted, u, s = (y, torch.zeros_like(r)), y, r
        else:
            predicted = _predict_value(batch, before, u, s)
            u, s, _ = kalman.condition_trusted_value(*predicted, y, r)
        rows.append((problem.excess(batch.theta) + floor, u, s, y - predicted[0], predicted[1] + r))
    return ValueTrack(*(torch.stack(column) for column in zip(*rows, strict=True)))
