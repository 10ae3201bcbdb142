"""Lists of tensors: which are treated at once, their norms, and passes that several optimizers make."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import compress

import torch
from torch import Tensor

from koala_lib.optim._engine.sharded import shard_counts

HALF = (torch.float16, torch.bfloat16)
LARGE = 2**16  # elements from which a tensor is treated alone
LONG = 4097  # elements from which torch 2.13 compiles sums that add up parts; smaller tensors are not worth a call
SLOTS = 8  # tensors in the lists that are compiled: more save calls, fewer compile sooner


def scalar_dtype(device: torch.device) -> torch.dtype:
    """The dtype of filter scalars: float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def memory_format(t: Tensor) -> torch.memory_format:
    """Channels last for a batch of images, or the weights of a convolution, with the channels together in memory."""
    last = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def flat(t: Tensor, order: torch.memory_format) -> Tensor | None:
    """All elements of a tensor as a vector, if that is how they lie in memory in this order; ``None`` if not."""
    if not t.is_contiguous(memory_format=order):
        return None
    # .data forgets which tensor this is a view of, on whose shape compiled code would depend.
    return t.as_strided((t.numel(),), (1,)).data


def wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Half precision as float32, the rest as it is."""
    return [t.float() if t.dtype in HALF else t for t in tensors]


def squared_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """|t|^2 of each tensor as a 0-dim float64 tensor on its device, accumulated in float32 or better."""
    if not tensors:
        return []
    if torch.compiler.is_compiling():  # compiled sums are cascades, good to 1e-6; of equal numbers to 1e-4
        return [t.square().sum().to(scalar_dtype(t.device)) for t in wide(tensors)]
    dtype = torch.float32 if tensors[0].dtype in HALF else tensors[0].dtype
    if tensors[0].device.type == "cpu":
        return _squared_norms_cpu(tensors, dtype)
    norms = torch._foreach_norm(list(tensors), 2, dtype=dtype)
    return [n.to(scalar_dtype(n.device)).square() for n in norms]


def _squared_norms_cpu(tensors: Sequence[Tensor], dtype: torch.dtype, row: int = 1024) -> list[Tensor]:
    # torch's CPU norm adds up a float32 tensor in one go and is off by 1.5 % at 1e7 elements. Norms of short rows,
    # added in float64, cost the same and are good to 1e-6. (Other layouts: below LARGE a norm in float64 is as fast.)
    vectors = [
        flat(t, memory_format(t)) if t.numel() > (row if t.is_contiguous() else LARGE) else None for t in tensors
    ]
    wholes = [None if v is None else v[: v.numel() // row * row] for v in vectors]
    short = [t if v is None else v[v.numel() // row * row :] for t, v in zip(tensors, vectors, strict=True)]
    squared = torch.stack(torch._foreach_norm(short, 2, dtype=torch.float64)).square().unbind()
    return [
        rest if whole is None else _squared_rows(whole.view(-1, row), dtype) + rest
        for rest, whole in zip(squared, wholes, strict=True)
    ]


def _squared_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
    return norms.double().square().sum()


def decayed(params: list[Tensor], grads: list[Tensor], weight_decay: float | Tensor) -> list[Tensor]:
    """h = g + lambda x, leaving ``p.grad`` alone."""
    if isinstance(weight_decay, Tensor):  # compiled
        return [torch.addcmul(g, x, weight_decay) for g, x in zip(grads, params, strict=True)]
    return list(torch._foreach_add(grads, params, alpha=weight_decay)) if weight_decay else grads


def subtract(tensors: Sequence[Tensor], directions: Sequence[Tensor], steps: Tensor) -> None:
    """x -= step h, with a step for each tensor; half precision is computed in float32 and rounded once."""
    for x, h, step in zip(tensors, directions, steps.unbind(), strict=True):
        if x.dtype in HALF:
            x.sub_(h.float() * step)
        else:
            x.addcmul_(h, step, value=-1)


def buckets(
    params: list[Tensor], *, foreach: bool | None, fused: bool | None, much: int = 2**18
) -> Iterator[list[Tensor]]:
    """Lists of parameters to treat at once, of one device and dtype.

    A single tensor without ``foreach``. By default all of them on CUDA; elsewhere small ones, up to ``much``
    elements together, which saves calls, and large ones alone, which saves memory. With ``fused`` long ones first,
    in lists as they are compiled.
    """
    if fused:  # as long as a shard is on the average, so that all ranks make the same lists
        long = [p.numel() >= LONG * cut for p, cut in zip(params, shard_counts(params), strict=True)]
        for kind in _kinds(list(compress(params, long))):
            yield from (kind[i : i + SLOTS] for i in range(0, len(kind), SLOTS))
        params = [p for p, compiled in zip(params, long, strict=True) if not compiled]
    if foreach is False:
        yield from ([p] for p in params)
    elif foreach or (params and params[0].device.type == "cuda"):
        yield from _kinds(params)
    else:
        yield from _runs(params, LARGE, much)


def _kinds(params: list[Tensor]) -> Iterable[list[Tensor]]:
    """Parameters by device and dtype."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in params:
        kinds.setdefault((p.device, p.dtype), []).append(p)
    return kinds.values()


def _runs(params: list[Tensor], small: int, much: int) -> Iterator[list[Tensor]]:
    """Successive small tensors of one kind, in their order."""
    run: list[Tensor] = []
    room, kind = 0, None
    for p in params:
        size, this = p.numel(), (p.device, p.dtype)
        if run and (size > room or this != kind):
            yield run
            run = []
        if not run:
            room, kind = much if size <= small else size, this
        run.append(p)
        room -= size
    if run:
        yield run
