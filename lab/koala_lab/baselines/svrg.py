"""SVRG: SGD whose gradient noise is taken out with a full gradient, once an epoch (Johnson and Zhang, NeurIPS 2013).

A rival of MEKA's Figure 12, not exported: no library that we know of keeps it as an optimizer for torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from koala_lab.checks import check_number

__all__ = ["Svrg"]


class Svrg(torch.optim.Optimizer):
    r"""Stochastic variance reduced gradient (Figure 1 of the paper, its option I: the snapshot is the last iterate).

    .. math::
        \tilde w \leftarrow w, \quad \tilde\mu \leftarrow \nabla P(\tilde w) \text{ (once an epoch)}; \qquad
        w \leftarrow w - \mathrm{lr}\,(g(w) - g(\tilde w) + \tilde\mu)

    with g the gradient of one minibatch, at both points. The estimate in brackets is unbiased, and exact at the
    snapshot. A step costs two gradients, and the snapshot one for every batch.

    Args:
        model: all its parameters that require a gradient are optimised. No batch normalisation, whose running
            averages would see the snapshot, and no randomness such as dropout, which would differ between the points.
        loss_fn: ``loss_fn(model(inputs), targets)`` -> losses of the B samples, shape (B,).
        lr: the step size. Schedulers act on it.

    Raises:
        ValueError: For an ``lr`` out of range or of the wrong type, or a model with BatchNorm.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor], lr: float) -> None:
        check_number("lr", lr)
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm):
                raise ValueError(f"Svrg cannot train a model with BatchNorm, {name!r}: use GroupNorm or LayerNorm")
        self.model, self.loss_fn = model, loss_fn
        super().__init__((p for p in model.parameters() if p.requires_grad), {"lr": lr})

    @torch.no_grad()
    def start_epoch(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Remember the weights as they are and the gradient of the mean loss there.

        Args:
            batches: inputs and targets of the whole training set.

        Raises:
            ValueError: if there is none.
        """
        named, samples = self._named_parameters(), 0
        totals = [torch.zeros_like(p) for p in named.values()]
        for inputs, targets in batches:
            torch._foreach_add_(totals, self._gradients(named, inputs, targets)[1], alpha=len(targets))
            samples += len(targets)
        if not samples:
            raise ValueError("a snapshot needs at least one batch of the training set, got none")
        for p, total in zip(named.values(), totals, strict=True):
            self.state[p] = {"snapshot": p.clone(), "full_gradient": total / samples}

    @torch.no_grad()
    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
        """Make one step on a minibatch.

        Returns:
            The mean loss before the step as a 0-dim tensor, still on the device.

        Raises:
            RuntimeError: before the first :meth:`start_epoch`.
        """
        named = self._named_parameters()
        states = [self.state[p] for p in named.values()]
        if not all(states):
            raise RuntimeError("Svrg has no full gradient yet: call start_epoch(batches) before the first step")
        loss, here = self._gradients(named, inputs, targets)
        snapshot = {name: state["snapshot"] for name, state in zip(named, states, strict=True)}
        _, there = self._gradients(snapshot, inputs, targets)
        lr = {p: group["lr"] for group in self.param_groups for p in group["params"]}
        for p, g, g_there, state in zip(named.values(), here, there, states, strict=True):
            p.sub_(lr[p] * (g - g_there + state["full_gradient"]))
        return loss

    def _named_parameters(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _gradients(
        self, weights: Mapping[str, Tensor], inputs: Tensor, targets: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the mean loss of a batch at some weights, and its gradient; ``p.grad`` is left alone."""
        at = {name: w.detach().requires_grad_() for name, w in weights.items()}
        with torch.enable_grad():
            loss = self.loss_fn(torch.func.functional_call(self.model, at, (inputs,)), targets).mean()
            gradients = torch.autograd.grad(loss, [*at.values()], materialize_grads=True)
        return loss.detach(), gradients
