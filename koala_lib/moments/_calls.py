"""Calls of torch functions as the pass of tangents sees them: what is linear, piecewise linear, or bends its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn import functional

from koala_lib.moments._products import dots, pair

Tangent: TypeAlias = Tensor | None  # None is zero
Bent: TypeAlias = tuple[Tangent, Tangent]  # tangent of the output, and <g_l, D_l> of each sample, (B,)


class UnknownCallError(Exception):
    """A call whose second derivative is not known, or not sample by sample."""


class Call:
    """One call of a torch function, remembered for the pass of tangents."""

    shape: torch.Size  # of the output
    needs_grad = False
    by_sample = False  # whether dimension 0 of the output, and no other, counts the samples
    grad: Tensor | None = None  # g_l; None until the backward pass has come by

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self.tensors = tensors  # the arguments that may move

    def run(self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Call the function."""
        return function(*args, **kwargs)

    def keep_grad(self, grad: Tensor) -> None:
        """Remember g_l: a hook of the output."""
        self.grad = pair(grad)[0]

    def release(self) -> None:
        """Let go of the graph of the forward pass."""
        self.tensors = [t if t is None else t.detach() for t in self.tensors]

    def push(self, *tangents: Tangent) -> Bent:
        """Push tangents of ``tensors``, one of them at least not zero, to that of the output."""
        raise NotImplementedError

    def bent(self, second: Tensor, factor: float = 1.0) -> Tangent:
        """Return factor <g_l, D_l> of each sample."""
        if self.grad is None:  # the loss does not depend on this output
            return None
        if not self.by_sample:
            raise UnknownCallError
        return factor * dots(self.grad, second)


class Sum(Call):
    """``input + alpha other`` or ``input - alpha other``; numbers do not move."""

    def __init__(self, input: Any, other: Any, *, alpha: float = 1.0, sign: float = 1.0) -> None:
        super().__init__([x if isinstance(x, Tensor) else None for x in (input, other)])
        self.factor = sign * alpha

    def release(self) -> None:
        self.tensors = ()

    def push(self, *tangents: Tangent) -> Bent:
        first, second = tangents
        if first is None or second is None:
            assert second is not None or first is not None
            only = first if second is None else second * self.factor
            return only.expand(self.shape), None  # type: ignore[union-attr]
        return torch.add(first, second, alpha=self.factor), None


