"""How the two passes of a KOALA++ step run: over the weights, and the two vectors that are kept for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from koala_lib.optim._engine.compiled import CompiledPass
from koala_lib.optim._engine.lists import HALF, wide
from koala_lib.optim._engine.passes import (
    Passes,
    Scalar,
    Scalars,
    add,
    average,
    decayed,
    inner_products,
    scalars,
    squared_norms,
    where,
)
from koala_lib.optim._engine.spread import Spread


@CompiledPass
def _measure(
    params: list[Tensor], grads: list[Tensor], last: list[Tensor], products: list[Tensor], weight_decay: float
) -> Tensor:
    """Return the rows |g|^2, |h|^2, |x|^2 (0 without decay), |H|^2, h^T H, h^T v and H^T v of every tensor, (7, n)."""
    h, raw = decayed(params, grads, weight_decay), squared_norms(grads)
    rows = [raw, raw, torch.zeros_like(raw)]
    if torch.is_tensor(weight_decay) or weight_decay:
        rows = [raw, squared_norms(h), squared_norms(params)]
    rows += [squared_norms(last), inner_products(h, last), inner_products(h, products), inner_products(last, products)]
    return torch.stack(rows)


@CompiledPass
def _revise(
    params: list[Tensor],
    grads: list[Tensor],
    last: list[Tensor],
    products: list[Tensor],
    weight_decay: float,
    observed: Tensor | None,
    from_product: Scalars,
    from_last: Scalars,
    from_gradient: Scalars,
    noises: Scalars,
    steps: Scalars,
    taken: Scalars,
    spread: Spread | None = None,
) -> None:
    """Compute v <- a v + b H + c h, then x -= step (v + Q h), then H <- h where it is taken."""
    h = decayed(params, grads, weight_decay)
    if observed is not None:
        # Zero times an infinite gradient is NaN, so a missing observation clears the gradient itself.
        h = where(observed, h, spread)
    v, H, g, half = products, last, h, products[0].dtype in HALF
    if half:  # computed in float32, rounded once
        v, H, g = wide(products), wide(last), wide(h)
    if isinstance(from_product, list):
        torch._foreach_mul_(v, from_product)
        directions = list(torch._foreach_mul(g, noises))
    elif spread is not None:
        torch._foreach_mul_(v, spread.filled(from_product))
        directions = list(torch._foreach_mul(g, spread.filled(noises)))
    else:
        for t, factor in zip(v, from_product, strict=True):
            t.mul_(factor)
        directions = [t * factor for t, factor in zip(g, noises, strict=True)]
    add(v, H, from_last, spread=spread)
    add(v, g, from_gradient, spread=spread)
    torch._foreach_add_(directions, v)
    add(params, directions, steps, sign=-1, spread=spread)
    average(last, h, taken, spread)
    if half:
        torch._foreach_copy_(products, v)


class Measured(NamedTuple):
    """What a KOALA++ step observes, over all ranks; vectors have an entry for each tensor with a gradient."""

    loss: Scalar  # L, the mean over the samples
    squared_loss: Scalar  # the mean of their squares
    norm: Scalar  # |g| of all weights together; not finite if any is not
    lr: Tensor
    penalty: Tensor  # lambda / 2 |x_i|^2
    HH: Tensor  # |H_k|^2, H_k with weight decay
    GG: Tensor  # |H_{k-1}|^2, 0 where there was none
    HG: Tensor  # H_k H_{k-1}^T
    Hv: Tensor  # H_k v_{k-1}^T
    Gv: Tensor  # H_{k-1} v_{k-1}^T


class ProductPasses(Passes):
    """The two passes over the weights, their last gradients H_{k-1} and their gradient-covariance products v_{k-1}."""

    def measure(self, losses: Sequence[Scalar]) -> Measured:
        """Read losses and inner products; nothing is changed.

        Args:
            losses: sum, sum of squares and number of this rank's losses.
        """
        rows = []
        for bucket in self.buckets:
            values = (_measure if bucket.compiled else _measure.plain)(
                params=bucket.shards,
                grads=bucket.grads,
                last=bucket.kept["gradient"],
                products=bucket.kept["product"],
                weight_decay=bucket.group["weight_decay"],
            )
            values[2] *= bucket.group["weight_decay"] / 2
            rows.append(values.to(self.filter.device))
        values = torch.cat(rows, -1) if len(rows) > 1 else rows[0]
        if self.ranks:
            losses, values = self._joined(losses, values)
        total, squares, count = losses
        raw, HH, penalty, GG, HG, Hv, Gv = values.unbind()
        lr = torch.cat([raw.new_ones(len(bucket.params)) * bucket.group["lr"] for bucket in self.buckets])
        return Measured(total / count, squares / count, scalars(raw.sum()) ** 0.5, lr, penalty, HH, GG, HG, Hv, Gv)

    def revise(
        self,
        *,
        from_product: Tensor,
        from_last: Tensor,
        from_gradient: Tensor,
        noise: Scalar,
        steps: Tensor,
        taken: Tensor,
        observed: Scalar,
    ) -> None:
        """Revise v <- a v + b H + c h, correct x -= step (v + Q h), and take H <- h.

        Args:
            from_product: a, entries as the vectors of :class:`Measured` have.
            from_last: b.
            from_gradient: c.
            noise: Q.
            steps: 0 leaves a tensor where it is.
            taken: 1 where h is the next step's H, else 0.
            observed: ``True``, or a tensor that says whether anything may move.
        """
        vectors = [from_product, from_last, from_gradient, torch.ones_like(steps) * noise, steps, taken.to(steps)]
        masked, end = isinstance(observed, Tensor), 0
        for bucket in self.buckets:
            start, end = end, end + len(bucket.params)
            a, b, c, noises, step, take = (scalars(vector[start:end].to(bucket.params[0].device)) for vector in vectors)
            (_revise if bucket.compiled else _revise.plain)(
                params=bucket.shards,
                grads=bucket.grads,
                last=bucket.kept["gradient"],
                products=bucket.kept["product"],
                weight_decay=bucket.group["weight_decay"],
                observed=observed.to(bucket.params[0].device) if masked else None,
                from_product=a,
                from_last=b,
                from_gradient=c,
                noises=noises,
                steps=step,
                taken=take,
                spread=bucket.spread,
            )
