r"""Slope and curvature of each sample's loss along a direction, from one pass of tangents through a recorded network.

Along theta + t delta the outputs z and the arguments of every call of a torch function move. Samples by themselves,

.. math::
    \delta^\top \nabla f_i = \langle \nabla \ell, z_i' \rangle, \qquad
    \delta^\top \nabla^2 f_i \, \delta = z_i'^\top \nabla^2 \ell \, z_i' + \sum_l \langle g_{l,i}, D_{l,i} \rangle .

g_l is the gradient of the loss by the output of call l, which the backward pass before has left, and D_l the second
derivative of this call along the tangents of its own arguments: 2 W' a' for a product W a, nothing for what is linear
or piecewise linear. This is the chain rule for second derivatives: call l bends its output by D_l, and g_l says what
that does to the loss. So the pass has no backward, and nothing in it is as large as the weights times the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from koala_lib.moments._calls import Call, Tangent, UnknownCallError, describe
from koala_lib.moments._products import dots

__all__ = ["Tape", "UnknownCallError"]

_NUMBER: Final = "_koala_number"  # set on tensors that parameters move


class Entry(NamedTuple):
    """A call on the tape."""

    call: Call
    sources: list[int | None]  # numbers of the tensors that may move


class Tape:
    """The calls of a forward pass in their order; the tensors that parameters move are numbered."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}  # of the parameters, by number
        self.entries: list[tuple[Entry, int]] = []  # with the number of the output
        self.count = 0
        self.known = True  # whether every call was
        self.slope: Tensor | None = None  # gradient of the losses by the outputs, with its graph
        self.outputs: Tensor
        self.end: int | None = None

    def start(self, parameters: Mapping[str, Tensor]) -> None:
        """Give the parameters their numbers."""
        self.names = {self._number(p): name for name, p in parameters.items()}

    def entry(
        self, layer: Call | None, func: Callable[..., Any], args: Any, kwargs: Any, tensors: Sequence[Tensor]
    ) -> Entry | None:
        """Return the entry of a call to be made, if any of its tensors moves."""
        moving = [t for t in tensors if hasattr(t, _NUMBER)]
        if not self.known or not moving:
            return None
        call = layer or describe(func, args, kwargs, moving)
        return Entry(call, [getattr(t, _NUMBER, None) for t in call.tensors])

    def record(self, entry: Entry, results: Sequence[Tensor], by_sample: bool) -> None:
        """Keep a call that was made."""
        if not any(t.is_floating_point() for t in results):
            return
        call, (out, *more) = entry.call, results
        if more or type(call) is Call:
            self.known = False
            return
        call.shape, call.by_sample = out.shape, by_sample
        if call.needs_grad and out.requires_grad:
            out.register_hook(call.keep_grad)  # type: ignore[no-untyped-call]
        self.entries.append((entry, self._number(out)))

    def finish(self, outputs: Tensor, leaf: Tensor, slope: Tensor | None) -> None:
        """Keep the outputs of the network, the same as the leaf of the loss's graph, and the gradient of the losses."""
        self.end, self.outputs, self.slope = getattr(outputs, _NUMBER, None), leaf, slope

    def release(self) -> None:
        """Let go of the graph of the forward pass."""
        for entry, _ in self.entries:
            entry.call.release()

    def _number(self, tensor: Tensor) -> int:
        setattr(tensor, _NUMBER, self.count)
        self.count += 1
        return self.count - 1

    @torch.no_grad()
    def along(self, direction: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return slope and curvature of each sample's loss along a direction, (B,) each.

        Raises:
            UnknownCallError: if the network holds a call whose second derivative is not known sample by sample.
        """
        if not self.known:
            raise UnknownCallError
        tangents: dict[int | None, Tangent] = {number: direction[name] for number, name in self.names.items()}
        bends: list[Tensor] = []
        for (call, sources), target in self.entries:
            given = [tangents.get(number) for number in sources]
            if all(t is None for t in given):
                continue
            tangents[target], bend = call.push(*given)
            if bend is not None:
                bends.append(bend)
        z1 = tangents.get(self.end)
        if z1 is None or self.slope is None:  # a loss that no parameter moves
            zero = self.outputs.new_zeros(len(self.outputs))
            return zero, zero
        if self.slope.requires_grad:
            (bent,) = torch.autograd.grad(self.slope, self.outputs, z1, retain_graph=True, allow_unused=True)
            if bent is not None:
                bends.append(dots(bent, z1))
        slopes = dots(self.slope.detach(), z1)
        return slopes, torch.stack(bends).sum(0) if bends else torch.zeros_like(slopes)
