"""Tensors in lists: their precision, how they lie in memory, inner products, norms of long ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
ROW = 1024  # elements of the rows that a long tensor's norm is made of
MIN_ROWS = 2**15  # elements from which that is faster than a norm in float64


def scalar_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of filter scalars: float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return half precision as float32, the rest as it is; tensors of one dtype."""
    return [t.float() for t in tensors] if tensors and tensors[0].dtype in HALF else list(tensors)


def dot(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    """Return x^T y of two vectors that lie in lists of tensors; 0-dim, float64 where the device has it.

    A tensor is added up in float32 at least, in torch's cascade, which loses no more than the products' rounding did;
    their sums in float64. To add everything in float64 would first copy it.
    """
    products = torch._foreach_mul(xs, ys)
    sums = [t.sum(dtype=torch.promote_types(t.dtype, torch.float32)) for t in products]
    return torch.stack(sums).sum(dtype=scalar_dtype(sums[0].device))


def memory_format(t: Tensor) -> torch.memory_format:
    """Return channels last for images or weights of a convolution whose channels lie together, else contiguous."""
    last = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def flat(t: Tensor, order: torch.memory_format) -> Tensor | None:
    """Return all elements of a tensor as a vector, if that is how they lie in memory in this order; ``None`` if not."""
    if not t.is_contiguous(memory_format=order):
        return None
    # Use .data: a tracked view would make the compiler specialise on the base tensor's shape.
    return t.as_strided((t.numel(),), (1,)).data


@cache
def row_length(size: int) -> int:
    """Return the length of the rows into which a long tensor is cut: if possible, so that nothing is left over."""
    return next((n for n in range(ROW, ROW // 2, -1) if size % n == 0), ROW)


def row_norms(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a vector with the norm of a long tensor: norms of rows of about 1024 elements, and what is left over.

    torch's CPU norm adds up a float32 tensor in one go and is off by 1.5 % at 1e7 elements. Norms of short rows, added
    in float64, cost the same and are good to 1e-6. A tensor that is no dense memory comes back as it is.
    """
    if not (t.is_contiguous() or t.is_contiguous(memory_format=memory_format(t))):
        return t
    n = row_length(t.numel())
    rows, left = divmod(t.numel(), n)
    norms: Tensor = torch.linalg.vector_norm(t.as_strided((rows, n), (n, 1)), dim=1, dtype=dtype)
    return torch.cat([norms, t.as_strided((left,), (1,), t.storage_offset() + rows * n)]) if left else norms
