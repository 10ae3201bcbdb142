"""How KOALA, MEKA and APOLLO hang together with methods of other names: equalities that hold to rounding.

Each of :data:`RELATIONS` runs one of our optimizers under a condition and, from the same start and on the same data,
the other method by its own paper's formula. They are float64 and small: least squares, linear losses, a convex function
of one variable at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import linalg  # type: ignore[import-untyped]
from torch import Tensor, nn

from koala_lab.theory.ekf import dense_filter
from koala_lab.theory.problems import linear
from koala_lib import Apollo, KoalaM, KoalaPlusPlus, KoalaV, Meka, kalman

__all__ = ["RELATIONS", "Relation"]

STEPS = 12
Path = list[Tensor]  # weights after each step
Losses = Callable[[int, Tensor], Tensor]  # step, weights -> losses of its samples
Gap = Callable[[float], float]


class Relation(NamedTuple):
    """An equality between two methods.

    Attributes:
        ours: our method.
        condition: under which it is the other one.
        other: the other method, with its paper.
        why: the derivation, in TeX, at most three lines.
        gap: largest deviation of the weights of the two from each other, relative to how far they moved, where the
            other's step is multiplied by the argument; at 1 it is rounding, elsewhere it must not be.
    """

    ours: str
    condition: str
    other: str
    why: str
    gap: Gap


RELATIONS: list[Relation] = []


def _relation(ours: str, condition: str, other: str, why: str) -> Callable[[Gap], Gap]:
    def register(gap: Gap) -> Gap:
        RELATIONS.append(Relation(ours, condition, other, why, gap))
        return gap

    return register


def _deviation(ours: Path, theirs: Path) -> float:
    """Return how far two paths are apart, relative to how far the first gets."""
    a, b = torch.stack(ours), torch.stack(theirs)
    moved = (a - a[0]).abs().max()
    return float((a - b).abs().max() / moved)


# ---- problems -------------------------------------------------------------------------------------------------------


@cache
def _data() -> tuple[Tensor, Tensor]:
    """Return features (STEPS, 4, 3) and labels (STEPS, 4) of minibatches of four samples."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(STEPS, 4, 3, generator=generator, dtype=torch.float64)
    return features, features @ torch.tensor([1.0, -2.0, 0.5]).double() + 1


def _koala(losses: Losses, make: Callable[[Any], Any], n: int = 3) -> tuple[list[float], Path]:
    """Run a KOALA from 0 on the given losses; return P^ (where it is a number) and the weights after each step."""
    x = nn.Parameter(torch.zeros(n, dtype=torch.float64))
    optimizer = make([x])
    variances, path = [], [x.detach().clone()]
    for k in range(STEPS):
        optimizer.predict()
        loss, x.grad = _at(losses, k, x)
        variances.append(optimizer.filter_state().get("variance", math.nan))
        optimizer.step(loss=loss)
        path.append(x.detach().clone())
    return variances, path


def _follow(step: Callable[[int, Tensor], Tensor], start: Tensor) -> Path:
    """Return the weights that x <- x - step(k, x) visits from the start on."""
    path = [start]
    for k in range(STEPS):
        path.append(path[-1] - step(k, path[-1]))
    return path


def _squares(k: int, x: Tensor) -> Tensor:
    """Return losses of minibatch k, half the squared residuals and 0.1."""
    features, labels = _data()
    return (features[k] @ x - labels[k]).square() / 2 + 0.1


def _residual(k: int, x: Tensor) -> Tensor:
    """Return the residual of one sample, which is of either sign."""
    features, labels = _data()
    return features[k, 0] @ x - labels[k, 0]


