"""Layers whose per-sample moments follow from their inputs and output gradients.

A class describes one call of a layer; its constructor takes the arguments of the torch function. ``input`` and the
``grad`` of its output are dual tensors where there is a direction: they carry their tangents along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from koala_lib.moments._group_norm import GroupNormFunction, channel_sums, spread
from koala_lib.moments._products import (
    BATCH_NORM,
    Moments,
    Pair,
    both,
    dual,
    in_chunks,
    pair,
    product_moments,
    square_sum,
    vector_moments,
)


class Layer:
    """One call of a layer: how to run it, whether its rule fits, and the moments of its parameters."""

    def __init__(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        self.input, self.weight, self.bias = input, weight, bias

    def run(self, function: Callable[..., Tensor], args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        return function(*args, **kwargs)

    def fits(self, samples: int) -> bool:
        """Whether dimension 0 of the input counts the samples, and dimension 1 could not be meant."""
        shape = self.input.shape
        return shape[:1] == (samples,) and (len(shape) < 3 or shape[1] != samples)

    def weight_moments(self, grad: Tensor) -> Moments:
        raise NotImplementedError

    def bias_moments(self, grad: Tensor) -> Moments:
        raise NotImplementedError


class Linear(Layer):
    """``functional.linear``; dimensions between the first and the last are positions."""

    def __init__(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(input, weight, bias)

    def fits(self, samples: int) -> bool:
        weight = self.weight
        assert weight is not None
        plain = weight.dim() == 2 and (self.bias is None or self.bias.shape == weight.shape[:1])
        return plain and self.input.dim() > 1 and super().fits(samples)

    def weight_moments(self, grad: Tensor) -> Moments:
        a, g = (both(lambda x: x.reshape(len(x), 1, -1, x.shape[-1]), pair(x)) for x in (self.input, grad))
        sums, squares = in_chunks(product_moments, a, g, (*a[0].shape[1:], g[0].shape[3]))
        return Moments(both(lambda x: x.squeeze(0), sums), squares)

    def bias_moments(self, grad: Tensor) -> Moments:
        return vector_moments(both(lambda g: g.reshape(len(g), -1, g.shape[-1]).sum(1), pair(grad)))


class Convolution(Layer):
    """``conv1d``, ``conv2d``, ``conv3d``: a linear layer on the window of every output position."""

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> None:
        super().__init__(input, weight, bias)
        self.kernel = tuple(weight.shape[2:])
        self.stride, self.dilation = (self._each(n) for n in (stride, dilation))
        self.groups = groups
        if isinstance(padding, str):  # "same" puts the odd one at the end
            total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(self.dilation, self.kernel, strict=True)]
            sides = [(t // 2, t - t // 2) for t in total]
        else:
            sides = [(p, p) for p in self._each(padding)]
        self.padding = [n for side in reversed(sides) for n in side]  # last dimension first, as functional.pad wants

    def _each(self, n: int | Sequence[int]) -> tuple[int, ...]:
        each = (n,) if isinstance(n, int) else tuple(n)
        return each * len(self.kernel) if len(each) == 1 else each

    def fits(self, samples: int) -> bool:
        return self.input.dim() == len(self.kernel) + 2 and self.input.shape[0] == samples

    def weight_moments(self, grad: Tensor) -> Moments:
        weight, places = self.weight, tuple(grad.shape[2:])
        assert weight is not None

        def moments(a: Pair, g: Pair) -> Moments:
            return product_moments(both(lambda x: self._windows(x, places), a), both(self._positions, g))

        def shaped(total: Tensor) -> Tensor:
            return total.reshape(len(weight), *self.kernel, -1).movedim(-1, 1)

        sizes = (self.groups, math.prod(places), math.prod(weight.shape[1:]), len(weight) // self.groups)
        sums, squares = in_chunks(moments, pair(self.input), pair(grad), sizes)
        return Moments(both(shaped, sums), squares)

    def _positions(self, g: Tensor) -> Tensor:
        """(B, O, *places) to (B, groups, T, O / groups)."""
        return g.reshape(len(g), self.groups, g.shape[1] // self.groups, -1).mT

    def _windows(self, x: Tensor, places: tuple[int, ...]) -> Tensor:
        """(B, C, *size) to (B, groups, T, K) with K = kernel size times C / groups, channels last."""
        x = (functional.pad(x, self.padding) if any(self.padding) else x).movedim(1, -1).contiguous()
        samples, channels = len(x), x.shape[-1] // self.groups
        steps = x.stride()[1:-1]
        windows = x.as_strided(
            (samples, self.groups, *places, *self.kernel, channels),
            (
                x.stride(0),
                channels,
                *(n * step for n, step in zip(self.stride, steps, strict=True)),
                *(n * step for n, step in zip(self.dilation, steps, strict=True)),
                1,
            ),
            x.storage_offset(),
        )
        return windows.reshape(samples, self.groups, math.prod(places), -1)

    def bias_moments(self, grad: Tensor) -> Moments:
        return vector_moments(both(channel_sums, pair(grad)))


class GroupNorm(Layer):
    """``functional.group_norm``, run by :class:`GroupNormFunction`."""

    def __init__(
        self,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(input, weight, bias)
        self.groups, self.eps = num_groups, eps
        self.statistics: tuple[Tensor, Tensor]  # mean and 1/std, (N, groups)
        self.statistics1: tuple[Tensor | None, Tensor | None] = None, None  # their tangents
        self.grad_sums: tuple[Tensor, Tensor]  # of the output gradient g and of g x, (N, C)

    def run(self, function: Callable[..., Tensor], args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        y: Tensor = GroupNormFunction.apply(self.input, self.weight, self.bias, self)  # type: ignore[no-untyped-call]
        if y.requires_grad:
            y.register_hook(self._observe)  # type: ignore[no-untyped-call]
        return y

    def dual_statistics(self) -> tuple[Tensor, Tensor]:
        (mean, rstd), (mean1, rstd1) = self.statistics, self.statistics1
        return dual(mean, mean1), dual(rstd, rstd1)

    def _observe(self, grad: Tensor) -> None:
        (g, g1), (x, x1) = pair(grad), pair(self.input)
        dot1 = None if g1 is None else g1 * x
        if x1 is not None:
            dot1 = g * x1 if dot1 is None else dot1.addcmul_(g, x1)
        total, dot = (both(channel_sums, s) for s in ((g, g1), (g * x, dot1)))
        self.grad_sums = dual(*total), dual(*dot)

    def fits(self, samples: int) -> bool:
        return self.input.shape[0] == samples

    def weight_moments(self, grad: Tensor) -> Moments:
        total, dot = self.grad_sums
        mean, rstd = (spread(s, self.input) for s in self.dual_statistics())
        return vector_moments(pair((dot - mean * total) * rstd))

    def bias_moments(self, grad: Tensor) -> Moments:
        return vector_moments(pair(self.grad_sums[0]))


class BatchNorm(Layer):
    """``functional.batch_norm``: with fixed statistics it is like any other operation."""

    def __init__(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(input, weight, bias)
        if training:
            raise ValueError(BATCH_NORM.format("functional.batch_norm(training=True)"))

    def fits(self, samples: int) -> bool:
        return False


class LayerNorm(Layer):
    """``functional.layer_norm``; dimensions before the normalised ones are positions."""

    def __init__(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(input, weight, bias)
        self.shape, self.eps = tuple(normalized_shape), eps

    def fits(self, samples: int) -> bool:
        return self.input.dim() > len(self.shape) and super().fits(samples)

    def weight_moments(self, grad: Tensor) -> Moments:
        return self.bias_moments(grad * functional.layer_norm(self.input, self.shape, eps=self.eps))

    def bias_moments(self, grad: Tensor) -> Moments:
        return vector_moments(both(lambda g: g.reshape(len(g), -1, *self.shape).sum(1), pair(grad)))


class Embedding(Layer):
    """``functional.embedding``: sums of the output gradients that meet in a row."""

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> None:
        super().__init__(input, weight, None)
        self.padding = None if padding_idx is None else padding_idx % len(weight)
        self.plain = max_norm is None and not scale_grad_by_freq and not sparse

    def fits(self, samples: int) -> bool:
        shape = self.input.shape
        return self.plain and shape[:1] == (samples,) and (len(shape) < 2 or shape[1] != samples)

    def weight_moments(self, grad: Tensor) -> Moments:
        weight = self.weight
        assert weight is not None
        if self.padding is not None:
            grad = grad * (self.input != self.padding).unsqueeze(-1)
        g = both(lambda x: x.reshape(len(x), -1, x.shape[-1]), pair(grad))
        tokens = self.input.reshape(len(grad), -1)
        ordered, order = tokens.sort(dim=1)
        rank = functional.pad((ordered[:, 1:] != ordered[:, :-1]).cumsum(1), (1, 0))  # equal tokens share a rank
        rank = torch.empty_like(rank).scatter_(1, order, rank)

        def rows(x: Tensor) -> Tensor:  # a sample's gradient without its zero rows
            return torch.zeros_like(x).scatter_add_(1, rank.unsqueeze(-1).expand_as(x), x)

        def whole(x: Tensor) -> Tensor:
            return torch.zeros_like(weight).index_add_(0, tokens.flatten(), x.flatten(0, 1))

        return Moments(both(whole, g), both(lambda x: square_sum(rows(x)), g))


# What a call is described by. The classes take the arguments of the functions.
LAYERS: Final[dict[Callable[..., Any], type[Layer]]] = {
    functional.linear: Linear,
    torch.conv1d: Convolution,
    torch.conv2d: Convolution,
    torch.conv3d: Convolution,
    functional.batch_norm: BatchNorm,
    functional.group_norm: GroupNorm,
    functional.layer_norm: LayerNorm,
    functional.embedding: Embedding,
}
