"""Layers whose per-sample moments follow from their inputs and output gradients.

A class describes one call of a layer; its constructor takes the arguments of the torch function. ``input`` and the
``grad`` of its output are dual tensors where there is a direction: they carry their tangents along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from koala_lib.moments._calls import Bent, Call, Tangent, UnknownCallError, second_order
from koala_lib.moments._group_norm import GroupNormFunction, bend, channel_sums, spread
from koala_lib.moments._products import (
    Moments,
    Pair,
    both,
    dots,
    dual,
    in_chunks,
    pair,
    product_moments,
    square_sum,
    tangent,
    vector_moments,
    vector_product_moments,
)


def in_front(x: Tensor, samples: int) -> bool:
    """Say whether dimension 0 counts the samples, and dimension 1 could not be meant."""
    return x.shape[:1] == (samples,) and (x.dim() < 3 or x.shape[1] != samples)


class Layer(Call):
    """One call of a layer: how to run it, whether its rule fits, the moments of its parameters, and its tangent."""

    needs_grad = True
    whole = False  # whether the moments of both parameters are asked for

    def __init__(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        super().__init__([input, weight, bias])
        self.input, self.weight, self.bias = input, weight, bias

    def release(self) -> None:
        super().release()
        self.input, self.weight, self.bias = self.tensors  # type: ignore[assignment]

    def fits(self, samples: int) -> bool:
        """Say whether dimension 0 of the input counts the samples, and dimension 1 could not be meant."""
        return in_front(self.input, samples)

    def weight_moments(self, grad: Tensor) -> Moments:
        raise NotImplementedError

    def bias_moments(self, grad: Tensor) -> Moments:
        raise NotImplementedError


class Product(Layer):
    """A layer W a + b, which bends its output by 2 W' a'."""

    spatial = 0  # dimensions of the output after the one that b counts

    def product(self, a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute W a + b."""
        raise NotImplementedError

    def push(self, *tangents: Tangent) -> Bent:
        a1, w1, b1 = tangents
        assert self.weight is not None
        out = None if a1 is None else self.product(a1, self.weight, None)
        if w1 is not None:
            more = self.product(self.input, w1, b1)
            out = more if out is None else out.add_(more)
        elif b1 is not None:
            shift = b1.reshape(-1, *[1] * self.spatial)
            out = shift.expand(self.shape) if out is None else out.add_(shift)
        return out, None if a1 is None or w1 is None else self.bent(self.product(a1, w1, None), 2.0)


