"""One forward and backward pass whose layers tell their moments: ``method="structured"``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from koala_lib.moments._layers import LAYERS, Layer, in_front
from koala_lib.moments._products import BATCH_NORM, Moments, Spread, check_losses, dots, dual, pair, square_sum
from koala_lib.moments._tangents import Tape

_OF_SAMPLES = "_koala_of_samples"  # set on tensors that are computed from the inputs


class _Recorder(TorchFunctionMode):
    """Sees every torch function of the forward pass: which of them are known layers, and where parameters go."""

    def __init__(self, names: Mapping[int, str], samples: int, tape: Tape | None) -> None:
        super().__init__()
        self.names, self.samples, self.tape = names, samples, tape
        self.moments: dict[str, Moments] = {}
        self.seen: set[str] = set()
        self.unknown: set[str] = set()  # parameters that no single known layer accounts for
        self.sources: list[GradientEdge] = []  # outputs of the layers that no gradient passes

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors((*args, kwargs)))
        of_samples = any(hasattr(t, _OF_SAMPLES) for t in tensors)
        if func is functional.batch_norm:
            _refuse_batch_statistics(*args, **kwargs)
        layer = LAYERS[func](*args, **kwargs) if func in LAYERS else None
        entry = None if self.tape is None else self.tape.entry(layer, func, args, kwargs, tensors)
        call = layer if entry is None else entry.call
        out = func(*args, **kwargs) if call is None else call.run(func, args, kwargs)
        results = list(_tensors((out,)))
        if not results:  # a size, a dtype
            return out
        if of_samples:
            for result in results:
                setattr(result, _OF_SAMPLES, True)
        if entry is not None:
            assert self.tape is not None
            in_order = in_front(results[0], self.samples) if layer is None else layer.fits(self.samples)
            self.tape.record(entry, results, of_samples and in_order)
        used = {self.names[id(t)] for t in tensors if id(t) in self.names}
        if used and layer is not None and hasattr(layer.input, _OF_SAMPLES) and layer.fits(self.samples):
            self._follow(layer, results[0])
            self.unknown |= used & self.seen
        else:
            self.unknown |= used
        self.seen |= used
        return out

    def _follow(self, layer: Layer, out: Tensor) -> None:
        """Take the moments when the backward pass comes by; the output may be changed in place before that."""
        version = layer.input._version

        def collect(grad: Tensor) -> None:
            if layer.input._version != version:
                raise RuntimeError("a layer's input was modified in place after the layer had used it")
            rules = ((layer.weight, layer.weight_moments), (layer.bias, layer.bias_moments))
            names = [self.names.get(id(parameter)) for parameter, _ in rules]
            asked = [name is not None and name not in self.unknown for name in names]
            layer.whole = all(asked)
            for name, wanted, (_, moments) in zip(names, asked, rules, strict=True):
                if name is not None and wanted:
                    self.moments[name] = moments(grad)

        if not layer.input.requires_grad:
            self.sources.append(get_gradient_edge(out))
        out.register_hook(collect)  # type: ignore[no-untyped-call]


def _refuse_batch_statistics(*args: Any, training: bool = False, **kwargs: Any) -> None:
    """Raise ValueError for ``functional.batch_norm`` with the statistics of the batch."""
    if training or (len(args) > 5 and args[5]):
        raise ValueError(BATCH_NORM.format("functional.batch_norm(training=True)"))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield all tensors in nested tuples, lists and dicts."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def run(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    direction: Mapping[str, Tensor] | None,
    trainable: Mapping[str, Tensor],
    tape: Tape | None,
) -> tuple[Spread, set[str]]:
    """Return mean and scatter, and the names of the parameters that are not in them; fill the tape."""
    plain = {name: p.detach().requires_grad_() for name, p in trainable.items()}
    with nullcontext() if direction is None else forward_ad.dual_level():
        parameters = dict(plain)
        if direction is not None:
            parameters = {name: dual(p, direction[name]) for name, p in plain.items()}
        recorder = _Recorder({id(p): name for name, p in parameters.items()}, len(inputs), tape)
        inputs = inputs.detach()
        setattr(inputs, _OF_SAMPLES, True)
        try:
            if tape is not None:
                tape.start(parameters)
            with recorder:
                outputs = functional_call(model, parameters, (inputs,))
            losses, slope, slopes = _slope(loss_fn, outputs, targets, tape)
            # The gradient has to pass every layer that was recorded, and no further.
            ends: list[Any] = [*recorder.sources, *(parameters[name] for name in recorder.unknown)]
            if ends and outputs.requires_grad and slope is not None:
                torch.autograd.grad(outputs, ends, slope, allow_unused=True)
        finally:
            recorder.sources.clear()  # they hold the graph, which holds the hooks, which hold the recorder
            if tape is not None:
                tape.release()
    known = {name: p for name, p in plain.items() if name not in recorder.unknown}
    moments = {name: m for name, m in recorder.moments.items() if name in known}
    gradient, hvp = (
        _mean(known, {name: (m.sums[i], m.squares[i]) for name, m in moments.items()}, len(losses)) for i in (0, 1)
    )
    curvatures = [m.curvatures for m in moments.values() if m.curvatures is not None]
    return Spread(losses, slopes, sum(curvatures, torch.zeros_like(losses)), *gradient, *hvp), recorder.unknown


def _slope(
    loss_fn: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, targets: Tensor, tape: Tape | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the losses of the samples, their sum's gradient by the outputs, ``None`` for a constant, and their slopes.

    The gradient's tangent is the symmetric Hessian of the losses times the tangent of the outputs: one more backward
    pass through the loss. Forward mode over its backward pass gives the same; torch goes through Python for that and
    takes 1 ms.
    """
    z, z1 = pair(outputs)
    z = z.detach().requires_grad_()
    losses = check_losses(loss_fn(z.clone(), targets), len(targets))  # a clone may be changed in place
    slopes = torch.zeros_like(losses.detach())
    if not losses.requires_grad:
        return losses, None, slopes
    again = z1 is not None or tape is not None
    (slope,) = torch.autograd.grad(losses.sum(), z, create_graph=again, allow_unused=True)
    if tape is not None:
        tape.finish(outputs, z, slope)
    if slope is None:
        return losses.detach(), None, slopes
    slope1 = None
    if z1 is not None:
        slopes = dots(slope.detach(), z1)
        if slope.requires_grad:
            (slope1,) = torch.autograd.grad(slope, z, z1, allow_unused=True, retain_graph=tape is not None)
    return losses.detach(), dual(slope.detach(), slope1), slopes


def _mean(
    parameters: Mapping[str, Tensor], sums: Mapping[str, tuple[Tensor | None, Tensor | None]], samples: int
) -> tuple[dict[str, Tensor], Tensor | float]:
    """Return the means, laid out as the parameters, and sum_i |G_i - G|^2 = sum_i |G_i|^2 - B |G|^2 of all."""
    means: dict[str, Tensor] = {}
    squares: list[Tensor] = []
    for name, p in parameters.items():
        total, square = sums.get(name, (None, None))
        if total is None or square is None:
            means[name] = torch.zeros_like(p, requires_grad=False)
        else:
            means[name] = torch.div(total, samples, out=torch.empty_like(p, requires_grad=False))
            squares.append(square)
    if not squares:
        return means, 0.0
    return means, (torch.stack(squares).sum() - samples * square_sum(*means.values())).clamp_min(0.0)
