"""Factors that stay on an accelerator, one for each tensor of a list: torch's lists take none, only equal shapes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from koala_lib.optim._engine.lists import HALF, memory_format


class Spread:
    """Memory for the elements of a list of tensors, in one piece, and a view of it for each tensor.

    What one kernel writes there are tensors that fit into a list's operation beside the others, one kernel again.
    Without it every tensor would take a launch of its own. What a method returns is valid until its next call.

    Args:
        tensors: of one device and dtype.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        device, dtype = tensors[0].device, tensors[0].dtype
        sizes = [t.numel() for t in tensors]
        # Made on the device: nothing is copied there.
        self._index = torch.cat([torch.full((n,), i, dtype=torch.int32, device=device) for i, n in enumerate(sizes)])
        self._memories, self._views = [], []
        for kind in (torch.float32 if dtype in HALF else dtype, dtype):
            memory = torch.empty(sum(sizes), dtype=kind, device=device)
            pieces = zip(tensors, torch.split(memory, sizes), strict=True)
            self._memories.append(memory)
            self._views.append(
                [
                    piece.as_strided(t.size(), t.stride())
                    if t.is_contiguous(memory_format=memory_format(t))
                    else piece.view(t.size())
                    for t, piece in pieces
                ]
            )

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Say whether it was made for tensors of these shapes, in this order."""
        views = self._views[1]
        return (
            len(views) == len(tensors)
            and (views[0].device, views[0].dtype) == (tensors[0].device, tensors[0].dtype)
            and all(view.shape == t.shape for view, t in zip(views, tensors, strict=True))
        )

    def filled(self, factors: Tensor) -> list[Tensor]:
        """Return a tensor of the shape of each, filled with its factor.

        Args:
            factors: (n,).
        """
        memory = self._memories[0]
        torch.index_select(factors.to(memory.dtype), 0, self._index, out=memory)
        return self._views[0]

    def where(self, condition: Tensor, tensors: list[Tensor]) -> list[Tensor]:
        """Return the tensors, or zeros.

        Args:
            condition: 0-dim; whether it is the tensors.
            tensors: in the shapes and the dtype of the list.
        """
        memory = self._memories[1]
        torch._foreach_copy_(self._views[1], tensors)
        torch.where(condition, memory, memory.new_zeros(()), out=memory)
        return self._views[1]
