"""What the operations of an optimizer's step read, write and keep allocated: counted, not timed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from koala_lab import models
from koala_lab.bench.timing import Row, now

Factory = Callable[[list[Tensor]], Optimizer]


class Traffic(TorchDispatchMode):
    """What the operations of a ``with`` block read and write, how long each takes, and what they keep allocated.

    Counts are those of the operators' signatures: every tensor passed in is read, every tensor changed or made is
    written, views are free. Buffers inside a kernel are not seen.

    Args:
        constant: Tensors that are not written, whatever a signature says: torch's fused optimizers declare gradients
            as changed, since a gradient scaler would change them.

    Attributes:
        operations: One row per operation: ``phase``, ``operation``, ``reads`` and ``writes`` in elements, ``ms``
            (on a GPU only that of starting it).
        phase: A name for the operations that follow.
        peak: Bytes of new tensors that were alive at once.
    """

    def __init__(self, constant: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Row] = []
        self.phase = ""
        self.peak = self._alive = 0
        self._storages: set[int] = set()  # those that are counted and alive
        self._constant = {t.data_ptr() for t in constant}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        start = now()
        result = func(*args, **kwargs)
        ms = 1e3 * (now() - start)
        schema = func._schema
        inputs = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        changed = [inputs[a.name] for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        made = [] if any(r.alias_info is not None for r in schema.returns) else tensors_in(result)
        for t in made:
            if not t._is_zerotensor():  # a tangent that is zero, without memory
                self._allocated(t.untyped_storage())
        if changed or made:
            written = [t for t in tensors_in(changed) if t.data_ptr() not in self._constant] + made
            reads, writes = (sum(t.numel() for t in ts) for ts in (tensors_in(inputs), written))
            row = {"phase": self.phase, "operation": schema.name.removeprefix("aten::"), "reads": reads}
            self.operations.append(row | {"writes": writes, "ms": ms})
        return result

    def _allocated(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._storages:  # some operations make a view whose signature does not say so
            return

        def free(address: int = storage._cdata, size: int = storage.nbytes()) -> None:
            self._storages.discard(address)
            self._alive -= size

        self._storages.add(storage._cdata)
        self._alive += storage.nbytes()
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, free)


def peak(job: Callable[[], object]) -> int:
    """Return the bytes of the tensors that a job makes, as far as they are alive at once."""
    with Traffic() as seen:
        job()
    return int(seen.peak)


def with_gradients(params: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return parameters as a list, each with a gradient of its memory layout. The values do not matter for the time."""
    listed: list[Tensor] = list(params)
    for p in listed:
        p.grad = torch.full_like(p, 0.01)
    return listed


def synthetic(parameters: int, *, tensors: int = 16, device: str = "cpu") -> list[Tensor]:
    """Return a flat model: ``tensors`` vectors with gradients, together of so many elements (rounded down)."""
    size = parameters // tensors
    return with_gradients(nn.Parameter(torch.full((size,), 0.01, device=device)) for _ in range(tensors))


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in nested containers."""
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def image_network(name: str, *, device: str = "cpu") -> nn.Module:
    """Build a network of the classification runs as they train it, channels last, for 100 classes of 32x32 images."""
    network = models.build(name, num_classes=100).to(device)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def step(optimizer: Any) -> None:
    """Take one step with the gradients that are there; the losses of an optimizer that filters them are 128 ones."""
    if hasattr(optimizer, "predict"):
        optimizer.predict()
        optimizer.step(loss=torch.ones(128, device=optimizer.param_groups[0]["params"][0].device))
    else:
        optimizer.step()


def traffic(create: Factory, params: list[Tensor]) -> Traffic:
    """Return the operations of an optimizer's second step, KOALA's in the phases ``predict`` and ``update``."""
    optimizer: Any = create(params)
    step(optimizer)
    seen = Traffic(constant=[p.grad for p in params if p.grad is not None])
    with seen:
        if hasattr(optimizer, "predict"):
            seen.phase = "predict"
            optimizer.predict()
            seen.phase = "update"
        step(optimizer)  # a second predict() does nothing
    return seen


def memory(params: list[Tensor], contenders: Mapping[str, Factory]) -> list[Row]:
    """Return what an optimizer needs beside weights and gradients.

    Args:
        params: Parameters with gradients.
        contenders: Optimizers by name.

    Returns:
        One row per optimizer: ``tensors`` (kept for each tensor of weights, of its shape), ``state_bytes`` (all that a
        checkpoint of it holds, scalars included), ``state`` and ``peak``: bytes kept, and bytes of temporary tensors
        alive at once in a step, both over the bytes of the weights.
    """
    weights = sum(p.numel() * p.element_size() for p in params)
    rows = []
    for name, create in contenders.items():
        optimizer = create(params)
        step(optimizer)
        kept = {t.data_ptr(): t for t in tensors_in(optimizer.state_dict())}.values()  # groups share one filter
        size = sum(t.numel() * t.element_size() for t in kept)
        like = sum(t.shape == p.shape for p in params for t in tensors_in(optimizer.state[p]))
        row = {"optimizer": name, "tensors": like / len(params), "state_bytes": size, "state": size / weights}
        rows.append(row | {"peak": traffic(create, params).peak / weights})
    return rows
