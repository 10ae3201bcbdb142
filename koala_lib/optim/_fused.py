"""Passes over the weights that can be compiled: one kernel serves large tensors of every size."""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from typing import Any, ClassVar
from warnings import warn

import torch
from torch import Tensor

from koala_lib.optim._base import LARGE, scalar_dtype


class Pass:
    """Decorator for a function of lists of tensors, numbers and flags: with ``fused=True`` a call with a single large
    tensor is compiled, so that every number is read and written once.

    The first argument is the list of the weights. The compiled function gets vectors, so that another shape compiles
    nothing, and numbers other than 0 as 0-dim tensors, so that another value compiles nothing. Where nothing can
    compile it warns once and calls the plain function.
    """

    compiler_works: ClassVar[bool | None] = None  # not known before the first call

    def __init__(self, function: Callable[..., Any]) -> None:
        update_wrapper(self, function)
        self._function = function
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, params: list[Tensor], *arguments: Any, fused: bool | None = False) -> Any:
        if fused and Pass.compiler_works is not False and not torch.compiler.is_compiling():
            vectors = _vectors(params, arguments)
            if vectors is not None:
                return self._call_compiled(vectors, params, arguments)
        return self._function(params, *arguments)

    def _call_compiled(self, vectors: list[Any], params: list[Tensor], arguments: tuple[Any, ...]) -> Any:
        try:
            if self._compiled is None:  # importing the compiler takes a while
                self._compiled = torch.compile(self._function, dynamic=True)
            result = self._compiled(*vectors)
        except Exception as error:  # before anything has moved
            if Pass.compiler_works:
                raise
            Pass.compiler_works = False
            warn(f"fused=True needs a working compiler ({type(error).__name__}); using foreach", stacklevel=2)
            return self._function(params, *arguments)
        Pass.compiler_works = True
        return result


def _vectors(params: list[Tensor], arguments: tuple[Any, ...]) -> list[Any] | None:
    """The arguments of a compiled call; ``None`` unless it is a single large tensor, with all else of its layout."""
    if len(params) != 1 or params[0].numel() < LARGE:
        return None
    device, last = params[0].device, _channels_last(params[0])
    converted: list[Any] = []
    for argument in (params, *arguments):
        if isinstance(argument, float) and argument:
            argument = torch.full((), argument, dtype=scalar_dtype(device), device=device)
        elif isinstance(argument, Tensor):
            argument = argument.clone()  # no view, see flat()
        elif isinstance(argument, list) and argument:
            vector = flat(argument[0])
            if vector is None or _channels_last(argument[0]) != last:
                return None
            argument = [vector]
        converted.append(argument)
    return converted


def _channels_last(t: Tensor) -> bool:
    return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)


def flat(t: Tensor) -> Tensor | None:
    """All elements of a dense tensor as a vector in the order of the memory; ``None`` for other tensors."""
    if _channels_last(t):
        t = t.permute(0, 2, 3, 1)
    # .data forgets which tensor this is a view of, on whose shape the compiled code would depend.
    return t.view(-1).data if t.is_contiguous() else None
