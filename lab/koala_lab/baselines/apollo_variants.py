"""APOLLO with the weak secant equation asked of something else than each tensor: what section 3.1 is a trade-off of.

For notebooks that ask what the parameter-wise equation is good for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from koala_lab.theory.curvature import groups_of, secant_update
from koala_lib import Apollo

__all__ = ["ApolloVariant"]


class ApolloVariant(Apollo):
    """Algorithm 1 with one weak secant equation per element, per tensor (which is APOLLO) or for the whole network.

    One param group, L2 decay; all weights as one vector.

    Args:
        params: as in :class:`koala_lib.Apollo`, and so are the options.
        lr: eta.
        equation: "element", "tensor" or "network". Per element with eps = 0 it is the secant equation (5) itself.
        options: see there; no decoupled decay, no ``maximize`` and no ``fused``.

    Raises:
        ValueError: For one of these.
    """

    def __init__(self, params: Any, lr: float | Tensor = 0.01, *, equation: str = "tensor", **options: Any) -> None:
        for name in ("decoupled_weight_decay", "maximize", "fused"):
            if options.get(name):
                raise ValueError(f"ApolloVariant has no {name}: it is written for comparing equations, not for speed")
        super().__init__(params, lr, **options)
        self.equation = equation

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step; return what the closure returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._initialise()
        [group] = self.param_groups
        weights = [p for p in group["params"] if p.grad is not None]
        states = [self.state[p] for p in weights]
        a, eta = self._rates(group, states[0]["step"].double())
        theta, g = (torch.cat([t.flatten() for t in ts]) for ts in (weights, [p.grad for p in weights]))
        m, B = (torch.cat([s[name].flatten() for s in states]) for name in ("mean", "curvature"))

        g = g + group["weight_decay"] * theta
        y = (a * (g - m)).to(g.dtype)  # (9)
        d = m / B.abs().clamp(min=group["sigma"])
        groups = groups_of([p.numel() for p in weights], self.equation).to(g.device)
        epsilon = group["eps"] / group["sigma"] if group["eps_scaling"] == "released" else group["eps"]
        B = secant_update(B, d, y, groups, epsilon)  # (8)
        m = m + y
        theta = theta - (eta * m / B.abs().clamp(min=group["sigma"])).to(g.dtype)  # (10)

        sizes = [p.numel() for p in weights]
        for p, state, *parts in zip(weights, states, *(t.split(sizes) for t in (theta, m, B)), strict=True):
            for kept, new in zip((p, state["mean"], state["curvature"]), parts, strict=True):
                kept.copy_(new.view_as(p))
            state["step"] += 1
        return loss
