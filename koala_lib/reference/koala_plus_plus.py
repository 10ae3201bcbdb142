"""KOALA++ slowly: one tensor after the other, in the symbols of the paper's algorithm.

The oracle of the tests, and the text to read beside Xia, Davtyan and Favaro, "KOALA++: Efficient Kalman-Based
Optimization with Gradient-Covariance Products" (NeurIPS 2025, arXiv 2506.04432). It shares no code with
:class:`koala_lib.KoalaPlusPlus`, keeps scalars as Python floats, and divides wherever the equations do. Use float64.

The filter is Table 1 of KOALA with the loss as observation, target 0, x^ = x and P^ = P + Q I. A step needs P only in
the product v_k = H_k P_{k-1}, a row as long as the weights. For every tensor by itself, with numbers that are ours:

    (1)  S_k = H_k v_k^T + Q |H_k|^2 + R_k
    (2)  x_k = x_{k-1} - eta_k L_k / S_k (v_k + Q H_k)^T
    (3)  v_k = (alpha_k - lambda_k) v_{k-1} + Q (H_k - lambda_k H_{k-1}) + w_k H_{k-1}
    (4)  lambda_k = H_k (v_{k-1} + Q H_{k-1})^T / S_{k-1}
    (5)  alpha_k v_{k-1} + w_k H_{k-1} = H_k P_{k-2}
    (6)  v_0 = sigma_0^2 H_0, with H_0 = H_1 and R_0 = R_1

(3) is H_k times the posterior P_{k-1} = (I - K_{k-1} H_{k-1}) (P_{k-2} + Q I). What it needs of P_{k-2}, (5), is that
of the matrix with the smallest Frobenius norm that fulfils H_{k-1} P_{k-2} = v_{k-1}:

    (5a) any matrix:             P = H^T v / |H|^2
    (5b) symmetric:              P = (H^T v + v^T H) / |H|^2 - (H v^T) H^T H / |H|^4
    (5c) positive semidefinite:  P = v^T v / (H v^T)

with H = H_{k-1}, v = v_{k-1}. (5a) and (5b) are the paper's "vanilla" and "symmetric". (5c) is not in the paper: in a
basis that begins with H / |H|, P = [[a, b^T], [b, C]] has a and b given, is semidefinite only if C - b b^T / a is, and
is smallest with C = b b^T / a. If H v^T >= 0, then P_{k-1} is semidefinite, too, and H_k v_k^T >= 0 in the next step.

A tensor without a gradient waits, with its H and v; Q_{k-1} and R_{k-1} are those of the last step that was observed.
(6) is the first step of the released code; it makes v_1 = R (sigma_0^2 + Q) / ((sigma_0^2 + Q) |H_1|^2 + R) H_1.

==========  ====================================================================================
x           parameters, a list over the tensors of all groups
H, v        gradient (with weight decay) and product of the last observation of each tensor
S           innovation variance of each tensor in its last observation
Q           variance added to P by a prediction; R: variance of the observed loss (KOALA, eq. 22)
L           data loss, the mean over the minibatch
beta        coefficient of the average R
==========  ====================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _dot(a: Tensor, b: Tensor) -> float:
    """Return a b^T."""
    return float((a * b).sum())


class ReferenceKoalaPlusPlus:
    """KOALA++ with one filter per tensor, and R and Q shared by all.

    Args:
        groups: list of dicts with "params" (float64 tensors, changed in place) and, if wanted, "lr" and "weight_decay".
        others: as in :class:`koala_lib.KoalaPlusPlus`.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        lr: float = 1.0,
        *,
        initial_variance: float = 0.1,
        process_noise: float = 0.1,
        symmetric: bool = True,
        positive_semidefinite: bool = False,
        measurement_noise: float | None = None,
        initial_measurement_noise: float = 1.0,
        noise_decay: float = 0.9,
        weight_decay: float = 0.0,
        min_grad_norm: float = 1e-9,
    ) -> None:
        self.groups = [{"lr": lr, "weight_decay": weight_decay, **group} for group in groups]
        self.x: list[Tensor] = [x for group in self.groups for x in group["params"]]
        self.sigma2, self.q = initial_variance, process_noise
        self.symmetric, self.positive_semidefinite = symmetric, positive_semidefinite
        self.adapt_R, self.beta, self.min_grad_norm = measurement_noise is None, noise_decay, min_grad_norm
        self.R = initial_measurement_noise if measurement_noise is None else measurement_noise
        self.Q = process_noise  # of the last observation
        self.drift = 0.0  # Q of all predictions since then
        self.H: list[Tensor | None] = [None for _ in self.x]
        self.v: list[Tensor] = [torch.zeros_like(x) for x in self.x]
        self.S: list[float] = [math.nan for _ in self.x]
        self.L = math.nan
        self.skipped_steps = 0

    def predict(self) -> None:
        """Set x^_k = x_{k-1}, P^_k = P_{k-1} + Q I."""
        self.drift += self.q

    @torch.no_grad()
    def update(self, losses: Tensor, grads: Sequence[Tensor | None]) -> None:
        """Compute (1) to (6).

        Args:
            losses: of the samples, (B,), or their mean, ().
            grads: gradient of their mean for every tensor, in its shape; ``None`` where there is none.
        """
        finite = all(bool(t.isfinite().all()) for t in [losses, *grads] if t is not None)
        norm = math.sqrt(sum(_dot(g, g) for g in grads if g is not None))
        if not finite or norm < self.min_grad_norm or all(g is None for g in grads):
            self.skipped_steps += 1
            return
        self.L = float(losses.mean())
        Q, R = self.drift, self.R
        if self.adapt_R:  # R_k is used in the very step k
            R = self.beta * R + (1 - self.beta) * float((losses**2).mean())
        settings = [group for group in self.groups for _ in group["params"]]
        observed = False
        for i, (x, g, group) in enumerate(zip(self.x, grads, settings, strict=True)):
            if g is None:
                continue
            H = g + group["weight_decay"] * x
            v, Q_v, S_v, last = self._before(i, H, R)
            if _dot(H, H) == 0:
                continue
            v = self._product(H, v, last, S_v, Q_v)  # (3)
            S = _dot(H, v) + Q * _dot(H, H) + R  # (1)
            if S <= 0:
                continue
            loss = self.L + group["weight_decay"] / 2 * _dot(x, x)
            x -= group["lr"] * loss / S * (v + Q * H)  # (2)
            self.H[i], self.v[i], self.S[i], observed = H, v, S, True
        if observed:
            self.Q, self.R, self.drift = Q, R, 0.0
        else:
            self.skipped_steps += 1

    def _before(self, i: int, H: Tensor, R: float) -> tuple[Tensor, float, float, Tensor]:
        """Return v_{k-1}, its Q, S_{k-1} and H_{k-1}; those of (6) where there are none."""
        last, Q = self.H[i], self.Q
        if last is not None:
            S = _dot(last, self.v[i]) + Q * _dot(last, last) + self.R
            if S > 0:
                return self.v[i], Q, S, last
        return self.sigma2 * H, Q, (self.sigma2 + Q) * _dot(H, H) + R, H

    def _product(self, H: Tensor, v: Tensor, last: Tensor, S: float, Q: float) -> Tensor:
        """Return v_k = H_k P_{k-1} from v_{k-1} and H_{k-1}, (3) to (5)."""
        lambda_ = _dot(H, v + Q * last) / S  # (4)
        if self.positive_semidefinite:  # (5c)
            alpha, w = _dot(H, v) / _dot(last, v) if _dot(last, v) > 0 else 0.0, 0.0
        else:  # (5a)
            alpha, w = _dot(H, last) / _dot(last, last), 0.0
            if self.symmetric:  # (5b)
                w = (_dot(H, v) * _dot(last, last) - _dot(last, v) * _dot(H, last)) / _dot(last, last) ** 2
        return (alpha - lambda_) * v + Q * (H - lambda_ * last) + w * last  # (3)
