"""Moments over the samples of a minibatch: loss, gradient and Hessian-vector product, each with its variance.

They are what MEKA observes at every step (paper sections 2 and 3; ``jax.vmap`` there). ``method="vmap"`` takes the
gradients of the samples one by one, in chunks. ``method="structured"`` never forms them all. One pass of forward mode
over the backward pass gives every layer its inputs a_i, its output gradients g_i and their tangents a'_i, g'_i along
the direction. For a matrix, G_i = g_i a_i^T is the gradient of sample i and H_i = g'_i a_i^T + g_i a'_i^T its
Hessian-vector product. A scalar variance needs no more than the sums of G_i and H_i, which are matrix products
over the batch, and their squared norms, which follow from the structure of the layer:

    sum_i |G_i - G|^2 = sum_i |G_i|^2 - B |G|^2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from koala_lib.moments import _structured, _vmap
from koala_lib.moments._products import BATCH_NORM, Spread

__all__ = ["METHODS", "SampleMoments", "sample_moments"]

METHODS = ("auto", "vmap", "structured")


class SampleMoments(NamedTuple):
    """Means over a minibatch, and unbiased variances between its samples (not of the mean: not divided by B)."""

    loss: Tensor  # 0-dim
    loss_variance: Tensor  # 0-dim, float64
    gradient: dict[str, Tensor]  # by parameter name
    gradient_variance: Tensor  # 0-dim, float64: average over all coordinates
    hvp: dict[str, Tensor] | None  # None without a direction
    hvp_variance: Tensor | None


def sample_moments(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    direction: Mapping[str, Tensor] | None = None,
    method: str = "auto",
) -> SampleMoments:
    """Means and variances of loss, gradient and Hessian-vector product over the samples of a minibatch.

    Parameters
    ----------
    model
        Called as ``model(inputs)``; treats every sample by itself. Its trainable parameters are the coordinates.
    loss_fn
        ``loss_fn(outputs, targets)`` returns one loss per sample, shape (B,). The parameters enter it through
        ``outputs`` alone.
    inputs, targets
        Tensors whose leading dimension counts the B >= 2 samples.
    direction
        By parameter name, the vector d the Hessian of each sample's loss is multiplied with: one tensor in the shape
        of each trainable parameter. ``None`` leaves the products out.
    method
        ``"structured"`` takes the time of three to five forward and backward passes and three times the memory of one.
        It knows linear layers, convolutions, group norm, layer norm and embeddings. Parameters that go anywhere else,
        or are used more than once, are done by ``"vmap"``, those alone. ``"vmap"`` is the slow reference.
        ``"auto"`` is ``"structured"``, or ``"vmap"`` where the model uses an operation without a forward-mode rule.

    Returns
    -------
    SampleMoments
        Gradient and product have the shapes, dtypes and memory layouts of the parameters.

    Raises
    ------
    ValueError
        For fewer than two samples, a network with BatchNorm, a loss of another shape, a direction that does not fit, or
        one for a network with torch's recurrent layers.
    TypeError
        For inputs or targets that are no tensors.

    Notes
    -----
    "structured" subtracts B |G|^2 from a sum of squares, so the relative error of a variance is that of the dtype times
    1 + B |G|^2 / sum_i |G_i - G|^2. Random layers such as dropout draw anew for what falls back to "vmap".

    Examples
    --------
    Loss (w x)^2 / 2 on x = 1 and 2 at w = 1: gradients 1 and 4, Hessians 1 and 4.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.ones_(model.weight)
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> moments = sample_moments(model, lambda o, y: o[:, 0] ** 2 / 2, x, x, {"weight": torch.tensor([[2.0]])})
    >>> moments.gradient["weight"].item(), moments.gradient_variance.item()
    (2.5, 4.5)
    >>> moments.hvp["weight"].item(), moments.hvp_variance.item()
    (5.0, 18.0)
    """
    _check(model, inputs, targets, method)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("the model has no trainable parameter")
    if direction is not None:
        _check_direction(model, trainable, direction)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward-mode rule
        parts = _spreads(model, loss_fn, inputs, targets, direction, method, list(trainable))
    losses = parts[0].losses
    size = sum(p.numel() for p in trainable.values()) * (len(losses) - 1)

    def variance(scatters: Iterable[Tensor | float]) -> Tensor:
        return torch.as_tensor(sum(scatters), dtype=torch.float64, device=losses.device) / size

    gradients = {n: t for part in parts for n, t in part.gradient.items()}
    products = {n: t for part in parts for n, t in part.hvp.items()}
    return SampleMoments(
        losses.mean(),
        losses.double().var(),
        {name: gradients[name] for name in trainable},
        variance(part.gradient_scatter for part in parts),
        None if direction is None else {name: products[name] for name in trainable},
        None if direction is None else variance(part.hvp_scatter for part in parts),
    )


def _spreads(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    direction: Mapping[str, Tensor] | None,
    method: str,
    names: list[str],
) -> list[Spread]:
    """Every parameter is in one of them."""
    if method == "vmap":
        return [_vmap.run(model, loss_fn, inputs, targets, direction, names)]
    try:
        spread, unknown = _structured.run(model, loss_fn, inputs, targets, direction)
    except NotImplementedError:  # what torch raises for an operation without a forward-mode rule
        if method == "structured":
            raise
        return _spreads(model, loss_fn, inputs, targets, direction, "vmap", names)
    if not unknown:
        return [spread]
    return [spread, _vmap.run(model, loss_fn, inputs, targets, direction, [n for n in names if n in unknown])]


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
            raise ValueError(
                f"{name!r} ({type(module).__name__}) has no forward-mode derivative in torch, which Hessian-vector "
                "products of single samples need; use a network without torch's recurrent layers"
            )
    for name in trainable.keys() ^ direction.keys():
        what = "lacks" if name in trainable else "has"
        why = "which is trainable" if name in trainable else "which is no trainable parameter of the model"
        raise ValueError(f"direction {what} {name!r}, {why}; names are those of model.named_parameters()")
    for name, p in trainable.items():
        if direction[name].shape != p.shape:
            shapes = f"{tuple(direction[name].shape)}, the parameter {tuple(p.shape)}"
            raise ValueError(f"direction[{name!r}] has shape {shapes}")
