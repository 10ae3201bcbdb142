"""APOLLO slowly: Algorithm 1 line by line, number by number, in the paper's symbols.

The oracle of the tests and the text to read beside section 3 of Ma, "Apollo: An Adaptive Parameter-wise Diagonal
Quasi-Newton Method for Nonconvex Stochastic Optimization" (arXiv 2009.13586). It shares no code with
:class:`koala_lib.optim.apollo.Apollo`: it stores d as the paper does, averages the gradients as (9) is printed, and
loops over the elements.

===========  =======================================================================================================
theta        the weights of one tensor ("parameter"), flat; g: their gradient g_{t+1} = grad f_t(theta_t)
m, d, B      averaged gradient, direction, diagonal of the Hessian estimate, all of theta's shape, from zero
D            rectify(B, sigma) = max(|B|, sigma) (10)
alpha        factor of d^2 in the update of B (8)
eta          learning rate of the step; t: gradients that the tensor has had
===========  =======================================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class _Parameter:
    """What Algorithm 1 keeps for one tensor."""

    def __init__(self, size: int) -> None:
        self.m, self.d, self.B = [0.0] * size, [0.0] * size, [0.0] * size
        self.t = 0


class ReferenceApollo:
    """APOLLO on a list of float64 tensors, changed in place.

    Args:
        tensors: the weights, of any shape, one "parameter" each.
        lr: eta after the warm-up; may be changed between steps, as schedulers do.
        others: as in :class:`koala_lib.optim.apollo.Apollo`.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        lr: float = 0.01,
        *,
        beta: float = 0.9,
        eps: float = 1e-4,
        sigma: float = 0.01,
        warmup_steps: int = 500,
        warmup_init_lr: float | None = None,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        eps_scaling: str = "released",
        maximize: bool = False,
    ) -> None:
        self.tensors = tensors
        self.parameters = [_Parameter(x.numel()) for x in tensors]
        self.lr = self.first_lr = lr
        self.beta, self.sigma = beta, sigma
        self.epsilon = eps / sigma if eps_scaling == "released" else eps
        self.W, self.eta_init = warmup_steps, lr / 1000 if warmup_init_lr is None else warmup_init_lr
        self.lambda_, self.decoupled = weight_decay, decoupled_weight_decay
        self.sign = -1.0 if maximize else 1.0

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """Make one step of Algorithm 1.

        Args:
            gradients: g_{t+1} of every tensor, in its shape; ``None`` for those that stay.
        """
        for x, parameter, gradient in zip(self.tensors, self.parameters, gradients, strict=True):
            if gradient is not None:
                theta = self._step(parameter, x.flatten().tolist(), gradient.flatten().tolist())
                x.copy_(torch.tensor(theta, dtype=x.dtype).view(x.shape))

    def eta(self, t: int) -> float:
        """Return eta_{t+1}: a line from eta_init, W steps long, then what the schedule says."""
        if self.lr == 0:
            return 0.0
        return self.eta_init + (self.first_lr - self.eta_init) * t / self.W if t < self.W else self.lr

    def _step(self, parameter: _Parameter, theta: list[float], g: list[float]) -> list[float]:
        """Return the new weights of one tensor; change what is kept for it."""
        beta, t, n = self.beta, parameter.t, range(len(theta))
        m, d, B = parameter.m, parameter.d, parameter.B
        g = [self.sign * g[i] for i in n]
        if not self.decoupled:
            g = [g[i] + self.lambda_ * theta[i] for i in n]

        # (9)
        old, new = beta * (1 - beta**t) / (1 - beta ** (t + 1)), (1 - beta) / (1 - beta ** (t + 1))
        m_next = [old * m[i] + new * g[i] for i in n]

        # (8) with y_t = m_{t+1} - m_t
        dy = sum(d[i] * (m_next[i] - m[i]) for i in n)
        dBd = sum(d[i] * B[i] * d[i] for i in n)
        norm = sum(d[i] ** 4 for i in n) ** 0.25
        alpha = (dy + dBd) / (norm + self.epsilon) ** 4 if norm > 0 else 0.0
        B_next = [B[i] - alpha * d[i] ** 2 for i in n]

        D = [max(abs(B_next[i]), self.sigma) for i in n]  # (10)
        d_next = [m_next[i] / D[i] for i in n]
        if self.decoupled:
            d_next = [d_next[i] + self.lambda_ * theta[i] for i in n]
        parameter.m, parameter.d, parameter.B, parameter.t = m_next, d_next, B_next, t + 1
        return [theta[i] - self.eta(t) * d_next[i] for i in n]
