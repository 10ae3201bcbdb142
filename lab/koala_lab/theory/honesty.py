"""What the filters say of themselves, held to what happens: watched trainings, errors beside variances, steering."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats  # type: ignore[import-untyped]
from torch import Tensor, nn

from koala_lab.theory.ekf import dense_filter
from koala_lab.theory.problems import FiniteSum, follow, linear
from koala_lib import KoalaM, KoalaV, Meka, kalman
from koala_lib.watch import Watch, best_gain, verdict_of, watch

__all__ = ["Task", "band", "follow_drift", "nees", "steered", "watched"]

LARGEST_MOMENTUM = 0.99  # of a steered one


@dataclass(frozen=True)
class Task:
    """A classification whose minibatches are drawn *with replacement*.

    Without replacement the noises of an epoch cancel, and a perfect filter's innovations are anticorrelated.

    Attributes:
        network: makes the network; its weights come from torch's default generator.
        inputs: of all training samples, (m, ...).
        labels: (m,).
        batch_size: samples per step.
    """

    network: Callable[[], nn.Module]
    inputs: Tensor
    labels: Tensor
    batch_size: int = 64

    def batches(self, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw minibatches."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            chosen = torch.randint(len(self.labels), (self.batch_size,), generator=generator).to(self.labels.device)
            yield self.inputs[chosen], self.labels[chosen]

    def start(self, seed: int) -> nn.Module:
        """Make the network of a seed."""
        torch.manual_seed(seed)
        return self.network().to(self.inputs.device)

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Return the mean loss of all training samples."""
        pairs = zip(torch.split(self.inputs, 2000), torch.split(self.labels, 2000), strict=True)
        return sum(float(losses(model(x), y).sum()) for x, y in pairs) / len(self.labels)


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each sample."""
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


def watched(
    task: Task,
    make: Callable[[nn.Module], Any],
    steps: int,
    seed: int,
    *,
    full: bool = False,
    between: Callable[[int, Watch], None] = lambda step, watched: None,
    window: int = 100,
) -> pd.DataFrame:
    """Train and watch every step.

    Args:
        task: what to train.
        make: makes the optimizer of a network: one of KOALA's, MEKA, or one of torch.
        steps: how many.
        seed: of network and minibatches.
        full: measure the loss of all samples after each step, too.
        between: is called after each step, which is counted from 1.
        window: of the watch.

    Returns:
        The table of :class:`koala_lib.watch.Watch`, and per step ``full``, the loss of all samples after it, and
        ``fell``, whether that is less than before it.
    """
    model = task.start(seed)
    optimizer = make(model)
    seen = watch(model, optimizer, rest=0, coordinates=10**9, history=steps, window=window)
    whole = [task.loss(model)] if full else []
    for k, (x, y) in enumerate(task.batches(steps, seed + 1000), start=1):
        if isinstance(optimizer, Meka):
            optimizer.step(x, y)
        else:

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                each = losses(model(x), y)
                each.mean().backward()  # type: ignore[no-untyped-call]
                return each if hasattr(optimizer, "predict") else each.mean()

            optimizer.step(closure)
        with torch.no_grad():
            seen.after(losses(model(x), y))
        whole += [task.loss(model)] if full else []
        between(k, seen)
    table = pd.DataFrame(seen.table())
    seen.close()
    if full:
        table["full"] = whole[1:]
        table["fell"] = np.diff(whole) < 0
    return table


def steered(
    task: Task, rate: float, steps: int, seed: int, *, every: int = 25, steer: bool = True, start: float = 0.9
) -> pd.DataFrame:
    """Train by SGD whose momentum is an average, and steer its gain by the whiteness of the innovations.

    After every ``every`` steps, where the verdict is that momentum is too large or too small, it becomes the one whose
    innovations would have been white, 0.99 at most. Dampening is as large, so that the rate means the same.

    Args:
        task: what to train.
        rate: learning rate.
        steps: how many.
        seed: of network and minibatches.
        every: steps between decisions, and those that one looks back on.
        steer: ``False`` keeps the first momentum.
        start: the first momentum.

    Returns:
        The table of :func:`watched`; the last row's ``full`` is the loss of all samples at the end.
    """
    groups: list[dict[str, Any]] = []
    ends: list[float] = []

    def make(model: nn.Module) -> torch.optim.SGD:
        sgd = torch.optim.SGD(model.parameters(), rate, momentum=start, dampening=start)
        groups.extend(sgd.param_groups)
        return sgd

    def between(step: int, seen: Watch) -> None:
        verdict = seen.verdict() if steer and step % every == 0 else None
        if verdict is not None and verdict.momentum.startswith("too"):
            momentum = min(verdict.best_momentum, LARGEST_MOMENTUM)
            groups[0].update(momentum=momentum, dampening=momentum)
        if step == steps:
            ends.append(task.loss(seen.model))

    table = watched(task, make, steps, seed, between=between, window=every)
    table["full"] = np.nan
    table.loc[table.index[-1], "full"] = ends[0]
    return table


# ---- controls: where the model is right -----------------------------------------------------------------------------


def follow_drift(
    gain: float, best: float, *, runs: int = 200, steps: int = 120, n: int = 16, seed: int = 0
) -> pd.DataFrame:
    """Filter a gradient that is a random walk, seen with noise, by a fixed gain.

    Args:
        gain: 1 - momentum.
        best: the gain of the scalar Kalman filter; q = best^2 / (1 - best) and sigma = 1.
        runs: how many, side by side.
        steps: of each.
        n: weights of each.
        seed: of the noise.

    Returns:
        A row per run: ``momentum`` (the verdict), ``white`` (share of the steps at which the cosine of two innovations
        is within 1.96 / sqrt n), ``best`` (the gain that whiteness suggests).
    """
    generator = torch.Generator().manual_seed(seed)
    moves, noises = torch.randn(2, steps, runs, n, generator=generator, dtype=torch.float64)
    gradients = torch.cumsum(best / math.sqrt(1 - best) * moves, 0) + noises
    mean, last, weight, products, sizes, cosines = gradients[0], torch.zeros(runs, n), gain, [], [], []
    for t, g in enumerate(gradients[1:], start=1):
        innovation, weight = g - mean, (1 - gain) * weight + gain
        mean = mean + gain / weight * innovation
        if t > 1:
            product, size = (innovation * last).sum(1), innovation.norm(dim=1) * last.norm(dim=1)
            products.append(product)
            sizes.append(size)
            cosines.append(product / size)
        last = innovation
    rho = torch.stack(products).sum(0) / torch.stack(sizes).sum(0)
    white = (torch.stack(cosines).abs() < 1.96 / math.sqrt(n)).double().mean(0)
    verdicts = [verdict_of(c).momentum for c in torch.stack(products, 1).tolist()]
    guesses = [best_gain(gain, r) for r in rho.tolist()]
    return pd.DataFrame({"momentum": verdicts, "white": white.tolist(), "best": guesses})


def nees(
    method: str, *, runs: int = 60, steps: int = 30, n: int = 10, noise: float = 0.5, scale: float = 1.0, seed: int = 0
) -> list[float]:
    r"""Return the squared error over the posterior's variance, :math:`(x - x^*)^\top P^{-1} (x - x^*)`, of each run.

    Truth and filter have one model: :math:`x^* \sim N(0, I)`, with KOALA-M's velocity :math:`p^* \sim N(0, 0.1 I)` that
    decays by 0.9 a step; a step sees one residual :math:`a^\top (x - x^*) + N(0, R)`, target 0.

    Args:
        method: ``"dense_v"`` and ``"dense_m"`` (the filter of Table 1 with its covariance matrix), ``"koala_v"`` and
            ``"koala_m"`` (one block), ``"koala_v_squares"`` (on half the squared residual, whose R is 3/4 of the
            residual's squared).
        runs: how many.
        steps: of each.
        n: weights.
        noise: variance of the residual's noise.
        scale: what the filter takes for R, in units of the true one.
        seed: of all draws.
    """
    moving = method.endswith("_m")
    kappa, B = 0.9, 0.1 if moving else 0.0
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(runs):
        draws = torch.randn(steps + 2, n, generator=generator, dtype=torch.float64)
        features, truth, velocity = draws[2:], draws[0], math.sqrt(B) * draws[1]
        errors = math.sqrt(noise) * torch.randn(steps, generator=generator, dtype=torch.float64)
        observations = []
        for a, error in zip(features, errors, strict=True):
            truth, velocity = truth + velocity, kappa * velocity
            observations.append(a @ truth + error)
        residuals = linear(features, -torch.stack(observations))
        R = scale * noise
        if method.startswith("dense"):
            x, P = _dense(residuals, steps, n, R, B, kappa)
        else:
            squares = method.endswith("squares")
            problem = _half_squares(residuals) if squares else residuals
            x, P = _koala(problem, steps, 0.75 * R**2 if squares else R, B, kappa)
        gap = x - truth
        found.append(float(gap @ torch.linalg.solve(P, gap)))
    return found


def _half_squares(residuals: FiniteSum) -> FiniteSum:
    return FiniteSum(lambda x: residuals.losses(x).square() / 2, residuals.start)


def _dense(problem: FiniteSum, steps: int, n: int, R: float, B: float, kappa: float) -> tuple[Tensor, Tensor]:
    covariance, transition = ([[1.0, 0.0], [0.0, B]], [[1.0, 1.0], [0.0, kappa]]) if B else ([[1.0]], [[1.0]])
    still = [[0.0] * len(covariance)] * len(covariance)
    options: dict[str, Any] = {"initial_covariance": covariance, "transition": transition, "process_noise": still}
    run = dense_filter(problem, steps, samples=torch.arange(steps), measurement_noise=R, **options)
    return run.states[-1][:n], run.covariances[-1][:n, :n]


def _koala(problem: FiniteSum, steps: int, R: float, B: float, kappa: float) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {"blocks": "global", "process_noise": 0.0, "measurement_noise": R, "min_grad_norm": 0.0}
    options |= {"initial_variance": 1.0}
    if B:
        options |= {"initial_velocity_variance": B, "velocity_noise": 0.0, "momentum": kappa}
    kind: Any = KoalaM if B else KoalaV
    run = follow(problem, lambda p: kind(p, **options), steps, samples=torch.arange(steps))
    A, squared = run.filter["variance"][-1], run.gradient_norms[-1] ** 2
    P = kalman.condition_position(A, squared, A.new_tensor(R))
    return run.last, P * torch.eye(len(run.last), dtype=run.last.dtype)


def band(runs: int, n: int, confidence: float = 0.99) -> tuple[float, float]:
    """Return where the mean of so many independent chi-square variables with n degrees of freedom lies.

    >>> low, high = band(100, 10)
    >>> round(low, 1), round(high, 1)
    (8.9, 11.2)
    """
    tail = (1 - confidence) / 2
    low, high = (float(stats.chi2.ppf(q, runs * n)) / runs for q in (tail, 1 - tail))
    return low, high
