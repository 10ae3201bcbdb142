"""Passes over the weights that can be compiled: one kernel serves lists of tensors of every shape.

A compiled pass reads and writes every number once. It gets vectors, so that another shape compiles nothing; numbers
other than 0 as 0-dim tensors, so that another value compiles nothing; and lists of fixed length, filled up with vectors
that nobody looks at. Tensors so small that the call would cost more than their numbers are treated by foreach.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, update_wrapper
from inspect import signature
from typing import Any, ClassVar
from warnings import warn

import torch
from torch import Tensor
from torch.fx.experimental import _config as symbols
from torch.utils._pytree import tree_map_only

from koala_lib.optim._engine.lists import LONG, SLOTS, flat, memory_format, scalar_dtype

# Kinds of calls in one process, each with code of its own; without this argument of newer versions torch keeps 8.
VARIANTS: dict[str, Any] = {"recompile_limit": 64} if "recompile_limit" in signature(torch.compile).parameters else {}


class Pass:
    """Decorator for a function of lists of tensors, vectors with a number for each of them, numbers and flags: calls
    with ``fused=True`` are compiled where :func:`vectors` can.

    The first argument is the list of the weights. Where nothing can compile it warns once and calls the plain function.
    """

    compiler_works: ClassVar[bool | None] = None  # not known before the first call

    def __init__(self, function: Callable[..., Any]) -> None:
        update_wrapper(self, function)
        self._function = function
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, params: list[Tensor], *arguments: Any, fused: bool | None = False) -> Any:
        if fused and Pass.compiler_works is not False and not torch.compiler.is_compiling():
            converted = vectors(params, arguments)
            if converted is not None:
                return self._call_compiled(converted, params, arguments)
        return self._function(params, *arguments)

    def _call_compiled(self, converted: list[Any], params: list[Tensor], arguments: tuple[Any, ...]) -> Any:
        before, symbols.use_duck_shape = symbols.use_duck_shape, False  # two equal shapes say nothing about the next
        try:
            if self._compiled is None:  # importing the compiler takes a while
                self._compiled = torch.compile(self._function, dynamic=True, **VARIANTS)
            result = self._compiled(*converted)
        except Exception as error:  # before anything has moved
            if Pass.compiler_works:
                raise
            result = self._function(params, *arguments)  # says itself if the arguments are wrong
            Pass.compiler_works = False
            why = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
            warn(f"fused=True needs a working compiler ({why}); using foreach", stacklevel=2)
            return result
        finally:
            symbols.use_duck_shape = before
        Pass.compiler_works = True
        n = len(params)
        return result if n == SLOTS else tree_map_only(Tensor, lambda t: t[..., :n], result)


def vectors(params: list[Tensor], arguments: tuple[Any, ...]) -> list[Any] | None:
    """The arguments of a compiled call; ``None`` for tensors that are short or no dense memory, or that lie otherwise
    than their weights."""
    n, device, empty = len(params), params[0].device, SLOTS - len(params)
    if empty < 0 or any(p.numel() < LONG for p in params):
        return None
    orders = [memory_format(p) for p in params]
    converted: list[Any] = []
    for argument in (params, *arguments):
        if isinstance(argument, float) and argument:
            argument = torch.full((), argument, dtype=scalar_dtype(device), device=device)
        elif isinstance(argument, Tensor):
            argument = torch.nn.functional.pad(argument, (0, empty)) if argument.dim() and empty else argument.clone()
        elif isinstance(argument, list) and argument:
            flattened = [flat(t, order) for t, order in zip(argument, orders, strict=True)]
            if any(vector is None for vector in flattened):
                return None
            dtype = argument[0].dtype
            argument = flattened + [_filling(len(converted), slot, LONG, dtype, device) for slot in range(n, SLOTS)]
        converted.append(argument)
    return converted


@cache
def _filling(argument: int, slot: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What fills an empty slot of an argument; no two share memory."""
    return torch.zeros(size, dtype=dtype, device=device)
