"""SdLBFGS: stochastic damped L-BFGS for nonconvex losses (Wang, Ma, Goldfarb & Liu, SIAM J. Optim. 27(2), 2017).

A comparison for APOLLO, written to be read: vectors instead of lists of tensors, and numbers read back at each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from koala_lab.checks import check_number, check_whole

__all__ = ["SdLBFGS"]

Pair = tuple[Tensor, Tensor]  # s and the damped y


def damped_change(s: Tensor, y: Tensor, gamma: float) -> Tensor:
    r"""Move the change of the gradient towards :math:`\gamma s` as far as it must for enough curvature (3.2).

    Enough is :math:`s^\top\bar y \ge 0.25\,\gamma\,s^\top s`.

    Args:
        s: displacement of the weights, not 0.
        y: change of the gradient along it.
        gamma: curvature of the initial Hessian.
    """
    sy, curvature = float(s @ y), gamma * float(s @ s)
    theta = 0.75 * curvature / (curvature - sy) if sy < 0.25 * curvature else 1.0
    return theta * y + (1 - theta) * gamma * s


def two_loop(gradient: Tensor, pairs: Sequence[Pair], gamma: float) -> Tensor:
    r"""Return H times the gradient (Procedure 3.1).

    H starts from :math:`I/\gamma` and takes in the pairs, oldest first:

    .. math:: H \leftarrow (I - \rho s\bar y^\top) H (I - \rho\bar y s^\top) + \rho s s^\top, \quad
        \rho = 1 / s^\top\bar y.
    """
    v, weights = gradient.clone(), []
    for s, y in reversed(pairs):
        weights.append((s @ v) / (s @ y))
        v -= weights[-1] * y
    v /= gamma
    for (s, y), weight in zip(pairs, reversed(weights), strict=True):
        v += (weight - (y @ v) / (s @ y)) * s
    return v


def _vector(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


class SdLBFGS(torch.optim.Optimizer):
    r"""Stochastic damped L-BFGS, Algorithm 3.1, with one inverse Hessian H for all parameters.

    .. math::
        x_{k+1} = x_k - \alpha H_k g(x_k, \xi_k), \quad s_k = x_{k+1} - x_k, \quad
        y_k = g(x_{k+1}, \xi_k) - g(x_k, \xi_k), \quad \gamma_{k+1} = \max(y_k^\top y_k / s_k^\top y_k, \delta).

    Both gradients of a pair are of the same minibatch, which costs a second forward and backward pass. Damping keeps H
    positive definite without a line search. The first step is plain descent.

    Args:
        params: real floating-point tensors of one device and dtype, or one param group.
        lr: alpha. The paper's falls as 1/k, for which there are schedulers.
        history_size: number of pairs kept, p >= 1: 2 p tensors for each tensor of weights.
        delta: the least gamma, > 0; also that of a pair without positive curvature.

    Raises:
        ValueError: For an option out of range, or a second param group.
        TypeError: For parameters that are not real floating-point numbers.

    State, kept with the first parameter: ``displacements`` and ``changes`` (s and the damped y, lists of vectors) and
    ``gamma``. After a step ``p.grad`` is the gradient at the new weights. A pair that is not finite is left out.

    Examples:
        x^2: the first step finds out its curvature 2, the second is Newton's.

        >>> x = torch.nn.Parameter(torch.tensor([2.0]))
        >>> optimizer = SdLBFGS([x], lr=1.0)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = (x**2).sum()
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(2):
        ...     loss = optimizer.step(closure)
        ...     print(x.data)
        tensor([-2.])
        tensor([0.])
    """

    def __init__(self, params: Any, lr: float = 1.0, *, history_size: int = 20, delta: float = 1.0) -> None:
        check_number("lr", lr)
        check_whole("history_size", history_size, 1)
        check_number("delta", delta, "> 0")
        super().__init__(params, {"lr": lr, "history_size": history_size, "delta": delta})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the one param group that there may be."""
        if self.param_groups:
            raise ValueError("SdLBFGS keeps one Hessian for all parameters and takes one param group")
        super().add_param_group(param_group)
        for p in self.param_groups[0]["params"]:
            if not p.is_floating_point():
                raise TypeError(f"SdLBFGS needs real floating-point parameters, got {p.dtype}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        """Make one step, for which the closure is called twice: at the weights before and after it.

        Args:
            closure: clears the gradients, computes the loss of one and the same minibatch, calls ``backward`` and
                returns the loss.

        Returns:
            What the closure returned at the weights before.

        Raises:
            RuntimeError: for a sparse gradient.
        """
        group = self.param_groups[0]
        params: list[Tensor] = group["params"]
        state = self.state[params[0]]
        if not state:
            state |= {"displacements": [], "changes": [], "gamma": torch.ones((), dtype=params[0].dtype)}
        with torch.enable_grad():
            first = closure()
        before, gradient = _vector(params), self._gradient(params)
        direction = self._apply(gradient)
        for p, d in zip(params, torch.split(direction, [p.numel() for p in params]), strict=True):
            p.sub_(group["lr"] * d.view_as(p))
        with torch.enable_grad():
            closure()
        self._remember(_vector(params) - before, self._gradient(params) - gradient)
        return first

    @torch.no_grad()
    def inverse_hessian(self) -> Tensor:
        """Return H of the next step as a matrix, ``(n, n)`` for n weights in all: for small problems."""
        first = self.param_groups[0]["params"][0]
        n = sum(p.numel() for p in self.param_groups[0]["params"])
        return torch.stack([self._apply(row) for row in torch.eye(n, dtype=first.dtype, device=first.device)])

    def _apply(self, gradient: Tensor) -> Tensor:
        state = self.state[self.param_groups[0]["params"][0]]
        pairs = list(zip(state.get("displacements", []), state.get("changes", []), strict=True))
        return two_loop(gradient, pairs, float(state.get("gamma", 1.0)))

    @staticmethod
    def _gradient(params: list[Tensor]) -> Tensor:
        """Return all gradients as one vector; that of a parameter without one is 0."""
        if any(p.grad is not None and p.grad.layout != torch.strided for p in params):
            raise RuntimeError("SdLBFGS does not support sparse gradients; use dense ones")
        return _vector(torch.zeros_like(p) if p.grad is None else p.grad for p in params)

    def _remember(self, s: Tensor, y: Tensor) -> None:
        """Take in a pair, and forget the oldest one where there are too many."""
        group = self.param_groups[0]
        state = self.state[group["params"][0]]
        ss, sy, yy = float(s @ s), float(s @ y), float(y @ y)
        if not 0 < ss + yy < float("inf") or ss == 0:
            return
        gamma = max(yy / sy, group["delta"]) if sy > 0 else group["delta"]
        state["gamma"].fill_(gamma)
        state["displacements"].append(s)
        state["changes"].append(damped_change(s, y, gamma))
        for kept in (state["displacements"], state["changes"]):
            del kept[: -group["history_size"]]
