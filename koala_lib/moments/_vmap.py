"""Per-sample gradients and Hessian-vector products one by one: ``method="vmap"``, the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, jvp, vmap

from koala_lib.moments._products import Spread, check_losses, square_sum

CHUNK = 2**24  # elements of per-sample gradients that are held at once

Named = dict[str, Tensor]


def run(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    direction: Mapping[str, Tensor] | None,
    trainable: Mapping[str, Tensor],
    names: Iterable[str],
) -> Spread:
    """Return mean and scatter with respect to the parameters ``names``; the direction is one of all parameters."""
    trainable = {name: p.detach() for name, p in trainable.items()}
    wanted = {name: trainable.pop(name) for name in names}

    def loss_of(wanted: Named, others: Named, x: Tensor, y: Tensor) -> Tensor:
        losses = loss_fn(functional_call(model, {**wanted, **others}, (x.unsqueeze(0),)), y.unsqueeze(0))
        return check_losses(losses, 1).squeeze(0)

    gradient = grad_and_value(loss_of)

    def sample(x: Tensor, y: Tensor) -> tuple[list[Tensor], list[Named]]:
        if direction is None:
            first, loss = gradient(wanted, trainable, x, y)
            return [loss], [first]
        along = tuple({name: direction[name] for name in part} for part in (wanted, trainable))
        (first, loss), (second, slope) = jvp(lambda w, o: gradient(w, o, x, y), (wanted, trainable), along)  # type: ignore[misc]
        curvature = torch.stack([(second[name] * d).sum() for name, d in along[0].items()]).sum()
        return [loss, slope, curvature], [first, second]

    size = max(1, CHUNK // max(1, sum(p.numel() for p in wanted.values())))
    scalars: list[list[Tensor]] = []
    merged: list[_Merged] = []
    for x, y in zip(torch.split(inputs, size), torch.split(targets, size), strict=True):
        numbers, parts = vmap(sample, randomness="different")(x, y)
        scalars.append([number.detach() for number in numbers])
        merged = merged or [_Merged() for _ in parts]
        for total, part in zip(merged, parts, strict=True):
            total.add(part)
    first, second = merged[0], merged[1] if direction is not None else _Merged()
    columns = [torch.cat(column) for column in zip(*scalars, strict=True)]
    losses, slopes, curvatures = [*columns, None, None][:3]
    assert losses is not None
    return Spread(losses, slopes, curvatures, first.mean, first.scatter, second.mean, second.scatter)


class _Merged:
    """Mean and sum of squared distances from it, over chunks of samples (Chan, Golub & LeVeque, 1983)."""

    def __init__(self) -> None:
        self.samples = 0
        self.mean: Named = {}
        self.scatter: Tensor | float = 0.0

    def add(self, chunk: Named) -> None:
        more = len(next(iter(chunk.values()))) if chunk else 0
        share = more / max(1, self.samples + more)
        for name, values in chunk.items():
            mean = values.mean(0)
            self.scatter = self.scatter + square_sum(values - mean)
            if self.samples == 0:
                self.mean[name] = mean
            else:
                apart = mean - self.mean[name]
                self.scatter = self.scatter + square_sum(apart) * (share * self.samples)
                self.mean[name] = self.mean[name] + apart * share
        self.samples += more
