"""Argument checks of the optimizers, and param groups that are checked as they come."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# arguments of constructors that belong to no param group, and the cell of super()
NO_OPTIONS = ("self", "params", "model", "loss_fn", "process_group", "__class__")


def check_number(name: str, value: object, low: float = 0.0, high: float = math.inf, *, open_low: bool = False) -> None:
    """Raise unless ``value`` is a finite number with low <= value < high (low < value if ``open_low``)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    number = float(value)
    if not (low < number if open_low else low <= number) or not number < high:
        bounds = f"{'>' if open_low else '>='} {low:g}" + (f" and < {high:g}" if math.isfinite(high) else "")
        raise ValueError(f"{name} must be a finite number {bounds}, got {value!r}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise unless ``value`` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Raise unless ``value`` is ``True``, ``False`` or ``None``."""
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{name} must be True, False or None, got {value!r}")


def check_bool(name: str, value: object) -> None:
    """Raise unless ``value`` is ``True`` or ``False``."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_lr(lr: object) -> None:
    """Raise unless ``lr`` is a number >= 0 or, for captured graphs, a tensor that holds one."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or not lr.is_floating_point():
            raise ValueError(f"lr as a tensor must hold one real number, got {lr.dtype} of shape {tuple(lr.shape)}")
        lr = float(lr)
    check_number("lr", lr)


def check_whole(optimizer: str, params: Sequence[Tensor]) -> None:
    """Raise for parameters that FSDP1 has flattened, several layers into one piece per rank."""
    if any(getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False) for p in params):
        raise TypeError(
            f"{optimizer} needs the norm of every layer, which FullyShardedDataParallel (FSDP1) flattens away; use "
            "torch.distributed.fsdp.fully_shard (FSDP2)"
        )


def check_not_divided(optimizer: str) -> None:
    """Raise inside ZeroRedundancyOptimizer, which gives every rank an optimizer for some of the weights only."""
    frame = sys._getframe() if torch.distributed.is_available() and torch.distributed.is_initialized() else None
    while frame is not None:
        if type(frame.f_locals.get("self")).__name__ == "ZeroRedundancyOptimizer":
            raise TypeError(
                f"{optimizer} keeps one filter for all weights, which ZeroRedundancyOptimizer divides among the ranks; "
                "use torch.distributed.fsdp.fully_shard (FSDP2)"
            )
        frame = frame.f_back


def check_real(optimizer: str, params: Sequence[Tensor]) -> None:
    """Raise unless all parameters hold real floating-point numbers."""
    for p in params:
        if not p.is_floating_point():
            raise TypeError(
                f"{optimizer} needs real floating-point parameters, got {p.dtype} of shape {tuple(p.shape)}"
                + ("; optimise torch.view_as_real of it" if p.is_complex() else "")
            )


def check_dense(optimizer: str, params: Sequence[Tensor]) -> None:
    """Raise if a gradient is sparse."""
    for p in params:
        if p.grad is not None and p.grad.layout != torch.strided:
            raise RuntimeError(
                f"{optimizer} does not support sparse gradients (parameter of shape {tuple(p.shape)}); "
                "use a dense gradient, e.g. Embedding(sparse=False)"
            )


def check_problem(optimizer: str, model: object, loss_fn: object) -> None:
    """Raise unless an optimizer can run the forward pass itself: a module of one process, and a function of losses."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got a {type(model).__name__}: {optimizer} runs the forward pass"
        )
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            f"{optimizer} runs in one process, but the model holds a DistributedDataParallel: give it the module "
            "inside and the whole batch"
        )
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable as loss_fn(outputs, targets), got a {type(loss_fn).__name__}")


def options_among(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a param group among a constructor's arguments, which are its ``locals()``."""
    return {name: value for name, value in arguments.items() if name not in NO_OPTIONS}


class CheckedOptimizer(torch.optim.Optimizer):
    """Base of all of them: a param group is checked by :meth:`_check_group`; one that fails is not added."""

    whole_numbers: tuple[str, ...] = ()  # the options that are counts
    made_in_groups: tuple[str, ...] = ()  # what the optimizer keeps in its groups: never taken from a user's dictionary
    _checked: Any = None  # the options of all groups as they were when they were checked last

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with options of their own.

        Raises:
            ValueError, TypeError: as the constructor does.
        """
        if isinstance(param_group, dict):  # a copy: dictionaries may be used for another optimizer, too
            param_group = {name: value for name, value in param_group.items() if name not in self.made_in_groups}
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_whole(type(self).__name__, group["params"])
            self._check_group(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        # numpy's numbers would keep torch.load(weights_only=True) from reading the state_dict
        for name in self.defaults:
            if isinstance(group[name], Real) and not isinstance(group[name], bool):
                group[name] = int(group[name]) if name in self.whole_numbers else float(group[name])

    def _check_rates(self) -> None:
        """Refuse rates that somebody, such as a schedule that divides by zero, wrote into the groups."""
        for group in self.param_groups:
            for name in ("lr", "weight_decay"):
                value = group.get(name, 0.0)
                if not (type(value) is float and 0.0 <= value < math.inf) and not isinstance(value, Tensor):
                    check_number(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # load_state_dict, unpickling and deepcopy end here: what does not fit is refused before anything has changed
        name = type(self).__name__
        first: dict[str, Any] = next(iter(getattr(self, "param_groups", ())), {})
        needed = [option for option in first if option in (*self.defaults, *self.made_in_groups)]
        for group in state.get("param_groups", []):
            if missing := [option for option in needed if option not in group]:
                raise ValueError(f"a param group of this state_dict has no {missing[0]}: it was not saved by {name}")
        for p, kept in state.get("state", {}).items():
            for entry, value in kept.items() if isinstance(p, Tensor) else ():
                if isinstance(value, Tensor) and value.dim() and value.shape != p.shape:
                    raise ValueError(
                        f"this state_dict holds {entry!r} of shape {tuple(value.shape)} for a parameter of shape "
                        f"{tuple(p.shape)}: it belongs to another model, or to the same parameters in another order"
                    )
        super().__setstate__(state)

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise a ValueError or a TypeError that names what is wrong with the options or parameters of a group."""
        raise NotImplementedError
