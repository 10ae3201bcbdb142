"""How a pass over the weights runs: in buckets of tensors, compiled or not, on shards whose sums other ranks join.

:class:`Passes` sorts the tensors of an optimizer into buckets. :class:`KoalaPasses` adds the three passes of a KOALA
step. What a pass does to the lists of one bucket stands in a function by itself, which can be compiled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from koala_lib.optim._engine.checks import check_dense
from koala_lib.optim._engine.compiled import CompiledPass, compiled_lists
from koala_lib.optim._engine.lists import HALF, MIN_ROWS, row_norms, scalar_dtype, wide
from koala_lib.optim._engine.sharded import (
    PLAIN,
    local,
    local_gradients,
    mean_over_ranks,
    rank_groups,
    times_shards,
)
from koala_lib.optim._engine.spread import Spread

MIN_ALONE = 2**17  # elements from which a tensor is treated alone, on an accelerator with launches of its own
MAX_TOGETHER = 2**18  # elements of smaller tensors that are treated together
ONE = torch.ones((), device="cpu")
READ_FREELY = frozenset({"cpu"})  # kinds of devices; the others would have to finish their work first
OWN = ("params", "param_names")  # what groups with equal options still have apart

Scalar = Any  # of a filter: a number, or a 0-dim tensor
Scalars = Any  # one for each tensor: a list of numbers, or a vector


def scalars(values: Tensor) -> Any:
    """Return a vector, or a 0-dim tensor, as an optimizer computes with it.

    On the CPU a list of Python numbers, or a number, since reading costs nothing there. On an accelerator and in code
    that is being compiled it stays a tensor. This is decided here only.
    """
    stays = torch.compiler.is_compiling() or values.device.type not in READ_FREELY
    return values if stays else values.tolist()


def like(scalar: Scalar, value: float) -> Scalar:
    """Return a number as another scalar is: a number, or a tensor that is made where that one is."""
    return torch.full_like(scalar, value) if isinstance(scalar, Tensor) else value


# ---- parts of a pass: lists of tensors of one device and dtype ------------------------------------------------------


def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return |t|^2 of each tensor, (n,) in float64 on their device, accumulated in float32 or better."""
    if torch.compiler.is_compiling():  # compiled sums are cascades, good to 1e-6; of equal numbers to 1e-4
        return torch.stack([t.square().sum().to(scalar_dtype(t.device)) for t in wide(tensors)])
    if not tensors:
        return torch.empty(0, dtype=torch.float64)
    device, dtype = tensors[0].device, torch.float32 if tensors[0].dtype in HALF else tensors[0].dtype
    if device.type == "cpu":
        pieces = [row_norms(t, dtype) if t.numel() >= MIN_ROWS else t for t in tensors]
        return torch.stack(torch._foreach_norm(pieces, 2, dtype=torch.float64)).square()
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=dtype)).to(scalar_dtype(device)).square()