class Relu(Call):
    """``relu``, in place or not."""

    def __init__(self, input: Tensor, inplace: bool = False) -> None:
        super().__init__([input])

    def run(self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        out = function(*args, **kwargs)
        self.tensors = [out]
        return out

    def push(self, *tangents: Tangent) -> Bent:
        return torch.ops.aten.threshold_backward(tangents[0], self.tensors[0], 0), None


class MaxPool(Call):
    """``max_pool1d``, ``max_pool2d``, ``max_pool3d``: the tangent of the largest entry."""

    def __init__(self, input: Tensor, *args: Any, **kwargs: Any) -> None:
        super().__init__([input])

    def run(self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        dimensions, with_indices = _MAX_POOLS[function]
        out, indices = with_indices(*args, **kwargs)
        self.indices = indices.flatten(-dimensions)  # among the positions
        self.first = -dimensions
        return out

    def release(self) -> None:
        self.tensors = ()

    def push(self, *tangents: Tangent) -> Bent:
        (tangent,) = tangents
        assert tangent is not None
        return tangent.flatten(self.first).gather(-1, self.indices).view(self.shape), None


class _Hole:
    def __init__(self, index: int) -> None:
        self.index = index


class Function(Call):
    """A function of the tensors that stand somewhere in its arguments."""

    def __init__(self, function: Callable[..., Any], args: Any, kwargs: Any, moving: Sequence[Tensor]) -> None:
        super().__init__(list(moving))
        holes = {id(t): _Hole(i) for i, t in enumerate(moving)}
        self.function, self.arguments = function, _replaced((tuple(args), kwargs), holes)
        self.versions = [t._version for t in moving]

    def __call__(self, *tensors: Tensor) -> Tensor:
        args, kwargs = _filled(self.arguments, tensors)
        out: Tensor = self.function(*args, **kwargs)
        return out


class Linear(Function):
    """A function that is linear in all its tensors together."""

    def push(self, *tangents: Tangent) -> Bent:
        given = [torch.zeros_like(x) if t is None else t for x, t in zip(self.tensors, tangents, strict=True)]  # type: ignore[arg-type]
        return self(*given), None


class Smooth(Function):
    """A function whose second derivative torch's forward mode gives."""

    needs_grad = True

    def push(self, *tangents: Tangent) -> Bent:
        values = [t for t in self.tensors if t is not None]
        if [t._version for t in values] != self.versions:  # overwritten since
            raise UnknownCallError
        first, second = second_order(self, values, tangents)
        return first, self.bent(second)


def second_order(
    function: Callable[..., Tensor], values: Sequence[Tensor], tangents: Sequence[Tangent]
) -> tuple[Tensor, Tensor]:
    """Return first and second derivative of a function of several tensors along their tangents."""
    moving = [i for i, t in enumerate(tangents) if t is not None]

    def of_moving(*some: Tensor) -> Tensor:
        full = list(values)
        for i, value in zip(moving, some, strict=True):
            full[i] = value
        return function(*full)

    at, along = (tuple(x[i] for i in moving) for x in (values, tangents))
    found: tuple[Tensor, Tensor] = jvp(lambda *some: jvp(of_moving, some, along)[1], at, along)  # type: ignore[assignment]
    return found


def _replaced(value: Any, new: Mapping[int, Any]) -> Any:
    """Exchange the tensors in nested tuples, lists and dicts, by their ids."""
    if isinstance(value, tuple | list):
        return type(value)(_replaced(v, new) for v in value)
    if isinstance(value, dict):
        return {k: _replaced(v, new) for k, v in value.items()}
    return new.get(id(value), value)


def _filled(value: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_filled(v, tensors) for v in value)
    if isinstance(value, dict):
        return {k: _filled(v, tensors) for k, v in value.items()}
    return tensors[value.index] if isinstance(value, _Hole) else value


_MAX_POOLS: Final[dict[Any, tuple[int, Callable[..., Any]]]] = {
    functional.max_pool1d: (1, functional.max_pool1d_with_indices),
    functional.max_pool2d: (2, functional.max_pool2d_with_indices),
    functional.max_pool3d: (3, functional.max_pool3d_with_indices),
}
# By name, since torch has most of them as functions and as methods.
_LINEAR: Final = frozenset(
    """
    flatten reshape view permute transpose squeeze unsqueeze movedim expand contiguous clone neg mean sum cat stack
    __getitem__ avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    """.split()  # noqa: SIM905
)
_SMOOTH: Final = frozenset(
    """
    mul div __rsub__ __rdiv__ __rtruediv__ matmul bmm square pow sqrt rsqrt reciprocal exp log log1p sin cos tanh
    sigmoid log_sigmoid softmax log_softmax softplus softsign gelu elu selu celu leaky_relu relu6 hardtanh batch_norm
    scaled_dot_product_attention multi_head_attention_forward conv_transpose1d conv_transpose2d conv_transpose3d
    """.split()  # noqa: SIM905
)


def describe(
    function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], moving: Sequence[Tensor]
) -> Call:
    """Describe the call of a function that is no layer; a bare :class:`Call` where no second derivative is known."""
    name = getattr(function, "__name__", "")
    if function in _MAX_POOLS:
        return MaxPool(*args, **kwargs)
    if name in ("relu", "relu_"):
        return Relu(*args, **kwargs)
    if name in ("add", "add_", "__iadd__"):
        return Sum(*args, **kwargs)
    if name in ("sub", "sub_", "__isub__"):
        return Sum(*args, **kwargs, sign=-1.0)
    if name in _LINEAR or (name == "pad" and not kwargs.get("value")):
        return Linear(function, args, kwargs, moving)
    if name in _SMOOTH:
        return Smooth(function, args, kwargs, moving)
    return Call([])
