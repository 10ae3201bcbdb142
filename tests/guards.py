"""What a training step must not do."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


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
