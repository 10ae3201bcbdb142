"""Passes that are compiled (``fused=True``): which tensors, what the compiler gets to see, and what if there is none.

A compiled pass reads and writes every number once. To avoid recompilation it receives flattened tensors, non-zero
numbers as 0-dim tensors, and lists padded to a fixed length with dummies whose results are dropped. Lists so short that
the call would cost more than their numbers run as they are.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from functools import cache, update_wrapper
from inspect import signature
from typing import Any, ClassVar
from warnings import warn

import torch
from torch import Tensor
from torch.fx.experimental import _config as symbols
from torch.utils._pytree import tree_map_only

from koala_lib.optim._engine.lists import flat, memory_format, scalar_dtype
from koala_lib.optim._engine.sharded import shard_counts

LIST_LENGTH = 8  # tensors in the lists that are compiled: more save calls, fewer compile sooner
MIN_COMPILED = 4097  # elements from which torch 2.13 compiles sums that add up parts; smaller tensors never pay
MIN_COMPILED_LIST = 2**19  # elements of a list from which its call pays on a CPU

# Kinds of calls in one process, each with code of its own; without this argument of newer versions torch keeps 8.
VARIANTS: dict[str, Any] = {"recompile_limit": 64} if "recompile_limit" in signature(torch.compile).parameters else {}

# Bits of a vector of the processor. torch's cache of compiled code on disk leaves them out of its key (2.13), and code
# that is found there by a processor with other vectors computes wrong numbers; as an option they are part of the key.
if platform.machine() in ("x86_64", "AMD64"):
    VARIANTS["options"] = {"cpp.simdlen": {"AVX512": 512, "AVX2": 256}.get(torch.backends.cpu.get_cpu_capability(), 1)}


class CompiledPass:
    """A function called compiled, of lists of tensors, lists or vectors with a number for each, numbers and flags.

    Arguments go by name, the first is a list of tensors in whose memory layout all others must lie. Where that is not
    so, or inside of other compiled code, the function is called as it is; where nothing can compile, after a warning.
    """

    compiler_works: ClassVar[bool | None] = None  # not known before the first call

    def __init__(self, function: Callable[..., Any]) -> None:
        update_wrapper(self, function)
        self.plain = function
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, **arguments: Any) -> Any:
        if CompiledPass.compiler_works is not False and not torch.compiler.is_compiling():
            converted = as_vectors(arguments)
            if converted is not None:
                return self._call_compiled(converted, arguments)
        return self.plain(**arguments)

    def _call_compiled(self, converted: dict[str, Any], arguments: dict[str, Any]) -> Any:
        before, symbols.use_duck_shape = symbols.use_duck_shape, False  # two equal shapes say nothing about the next
        try:
            if self._compiled is None:  # importing the compiler takes a while
                self._compiled = torch.compile(self.plain, dynamic=True, **VARIANTS)
            result = self._compiled(**converted)
        except Exception as error:  # before anything has moved
            if CompiledPass.compiler_works:
                raise
            result = self.plain(**arguments)  # says itself if the arguments are wrong
            CompiledPass.compiler_works = False
            why = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
            warn(f"fused=True needs a working compiler ({why}); using foreach", stacklevel=2)
            return result
        finally:
            symbols.use_duck_shape = before
        CompiledPass.compiler_works = True
        n = len(next(iter(arguments.values())))
        return result if n == LIST_LENGTH else tree_map_only(Tensor, lambda t: t[..., :n], result)


def compiled_lists(params: Sequence[Tensor]) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Split parameters into lists for which a compiled call pays, and the rest.

    A shard counts with its average size, so that all ranks make the same lists.
    """
    sizes = [p.numel() / cut for p, cut in zip(params, shard_counts(params), strict=True)]
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, (p, size) in enumerate(zip(params, sizes, strict=True)):
        if size >= MIN_COMPILED:
            kinds.setdefault((p.device, p.dtype), []).append(i)
    lists: list[list[Tensor]] = []
    rest = dict(enumerate(params))
    for kind in kinds.values():
        for start in range(0, len(kind), LIST_LENGTH):
            indices = kind[start : start + LIST_LENGTH]
            on_cpu = params[indices[0]].device.type == "cpu"
            if sum(sizes[i] for i in indices) >= MIN_COMPILED_LIST or not on_cpu:
                lists.append([rest.pop(i) for i in indices])
    return lists, list(rest.values())


def as_vectors(arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Return the arguments of a compiled call, or ``None`` where a tensor is too short or lies otherwise in memory.

    Every tensor must be dense, in the memory layout of its partner in the first list.
    """
    params = next(iter(arguments.values()))
    n, device, empty = len(params), params[0].device, LIST_LENGTH - len(params)
    if empty < 0 or any(p.numel() < MIN_COMPILED for p in params):
        return None
    orders = [memory_format(p) for p in params]
    converted: dict[str, Any] = {}
    for name, argument in arguments.items():
        if isinstance(argument, float) and argument:
            argument = torch.full((), argument, dtype=scalar_dtype(device), device=device)
        elif isinstance(argument, Tensor):
            argument = torch.nn.functional.pad(argument, (0, empty)) if argument.dim() and empty else argument.clone()
        elif isinstance(argument, list) and argument and not isinstance(argument[0], Tensor):
            argument = torch.tensor(argument + [0.0] * empty, dtype=scalar_dtype(device), device=device)
        elif isinstance(argument, list) and argument:
            flattened = [flat(t, order) for t, order in zip(argument, orders, strict=True)]
            if any(vector is None for vector in flattened):
                return None
            dtype = argument[0].dtype
            argument = flattened + [_filling(name, slot, MIN_COMPILED, dtype, device) for slot in range(n, LIST_LENGTH)]
        converted[name] = argument
    return converted


@cache
def _filling(argument: str, slot: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what fills an empty slot of an argument; no two share memory."""
    return torch.zeros(size, dtype=dtype, device=device)
