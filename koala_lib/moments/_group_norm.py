"""Group normalisation that can be differentiated forward over reverse.

torch's fused backward of group norm has no forward-mode rule, and a composition of elementary operations would make
some thirty passes over the activations. Here the forward pass is torch's; its tangent, the backward pass and the
tangent of that are sums over positions and linear combinations of whole activations, whose coefficients are small
tensors with one entry per sample and channel.

With m = mean, r = 1/std and s = sum over the D entries of a group, y = w r (x - m) + b has the tangent

    y' = (w r) x' + (w r)' x + (b - w r m)',    m' = s(x') / D,    r' = -r^3 (s(x x') / D - m m'),

and an output gradient g gives the input gradient

    (w r) g + p x + q,    p = r^3 (s(w g) m - s(w g x)) / D,    q = -p m - r s(w g) / D,

whose tangent is the product rule once more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from koala_lib.moments._products import both, dual, pair


class GroupNormFunction(torch.autograd.Function):
    """Group normalisation as ``apply(x, weight, bias, layer)``.

    ``layer``, a ``GroupNorm`` of :mod:`koala_lib.moments._layers`, takes the statistics and gives the sums of the
    output gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, layer: Any) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        last = x.dim() == 4 and x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        samples, channels, positions = *x.shape[:2], x[0, 0].numel()
        y, mean, rstd = torch.native_group_norm(x, weight, bias, samples, channels, positions, layer.groups, layer.eps)
        layer.statistics = mean, rstd
        return y

    @staticmethod
    @torch.no_grad()
    def jvp(ctx: Any, x1: Tensor | None, weight1: Tensor | None, bias1: Tensor | None, _: None) -> Tensor:
        # Tangents by hand: torch switches its forward mode off in here.
        layer = ctx.layer
        x, weight = pair(layer.input)[0], None if layer.weight is None else pair(layer.weight)[0]
        y1, layer.statistics1 = _tangent(layer, x, weight, x1, weight1, bias1)
        return y1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        layer = ctx.layer
        x, weight = ctx.saved_tensors
        total, dot = layer.grad_sums
        if weight is not None:
            total, dot = total * weight, dot * weight
        mean, rstd = layer.dual_statistics()
        mean_g, mean_gx = (_group_mean(s, x, layer.groups) for s in (total, dot))
        p = rstd**3 * (mean_g * mean - mean_gx)
        q = -p * mean - rstd * mean_g
        scale = spread(rstd, x) if weight is None else spread(rstd, x) * weight
        return combination([(scale, grad), (spread(p, x), x)], spread(q, x)), None, None, None


def _tangent(
    layer: Any, x: Tensor, weight: Tensor | None, x1: Tensor | None, weight1: Tensor | None, bias1: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return y', and m' and r'."""
    mean, rstd = layer.statistics
    statistics1 = torch.zeros_like(mean), torch.zeros_like(rstd)
    if x1 is not None:
        mean1 = _group_mean(channel_sums(x1), x, layer.groups)
        moment1 = _group_mean(channel_sums(x * x1), x, layer.groups)
        statistics1 = mean1, -(rstd**3) * (moment1 - mean * mean1)
    mean, rstd, mean1, rstd1 = (spread(s, x) for s in (mean, rstd, *statistics1))
    scale, scale1 = (rstd, rstd1) if weight is None else (weight * rstd, weight * rstd1)
    if weight1 is not None:
        scale1 = scale1 + weight1 * rstd
    shift1 = -scale1 * mean - scale * mean1
    if bias1 is not None:
        shift1 = shift1 + bias1
    terms = [(scale1, x)] if x1 is None else [(scale1, x), (scale, x1)]
    return _accumulate(shift1, terms), statistics1


def bend(layer: Any, x1: Tensor | None, weight1: Tensor | None, bias1: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return y', and <g, y''> of each sample.

    With h = r (x - m), y'' = 2 w' h' + w h'' where h' = r x' + r' x - (r m)', h'' = 2 r' x' + r'' x - 2 r' m' - r'' m
    and r'' = 3 r^5 c'^2 - r^3 c'', c' = s(x x') / D - m m' and c'' = s(x' x') / D - m'^2 half the derivatives of the
    variance.
    """
    x, weight, grad = layer.input, layer.weight, layer.grad
    y1, (mean1, rstd1) = _tangent(layer, x, weight, x1, weight1, bias1)
    if x1 is None or grad is None:
        return y1, None
    mean, rstd = layer.statistics
    total, dot = layer.grad_sums
    dot1 = channel_sums(grad * x1)
    spread_of_x1 = _group_mean(channel_sums(x1 * x1), x, layer.groups) - mean1.square()
    rstd2 = 3 * rstd1.square() / rstd - rstd**3 * spread_of_x1
    mean, rstd, mean1, rstd1, rstd2 = (spread(s, x) for s in (mean, rstd, mean1, rstd1, rstd2))
    bent = 2 * rstd1 * dot1 + rstd2 * dot - (2 * mean1 * rstd1 + mean * rstd2) * total
    if weight is not None:
        bent = bent * weight
    if weight1 is not None:
        bent = bent + 2 * weight1 * (rstd * dot1 + rstd1 * dot - (mean1 * rstd + mean * rstd1) * total)
    return y1, bent.sum(1)


def channel_sums(x: Tensor) -> Tensor:
    """Sum (N, C, *positions) over the positions, to (N, C)."""
    return x.flatten(2).sum(2) if x.dim() > 2 else x


def spread(x: Tensor, like: Tensor) -> Tensor:
    """Spread (N, G) to (N, C): a group's number for each of its channels."""
    return x.repeat_interleave(like.shape[1] // x.shape[1], dim=1)


def _group_mean(sums: Tensor, like: Tensor, groups: int) -> Tensor:
    """Turn (N, C) sums over positions into (N, G) means over the entries of a group of ``like``.

    Value and tangent on their own: torch's rule for a division of a dual tensor by a number goes through Python.
    """
    entries = like[0].numel() // groups
    return dual(*both(lambda s: s.view(len(s), groups, -1).sum(2) / entries, pair(sums)))


def combination(terms: list[tuple[Tensor, Tensor]], shift: Tensor) -> Tensor:
    """Return the sum of coefficient times activation, plus shift: a dual tensor if any of them is.

    Coefficients and shift are (N, C), activations (N, C, *positions).
    """
    pairs = [(pair(c), pair(x)) for c, x in terms]
    constant, constant1 = pair(shift)
    value = _accumulate(constant, [(c, x) for (c, _), (x, _) in pairs])
    tangents = [(c1, x) for (_, c1), (x, _) in pairs] + [(c, x1) for (c, _), (_, x1) in pairs]
    moving = [(c, x) for c, x in tangents if c is not None and x is not None]
    if not moving:
        return value
    return dual(value, _accumulate(torch.zeros_like(constant) if constant1 is None else constant1, moving))


def _accumulate(shift: Tensor, terms: list[tuple[Tensor, Tensor]]) -> Tensor:
    shape = (*shift.shape, *[1] * (terms[0][1].dim() - 2))
    total = shift.reshape(shape)
    for i, (coefficient, x) in enumerate(terms):
        step = total.addcmul if i == 0 else total.addcmul_  # what the first made is ours
        total = step(coefficient.reshape(shape), x)
    return total
