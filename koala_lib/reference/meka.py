"""MEKA slowly: the paper's equations with full matrices, one sample after the other, in the paper's symbols.

The oracle of the tests and the text to read beside sections 2 and 3 and the appendices A and B of Chen et al.,
"Self-Tuning Stochastic Optimization with Curvature-Aware Gradient Filtering" (arXiv 2011.04803). It shares no code with
:class:`koala_lib.optim.meka.Meka`: gradients and Hessian-vector products come sample by sample from autograd, all
covariances are n x n, averages are sums over the whole history, the step size is found by halving an interval on which
the derivative of the criterion, as defined, changes sign. For a few dozen weights in float64.

==============  ================================================================================================
theta           the weights (n,); d: the last displacement theta_t - theta_{t-1}; delta: the new direction
y, g, b         minibatch means of the loss, its gradient and its Hessian times d (n,)
r, Sigma, Q     (co)variances of those means: the unbiased ones of the samples, divided by their number
m, P            mean and covariance of the filtered gradient (5); K: the gain (7)
u, s            mean and variance of the filtered loss (10); lam: the model error (22)
a, b_delta      - delta^T m and delta^T B delta; p = delta^T P delta; q = delta^T Q delta with the Q of B delta
alpha_star      what the rule chooses; alpha: its average
==============  ================================================================================================
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

SampleLoss = Callable[[Tensor, Any], Tensor]


def _average(history: Sequence[Any], beta: float) -> Any:
    """Return the bias-corrected exponential average, sum_i beta^(t-i) x_i / sum_i beta^(t-i)."""
    weights = [beta ** (len(history) - 1 - i) for i in range(len(history))]
    return sum(w * x for w, x in zip(weights, history, strict=True)) / sum(weights)


def _halve(criterion: Callable[[float], float], low: float, high: float) -> float:
    """Find where a function goes from negative at ``low`` to positive at ``high``."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if criterion(middle) >= 0 else (middle, high)
    return high


class Change:
    """Mean and variance of the change of the loss along alpha delta (11) and their derivatives.

    Args:
        a, b, s, p, q, c: the numbers of (11) and (23): slope, curvature, and the terms of the variance.
    """

    def __init__(self, a: float, b: float, s: float, p: float, q: float, c: float = 0.0) -> None:
        self.a, self.b, self.s, self.p, self.q, self.c = a, b, s, p, q, c

    def at(self, alpha: float) -> tuple[float, float, float, float]:
        """Return mu, V, mu', V' at a step size (11)."""
        mu = -alpha * self.a + alpha**2 / 2 * self.b
        V = 2 * self.s + alpha**2 * self.p + alpha**4 / 4 * self.q + alpha**6 * self.c
        return mu, V, -self.a + alpha * self.b, 2 * alpha * self.p + alpha**3 * self.q + 6 * alpha**5 * self.c

    def quadratic(self) -> float:
        """Return a / b, the minimum of mu, infinite where there is none."""
        return self.a / self.b if self.b > 0 else math.inf

    def pi(self) -> float:
        """Find the minimum of J = mu / sqrt V (13): J' has the sign of mu' V - mu V' / 2."""

        def slope(alpha: float) -> float:
            mu, V, mu1, V1 = self.at(alpha)
            return mu1 * V - mu * V1 / 2

        if self.b <= 0 and self.q == 0 and self.c == 0:
            return math.inf
        high = self.a / self.b if self.b > 0 else 1.0
        while slope(high) < 0:
            high *= 2
        return _halve(slope, 0.0, high)

    def ei(self) -> float:
        """Find the first maximum of E max(0, -change) up to 2 a/b; EI' = - mu' Phi(z) + V' / (2 sqrt V) phi(z)."""

        def fall(alpha: float) -> float:
            mu, V, mu1, V1 = self.at(alpha)
            z = -mu / math.sqrt(V)
            phi = math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
            return mu1 * math.erfc(-z / math.sqrt(2)) / 2 - V1 / (2 * math.sqrt(V)) * phi

        if self.b <= 0:
            return math.inf
        steps = 5000
        points = [2 * self.a / self.b * i / steps for i in range(steps + 1)]
        for low, high in itertools.pairwise(points):
            if fall(high) >= 0:
                return _halve(fall, low, high)
        return points[-1]