def _at(losses: Losses, k: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean loss and gradient."""
    x = x.detach().requires_grad_()
    loss = losses(k, x).mean()
    return loss.detach(), torch.autograd.grad(loss, x)[0]


# ---- KOALA ----------------------------------------------------------------------------------------------------------

FIXED: dict[str, Any] = {"blocks": "global", "process_noise": 0.3, "measurement_noise": 2.0}
WITHOUT_NOISE: dict[str, Any] = FIXED | {"measurement_noise": 1e-200}


def _koala_v_against(step: Callable[[int, Tensor, float], Tensor], losses: Losses = _squares, **options: Any) -> float:
    """Compare KOALA-V on one block with x <- x - step(k, x, delta), where delta = R / P^ is KOALA-V's."""
    options = FIXED | options
    variances, ours = _koala(losses, lambda p: KoalaV(p, **options))
    R = options["measurement_noise"]
    return _deviation(ours, _follow(lambda k, x: step(k, x, R / variances[k]), ours[0]))


@_relation(
    "KOALA-V",
    "one block",
    "ALI-G without its cap, δ = R / P̂ (Berrada et al., ICML 2020)",
    r"K = \hat P g / (\hat P |g|^2 + R) \\ x - K L = x - L / (|g|^2 + \delta)\, g,\quad \delta = R / \hat P",
)
def _alig(factor: float) -> float:
    def step(k: int, x: Tensor, delta: float) -> Tensor:
        loss, g = _at(_squares, k, x)
        return factor * loss / (g @ g + delta) * g

    return _koala_v_against(step)


@_relation(
    "KOALA-V",
    "one block, R → 0",
    "Polyak's step, stochastic (SPS, Loizou et al., AISTATS 2021)",
    r"R = 0:\quad x - L / |g|^2\, g",
)
def _polyak(factor: float) -> float:
    def step(k: int, x: Tensor, delta: float) -> Tensor:
        loss, g = _at(_squares, k, x)
        return factor * loss / (g @ g) * g

    return _koala_v_against(step, **WITHOUT_NOISE)


@_relation(
    "KOALA-V",
    "one block, Q = 0, R → ∞ with η P₀ / R kept",
    "SGD on half the squared loss",
    r"\hat P |g|^2 \ll R:\quad x - (\eta P_0 / R)\, L\, g \\ L g = \nabla (L^2 / 2)",
)
def _squared_loss(factor: float) -> float:
    def step(k: int, x: Tensor, delta: float) -> Tensor:
        x = nn.Parameter(x.clone())
        before, sgd = x.detach().clone(), torch.optim.SGD([x], lr=1e-2 * factor)
        (_squares(k, x).mean().square() / 2).backward()  # type: ignore[no-untyped-call]
        sgd.step()
        return before - x.detach()

    return _koala_v_against(step, lr=1e18, initial_variance=1e-20, process_noise=0.0, measurement_noise=1.0)


@_relation(
    "KOALA-V",
    "one block",
    "Levenberg-Marquardt on one residual, the loss",
    r"(g g^\top + \delta I)^{-1} g\, L = L / (|g|^2 + \delta)\, g \quad\text{(Sherman-Morrison)}",
)
def _levenberg_marquardt(factor: float) -> float:
    def step(k: int, x: Tensor, delta: float) -> Tensor:
        loss, g = _at(_squares, k, x)
        solved: Tensor = torch.linalg.solve(torch.outer(g, g) + delta * torch.eye(3, dtype=x.dtype), g * loss)
        return factor * solved

    return _koala_v_against(step)


@_relation(
    "KOALA-V",
    "one block, a linear residual of either sign as the loss",
    "normalised LMS (Nagumo & Noda, 1967)",
    r"L = r = a^\top x - b,\quad g = a \\ x - r / (|a|^2 + \delta)\, a",
)
def _lms(factor: float) -> float:
    features, labels = _data()

    def step(k: int, x: Tensor, delta: float) -> Tensor:
        a = features[k, 0]
        return factor * (a @ x - labels[k, 0]) / (a @ a + delta) * a

    return _koala_v_against(step, _residual)


@_relation(
    "KOALA-V",
    "one block, R → 0, η = 2, half the squared residual of one sample as the loss",
    "Kaczmarz's projection (1937)",
    r"L = r^2 / 2,\quad g = r\, a \\ x - 2 L / |g|^2\, g = x - r / |a|^2\, a",
)
def _kaczmarz(factor: float) -> float:
    features, labels = _data()

    def half_square(k: int, x: Tensor) -> Tensor:
        return _residual(k, x).square() / 2

    def step(k: int, x: Tensor, delta: float) -> Tensor:
        a = features[k, 0]
        return factor * (a @ x - labels[k, 0]) / (a @ a) * a

    return _koala_v_against(step, half_square, lr=2.0, min_grad_norm=0.0, **WITHOUT_NOISE)


@_relation(
    "KOALA-V's filter",
    "one weight, Q = (1 / λ - 1) P",
    "recursive least squares with forgetting, the filter of interatomic potentials (LKF)",
    r"\hat P = P / \lambda:\quad K = \hat P h,\ A = 1 / (1 + h \hat P h) \\ P = \hat P - A K K^\top",
)
def _forgetting(factor: float) -> float:
    features, labels = _data()
    forget, variance, P = 0.9, 0.4, 0.4
    ours, theirs = [torch.zeros(()).double()], [torch.zeros(()).double()]
    for h, label in zip(features[:, 0, 0].tolist(), labels[:, 0].tolist(), strict=True):
        ahead = kalman.predict_position(variance, (1 / forget - 1) * variance)
        S = kalman.innovation_variance(ahead, h * h, 1.0)
        ours.append(ours[-1] - ahead * h / S * (h * ours[-1] - label))  # (12)
        variance = kalman.condition_position(ahead, h * h, 1.0)

        P = P / forget
        K, A = P * h, 1 / (1 + h * P * h)
        theirs.append(theirs[-1] - factor * A * K * (h * theirs[-1] - label))
        P = P - A * K * K
    return _deviation(ours, theirs)


@_relation(
    "the filter of Table 1, dense",
    "Q = 0, linear outputs",
    "online natural gradient, rate 1 / (t + 1) (Ollivier, 2018)",
    r"P_t^{-1} = P_{t-1}^{-1} + a a^\top / R = (t + 1)\, J_t \\ x - P_t\, a\, r / R = x - J_t^{-1} \nabla / (t + 1)",
)
def _natural_gradient(factor: float) -> float:
    features, labels = _data()
    a, R, P = features[:, 0], 2.0, 0.4
    options: dict[str, Any] = {
        "initial_covariance": [[P]],
        "transition": [[1.0]],
        "process_noise": [[0.0]],
        "measurement_noise": R,
    }
    run = dense_filter(linear(a, -labels[:, 0]), STEPS, samples=torch.arange(STEPS), **options)
    J, x, theirs = torch.eye(3, dtype=a.dtype) / P, torch.zeros(3, dtype=a.dtype), []
    for t, (row, label) in enumerate(zip(a, labels[:, 0], strict=True), start=1):
        rate = 1 / (t + 1)
        J = (1 - rate) * J + rate * torch.outer(row, row) / R  # the Fisher matrix of a normal output
        x = x - factor * rate * torch.linalg.solve(J, row * (row @ x - label) / R)
        theirs.append(x)
    return _deviation(list(run.states), theirs)


@_relation(
    "KOALA-M",
    "no variance of the velocity",
    "KOALA-V",
    r"B_0 = C_0 = q_p^2 = 0:\quad \hat A = A + Q,\ \hat C = \hat B = 0 \\ p = 0",
)
def _without_velocity(factor: float) -> float:
    still: dict[str, Any] = {"initial_velocity_variance": 0.0, "velocity_noise": 0.0}
    _, theirs = _koala(_squares, lambda p: KoalaV(p, lr=factor, **FIXED))
    _, ours = _koala(_squares, lambda p: KoalaM(p, **FIXED, **still))
    return _deviation(ours, theirs)


@_relation(
    "KOALA-M",
    "constant gradients, after a while",
    "quasi-hyperbolic momentum on half the squared loss (Ma & Yarats, ICLR 2019); heavy ball where k_x = 0",
    r"(k_x, k_p) = \lim\, (\hat A, \hat C) / S \\ p_{k+1} = \kappa p_k - k_p L g,\quad "
    r"\hat x_{k+1} = \hat x_k + p_{k+1} - k_x L g",
)
def _momentum(factor: float) -> float:
    slope, kappa, Q, q_p, R = torch.tensor([0.6, -0.3, 0.2]).double(), 0.8, 0.3, 0.05, 2.0
    x = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    options: dict[str, Any] = {"blocks": "global", "process_noise": Q, "velocity_noise": q_p, "measurement_noise": R}
    optimizer = KoalaM([x], lr=1e-3, momentum=kappa, **options)
    predicted, losses = [], []
    for _ in range(300 + STEPS):
        optimizer.predict()
        loss = 5 + slope @ x.detach()
        predicted.append(x.detach().clone())
        losses.append(loss)
        x.grad = slope.clone()
        optimizer.step(loss=loss)
    ours = predicted[300:]

    F, H = np.array([[1.0, 1.0], [0.0, kappa]]), np.array([[float(slope.norm()), 0.0]])
    ahead = linalg.solve_discrete_are(F.T, H.T, np.diag([Q, q_p]), [[R]])
    k_x, k_p = (1e-3 * ahead[i, 0] / (ahead[0, 0] * float(slope @ slope) + R) for i in (0, 1))
    theirs = [ours[0]]
    p = ours[1] - ours[0] + k_x * losses[300] * slope  # p_{k+1}
    for _ in range(1, STEPS):
        theirs.append(theirs[-1] + p - factor * k_x * (5 + slope @ theirs[-1]) * slope)
        p = kappa * p - k_p * (5 + slope @ theirs[-1]) * slope
    return _deviation(ours, theirs)


@_relation(
    "KOALA++",
    "tensors of one weight, R fixed",
    "the extended Kalman filter itself, its first gradient observed twice",
    r"H P = v \Rightarrow P = v / H, \text{ for every closure} \\ v_k = H_k P_{k-1} \text{ without loss}",
)
def _one_weight(factor: float) -> float:
    features, labels = _data()
    Q, R, P = 0.3, 2.0, 0.4

    def loss(k: int, x: Tensor) -> Tensor:
        return ((features[k, 0, 0] * x - labels[k, 0]).square() / 2 + 0.1).sum()

    options: dict[str, Any] = {"initial_variance": P, "process_noise": Q, "measurement_noise": R}
    _, ours = _koala(loss, lambda p: KoalaPlusPlus(p, **options), n=1)
    theirs, (Q_, P_, R_) = [ours[0]], torch.tensor([Q, P, R], dtype=ours[0].dtype)
    for k in range(STEPS):
        value, g = _at(loss, k, theirs[-1])
        for _ in range(2 if k == 0 else 1):
            ahead = kalman.predict_position(P_, Q_)
            gain = ahead * g / kalman.innovation_variance(ahead, g @ g, R_)
            P_ = kalman.condition_position(ahead, g @ g, R_)
        theirs.append(theirs[-1] - factor * gain * value)
    return _deviation(ours, theirs)


# ---- MEKA -----------------------------------------------------------------------------------------------------------


def _meka(**options: Any) -> tuple[list[float], Path]:
    """Run MEKA on the least squares; return its gains and the weights after each step."""
    features, labels = _data()
    model = nn.Linear(3, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = Meka(model, lambda out, y: (out[:, 0] - y).square() / 2, step_size="constant", **options)
    gains, path = [], [model.weight.detach()[0].clone()]
    for k in range(STEPS):
        optimizer.step(features[k], labels[k])
        gains.append(optimizer.filter_state()["gain"])
        path.append(model.weight.detach()[0].clone())
    return gains, path


def _gradient(k: int, x: Tensor) -> Tensor:
    features, labels = _data()
    return features[k].T @ (features[k] @ x - labels[k]) / 4


def _descend_along(mean: Callable[[int, float, Tensor, Tensor, Tensor], Tensor], factor: float) -> float:
    """Compare with x <- x - 0.1 m, where m is made of the step, MEKA's gain there, x, the last x and the last m."""
    gains, ours = _meka(lr=0.1)
    x = last = ours[0]
    m, theirs = torch.zeros_like(x), [x]
    for k in range(STEPS):
        m = mean(k, gains[k], x, last, m)
        last, x = x, x - factor * 0.1 * m
        theirs.append(x)
    return _deviation(ours, theirs)


@_relation(
    "MEKA",
    "constant steps, the gain as the weight",
    "Hessian-corrected momentum (SGDHess, Tran & Cutkosky, 2021)",
    r"m_t = (1 - k_t)\,(m_{t-1} + B_t d_t) + k_t g_t",
)
def _sgd_hess(factor: float) -> float:
    features, _ = _data()

    def mean(k: int, gain: float, x: Tensor, last: Tensor, m: Tensor) -> Tensor:
        hessian = features[k].T @ features[k] / 4
        return (1 - gain) * (m + hessian @ (x - last)) + gain * _gradient(k, x)

    return _descend_along(mean, factor)


@_relation(
    "MEKA",
    "constant steps, losses quadratic",
    "STORM (Cutkosky & Orabona, NeurIPS 2019)",
    r"B_t d_t = g_t(x_t) - g_t(x_{t-1}) \\ m_t = g_t(x_t) + (1 - k_t)\,(m_{t-1} - g_t(x_{t-1}))",
)
def _storm(factor: float) -> float:
    def mean(k: int, gain: float, x: Tensor, last: Tensor, m: Tensor) -> Tensor:
        return _gradient(k, x) + (1 - gain) * (m - _gradient(k, last))

    return _descend_along(mean, factor)


@_relation(
    "MEKA",
    "constant steps, losses quadratic, β = 1 - k, γ = 1",
    "MARS without clipping (Yuan et al., 2024)",
    r"c_t = g_t + \gamma \tfrac{\beta}{1 - \beta}\,(g_t(x_t) - g_t(x_{t-1})) \\ m_t = \beta m_{t-1} + (1 - \beta) c_t",
)
def _mars(factor: float) -> float:
    def mean(k: int, gain: float, x: Tensor, last: Tensor, m: Tensor) -> Tensor:
        g, beta = _gradient(k, x), 1 - gain
        return beta * m + (1 - beta) * g + beta * (g - _gradient(k, last))

    return _descend_along(mean, factor)


@_relation(
    "MEKA",
    "losses linear, no average of σ",
    "dual averaging: the mean of all gradients, by inverse variance (Nesterov, 2009)",
    r"B = q = 0:\quad 1 / p_t = 1 / p_0 + \textstyle\sum_i 1 / \sigma_i \\ m_t = p_t \textstyle\sum_i g_i / \sigma_i",
)
def _dual_averaging(factor: float) -> float:
    features, _ = _data()
    model = nn.Linear(3, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = Meka(model, lambda out, y: out[:, 0] + y, lr=0.1, step_size="constant", smoothing=0.0)
    ours, x = [torch.zeros(3).double()], torch.zeros(3).double()
    theirs, weight, total = [x], 1e-4, torch.zeros(3).double()
    for batch in features:
        optimizer.step(batch, torch.zeros(4).double())
        ours.append(model.weight.detach()[0].clone())
        sigma = batch.var(0).mean() / 4
        weight, total = weight + 1 / sigma, total + batch.mean(0) / sigma
        x = x - factor * 0.1 * total / weight
        theirs.append(x)
    return _deviation(ours, theirs)


@_relation(
    "MEKA's gradient filter",
    "no transport (B d = 0), q and σ constant, after a while",
    "momentum, β = 1 - k (torch's SGD with dampening β)",
    r"p^2 - q p - q \sigma = 0 \text{ for } p = p^- :\quad k = p / (p + \sigma) \\ m_t = (1 - k)\, m_{t-1} + k\, g_t",
)
def _momentum_of_gradients(factor: float) -> float:
    q, sigma, p = torch.tensor([0.2, 1.5, 1e4]).double()
    for _ in range(200):
        p = kalman.condition_variance(kalman.predict_position(p, q), sigma)
    gradients = torch.randn(STEPS, 3, generator=torch.Generator().manual_seed(1)).double()
    root = (q + (q * q + 4 * q * sigma).sqrt()) / 2
    beta = float(1 - root / (root + sigma))
    x = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    sgd = torch.optim.SGD([x], lr=factor, momentum=beta, dampening=beta)
    mean, ours, theirs = gradients[0], [x.detach().clone()], [x.detach().clone()]
    for g in gradients:  # the first gradient is the first mean, there as here
        mean = mean + kalman.gain(kalman.predict_position(p, q), sigma) * (g - mean)
        ours.append(ours[-1] - mean)
        x.grad = g.clone()
        sgd.step()
        theirs.append(x.detach().clone())
    return _deviation(ours, theirs)


@_relation(
    "MEKA",
    "equal samples, losses quadratic, quadratic rule",
    "steepest descent with exact line search (Cauchy, 1847)",
    r"\sigma = q = 0:\quad m = g \\ \alpha = |g|^2 / g^\top B g",
)
def _cauchy(factor: float) -> float:
    features, labels = _data()
    a, b = features[0].repeat(2, 1), labels[0].repeat(2)
    model = nn.Linear(3, 1, bias=False).double()
    nn.init.zeros_(model.weight)

    def losses(outputs: Tensor, _: Tensor) -> Tensor:
        return (outputs[..., 0] - b[:4]).square().mean(-1) / 2  # a sample is the whole data

    optimizer = Meka(model, losses, step_size="quadratic", moments="vmap", smoothing=0.0)
    ours, inputs = [model.weight.detach()[0].clone()], torch.stack([a[:4], a[:4]])
    for _ in range(STEPS):
        optimizer.step(inputs, torch.zeros(2))
        ours.append(model.weight.detach()[0].clone())
    hessian = a[:4].T @ a[:4] / 4

    def step(k: int, x: Tensor) -> Tensor:
        g = _gradient(0, x)
        return factor * (g @ g) / (g @ hessian @ g) * g

    return _deviation(ours, _follow(step, ours[0]))


# ---- APOLLO ---------------------------------------------------------------------------------------------------------


@_relation(
    "APOLLO",
    "|B| ≤ σ",
    "SGD with bias-corrected momentum, rate η / σ",
    r"D = \max(|B|, \sigma) = \sigma \\ x - (\eta / \sigma)\, m,\quad m = \tfrac{1 - \beta}{1 - \beta^t} "
    r"\textstyle\sum_i \beta^{t-i} g_i",
)
def _floor(factor: float) -> float:
    x = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = Apollo([x], lr=1e4, sigma=1e6, beta=0.9, warmup_steps=0)
    ours, theirs, y, total = (
        [x.detach().clone()],
        [x.detach().clone()],
        torch.zeros(3).double(),
        torch.zeros(3).double(),
    )
    for k in range(STEPS):
        x.grad = _gradient(k, x.detach())
        optimizer.step()
        ours.append(x.detach().clone())
        total = 0.9 * total + _gradient(k, y)
        y = y - factor * 1e-2 * (1 - 0.9) / (1 - 0.9 ** (k + 1)) * total
        theirs.append(y)
    return _deviation(ours, theirs)


@_relation(
    "APOLLO",
    "tensors of one weight, β = ε = 0, no floor",
    "the secant method, Barzilai & Borwein (1988) per coordinate",
    r"B_{t+1} = -y / d,\quad s = -\eta d \\ x - \eta g / |B| = x - |s / y|\, g",
)
def _secant(factor: float) -> float:
    def slope(x: Tensor) -> Tensor:
        return torch.sinh(x) + x  # of a strictly convex function

    start = torch.tensor([1.5, -0.7, 0.4]).double()
    weights = [nn.Parameter(start[i : i + 1].clone()) for i in range(3)]
    # The first step overshoots the minimum of a curvature above 2, so that B = eta times it lies above the floor.
    optimizer = Apollo(weights, lr=0.55e-12, sigma=1e-12, beta=0.0, eps=0.0, warmup_steps=0)
    ours = []
    for _ in range(6):  # then it has converged, and y is rounding
        for weight in weights:
            weight.grad = slope(weight.detach())
        optimizer.step()
        ours.append(torch.cat([weight.detach() for weight in weights]))
    theirs = [ours[0]]
    before, x = start, ours[0]
    for _ in range(1, 6):
        step = factor * ((x - before) / (slope(x) - slope(before))).abs() * slope(x)
        before, x = x, x - step
        theirs.append(x)
    return _deviation(ours, theirs)
