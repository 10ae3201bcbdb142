"""A fixed sample of the numbers in many tensors, read with one view each."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from koala_lib.optim._engine.lists import scalar_dtype


class Piece(NamedTuple):
    """Every stride-th number of a tensor, in the order of its memory."""

    parameter: Tensor
    layout: tuple[int, ...]  # strides of a dense tensor like it
    length: int
    stride: int
    offset: int

    def of(self, t: Tensor) -> Tensor:
        """Return these numbers of a tensor as a vector, a view where it lies in memory as the weights do."""
        if t.stride() != self.layout:
            t = torch.empty_like(self.parameter).copy_(t)
        return t.as_strided((self.length,), (self.stride,), t.storage_offset() + self.offset)


def _piece(p: Tensor, share: float) -> Piece:
    """Take about a share of a tensor, from all its rows and columns: the stride has no common factor with its size."""
    n = p.numel()
    stride = min(max(int(1 / share), 1), n)
    while math.gcd(stride, n) > 1 and stride < n:
        stride += 1
    offset = stride // 2 if stride < n else n // 2
    return Piece(p, torch.empty_like(p).stride(), -(-(n - offset) // stride), stride, offset)


class Sample:
    """The sampled numbers of gradients and weights as vectors, scaled so that inner products estimate those of all."""

    NAMES = ("innovation", "previous", "gradient", "difference", "move")

    def __init__(self, groups: list[list[Tensor]], coordinates: int) -> None:
        self.weights = sum(p.numel() for group in groups for p in group)
        share = min(coordinates / self.weights, 1.0)
        parts = [[_piece(p, share) for p in group] for group in groups]
        self.pieces = [piece for part in parts for piece in part]
        lengths = [sum(piece.length for piece in part) for part in parts]
        self.parts = [slice(sum(lengths[:i]), sum(lengths[: i + 1])) for i in range(len(parts))]
        self.parameters = [piece.parameter for piece in self.pieces]
        self.places = [p.data_ptr() for p in self.parameters]
        # views stay valid while the weights keep their memory; a weight that is no dense memory has none
        dense = all(p.stride() == piece.layout for p, piece in zip(self.parameters, self.pieces, strict=True))
        self.views = [piece.of(piece.parameter.detach()) for piece in self.pieces] if dense else None
        device = self.parameters[0].device
        like: Any = {"dtype": scalar_dtype(device), "device": device}
        scales = [torch.full((q.length,), math.sqrt(q.parameter.numel() / q.length), **like) for q in self.pieces]
        self.scale = torch.cat(scales)
        self.vectors = torch.zeros(len(self.NAMES), len(self.scale), **like)
        self.mean, self.last, self.start = torch.zeros(3, len(self.scale), **like)

    def fits(self, parameters: list[Tensor]) -> bool:
        """Say whether these are the weights it was made of, at their old places."""
        return len(parameters) == len(self.places) and [p.data_ptr() for p in parameters] == self.places

    def gather(self, tensors: list[Tensor] | None, out: Tensor) -> Tensor:
        """Write the sampled numbers of tensors, or of the weights, into a vector."""
        if tensors is None and self.views is not None:
            return torch.cat(self.views, out=out)
        tensors = [p.detach() for p in self.parameters] if tensors is None else tensors
        return torch.cat([piece.of(t) for piece, t in zip(self.pieces, tensors, strict=True)], out=out)
