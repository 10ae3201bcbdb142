"""MEKA with one thing changed: what the paper tried and gave up (appendix C), or says could be left out (appendix B.1).

For notebooks that ask what that thing is good for; nobody would train with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from koala_lab.checks import check_known
from koala_lib import kalman
from koala_lib.optim.meka import Meka

__all__ = ["MekaPreviousHessian", "MekaWithoutModelError"]


class MekaPreviousHessian(Meka):
    """MEKA that carries the gradient over with the Hessian at the weights *before* the last step (appendix C).

    m^- = m + B d with B at theta_{t-1} in place of theta_t; its variance q likewise. A rule judges the new direction as
    ever, at the weights as they are.

    Args:
        minibatch: of whose samples the Hessian at theta_{t-1} is, ``"previous"`` for those of the step taken there, or
            ``"current"`` for the new ones. The paper does not say which; the first costs it nothing extra, since a rule
            has computed that product already.
        model, loss_fn, lr, options: as in :class:`koala_lib.optim.Meka`.

    All minibatches must have one size. A third forward and backward pass per step makes it slower than it need be.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        lr: float | Tensor = 1.0,
        *,
        minibatch: str = "previous",
        **options: Any,
    ) -> None:
        check_known("minibatch", minibatch, ("previous", "current"))
        super().__init__(model, loss_fn, lr, **options)
        self.param_groups[0]["minibatch"] = minibatch

    def _observe(self, inputs: Tensor, targets: Tensor, named: dict[str, Tensor], moves: list[Tensor]) -> Any:
        options, weights = self.param_groups[0], list(named.values())
        now = self._moments(inputs, targets, named, moves)
        new = inputs.clone(), targets.clone()
        x, y = new if options["minibatch"] == "current" else options.get("last_minibatch", new)
        options["last_minibatch"] = new  # in a param group, so that a checkpoint has it
        here = [p.clone() for p in weights]
        torch._foreach_sub_(weights, moves)
        before = self._moments(x, y, named, moves)
        torch._foreach_copy_(weights, here)
        return now._replace(
            products=before.products,
            product_variance=before.product_variance,
            curvature_variance=before.curvature_variance,
        )


class MekaWithoutModelError(Meka):
    """MEKA whose function-value filter trusts its prediction: lambda = 0 in place of eq. (22) (appendix B.1)."""

    _condition_value = staticmethod(kalman.condition_trusted_value)
