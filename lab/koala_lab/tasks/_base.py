"""What a task is: its data, its networks, one training step and its test metrics."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from koala_lab.baselines.registry import OWN_FORWARD, SECOND_ORDER
from koala_lab.config import PRECISIONS, RunConfig


class Task(ABC):
    """One kind of training. A subclass takes its own options as keywords after ``device`` (``task_args``).

    Attributes:
        config: the run.
        losses: names of the entries of what :meth:`step` returns.
        data: the data set; a result records its ``title``, ``tag`` and ``identity``.
        network: everything that is trained.
        parts: the modules that get an optimizer of their own each; of one network, ``"network"``.
        steps_per_epoch: number of batches of an epoch.
        clip_norm: the gradient is shortened to this norm where it is longer, before the optimizer sees it; 0: never.
        loss_fn: losses of the samples, shape ``(B,)``, of the network's outputs and of targets, if a batch is a pair of
            inputs and targets; an optimizer that runs the forward pass itself needs it.
    """

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
        """The batches of an epoch from number ``start`` on, the same ones however often the run was interrupted."""

    def sample_losses(self, batch: Any) -> Tensor:
        """Losses of the samples of a batch at the weights as they are, shape ``(B,)``, for tasks that have one loss."""
        raise NotImplementedError(f"{type(self).__name__} has no single loss")

    def step(self, batch: Any, optimizers: Mapping[str, Optimizer]) -> Tensor:
        """One training step; returns the detached losses, shape ``(len(losses),)``, without reading them back."""
        optimizer = optimizers["network"]
        if self.config.optimizer in OWN_FORWARD:
            loss: Any = optimizer.step(*batch)
            return loss.reshape(1)  # type: ignore[no-any-return]
        losses_of = partial(self.sample_losses, batch)
        return closure_step(optimizer, losses_of, clip_norm=self.clip_norm, create_graph=self.second_order).reshape(1)

    @property
    def second_order(self) -> bool:
        """Whether the optimizer differentiates the gradients."""
        return self.config.optimizer in SECOND_ORDER

    @abstractmethod
    def evaluate(self, network: nn.Module) -> dict[str, float]:
        """The test metrics of a network like :attr:`network`."""

    def state_dict(self) -> dict[str, Tensor]:
        """What lives from one step to the next beside network and optimizers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027 - most tasks have none
        """Restore it."""

    def pictures(self) -> dict[str, str]:
        """Small pictures of the trained network, base64 PNG by name."""
        return {}

    def provenance(self) -> dict[str, Any]:
        """What the provenance of a result should hold beside what it has for every task."""
        return {}


def options(cls: type[Task], config: RunConfig) -> dict[str, Any]:
    """The ``task_args`` of a configuration, refused where the task does not have them."""
    known = [p.name for p in inspect.signature(cls).parameters.values() if p.kind is p.KEYWORD_ONLY]
    given = dict(config.task_args)
    for name in given:
        if name not in known:
            raise TypeError(f"task {config.task!r} has no option {name!r}; it has {', '.join(known) or 'none'}")
    return given


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """The precision of a run, as a context for forward passes."""
    precision = PRECISIONS[config.precision]
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)


def check_clip_norm(clip_norm: float) -> None:
    """Refuse what is no finite number >= 0."""
    if not (isinstance(clip_norm, int | float) and 0 <= clip_norm < math.inf):
        raise ValueError(f"clip_norm must be a finite number >= 0, got {clip_norm!r}")


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
