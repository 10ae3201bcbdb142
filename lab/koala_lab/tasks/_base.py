"""What a task is: its data, its networks, one training step and its test metrics."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from koala_lab.baselines.registry import OPTIMIZERS

if TYPE_CHECKING:
    from koala_lab.config import RunConfig

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Task(ABC):
    """One kind of training. A subclass takes its own options as keywords after ``device`` (``task_args``).

    Attributes:
        datasets: names of the data sets that it can be trained on.
        networks: its networks by name.
        config: the run.
        losses: names of the entries of what :meth:`step` returns.
        data: the data set; a result records its ``title``, ``tag`` and ``identity``.
        network: everything that is trained.
        parts: the modules that get an optimizer of their own each; of one network, ``"network"``.
        steps_per_epoch: number of batches of an epoch.
        clip_norm: the gradient is shortened to this norm where it is longer, before the optimizer sees it; 0: never.
        loss_fn: per-sample loss (outputs, targets) -> ``(B,)``; set only if batches are (inputs, targets). Needed by
            optimizers that run the forward pass themselves.
    """

    datasets: ClassVar[Collection[str]]
    networks: ClassVar[Mapping[str, Callable[..., nn.Module]]]
    losses: tuple[str, ...] = ("train_loss",)

    config: RunConfig
    data: Any
    network: nn.Module
    parts: Mapping[str, nn.Module]
    steps_per_epoch: int
    clip_norm: float = 0.0
    loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None

    @abstractmethod
    def __init__(self, config: RunConfig, device: torch.device) -> None: ...

    @abstractmethod
    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Iterate over an epoch from batch ``start`` on, the same ones however often the run was interrupted."""

    def sample_losses(self, batch: Any) -> Tensor:
        """Return the per-sample losses of a batch at the present weights, ``(B,)``, for tasks that have one loss."""
        raise NotImplementedError(f"{type(self).__name__} has no single loss")

    def step(self, batch: Any, optimizers: Mapping[str, Optimizer]) -> Tensor:
        """Make one training step; return the detached losses, shape ``(len(losses),)``, without reading them back."""
        optimizer = optimizers["network"]
        if OPTIMIZERS[self.config.optimizer].own_forward:
            loss: Any = optimizer.step(*batch)
            return loss.reshape(1)  # type: ignore[no-any-return]
        losses_of = partial(self.sample_losses, batch)
        return closure_step(optimizer, losses_of, clip_norm=self.clip_norm, create_graph=self.second_order).reshape(1)

    @property
    def second_order(self) -> bool:
        """Say whether the optimizer differentiates the gradients."""
        return OPTIMIZERS[self.config.optimizer].second_order

    @abstractmethod
    def evaluate(self, network: nn.Module) -> dict[str, float]:
        """Return the test metrics of a network like :attr:`network`."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return what lives from one step to the next beside network and optimizers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027 - most tasks have none
        """Restore it."""

    def pictures(self) -> dict[str, str]:
        """Return small pictures of the trained network, base64 PNG by name."""
        return {}

    def provenance(self) -> dict[str, Any]:
        """Return what the provenance of a result should hold beside what it has for every task."""
        return {}


def options(cls: type[Task], config: RunConfig) -> dict[str, Any]:
    """Return the ``task_args`` of a configuration, refused where the task does not have them."""
    known = [p.name for p in inspect.signature(cls).parameters.values() if p.kind is p.KEYWORD_ONLY]
    given = dict(config.task_args)
    for name in given:
        if name not in known:
            raise TypeError(f"task {config.task!r} has no option {name!r}; it has {', '.join(known) or 'none'}")
    return given


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """Return the precision of a run, as a context for forward passes."""
    precision = PRECISIONS[config.precision]
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)


def closure_step(
    optimizer: Optimizer, losses_of: Callable[[], Tensor], *, clip_norm: float = 0.0, create_graph: bool = False
) -> Tensor:
    """One step on per-sample losses, in the protocol that all optimizers understand.

    Args:
        optimizer: any optimizer.
        losses_of: computes the losses, shape ``(B,)``, at the weights as they are when it is called.
        clip_norm: as in :class:`Task`.
        create_graph: keep the graph of the gradients, for an optimizer that differentiates them.

    Returns:
        The mean loss, a detached scalar.
    """

    def closure() -> Tensor:
        optimizer.zero_grad()
        # The fused kernels of attention have no second derivative.
        with sdpa_kernel(SDPBackend.MATH) if create_graph else nullcontext():
            losses = losses_of()
        losses.mean().backward(create_graph=create_graph)  # type: ignore[no-untyped-call]
        if clip_norm:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip_norm)
        return losses

    # KOALA returns the mean loss, torch's optimizers what the closure returned.
    returned: Any = optimizer.step(closure)  # type: ignore[arg-type]
    loss: Tensor = returned.detach().mean()
    return loss