class Linear(Product):
    """``functional.linear``; dimensions between the first and the last are positions."""

    def __init__(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(input, weight, bias)
        self.own: Tensor | None = None  # W' a + b' where it is at hand: the output's tangent if the input has none

    def run(self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        out = super().run(function, args, kwargs)
        moved = tangent(out) if self.input.dim() == 2 and tangent(self.input) is None else None
        self.own = None if moved is None else moved.detach().clone()  # the output may be changed in place
        return out

    def release(self) -> None:
        super().release()
        self.own = None

    def fits(self, samples: int) -> bool:
        weight = self.weight
        assert weight is not None
        plain = weight.dim() == 2 and (self.bias is None or self.bias.shape == weight.shape[:1])
        return plain and self.input.dim() > 1 and super().fits(samples)

    def weight_moments(self, grad: Tensor) -> Moments:
        direction = tangent(self.weight)
        if self._at_once:
            (_, g1), own = pair(grad), self.own
            moments = vector_product_moments(pair(self.input), pair(grad), None)
            return moments._replace(curvatures=None if g1 is None or own is None else dots(g1, own))
        if self.input.dim() == 2:
            return vector_product_moments(pair(self.input), pair(grad), direction)
        a, g = (both(lambda x: x.reshape(len(x), 1, -1, x.shape[-1]), pair(x)) for x in (self.input, grad))
        direction = None if direction is None else direction.unsqueeze(0)
        moments = in_chunks(partial(product_moments, direction=direction), a, g, (*a[0].shape[1:], g[0].shape[3]))
        return moments._replace(sums=both(lambda x: x.squeeze(0), moments.sums))

    def bias_moments(self, grad: Tensor) -> Moments:
        direction = None if self._at_once else tangent(self.bias)
        if grad.dim() == 2:
            return vector_moments(pair(grad), direction)
        return vector_moments(both(lambda g: g.reshape(len(g), -1, g.shape[-1]).sum(1), pair(grad)), direction)

    @property
    def _at_once(self) -> bool:
        """Say whether the curvatures of weight and bias are one inner product, booked under the weight."""
        return self.whole and self.own is not None

    def product(self, a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(a, weight, bias)


class Convolution(Product):
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
        self.options = (stride, padding, dilation, groups)
        self.kernel = tuple(weight.shape[2:])
        self.spatial = len(self.kernel)
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
        return each * self.spatial if len(each) == 1 else each

    def fits(self, samples: int) -> bool:
        return self.input.dim() == self.spatial + 2 and self.input.shape[0] == samples

    def weight_moments(self, grad: Tensor) -> Moments:
        weight, places = self.weight, tuple(grad.shape[2:])
        assert weight is not None

        direction = tangent(weight)
        if direction is not None:
            direction = direction.movedim(1, -1).reshape(self.groups, len(weight) // self.groups, -1)

        def moments(a: Pair, g: Pair) -> Moments:
            return product_moments(both(lambda x: self._windows(x, places), a), both(self._positions, g), direction)

        def shaped(total: Tensor) -> Tensor:
            return total.reshape(len(weight), *self.kernel, -1).movedim(-1, 1)

        sizes = (self.groups, math.prod(places), math.prod(weight.shape[1:]), len(weight) // self.groups)
        found = in_chunks(moments, pair(self.input), pair(grad), sizes)
        return found._replace(sums=both(shaped, found.sums))

    def _positions(self, g: Tensor) -> Tensor:
        """Lay out (B, O, *places) as (B, groups, T, O / groups)."""
        return g.reshape(len(g), self.groups, g.shape[1] // self.groups, -1).mT

    def _windows(self, x: Tensor, places: tuple[int, ...]) -> Tensor:
        """Lay out (B, C, *size) as (B, groups, T, K) with K = kernel size times C / groups, channels last."""
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
        return vector_moments(both(channel_sums, pair(grad)), tangent(self.bias))

    def product(self, a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve: Callable[..., Tensor] = (torch.conv1d, torch.conv2d, torch.conv3d)[self.spatial - 1]
        return convolve(a, weight, bias, *self.options)


class GroupNorm(Layer):
    """``functional.group_norm``, run by :class:`GroupNormFunction`."""

    needs_grad = False  # its own hook keeps it

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

    def release(self) -> None:
        super().release()
        self.statistics1 = None, None

    def dual_statistics(self) -> tuple[Tensor, Tensor]:
        (mean, rstd), (mean1, rstd1) = self.statistics, self.statistics1
        return dual(mean, mean1), dual(rstd, rstd1)

    def _observe(self, grad: Tensor) -> None:
        (g, g1), (x, x1) = pair(grad), pair(self.input)
        self.grad = g
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
        return vector_moments(pair((dot - mean * total) * rstd), tangent(self.weight))

    def bias_moments(self, grad: Tensor) -> Moments:
        return vector_moments(pair(self.grad_sums[0]), tangent(self.bias))

    def push(self, *tangents: Tangent) -> Bent:
        out, bends = bend(self, *tangents)
        if bends is not None and not self.by_sample:
            raise UnknownCallError
        return out, bends


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
        self.normalized, self.eps = tuple(normalized_shape), eps

    def fits(self, samples: int) -> bool:
        return self.input.dim() > len(self.normalized) and super().fits(samples)

    def weight_moments(self, grad: Tensor) -> Moments:
        return self._moments(grad * functional.layer_norm(self.input, self.normalized, eps=self.eps), self.weight)

    def bias_moments(self, grad: Tensor) -> Moments:
        return self._moments(grad, self.bias)

    def _moments(self, grad: Tensor, parameter: Tensor | None) -> Moments:
        return vector_moments(
            both(lambda g: g.reshape(len(g), -1, *self.normalized).sum(1), pair(grad)), tangent(parameter)
        )

    def push(self, *tangents: Tangent) -> Bent:
        there = [i for i, t in enumerate(self.tensors) if t is not None]
        values = [t for t in self.tensors if t is not None]
        first, second = second_order(self._composed, values, [tangents[i] for i in there])
        return first, self.bent(second)

    def _composed(self, x: Tensor, *rest: Tensor) -> Tensor:
        """Normalise in elementary operations: torch's own loses terms of the second derivative in forward mode."""
        over = tuple(range(-len(self.normalized), 0))
        x = x - x.mean(over, keepdim=True)
        x = x * (x.square().mean(over, keepdim=True) + self.eps).rsqrt()
        parameters = iter(rest)
        if self.weight is not None:
            x = x * next(parameters)
        return x if self.bias is None else x + next(parameters)


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

        sums, direction = both(whole, g), tangent(weight)
        moving = g[1] is not None and direction is not None
        curvatures = dots(g[1], functional.embedding(tokens, direction)) if moving else None  # type: ignore[arg-type]
        return Moments(sums, both(lambda x: square_sum(rows(x)), g), curvatures)

    def push(self, *tangents: Tangent) -> Bent:
        assert tangents[1] is not None
        return functional.embedding(self.input, tangents[1]), None


# What a call is described by. The classes take the arguments of the functions.
LAYERS: Final[dict[Callable[..., Any], type[Layer]]] = {
    functional.linear: Linear,
    torch.conv1d: Convolution,
    torch.conv2d: Convolution,
    torch.conv3d: Convolution,
    functional.group_norm: GroupNorm,
    functional.layer_norm: LayerNorm,
    functional.embedding: Embedding,
}
