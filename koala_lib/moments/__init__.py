"""Moments over the samples of a minibatch: loss, gradient and Hessian-vector product, each with its variance.

They are what MEKA observes at every step (paper sections 2 and 3; ``jax.vmap`` there). ``method="vmap"`` takes the
gradients of the samples one by one, in chunks. ``method="structured"`` never forms them all. One pass of forward mode
over the backward pass gives every layer its inputs a_i, its output gradients g_i and their tangents a'_i, g'_i along
the direction. For a matrix, G_i = g_i a_i^T is the gradient of sample i and H_i = g'_i a_i^T + g_i a'_i^T its
Hessian-vector product. A scalar variance needs no more than the sums of G_i and H_i, which are matrix products
over the batch, and their squared norms, which follow from the structure of the layer:

    sum_i |G_i - G|^2 = sum_i |G_i|^2 - B |G|^2.

Where only numbers along a direction are asked for, delta^T grad f_i and delta^T Hess f_i delta, no product with a
Hessian is needed: :func:`observe` remembers the forward pass, and one pass of tangents through it gives them for any
further direction at the price of a gradient or less (:mod:`koala_lib.moments._tangents`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from koala_lib.moments import _structured, _vmap
from koala_lib.moments._products import BATCH_NORM, BY_SAMPLE, NO_FORWARD_MODE, Spread
from koala_lib.moments._tangents import Tape, UnknownCallError

__all__ = ["METHODS", "Along", "Observation", "SampleMoments", "observe", "sample_moments"]

METHODS = ("auto", "vmap", "structured")
TRANSFORMS = re.compile(
    r"vmap|functorch|torch\.func\b|^Batch norm got a batched tensor"
)  # errors of torch's transforms


class SampleMoments(NamedTuple):
    """Means over a minibatch, and unbiased variances between its samples (not of the mean: not divided by B)."""

    loss: Tensor  # 0-dim
    loss_variance: Tensor  # 0-dim, float64
    gradient: dict[str, Tensor]  # by parameter name
    gradient_variance: Tensor  # 0-dim, float64: average over all coordinates
    hvp: dict[str, Tensor] | None  # this and all below None without a direction d
    hvp_variance: Tensor | None
    slope_variance: Tensor | None  # of d^T grad f_i; 0-dim, float64
    curvature: Tensor | None  # d^T Hess f_i d, 0-dim, float64
    curvature_variance: Tensor | None


class Along(NamedTuple):
    """Slope and curvature of the losses along a direction: mean and variance over the samples, 0-dim, float64."""

    slope: Tensor
    slope_variance: Tensor
    curvature: Tensor
    curvature_variance: Tensor


class Observation(NamedTuple):
    """What :func:`observe` returns."""

    moments: SampleMoments
    along: Callable[[Mapping[str, Tensor]], Along]


def sample_moments(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    direction: Mapping[str, Tensor] | None = None,
    method: str = "auto",
) -> SampleMoments:
    """Measure loss, gradient and Hessian-vector product over the samples of a minibatch: means and variances.

    With a direction also slope and curvature along it.

    Args:
        model: Called as ``model(inputs)``; treats every sample by itself. Its trainable parameters are the coordinates.
        loss_fn: ``loss_fn(outputs, targets)`` returns one loss per sample, shape (B,). The parameters enter it through
            ``outputs`` alone.
        inputs: Tensor whose leading dimension counts the B >= 2 samples.
        targets: Tensor with the same leading dimension.
        direction: By parameter name, the vector d the Hessian of each sample's loss is multiplied with: one tensor in
            the shape of each trainable parameter. ``None`` leaves the products out.
        method: ``"structured"`` takes the time of three to five forward and backward passes and three times the memory
            of one. It knows linear layers, convolutions, group norm, layer norm and embeddings. Parameters that go
            anywhere else, or are used more than once, are done by ``"vmap"``, those alone. ``"vmap"`` is the slow
            reference. ``"auto"`` is ``"structured"``, or ``"vmap"`` where the model uses an operation without a
            forward-mode rule.

    Returns:
        Gradient and product have the shapes, dtypes and memory layouts of the parameters.

    Raises:
        ValueError: For fewer than two samples, a network with BatchNorm, a loss of another shape, a direction that does
            not fit, or one for a network with a layer that has no forward-mode derivative, such as torch's recurrent
            ones or weight norm, or that cannot be differentiated sample by sample; the message names it.
        TypeError: For inputs, targets or losses that are no tensors.

    Notes:
        "structured" subtracts B |G|^2 from a sum of squares, so the relative error of a variance is that of the dtype
        times 1 + B |G|^2 / sum_i |G_i - G|^2. Random layers such as dropout draw anew for what falls back to "vmap".

    Examples:
        Loss (w x)^2 / 2 on x = 1 and 2 at w = 1: gradients 1 and 4, Hessians 1 and 4.

        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> moments = sample_moments(model, lambda o, y: o[:, 0] ** 2 / 2, x, x, {"weight": torch.tensor([[2.0]])})
        >>> moments.gradient["weight"].item(), moments.gradient_variance.item()
        (2.5, 4.5)
        >>> moments.hvp["weight"].item(), moments.hvp_variance.item()
        (5.0, 18.0)
        >>> moments.slope_variance.item(), moments.curvature.item(), moments.curvature_variance.item()
        (18.0, 10.0, 72.0)
    """
    return _observe(model, loss_fn, inputs, targets, direction, method, None)


def observe(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    direction: Mapping[str, Tensor] | None = None,
    method: str = "auto",
) -> Observation:
    """Take the moments, and keep what gives slope and curvature along further directions of the same samples.

    ``along`` belongs to the weights as they are, so it must be called before they move, and it keeps the activations
    of the forward pass and their gradients alive. A call takes about as long as a gradient or less; as long as all
    moments with ``method="vmap"``, and where the network holds an operation whose second derivative is not known
    sample by sample (dropout, say, or a cumulative sum).

    Args:
        model: As in :func:`sample_moments`, and so are the others.
        loss_fn: Losses of the samples.
        inputs: Samples.
        targets: Their targets.
        direction: Of the Hessian-vector products.
        method: ``"auto"``, ``"structured"`` or ``"vmap"``.

    Returns:
        ``moments`` and ``along``, a function of a direction like that one: mean and variance of delta^T grad f_i and
        delta^T Hess f_i delta.
    """
    tape = Tape()
    moments = _observe(model, loss_fn, inputs, targets, direction, method, tape)

    def along(direction: Mapping[str, Tensor]) -> Along:
        _check_direction(model, _trainable(model), direction)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                of_samples = torch.stack(tape.along(direction)).double()
        except UnknownCallError:
            again = sample_moments(model, loss_fn, inputs, targets, direction, method)
            assert again.slope_variance is not None
            assert again.curvature is not None
            assert again.curvature_variance is not None
            slope = torch.stack([(again.gradient[n] * d).sum(dtype=torch.float64) for n, d in direction.items()]).sum()
            return Along(slope, again.slope_variance, again.curvature, again.curvature_variance)
        (slope, curvature), (slope_variance, curvature_variance) = of_samples.mean(1), of_samples.var(1)
        return Along(slope, slope_variance, curvature, curvature_variance)

    return Observation(moments, along)


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    trainable: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("the model has no trainable parameter")
    return trainable


def _observe(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    direction: Mapping[str, Tensor] | None,
    method: str,
    tape: Tape | None,
) -> SampleMoments:
    _check(model, inputs, targets, method)
    trainable = _trainable(model)
    if direction is not None:
        _check_direction(model, trainable, direction)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward-mode rule
        try:
            parts = _spreads(model, loss_fn, inputs, targets, direction, method, trainable, tape)
        except NotImplementedError as error:
            other = ', or method="vmap", which may need no rule for it' if method == "structured" else ""
            raise ValueError(NO_FORWARD_MODE.format(_layer_of(error, model)) + other) from error
        except RuntimeError as error:
            if not TRANSFORMS.search(str(error)):
                raise
            reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
            raise ValueError(BY_SAMPLE.format(_layer_of(error, model), reason)) from error
    losses = parts[0].losses
    size = sum(p.numel() for p in trainable.values()) * (len(losses) - 1)

    def variance(scatters: Iterable[Tensor | float]) -> Tensor:
        return torch.as_tensor(sum(scatters), dtype=torch.float64, device=losses.device) / size

    gradients = {n: t for part in parts for n, t in part.gradient.items()}
    products = {n: t for part in parts for n, t in part.hvp.items()}
    numbers = [losses]
    if direction is not None:
        slopes, curvatures = parts[0].slopes, [c for part in parts if (c := part.curvatures) is not None]
        assert slopes is not None
        numbers += [slopes, sum(curvatures[1:], curvatures[0])]
    of_samples = torch.stack([n.detach() for n in numbers]).double()
    loss_variance, slope_variance, curvature_variance = [*of_samples.var(1), None, None][:3]
    return SampleMoments(
        losses.mean(),
        loss_variance,
        {name: gradients[name] for name in trainable},
        variance(part.gradient_scatter for part in parts),
        None if direction is None else {name: products[name] for name in trainable},
        None if direction is None else variance(part.hvp_scatter for part in parts),
        slope_variance,
        None if direction is None else of_samples[2].mean(),
        curvature_variance,
    )


def _spreads(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    direction: Mapping[str, Tensor] | None,
    method: str,
    trainable: Mapping[str, Tensor],
    tape: Tape | None,
) -> list[Spread]:
    """Return spreads that together hold every parameter once."""
    problem = model, loss_fn, inputs, targets, direction, trainable
    if method == "vmap":
        if tape is not None:
            tape.known = False
        return [_vmap.run(*problem, list(trainable))]
    try:
        spread, unknown = _structured.run(*problem, tape)
    except NotImplementedError:  # what torch raises for an operation without a forward-mode rule
        if method == "structured":
            raise
        return _spreads(model, loss_fn, inputs, targets, direction, "vmap", trainable, tape)
    if not unknown:
        return [spread]
    return [spread, _vmap.run(*problem, [n for n in trainable if n in unknown])]


def _layer_of(error: BaseException, model: nn.Module) -> str:
    """Return the operation without a forward-mode rule and the innermost layer around it, for an error message."""
    names = {id(module): name for name, module in model.named_modules()}
    found, trace = "the model or the loss", error.__traceback__
    while trace is not None:
        layer = trace.tb_frame.f_locals.get("self")
        if id(layer) in names:
            found = f"{names[id(layer)]!r} ({type(layer).__name__})"
        trace = trace.tb_next
    operation = re.search(r"forward AD with ([\w:]+)", str(error))
    return f"{operation.group(1)} in {found}" if operation else found


def _check(model: nn.Module, inputs: Tensor, targets: Tensor, method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    for what, value in (("inputs", inputs), ("targets", targets)):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{what} must be one tensor with a leading dimension of samples, got {type(value).__name__}"
            )
    if inputs.dim() == 0 or targets.dim() == 0 or len(inputs) != len(targets):
        shapes = f"{tuple(inputs.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"inputs and targets must have one leading dimension of samples in common, got {shapes}")
    if len(inputs) < 2:
        raise ValueError(f"a variance between samples needs at least 2 of them, got a batch of {len(inputs)}")
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(BATCH_NORM.format(f"{name!r} ({type(module).__name__})"))


def _check_direction(model: nn.Module, trainable: Mapping[str, Tensor], direction: Mapping[str, Tensor]) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            raise ValueError(NO_FORWARD_MODE.format(f"{name!r} ({type(module).__name__})"))
    for name in trainable.keys() ^ direction.keys():
        what = "lacks" if name in trainable else "has"
        why = "which is trainable" if name in trainable else "which is no trainable parameter of the model"
        raise ValueError(f"direction {what} {name!r}, {why}; names are those of model.named_parameters()")
    for name, p in trainable.items():
        if direction[name].shape != p.shape:
            shapes = f"{tuple(direction[name].shape)}, the parameter {tuple(p.shape)}"
            raise ValueError(f"direction[{name!r}] has shape {shapes}")
