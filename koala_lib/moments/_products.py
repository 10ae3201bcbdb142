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

NO_FORWARD_MODE: Final = (
    "{} has no forward-mode derivative in torch, which Hessian-vector products of single samples need; use a network "
    "without it"
)
BY_SAMPLE: Final = "torch cannot differentiate {} sample by sample: {}; use a network without it"
BATCH_NORM: Final = (
    "batch normalisation mixes the samples of a batch, so that none has a gradient of its own; "
    "use GroupNorm or LayerNorm, or eval() with running statistics, in place of {}"
)

Pair: TypeAlias = tuple[Tensor, Tensor | None]


class Moments(NamedTuple):
    """What one parameter contributes; G_i is the gradient of sample i, its tangent H_i the Hessian-vector product."""

    sums: Pair  # sum_i G_i and sum_i H_i, in the shape of the parameter
    squares: Pair  # sum_i |G_i|^2 and sum_i |H_i|^2, float64 scalars
    curvatures: Tensor | None  # <D, H_i> for the parameter's part D of the direction, (B,)


class Spread(NamedTuple):
    """Mean gradient and Hessian-vector product of B samples, and how far the samples scatter about them."""

    losses: Tensor  # (B,)
    slopes: Tensor | None  # of the losses along the direction, whatever the parameters; (B,)
    curvatures: Tensor | None  # (B,), what the parameters of this spread contribute
    gradient: dict[str, Tensor]  # by name of the parameter
    gradient_scatter: Tensor | float  # sum_i |G_i - G|^2
    hvp: dict[str, Tensor]
    hvp_scatter: Tensor | float


def check_losses(losses: Tensor, samples: int) -> Tensor:
    """Return the losses if there is one real number per sample; raise a ``ValueError`` or ``TypeError`` otherwise."""
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        what = losses.dtype if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
        raise TypeError(f"loss_fn must return a tensor of real floating-point losses, got {what}")
    if losses.shape != (samples,):
        raise ValueError(
            f"loss_fn must return one loss per sample, shape ({samples},), got {tuple(losses.shape)}; "
            "torch's losses do with reduction='none'"
        )
    return losses


def square_sum(*xs: Tensor) -> Tensor:
    """Return |x|^2 of one tensor or several, as a float64 scalar.

    Norms of the rows, added in float64: as quick as one float32 norm of everything, which is off by 1e-4 and more
    from 1e7 elements on, and several times quicker than a norm that is taken in float64.
    """
    rows = [torch.linalg.vector_norm(x, dim=-1).flatten() if x.dim() else x.reshape(1) for x in xs]
    return (rows[0] if len(rows) == 1 else torch.cat(rows)).double().square().sum()


def pair(x: Tensor) -> Pair:
    """Return the two halves of a dual tensor."""
    dual = unpack_dual(x)  # type: ignore[no-untyped-call]
    return dual.primal, dual.tangent


def tangent(x: Tensor | None) -> Tensor | None:
    """Return the tangent of a dual tensor, ``None`` for any other."""
    return None if x is None else pair(x)[1]


def dual(value: Tensor, tangent: Tensor | None) -> Tensor:
    return value if tangent is None else make_dual(value, tangent)  # type: ignore[no-untyped-call]


def both(function: Callable[[Tensor], Tensor], x: Pair) -> Pair:
    """Apply a linear function to value and tangent."""
    return function(x[0]), None if x[1] is None else function(x[1])


def dots(x: Tensor, y: Tensor) -> Tensor:
    """Return the inner products of the samples, (B,)."""
    return (x * y).reshape(len(x), -1).sum(1)


def vector_moments(per_sample: Pair, direction: Tensor | None) -> Moments:
    """Return the moments of a parameter whose per-sample gradients are at hand: a pair of (B, *shape)."""
    second = per_sample[1]
    curvatures = None if second is None or direction is None else second.reshape(len(second), -1) @ direction.flatten()
    return Moments(both(lambda x: x.sum(0), per_sample), both(square_sum, per_sample), curvatures)


def product_moments(a: Pair, g: Pair, direction: Tensor | None) -> Moments:
    """Return moments of a matrix with G_i = sum_t g_it a_it^T, so H_i = sum_t g'_it a_it^T + g_it a'_it^T.

    Args:
        a: Inputs of the layer, (B, groups, T positions, K), and their tangents.
        g: Gradients of the loss with respect to its outputs, (B, groups, T, O), and their tangents.
        direction: The weight's own tangent, (groups, O, K).

    Returns:
        Sums of shape (groups, O, K).

    Notes:
        |G_i|^2 = sum_ts (a_t . a_s)(g_t . g_s) needs T^2 (K + O) multiplications against T K O for G_i itself, and no
        room for it. With one position, as in a linear layer on vectors, it is a product of two norms.
    """
    sizes = (*a[0].shape[1:], g[0].shape[3])
    return (_by_gram if _gram_is_cheaper(*sizes) else _explicit)(a, g, direction)


