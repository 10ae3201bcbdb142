"""Sums over samples and squared norms of per-sample quantities: the arithmetic behind the layer rules.

A value and its tangent along the direction travel as a pair ``(value, tangent)``; the tangent is ``None`` where it
is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Final, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.forward_ad import make_dual, unpack_dual

CHUNK = 2**19  # elements of a layer's windows, or of its per-sample gradients, held at once: 2 MB, a core's cache

BATCH_NORM: Final = (
    "batch normalisation mixes the samples of a batch, so that none has a gradient of its own; "
    "use GroupNorm or LayerNorm, or eval() with running statistics, in place of {}"
)

Pair: TypeAlias = tuple[Tensor, Tensor | None]


class Moments(NamedTuple):
    """What one parameter contributes; G_i is the gradient of sample i, its tangent H_i the Hessian-vector product."""

    sums: Pair  # sum_i G_i and sum_i H_i, in the shape of the parameter
    squares: Pair  # sum_i |G_i|^2 and sum_i |H_i|^2, float64 scalars


class Spread(NamedTuple):
    """Mean gradient and Hessian-vector product of B samples, and how far the samples scatter about them."""

    losses: Tensor  # (B,)
    gradient: dict[str, Tensor]  # by name of the parameter
    gradient_scatter: Tensor | float  # sum_i |G_i - G|^2
    hvp: dict[str, Tensor]
    hvp_scatter: Tensor | float


def check_losses(losses: Tensor, samples: int) -> Tensor:
    """The losses, if there is one for each sample."""
    if losses.shape != (samples,):
        raise ValueError(
            f"loss_fn must return one loss per sample, shape ({samples},), got {tuple(losses.shape)}; "
            "torch's losses do with reduction='none'"
        )
    return losses


def square_sum(x: Tensor) -> Tensor:
    """|x|^2 as a float64 scalar.

    Norms of the rows, added in float64: as quick as one float32 norm of everything, which is off by 1e-4 and more
    from 1e7 elements on, and several times quicker than a norm that is taken in float64.
    """
    rows: Tensor = torch.linalg.vector_norm(x, dim=-1) if x.dim() else x
    return rows.double().square().sum()


def pair(x: Tensor) -> Pair:
    """The two halves of a dual tensor."""
    dual = unpack_dual(x)  # type: ignore[no-untyped-call]
    return dual.primal, dual.tangent


def dual(value: Tensor, tangent: Tensor | None) -> Tensor:
    return value if tangent is None else make_dual(value, tangent)  # type: ignore[no-untyped-call]


def both(function: Callable[[Tensor], Tensor], x: Pair) -> Pair:
    """A linear function of value and tangent."""
    return function(x[0]), None if x[1] is None else function(x[1])


def vector_moments(per_sample: Pair) -> Moments:
    """Moments of a parameter whose per-sample gradients are at hand: a pair of (B, *shape)."""
    return Moments(both(lambda x: x.sum(0), per_sample), both(square_sum, per_sample))


def product_moments(a: Pair, g: Pair) -> Moments:
    """Moments of a matrix with per-sample gradient G_i = sum_t g_it a_it^T, so H_i = sum_t g'_it a_it^T + g_it a'_it^T.

    Parameters
    ----------
    a
        Inputs of the layer, (B, groups, T positions, K), and their tangents.
    g
        Gradients of the loss with respect to its outputs, (B, groups, T, O), and their tangents.

    Returns
    -------
    Moments
        Sums of shape (groups, O, K).

    Notes
    -----
    |G_i|^2 = sum_ts (a_t . a_s)(g_t . g_s) needs T^2 (K + O) multiplications against T K O for G_i itself, and no
    room for it. With one position, as in a linear layer on vectors, it is a product of two norms.
    """
    sizes = (*a[0].shape[1:], g[0].shape[3])
    return _by_gram(a, g) if _gram_is_cheaper(*sizes) else _explicit(a, g)


def in_chunks(function: Callable[[Pair, Pair], Moments], a: Pair, g: Pair, sizes: tuple[int, int, int, int]) -> Moments:
    """``function`` of a few samples at a time, added up; ``sizes`` are (groups, T, K, O) of its matrix product."""
    groups, positions, width, height = sizes
    held = positions * (positions + width) if _gram_is_cheaper(*sizes) else width * max(positions, height)
    count = max(1, CHUNK // (groups * held))

    def part(start: int) -> Moments:
        return function(*(both(lambda x: x[start : start + count], x) for x in (a, g)))

    return reduce(_plus, map(part, range(0, len(g[0]), count)))


def _gram_is_cheaper(groups: int, positions: int, width: int, height: int) -> bool:
    return positions == 1 or positions * (width + height) < width * height


def _plus(x: Moments, y: Moments) -> Moments:
    def add(x: Pair, y: Pair) -> Pair:
        return x[0] + y[0], None if x[1] is None or y[1] is None else x[1] + y[1]

    return Moments(add(x.sums, y.sums), add(x.squares, y.squares))


def _explicit(a: Pair, g: Pair) -> Moments:
    (a0, a1), (g0, g1) = (_merged(*a), _merged(*g))
    shape = (*a[0].shape[:2], g0.shape[-1], a0.shape[-1])
    products = torch.bmm(g0.mT, a0)
    products1 = None if g1 is None else torch.bmm(g1.mT, a0)
    if a1 is not None:
        products1 = torch.bmm(g0.mT, a1) if products1 is None else products1.baddbmm_(g0.mT, a1)
    whole = products, products1
    return Moments(both(lambda x: x.view(shape).sum(0), whole), both(square_sum, whole))


def _merged(x: Tensor, tangent: Tensor | None) -> Pair:
    """(B, G, T, N) as (B G, T, N)."""
    return x.flatten(0, 1), None if tangent is None else tangent.flatten(0, 1)


def _by_gram(a: Pair, g: Pair) -> Moments:
    (a0, a1), (g0, g1) = a, g
    aa, gg = _gram(a0, a0), _gram(g0, g0)
    sums1 = None if g1 is None else _sum_of_products(a0, g1)
    squares1 = None if g1 is None else _total(aa * _gram(g1, g1))
    if a1 is not None:
        more, more_squares = _sum_of_products(a1, g0), _total(gg * _gram(a1, a1))
        sums1 = more if sums1 is None else sums1.add_(more)
        squares1 = more_squares if squares1 is None else squares1 + more_squares
        if g1 is not None:  # the mixed products of g'_t a_t^T and g_s a'_s^T, twice
            squares1 = squares1 + 2 * _total(_gram(a0, a1) * _gram(g1, g0))
    return Moments((_sum_of_products(a0, g0), sums1), (_total(aa * gg), squares1))


def _gram(x: Tensor, y: Tensor) -> Tensor:
    """x_t . y_s for all positions t, s: (B, G, T, N) twice to (B, G, T, T)."""
    return (x * y).sum(-1, keepdim=True) if x.shape[2] == 1 else x @ y.mT


def _total(x: Tensor) -> Tensor:
    return x.sum(dtype=torch.float64)


def _sum_of_products(a: Tensor, g: Tensor) -> Tensor:
    """Sum over samples and positions of g a^T, (G, O, K)."""
    a, g = (x.transpose(0, 1).flatten(1, 2) for x in (a, g))
    return torch.bmm(g.mT, a)