class ReferenceMeka:
    """MEKA and AdaMEKA on a vector of weights.

    Args:
        theta: (n,) float64, changed in place.
        sample_loss: (theta, sample) -> 0-dim loss of one sample.
        covariance: "scalar" puts the average of the diagonal times the identity for Sigma and Q, as the paper does in
            practice; "full" is section 2 as written and exists here only.
        hessian: "current" takes B_t at theta_t; the others take it at theta_{t-1} (appendix C), of the samples of
            minibatch t - 1 ("previous") or of minibatch t ("previous_current_samples").
        variances: the matrices for P and Q in (11) and (16): "mean", the scalar ones; "sum", their traces times the
            identity; "directional", K cov(g) and cov(B d) over the samples of one minibatch, in full.
        third_order: (23), lam / |d|^6 times |alpha delta|^6 in the variance of the change.
        model_error: whether lam follows (22), or is 0 throughout.
        others: as in :class:`koala_lib.optim.meka.Meka`.
    """

    def __init__(
        self,
        theta: Tensor,
        sample_loss: SampleLoss,
        lr: float = 1.0,
        *,
        step_size: Literal["constant", "quadratic", "pi", "ei"] = "pi",
        direction: Literal["gradient", "adam"] = "gradient",
        smoothing: float = 0.999,
        max_step_size: float = 1.0,
        prior_variance: float = 1e4,
        variances: Literal["mean", "directional", "sum"] = "mean",
        third_order: bool = False,
        curvature_smoothing: float = 0.0,
        covariance: Literal["scalar", "full"] = "scalar",
        hessian: Literal["current", "previous", "previous_current_samples"] = "current",
        model_error: bool = True,
    ) -> None:
        self.hessian, self.model_error = hessian, model_error
        self.last_batch: Sequence[Any] = ()
        self.theta, self.sample_loss, self.lr = theta, sample_loss, lr
        self.rule, self.direction, self.beta = step_size, direction, smoothing
        self.alpha_max, self.covariance = max_step_size, covariance
        self.beta_b, self.variances, self.third_order = curvature_smoothing, variances, third_order
        self.identity = torch.eye(len(theta), dtype=theta.dtype)
        self.m, self.P = torch.zeros_like(theta), prior_variance * self.identity
        self.u, self.s = 0.0, prior_variance
        self.d = torch.zeros_like(theta)
        self.K = torch.zeros_like(self.P)
        self.Sigmas: list[Tensor] = []
        self.rs: list[float] = []
        self.alphas: list[float] = []
        self.curvatures: list[float] = []  # b_delta / |delta|^2
        self.Q = torch.zeros_like(self.P)
        self.P_read = self.P  # what stands for P in d^T P d
        self.lam = self.lam3 = self.a = self.b_delta = self.alpha_star = self.alpha = 0.0
        self.skipped_steps = 0

    @property
    def Sigma(self) -> Tensor:
        """Covariance of the minibatch gradient, averaged over the steps."""
        average: Tensor = _average(self.Sigmas, self.beta)
        return average

    @property
    def r(self) -> float:
        """Variance of the minibatch loss, averaged over the steps."""
        return float(_average(self.rs, self.beta))

    def step(self, batch: Sequence[Any]) -> float:
        """Make one step: filter loss (16)-(22) and gradient (6)-(8), choose alpha, move along delta.

        Args:
            batch: M >= 2 samples, whatever ``sample_loss`` takes.

        Returns:
            The mean loss before the step.
        """
        M, d, m, P = len(batch), self.d, self.m, self.P
        losses, gradients, products = self._samples(batch, d)
        if self.hessian != "current":
            old = self.last_batch if self.hessian == "previous" and self.last_batch else batch
            products = self._samples(old, d, at=self.theta - d)[2]
            self.last_batch = batch
        y, g, b = float(losses.mean()), gradients.mean(0), products.mean(0)
        if not all(bool(t.isfinite().all()) for t in (losses, gradients, products)):
            self.skipped_steps += 1
            return y
        self.Sigmas.append(self._covariance_of(gradients) / M)
        self.rs.append(float(losses.var()) / M)
        self.Q = Q = self._covariance_of(products) / M
        Sigma, r, identity = self.Sigma, self.r, self.identity

        # the loss, from m, P, u, s of the step before (16)-(22)
        predicted = self.u + float(m @ d) + float(d @ b) / 2
        Q_read = self._read(Q, torch.cov(products.T) / M)
        c = self.s + float(d @ self.P_read @ d) + float(d @ Q_read @ d) / 4 + r
        self.lam = max((y - predicted) ** 2 - c, 0.0) if self.model_error else 0.0
        length = float(d @ d) ** 3
        if self.third_order and length == 0:
            self.lam = 0.0  # lam3 |d|^6
        self.lam3 = self.lam / length if self.third_order and length > 0 else 0.0
        s = self.lam + c - r
        gamma = s / (s + r)
        self.u = (1 - gamma) * predicted + gamma * y
        self.s = (1 - gamma) ** 2 * s + gamma**2 * r

        # the gradient (6)-(8)
        m, P = m + b, P + Q
        self.K = K = P @ torch.linalg.inv(P + Sigma)
        self.m = m = (identity - K) @ m + K @ g
        self.P = P = (identity - K) @ P @ (identity - K).T + K @ Sigma @ K.T
        self.P_read = self._read(P, K @ torch.cov(gradients.T) / M)

        delta = -m if self.direction == "gradient" else -m / ((m**2 + P.diag()).sqrt() + 1e-8)
        self.alpha = 1.0 if self.rule == "constant" else self._step_size(batch, delta)
        self.d = self.lr * self.alpha * delta
        self.theta += self.d
        return y

    def _samples(
        self, batch: Sequence[Any], direction: Tensor, at: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, gradient and Hessian times direction per sample, (M,), (M, n), (M, n); at theta by default."""
        rows = []
        for sample in batch:
            theta = (self.theta if at is None else at).detach().clone().requires_grad_()
            loss = self.sample_loss(theta, sample)
            (g,) = torch.autograd.grad(loss, theta, create_graph=True)
            (h,) = torch.autograd.grad(g @ direction, theta)
            rows.append((loss.detach(), g.detach(), h))
        losses, gradients, products = (torch.stack(column) for column in zip(*rows, strict=True))
        return losses, gradients, products

    def _covariance_of(self, rows: Tensor) -> Tensor:
        """Return the unbiased covariance of M vectors, (M, n) to (n, n), or the scalar one that stands for it."""
        full = torch.cov(rows.T)
        return full if self.covariance == "full" else full.diag().mean() * self.identity

    def _read(self, scalar: Tensor, measured: Tensor) -> Tensor:
        """Return the matrix that stands for a covariance along a direction."""
        if self.variances == "directional":
            return measured
        return scalar if self.variances == "mean" else scalar.trace() * self.identity

    def _step_size(self, batch: Sequence[Any], delta: Tensor) -> float:
        """Return alpha along delta: what the rule chooses, averaged (section 3)."""
        products = self._samples(batch, delta)[2]
        Q = self._read(self._covariance_of(products) / len(batch), torch.cov(products.T) / len(batch))
        self.a, self.b_delta = -float(delta @ self.m), float(delta @ products.mean(0))
        p, q = float(delta @ self.P_read @ delta), float(delta @ Q @ delta)
        self.curvatures.append(self.b_delta / float(delta @ delta))
        b = float(_average(self.curvatures, self.beta_b)) * float(delta @ delta)
        c = self.lam3 * float(delta @ delta) ** 3
        best = float(getattr(Change(self.a, b, self.s, p, q, c), self.rule)())
        self.alpha_star = best if math.isfinite(best) else self.alpha_max
        self.alphas.append(self.alpha_star)
        return float(_average(self.alphas, self.beta))
