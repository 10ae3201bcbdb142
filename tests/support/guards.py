"""What a training step must not do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class NoHostReads(TorchDispatchMode):
    """Fails where a tensor is read back, which would make a GPU wait."""

    reads = frozenset({"_local_scalar_dense", "item", "equal", "nonzero", "is_nonzero", "masked_select"})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        # a mask among the indices must be counted, unseen from outside
        mask = name == "index" and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        reads = mask or name in self.reads
        assert not reads, f"{func} reads a tensor back"
        return func(*args, **(kwargs or {}))


class NoTransfers(TorchDispatchMode):
    """Fails where a tensor is copied to another device or made of numbers on the host, for which a GPU is waited too.

    The meta device stands for a GPU; tensors of numbers are seen on the CPU. A 0-dim tensor of the host goes with some
    operations as a number.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        numbers = func.overloadpacket.__name__ in ("mul", "add")
        devices = {t.device.type for t in tensors if t.dim() or not numbers}
        assert len(devices) <= 1, f"{func} moves a tensor between {' and '.join(sorted(devices))}"
        assert func.overloadpacket.__name__ != "lift_fresh", f"{func} makes a tensor of numbers on the host"
        return result