def in_chunks(function: Callable[[Pair, Pair], Moments], a: Pair, g: Pair, sizes: tuple[int, int, int, int]) -> Moments:
    """Add up ``function`` of a few samples at a time; ``sizes`` are (groups, T, K, O) of its matrix product."""
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

    curvatures = None if x.curvatures is None or y.curvatures is None else torch.cat([x.curvatures, y.curvatures])
    return Moments(add(x.sums, y.sums), add(x.squares, y.squares), curvatures)


def _explicit(a: Pair, g: Pair, direction: Tensor | None) -> Moments:
    (a0, a1), (g0, g1) = (_merged(*a), _merged(*g))
    shape = (*a[0].shape[:2], g0.shape[-1], a0.shape[-1])
    products = torch.bmm(g0.mT, a0)
    products1 = None if g1 is None else torch.bmm(g1.mT, a0)
    if a1 is not None:
        products1 = torch.bmm(g0.mT, a1) if products1 is None else products1.baddbmm_(g0.mT, a1)
    whole = products, products1
    moving = products1 is not None and direction is not None
    curvatures = products1.view(shape[0], -1) @ direction.flatten() if moving else None  # type: ignore[union-attr]
    return Moments(both(lambda x: x.view(shape).sum(0), whole), both(square_sum, whole), curvatures)


def _merged(x: Tensor, tangent: Tensor | None) -> Pair:
    """View (B, G, T, N) as (B G, T, N)."""
    return x.flatten(0, 1), None if tangent is None else tangent.flatten(0, 1)


def _by_gram(a: Pair, g: Pair, direction: Tensor | None) -> Moments:
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
    curvatures = None
    if direction is not None:
        moved = [dots(g, _map(x, direction)) for g, x in ((g1, a0), (g0, a1)) if g is not None and x is not None]
        curvatures = sum(moved[1:], moved[0]) if moved else None
    return Moments((_sum_of_products(a0, g0), sums1), (_total(aa * gg), squares1), curvatures)


def _map(x: Tensor, matrix: Tensor) -> Tensor:
    """Multiply (B, G, T, K) with the transposed (G, O, K)."""
    samples, _, positions, _ = x.shape
    flat = torch.bmm(x.transpose(0, 1).flatten(1, 2), matrix.mT)
    return flat.view(len(flat), samples, positions, -1).transpose(0, 1)


def vector_product_moments(a: Pair, g: Pair, direction: Tensor | None) -> Moments:
    """Return :func:`product_moments` of one position without groups, (B, K) and (B, O): |G_i| = |g_i| |a_i|."""
    (a0, a1), (g0, g1) = a, g
    aa, gg = _inner(a0, a0), _inner(g0, g0)
    sums1 = squares1 = curvatures = None
    if g1 is not None:
        sums1, squares1 = g1.mT @ a0, aa * _inner(g1, g1)
    if a1 is not None:
        more = gg * _inner(a1, a1)
        squares1 = more if g1 is None or squares1 is None else squares1 + more + 2 * _inner(a0, a1) * _inner(g1, g0)
        sums1 = g0.mT @ a1 if sums1 is None else sums1.addmm_(g0.mT, a1)
    if direction is not None:
        moved = [_inner(g, x @ direction.mT) for g, x in ((g1, a0), (g0, a1)) if g is not None and x is not None]
        curvatures = sum(moved[1:], moved[0]) if moved else None
    squares = _total(aa * gg), None if squares1 is None else _total(squares1)
    return Moments((g0.mT @ a0, sums1), squares, curvatures)


def _inner(x: Tensor, y: Tensor) -> Tensor:
    products: Tensor = torch.linalg.vecdot(x, y)
    return products


def _gram(x: Tensor, y: Tensor) -> Tensor:
    """Return x_t . y_s for all positions t, s: (B, G, T, N) twice to (B, G, T, T)."""
    return (x * y).sum(-1, keepdim=True) if x.shape[2] == 1 else x @ y.mT


def _total(x: Tensor) -> Tensor:
    return x.sum(dtype=torch.float64)


def _sum_of_products(a: Tensor, g: Tensor) -> Tensor:
    """Sum g a^T over samples and positions, (G, O, K)."""
    a, g = (x.transpose(0, 1).flatten(1, 2) for x in (a, g))
    return torch.bmm(g.mT, a)
