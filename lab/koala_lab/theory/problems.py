"""Small problems with known answers, on which the statements of the papers can be checked.

A problem is a function of the parameter vector with a starting point, in float64. :func:`follow` runs an optimizer on
one and records what it saw, so that notebooks and tests need no loop of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from koala_lab.checks import check_known


@dataclass(frozen=True)
class FiniteSum:
    """An empirical risk, the mean of m sample losses (KOALA, eq. 2): L(x) = 1/m sum_i l_i(x).

    Attributes:
        losses: the sample losses, x (n,) -> (m,); differentiable, float64.
        start: where runs begin, n numbers.
        sizes: lengths of the tensors that x consists of, in order; ``None``: it is one tensor.
    """

    losses: Callable[[Tensor], Tensor]
    start: tuple[float, ...]
    sizes: tuple[int, ...] | None = None

    def at(self, x: Tensor | Sequence[float]) -> tuple[Tensor, Tensor]:
        """Sample losses (m,) and their gradients (m, n) at a point (n,)."""
        x = torch.as_tensor(x, dtype=torch.float64).detach()
        return self.losses(x), torch.func.jacrev(self.losses)(x)

    def gradient(self, x: Tensor | Sequence[float]) -> Tensor:
        """Return the gradient (n,) of the mean loss at a point (n,)."""
        return self.at(x)[1].mean(0)

    def minimiser(self) -> Tensor:
        """Find where the mean loss of a convex problem is smallest, (n,), numerically from the start.

        >>> two_samples().minimiser()
        tensor([-0.3333], dtype=torch.float64)
        """
        x = torch.tensor(self.start, dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS(
            [x], max_iter=1000, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            solver.zero_grad()
            loss: Tensor = self.losses(x).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        solver.step(closure)  # type: ignore[no-untyped-call]
        return x.detach()


class Trace(NamedTuple):
    """What an optimizer saw at the points where it took gradients; one row per step.

    Attributes:
        points: x^_k (steps, n), the predicted points.
        losses: minibatch loss there (steps,).
        gradient_norms: norm of the minibatch gradient there (steps,).
        filter: scalars of the filter by name (steps,), after the prediction, so ``filter["variance"]`` is P^_k while
            ``filter["measurement_noise"]`` is R_{k-1}; empty for an optimizer that has none.
        last: x (n,) after the last step.
    """

    points: Tensor
    losses: Tensor
    gradient_norms: Tensor
    filter: dict[str, Tensor]
    last: Tensor


def follow(
    problem: FiniteSum,
    optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    steps: int,
    *,
    epsilon: Callable[[int], float] | float = 1.0,
    samples: Tensor | None = None,
    sizes: Sequence[int] | None = None,
    target: Callable[[Tensor], Tensor] | None = None,
) -> Trace:
    """Run an optimizer on a problem.

    Args:
        problem: what to minimise.
        optimizer: makes the optimizer from the list of parameters, e.g. ``lambda p: KoalaV(p, process_noise=0.1)``.
        steps: number of steps.
        epsilon: k -> epsilon_k, the learning rate of step k = 1, 2, ..., or a number for all of them.
        samples: indices (steps,) or (steps, B) of the sample losses that step k sees; ``None`` is full batch.
        sizes: cut x into parameter tensors of these lengths, in order; ``None`` takes the problem's.
        target: minibatch loss -> target risk, which is subtracted from the losses before the optimizer sees them;
            ``None`` is 0. The record keeps the loss itself.

    Returns:
        The record of all steps.

    Raises:
        ValueError: if ``samples`` has not one row per step, or ``sizes`` do not add up to n.

    >>> run = follow(quadratic([2.0], start=[1.0]), torch.optim.SGD, 2, epsilon=lambda k: 0.5 / k)
    >>> run.points.flatten(), run.last
    (tensor([1., 0.], dtype=torch.float64), tensor([0.], dtype=torch.float64))
    """
    if samples is not None and len(samples) != steps:
        raise ValueError(f"samples has {len(samples)} rows for {steps} steps; give one row per step")
    start = torch.tensor(problem.start, dtype=torch.float64)
    cuts = list(sizes or problem.sizes or [len(start)])
    if sum(cuts) != len(start):
        raise ValueError(f"sizes {cuts} add up to {sum(cuts)}, but x has {len(start)} entries")
    parts = [torch.nn.Parameter(part.clone()) for part in torch.split(start, cuts)]
    algorithm = optimizer(parts)
    read_filter = getattr(algorithm, "filter_state", dict)
    seen: list[Tensor] = []
    scalars: list[dict[str, float]] = []

    for k in range(1, steps + 1):

        def closure(k: int = k) -> Tensor:  # called at the predicted point
            algorithm.zero_grad()
            x = torch.cat([*parts])
            losses = problem.losses(x)
            if samples is not None:
                losses = losses[samples[k - 1]]
            mean = losses.mean()
            mean.backward()  # type: ignore[no-untyped-call]
            norm = torch.cat([part.grad for part in parts if part.grad is not None]).norm()
            seen.append(torch.cat([mean.detach()[None], norm[None], x.detach()]))
            scalars.append(read_filter())
            return losses if target is None else losses - target(mean.detach())

        for group in algorithm.param_groups:
            group["lr"] = epsilon(k) if callable(epsilon) else epsilon
        algorithm.step(closure)  # type: ignore[arg-type]  # torch's stub wants a float

    rows = torch.stack(seen)
    filters = {name: torch.tensor([row[name] for row in scalars], dtype=torch.float64) for name in scalars[0]}
    return Trace(rows[:, 2:], rows[:, 0], rows[:, 1], filters, torch.cat([*parts]).detach())


# ---- problems ----------------------------------------------------------------------------------------------------


def quadratic(curvatures: Sequence[float], *, minimum: float = 0.0, start: Sequence[float] | None = None) -> FiniteSum:
    """Make the one loss minimum + 1/2 sum_j h_j x_j^2, smallest at 0; starts at ones by default.

    >>> quadratic([1.0, 4.0], minimum=0.5).at([2.0, 1.0])
    (tensor([4.5000], dtype=torch.float64), tensor([[2., 4.]], dtype=torch.float64))
    """
    h = torch.tensor(curvatures, dtype=torch.float64)
    return FiniteSum(
        lambda x: (minimum + (h * x**2).sum() / 2)[None],
        tuple(start) if start is not None else (1.0,) * len(curvatures),
    )


def linear(slopes: Tensor, offsets: Tensor, *, start: Sequence[float] | None = None) -> FiniteSum:
    """Make losses l_i(x) = offset_i + slope_i . x, with gradients chosen by the caller; starts at 0 by default.

    >>> linear(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0])).at([1.0, 1.0])
    (tensor([8.], dtype=torch.float64), tensor([[3., 4.]], dtype=torch.float64))
    """
    slopes, offsets = slopes.double(), offsets.double()
    return FiniteSum(lambda x: offsets + slopes @ x, tuple(start) if start is not None else (0.0,) * slopes.shape[1])


def logistic(samples: int = 40, *, l2: float = 0.1) -> FiniteSum:
    """Make a logistic regression in two dimensions: Lipschitz gradient, no closed-form minimum, positive minimum value.

    Sample i has the features (sin 2i, cos 3i) and the label +1 or -1 of sin 2i + 0.5 cos 3i + 0.5 sin 7i > 0, so no
    line separates the classes: l_i = log(1 + exp(-label_i feature_i . x)) + l2/2 |x|^2.
    """
    i = torch.arange(samples, dtype=torch.float64)
    features = torch.stack([torch.sin(2 * i), torch.cos(3 * i)], dim=1)
    labels = torch.sign(features @ torch.tensor([1.0, 0.5], dtype=torch.float64) + 0.5 * torch.sin(7 * i))
    return FiniteSum(
        lambda x: torch.nn.functional.softplus(-labels * (features @ x)) + l2 / 2 * (x**2).sum(), (-2.0, 3.0)
    )


def least_squares(samples: int = 40) -> FiniteSum:
    """Make a linear regression on two weights whose features differ in size: the mean loss is a long valley.

    Sample i has the features (3 sin 2i, 0.5 cos 3i) and the observation feature_i . (1, 1) + 0.3 sin 7i:
    l_i = 1/2 (feature_i . x - observation_i)^2.
    """
    i = torch.arange(samples, dtype=torch.float64)
    features = torch.stack([3 * torch.sin(2 * i), 0.5 * torch.cos(3 * i)], dim=1)
    observations = features.sum(dim=1) + 0.3 * torch.sin(7 * i)
    return FiniteSum(lambda x: (features @ x - observations) ** 2 / 2, (-1.0, 3.0))


def tanh_network(inputs: Tensor, labels: Tensor, *, hidden: int = 16, seed: int = 0) -> FiniteSum:
    """Make the cross-entropy of a network with one hidden layer, W2 tanh(W1 x + b1) + b2, in all its weights.

    Args:
        inputs: (m, inputs), one sample a row.
        labels: (m,), from 0.
        hidden: units of the hidden layer.
        seed: of the starting point, normal with variance 1 / (inputs of the layer); biases start at 0.

    Returns:
        The problem; its tensors are W1, b1, W2, b2.
    """
    inputs, width, classes = inputs.double(), inputs.shape[1], int(labels.max()) + 1
    sizes = (width * hidden, hidden, hidden * classes, classes)

    def losses(x: Tensor) -> Tensor:
        W1, b1, W2, b2 = torch.split(x, list(sizes))
        logits = torch.tanh(inputs @ W1.view(width, hidden) + b1) @ W2.view(hidden, classes) + b2
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    spread = (width**-0.5, 0.0, hidden**-0.5, 0.0)
    generator = torch.Generator().manual_seed(seed)
    start = [s * torch.randn(n, generator=generator, dtype=torch.float64) for n, s in zip(sizes, spread, strict=True)]
    return FiniteSum(losses, tuple(torch.cat(start).tolist()), sizes)


def two_samples(start: float = 1.5) -> FiniteSum:
    """Make (x - 1)^2 + 0.5 and 2 (x + 1)^2 + 0.1: the mean loss is smallest at -1/3, the mean square at -0.191.

    >>> two_samples().gradient([-1 / 3]).abs().item() < 1e-12
    True
    """
    return FiniteSum(lambda x: torch.cat([(x - 1) ** 2 + 0.5, 2 * (x + 1) ** 2 + 0.1]), (start,))


def bounded_slopes(offset: float = 5.0, start: float = 1.0) -> FiniteSum:
    """Make three losses whose slopes stay between 0.5 and 2.5 in size at *every* x; their mean is smallest at 0.

    l_1 = l_2 = offset + x + c(x) and l_3 = offset - 2 x + c(x) with c = 1/2 log cosh x: the gradients are Lipschitz and
    fulfil g <= |dl_i/dx| <= G with g = 0.5, G = 2.5; the mean loss is offset + c(x).

    >>> losses, gradients = bounded_slopes().at([0.0])
    >>> gradients.flatten().tolist()
    [1.0, 1.0, -2.0]
    """
    slopes = torch.tensor([1.0, 1.0, -2.0], dtype=torch.float64)

    def losses(x: Tensor) -> Tensor:
        bowl = (torch.logaddexp(x, -x) - torch.log(torch.tensor(2.0, dtype=torch.float64))) / 2  # 1/2 log cosh x
        return offset + slopes * x + bowl

    return FiniteSum(losses, (start,))


# ---- for the theorems of APOLLO -------------------------------------------------------------------------------------

_ONLINE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {  # features, observations, x -> losses
    "squares": lambda A, b, x: (A @ x - b) ** 2 / 2,
    "logistic": lambda A, b, x: torch.nn.functional.softplus(-b.sign() * (A @ x)) + 0.01 * (x**2).sum(),
    "alternating": lambda A, b, x: (A @ x - b) ** 2 * torch.where(torch.arange(len(b)) % 2 == 0, 0.45, 0.005),
    "absolute": lambda A, b, x: ((A @ x - b) ** 2 + 1e-2).sqrt(),
}


def random_online(kind: str, rounds: int, *, n: int = 4, seed: int = 0) -> FiniteSum:
    """Make a random convex online problem, whose loss of round t is the t-th of the sum.

    Args:
        kind: ``"squares"`` of a linear model; ``"alternating"``, the same with a curvature that changes by a factor of
            90 from round to round; ``"absolute"`` errors, rounded off at zero; ``"logistic"`` losses with a small L2.
        rounds: T.
        n: number of weights; their features' scales go from 0.1 to 3.
        seed: of features, observations and start.

    Raises:
        ValueError: For another kind.
    """
    check_known("kind", kind, _ONLINE)
    generator = torch.Generator().manual_seed(seed)
    scales = 10 ** torch.linspace(-1, 0.5, n, dtype=torch.float64)
    A = torch.randn(rounds, n, generator=generator, dtype=torch.float64) * scales
    b = A.sum(1) + 0.5 * torch.randn(rounds, generator=generator, dtype=torch.float64)
    start = 2 * torch.randn(n, generator=generator, dtype=torch.float64)
    return FiniteSum(lambda x: _ONLINE[kind](A, b, x), tuple(start.tolist()))


def wells_slope(x: Tensor) -> Tensor:
    """Return the gradient of f = sum_j x_j^2 / (1 + x_j^2), which is nonconvex with bounded slopes; elementwise."""
    return 2 * x / (1 + x**2) ** 2


def noisy_wells(generator: torch.Generator) -> Callable[[int, Tensor], tuple[Tensor, Tensor]]:
    """Return round t, x (n,) -> f and its gradient with noise uniform in [-1, 1]; f as in :func:`wells_slope`."""

    def oracle(t: int, x: Tensor) -> tuple[Tensor, Tensor]:
        noise = 2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1
        return (x**2 / (1 + x**2)).sum(), wells_slope(x) + noise

    return oracle


# ---- the noisy quadratic of MEKA -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoisyQuadratic:
    """Sample losses 1/2 (theta - xi)^T H (theta - xi) with xi ~ N(0, C) (MEKA, eq. 14); the minimum is at 0.

    The excess f - f* is 1/2 theta^T H theta, a minibatch gradient of B samples H theta + N(0, H C H / B).

    Attributes:
        hessian: H, (n, n), positive definite.
        covariance: C, (n, n).
        start: theta_0, (n,).
    """

    hessian: Tensor
    covariance: Tensor
    start: Tensor

    def excess(self, theta: Tensor) -> Tensor:
        """Return f - f*, (..., n) -> (...)."""
        value: Tensor = (theta @ self.hessian * theta).sum(-1) / 2
        return value

    def gradient(self, theta: Tensor) -> Tensor:
        """Return grad f, (..., n) -> (..., n)."""
        return theta @ self.hessian

    def gradient_noise(self, batch_size: int) -> Tensor:
        """Return Sigma = H C H / B, (n, n), the covariance of the minibatch gradient."""
        return self.hessian @ self.covariance @ self.hessian / batch_size

    def loss_noise(self, theta: Tensor, batch_size: int) -> Tensor:
        """Return the minibatch loss's variance r = (theta^T H C H theta + 1/2 tr (H C)^2) / B, (..., n) -> (...)."""
        constant: Tensor = (self.hessian @ self.covariance).matrix_power(2).trace() / 2
        linear: Tensor = (theta @ self.gradient_noise(1) * theta).sum(-1)
        return (linear + constant) / batch_size

    def draw(self, *shape: int, generator: torch.Generator) -> Tensor:
        """Draw samples xi, (*shape, n)."""
        normal = torch.randn(*shape, len(self.start), generator=generator, dtype=self.start.dtype)
        factor: Tensor = torch.linalg.cholesky(self.covariance)
        return normal @ factor.T

    def model(self) -> torch.nn.Module:
        """Wrap theta as a module, for optimizers that run the forward pass themselves: xi (B, n) -> theta - xi."""
        return _Shift(self.start.clone())

    def loss_fn(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Sample losses (B,) of outputs theta - xi; the targets are ignored."""
        return self.excess(outputs)


class _Shift(torch.nn.Module):
    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(start)

    def forward(self, xi: Tensor) -> Tensor:
        return self.theta - xi


def noisy_quadratic(
    n: int = 20,
    *,
    condition: float = 1000.0,
    noise: float = 1.0,
    distance: float = 1.0,
    turned: bool = True,
    seed: int = 0,
) -> NoisyQuadratic:
    """Draw a problem whose Hessian has eigenvalues from 1 / condition to 1, evenly spread in the logarithm.

    Args:
        n: number of weights.
        condition: ratio of the largest eigenvalue to the smallest.
        noise: C = noise I.
        distance: theta_0 is normal with this standard deviation in every coordinate.
        turned: whether the eigenvectors are random, or else the coordinates.
        seed: of eigenvectors and start.

    >>> torch.linalg.eigvalsh(noisy_quadratic(3, condition=100.0).hessian)
    tensor([0.0100, 0.1000, 1.0000], dtype=torch.float64)
    """
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(n + 1, n, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(normal[1:])[0] if turned else torch.eye(n, dtype=torch.float64)
    eigenvalues = condition ** -torch.linspace(0, 1, n, dtype=torch.float64)
    hessian = basis * eigenvalues @ basis.T
    return NoisyQuadratic((hessian + hessian.T) / 2, noise * torch.eye(n, dtype=torch.float64), distance * normal[0])