def inner_products(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    """Return x^T y of each pair of tensors, (n,) in float64 on their device, accumulated in float32 or better."""
    if xs[0].dtype in HALF:
        xs, ys = wide(xs), wide(ys)
    return sums(list(torch._foreach_mul(xs, ys)))


def sums(tensors: list[Tensor]) -> Tensor:
    """Return the sum of each tensor, (n,) in float64 on their device, accumulated in their dtype."""
    if torch.compiler.is_compiling() or tensors[0].device.type in READ_FREELY:
        return torch.stack([t.sum() for t in tensors]).double()
    # There are list operations for norms only: the positive numbers and the negative ones have one each.
    parts = torch._foreach_clamp_min(tensors, 0.0) + torch._foreach_clamp_max(tensors, 0.0)
    norms = torch.stack(torch._foreach_norm(parts, 1))
    positive, negative = norms.to(scalar_dtype(norms.device)).chunk(2)
    return positive - negative


def where(condition: Tensor, tensors: list[Tensor], spread: Spread | None) -> list[Tensor]:
    """Return the tensors, or zeros where the condition, 0-dim, is false."""
    if spread is not None:
        return spread.where(condition, tensors)
    zero = torch.zeros((), dtype=tensors[0].dtype, device=tensors[0].device)
    return [torch.where(condition, t, zero) for t in tensors]


def decayed(params: list[Tensor], grads: list[Tensor], weight_decay: Any) -> list[Tensor]:
    """Return h = g + lambda x, leaving ``p.grad`` alone."""
    if isinstance(weight_decay, Tensor):  # from CompiledPass, so that another value compiles nothing
        return [torch.addcmul(g, x, weight_decay) for g, x in zip(grads, params, strict=True)]
    return list(torch._foreach_add(grads, params, alpha=weight_decay)) if weight_decay else grads


def add(
    tensors: list[Tensor],
    directions: list[Tensor] | tuple[Tensor, ...],
    factors: Scalars,
    *,
    sign: int = 1,
    times: list[Tensor] | None = None,
    spread: Spread | None = None,
) -> None:
    """Compute x += sign factor h, or x += sign factor h t, with a factor for each tensor.

    Half precision is computed in float32 and rounded once. With a ``spread``, a vector of factors needs no launch for
    each tensor.
    """
    if isinstance(factors, list) and tensors[0].dtype not in HALF:
        one = ONE if tensors[0].is_cpu else tensors[0].new_ones(())
        others = [one] * len(factors) if times is None else times
        torch._foreach_addcmul_(tensors, directions, others, [sign * factor for factor in factors])
        return
    products = directions if times is None else torch._foreach_mul(directions, times)
    if spread is not None:
        filled = spread.filled(factors)
        if tensors[0].dtype in HALF:
            torch._foreach_add_(tensors, torch._foreach_mul(wide(products), filled), alpha=sign)
        else:
            torch._foreach_addcmul_(tensors, products, filled, value=sign)
        return
    for x, h, factor in zip(tensors, products, factors, strict=True):
        if x.dtype in HALF:
            x.add_(h.float() * factor, alpha=sign)
        else:
            x.addcmul_(h, factor, value=sign)


def average(averages: list[Tensor], tensors: list[Tensor], rates: Scalars, spread: Spread | None = None) -> None:
    """Compute a += rate (x - a), with a rate for each tensor; half precision in float32, rounded once."""
    if spread is not None:
        means = wide(averages)
        torch._foreach_lerp_(means, wide(tensors), spread.filled(rates))
        if averages[0].dtype in HALF:
            torch._foreach_copy_(averages, means)
    elif averages[0].dtype in HALF:
        for a, x, rate in zip(averages, tensors, rates, strict=True):
            a.copy_(a.float() + (x.float() - a.float()) * rate)
    elif isinstance(rates, list):
        torch._foreach_lerp_(averages, tensors, rates)
    else:
        for a, x, rate in zip(averages, tensors, rates.to(averages[0].dtype).unbind(), strict=True):
            a.lerp_(x, rate)


def subtract_quotients(
    tensors: list[Tensor],
    numerators: list[Tensor],
    denominators: list[Tensor],
    rates: Scalars,
    spread: Spread | None = None,
) -> None:
    """Compute x -= rate m / D, with a rate for each tensor; half precision in float32, rounded once."""
    if isinstance(rates, list) and tensors[0].dtype not in HALF:
        torch._foreach_addcdiv_(tensors, numerators, denominators, [-rate for rate in rates])
    else:
        add(tensors, torch._foreach_div(wide(numerators), denominators), rates, sign=-1, spread=spread)


def left_behind(p: Tensor, kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what is kept for a parameter in another dtype or place: ``model.to()`` moves the weights alone."""
    return {name: t for name, t in kept.items() if name != "step" and (t.dtype, t.device) != (p.dtype, p.device)}


# ---- buckets --------------------------------------------------------------------------------------------------------


class Bucket(NamedTuple):
    """Tensors that are treated at once: of one param group, device and dtype."""

    group: dict[str, Any]
    params: list[Tensor]
    shards: list[Tensor]  # what of the parameters lies on this rank
    grads: list[Tensor]  # of the shards; empty for a pass that looks at none
    kept: dict[str, list[Tensor]]  # state of the shards, by name
    compiled: bool
    spread: Spread | None = None  # for factors that stay on an accelerator


class Passes:
    """The weights of an optimizer in buckets, and the ranks among which they are spread.

    Frozen weights (``requires_grad=False``) take no part. Groups with equal options are treated as one.

    Args:
        optimizer: its groups hold ``foreach`` and ``fused``, its ``_initialise()`` creates the state that is missing.
        kept: names of the state that the passes need.
        with_gradient: whether only parameters with a gradient take part.
        process_group: whose ranks join their sums; without one, where parameters are DTensors, those of their meshes.

    Raises:
        RuntimeError: if a gradient is sparse.
    """

    def __init__(self, optimizer: Any, kept: Sequence[str], *, with_gradient: bool, process_group: Any = None) -> None:
        groups = optimizer.param_groups
        self.buckets: list[Bucket] = []
        self.filter = groups[0].get("filter")
        self.sharded = not all(PLAIN.issuperset(map(type, group["params"])) for group in groups)
        self.ranks: list[Any] = [] if process_group is None else [process_group]
        if self.sharded and process_group is None:
            self.ranks = rank_groups(p for group in groups for p in group["params"])
        alike: dict[Any, tuple[dict[str, Any], list[Tensor]]] = {}  # by their options
        for group in groups:
            options = None
            if len(groups) > 1:
                told = ((name, value) for name, value in group.items() if name not in OWN)  # printing weights is slow
                options = frozenset((name, id(v) if isinstance(v, Tensor) else repr(v)) for name, v in told)
            alike.setdefault(options, (group, []))[1].extend(p for p in group["params"] if p.requires_grad)
        for group, params in alike.values():
            lists: list[list[Tensor]] = []
            if with_gradient:
                params = [p for p in params if p.grad is not None]
                if any(p.grad is not None and p.grad.layout is not torch.strided for p in params):
                    check_dense(type(optimizer).__name__, params)
            if group["fused"]:
                lists, params = compiled_lists(params)
            compiled = len(lists)
            rooms: dict[Any, tuple[list[Tensor], float]] = {}  # the last list of a device and dtype, and its room
            for p in params:
                size = p.numel()
                kind = (p.device, p.dtype, p.device.type in READ_FREELY or size < MIN_ALONE)
                together, room = rooms.get(kind, ([], 0))
                if size >= room:
                    together, room = [], MAX_TOGETHER if size <= MIN_ALONE else 0
                    if group["foreach"] is not None or p.device.type != "cpu":
                        room = 0 if group["foreach"] is False else math.inf
                    lists.append(together)
                together.append(p)
                rooms[kind] = together, room - size
            for i, together in enumerate(lists):
                states = [optimizer.state[p] for p in together] if kept else []
                try:
                    state = {name: [of_p[name] for of_p in states] for name in kept}
                except KeyError:  # of a new parameter
                    optimizer._initialise()
                    state = {name: [of_p[name] for of_p in states] for name in kept}
                p = together[0]
                if any(t[0].dtype != p.dtype or t[0].device != p.device for name, t in state.items() if name != "step"):
                    for of_q, q in zip(states, together, strict=True):
                        of_q.update({name: t.to(q) for name, t in left_behind(q, of_q).items()})
                    state = {name: [of_p[name] for of_p in states] for name in kept}
                shards, grads = together, [p.grad for p in together if p.grad is not None] if with_gradient else []
                if self.sharded:
                    shards, grads = local(together), local_gradients(together) if with_gradient else []
                    state = {name: local(tensors) for name, tensors in state.items()}
                bucket = Bucket(group, together, shards, grads, state, i < compiled)
                if with_gradient and p.device.type not in READ_FREELY:
                    bucket = bucket._replace(spread=self._spread(optimizer, bucket))
                self.buckets.append(bucket)

    def _spread(self, optimizer: Any, bucket: Bucket) -> Spread | None:
        """Return what a list of small tensors on an accelerator needs; it is made once and kept beside the state."""
        shards = bucket.shards
        small = len(shards) > 1 and max(t.numel() for t in shards) < MIN_ALONE
        if bucket.compiled or not small or torch.compiler.is_compiling():
            return None
        kept: dict[int, Spread] = optimizer.__dict__.setdefault("_spreads", {})
        spread = kept.get(len(self.buckets))
        if spread is None or not spread.fits(shards):
            spread = kept[len(self.buckets)] = Spread(shards)
        return spread

    def _joined(self, losses: Sequence[Scalar], norms: Tensor) -> tuple[Any, Tensor]:
        """Return means of losses over the ranks and norms of whole tensors, in one collective."""
        norms = times_shards(norms, (p for bucket in self.buckets for p in bucket.params))
        sums = torch.stack([t if isinstance(t, Tensor) else norms.new_full((), t) for t in losses])
        joined = mean_over_ranks(torch.cat([sums, norms.flatten()]), self.ranks)
        return scalars(joined[: len(sums)]), joined[len(sums) :].view_as(norms)


# ---- KOALA's passes: lists of tensors of one device and dtype -------------------------------------------------------


@CompiledPass
def _advance(
    params: list[Tensor],
    velocities: list[Tensor],
    averages: list[Tensor],
    momentum: float,
    average_rate: float | None,
) -> Tensor | None:
    """Compute x_avg += rate (x - x_avg), then x += p, p *= kappa; return |x - x_avg|^2 of each tensor before, (n,)."""
    squared = None
    if averages:
        differences = list(torch._foreach_sub(params, averages))
        squared = squared_norms(differences)
        if isinstance(average_rate, Tensor):  # from CompiledPass, likewise
            add(averages, differences, average_rate.expand(len(averages)))
        elif average_rate is not None:
            torch._foreach_add_(averages, differences, alpha=average_rate)
    if velocities:
        torch._foreach_add_(params, velocities)
        torch._foreach_mul_(velocities, momentum)
    return squared


@CompiledPass
def _norms(params: list[Tensor], grads: list[Tensor], weight_decay: float) -> Tensor:
    """Return the rows |g|^2, |h|^2 and |x|^2 of every tensor, (3, n)."""
    h = decayed(params, grads, weight_decay)
    return torch.stack([squared_norms(grads), squared_norms(h), squared_norms(params)])


@CompiledPass
def _correct(
    params: list[Tensor],
    velocities: list[Tensor],
    averages: list[Tensor],
    grads: list[Tensor],
    weight_decay: float | None,
    observed: Tensor | None,
    steps: Scalars,
    velocity_steps: Scalars | None,
    average_rates: Scalars | None,
    spread: Spread | None = None,
) -> None:
    """Compute x -= step h, p -= velocity step h where there was an observation, then x_avg += rate (x - x_avg)."""
    directions = grads if weight_decay is None else decayed(params, grads, weight_decay)
    if observed is not None:
        # A step of zero times an infinite gradient is NaN, so a missing observation clears the direction itself.
        directions = where(observed, directions, spread)
    add(params, directions, steps, sign=-1, spread=spread)
    if velocity_steps is not None:
        add(velocities, directions, velocity_steps, sign=-1, spread=spread)
    if average_rates is not None:
        average(averages, params, average_rates, spread)


class Block(NamedTuple):
    """What a KOALA step knows of a block; where numbers stay tensors, vectors over the blocks of all tensors."""

    squared_norm: Scalar  # |h_i|^2, h with weight decay
    penalty: Scalar  # lambda / 2 |x_i|^2
    lr: Scalar  # 0 if it takes no part
    part: Scalar  # 1 if it takes part, else 0


class Observation(NamedTuple):
    """What a KOALA step observes, over all ranks."""

    loss: Scalar  # L, the mean over the samples
    squared_loss: Scalar  # the mean of their squares
    norm: Scalar  # |g|, of all weights together or of the tensor where it is largest; not finite if any is not
    largest: Scalar  # max_i |h_i|^2
    blocks: list[Block]  # of each tensor with a gradient; where numbers stay tensors, one entry with vectors


class KoalaPasses(Passes):
    """The three passes of a KOALA step over the weights x, their velocities p and their averages x_avg."""

    def advance(self, *, momentum: float, average_rate: float) -> Scalar:
        """Move the averages, x_avg += rate (x - x_avg) (23), then along the velocities, x += p, p *= kappa (16, 17).

        Args:
            momentum: kappa.
            average_rate: 0 leaves the averages alone.

        Returns:
            |x - x_avg|^2 over all weights, with the new x_avg and x before it moved; 0 without averages.
        """
        drifts = []
        for bucket in self.buckets:
            squared = (_advance if bucket.compiled else _advance.plain)(
                params=bucket.shards,
                velocities=bucket.kept.get("velocity", []),
                averages=bucket.kept.get("average", []),
                momentum=momentum,
                average_rate=average_rate or None,
            )
            if squared is not None:
                drifts.append(squared.to(self.filter.device))
        if not drifts:
            return 0.0
        drift = torch.cat(drifts) if len(drifts) > 1 else drifts[0]
        if self.sharded:
            drift = times_shards(drift, [p for bucket in self.buckets for p in bucket.params])
            drift = mean_over_ranks(drift.sum(), self.ranks)
        return scalars(drift.sum()) * (1 - average_rate) ** 2

    def observe(self, losses: Sequence[Scalar], *, least: float | None, together: bool) -> Observation:
        """Read losses and norms of the gradients; nothing is changed.

        Args:
            losses: sum, sum of squares and number of this rank's losses.
            least: leave out single tensors with a gradient of a smaller norm; ``None`` judges all of them together.
            together: whether all tensors are one block, instead of each by itself.
        """
        decays = any(bucket.group["weight_decay"] for bucket in self.buckets)
        rows = []
        for bucket in self.buckets:
            if weight_decay := bucket.group["weight_decay"]:
                norms = (_norms if bucket.compiled else _norms.plain)(
                    params=bucket.shards, grads=bucket.grads, weight_decay=weight_decay
                )
                norms[2] *= weight_decay / 2
            else:
                norms = squared_norms(bucket.grads)
                norms = torch.stack([norms, norms, torch.zeros_like(norms)]) if decays else norms
            rows.append(norms.to(self.filter.device))
        norms = torch.cat(rows, -1) if len(rows) > 1 else rows[0]
        if self.ranks:
            losses, norms = self._joined(losses, norms)
        total, squares, count = losses
        raw = norms[0] if decays else norms
        norm = raw.sum() if least is None else raw.max()
        part, lr = 1.0, self.buckets[0].group["lr"]
        if least is not None:
            part = raw.sqrt() >= least
            norms, part = torch.where(part, norms, 0.0), part.to(norms.dtype)
        if together:
            norms = norms.sum(-1, keepdim=True).expand_as(norms)
        if isinstance(lr, Tensor) or any(bucket.group is not self.buckets[0].group for bucket in self.buckets):
            lr = torch.cat([raw.new_ones(len(bucket.params)) * bucket.group["lr"] for bucket in self.buckets])
        squared = norms[1] if decays else norms
        entries = squared, norms[2] if decays else 0.0, lr if least is None else lr * part, part
        block = Block(*(scalars(entry) if isinstance(entry, Tensor) else entry for entry in entries))
        blocks = [block]
        if isinstance(block.squared_norm, list):
            columns = (c if isinstance(c, list) else [c] * len(squared) for c in block)
            blocks = [Block(*numbers) for numbers in zip(*columns, strict=True)]
        norm, largest = scalars(norm), scalars(squared.max())
        return Observation(total / count, squares / count, norm**0.5, largest, blocks)

    def correct(
        self,
        *,
        steps: list[Scalar],
        velocity_steps: list[Scalar] | None,
        average_rates: list[Scalar] | None,
        weight_decay: bool,
        observed: Scalar,
    ) -> None:
        """Correct the weights, x -= step h (12), and p -= velocity step h, then x_avg += rate (x - x_avg).

        Args:
            steps: entries as the blocks of the observation have.
            velocity_steps: likewise; ``None`` leaves p alone.
            average_rates: likewise; ``None`` leaves x_avg alone.
            weight_decay: whether h is the gradient with weight decay, or without.
            observed: ``True``, or a tensor that says whether anything may move.
        """
        vectors: list[Any] = [steps, velocity_steps, average_rates]
        masked = isinstance(observed, Tensor)
        if masked:
            vectors = [None if v is None else torch.where(observed, v[0], 0.0) for v in vectors]
        end = 0
        for bucket in self.buckets:
            start, end = end, end + len(bucket.params)
            factors = [None if v is None else v[start:end] for v in vectors]
            decay = (weight_decay and bucket.group["weight_decay"]) or None
            compiled = bucket.compiled and (masked or decay is not None)  # else there is nothing to fuse
            if masked:
                factors = [None if v is None else v.to(bucket.params[0].device) for v in factors]
            (_correct if compiled else _correct.plain)(
                params=bucket.shards,
                velocities=bucket.kept.get("velocity", []),
                averages=bucket.kept.get("average", []),
                grads=bucket.grads,
                weight_decay=decay,
                observed=observed.to(bucket.params[0].device) if masked else None,
                steps=factors[0],
                velocity_steps=factors[1],
                average_rates=factors[2],
                spread=bucket.spread,
            )
