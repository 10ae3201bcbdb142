"""Filters: the scalars that an optimizer keeps for all weights, and the protocol predict -> observe -> step."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from koala_lib.optim._engine.checks import (
    CheckedOptimizer,
    check_flag,
    check_lr,
    check_not_divided,
    check_number,
    check_real,
)
from koala_lib.optim._engine.lists import scalar_dtype
from koala_lib.optim._engine.passes import Scalar, scalars
from koala_lib.optim._engine.sharded import check_meshes, is_sharded

Entries = dict[str, Tensor]  # a filter's scalars by name
COUNTS = ("skipped_steps", "negative_losses")  # the scalars that are no part of the filter's state, and stand last


class ScalarFilter(CheckedOptimizer):
    """Base of the optimizers with a filter: one small tensor of scalars, ``filter_entries`` in order, for all weights.

    It lives in every param group (the same tensor): there ``load_state_dict`` keeps its float64, which it would cast to
    the dtype of the weights in ``state``, and checkpoints keyed by parameter find it.
    """

    filter_entries: tuple[str, ...]  # one of them is "skipped_steps"
    per_group: tuple[str, ...] = ("lr",)  # the options that groups may set differently
    fixed: tuple[str, ...]  # the options that say how the filter starts, which nothing reads afterwards
    made_in_groups = ("filter", "predicted")
    new_entries = 0  # how many of the last entries states of version 0.1 have not

    def __init__(self, params: Any, defaults: dict[str, Any], filter_values: dict[str, float]) -> None:
        check_not_divided(type(self).__name__)
        self._check_options(defaults)
        self._accepted: dict[str, Any] = {}
        self._filter_values = [filter_values[name] for name in self.filter_entries]
        super().__init__(params, defaults)

    def _trained(self) -> Iterator[Tensor]:
        """Yield the parameters that are not frozen."""
        return (p for group in self.param_groups for p in group["params"] if p.requires_grad)

    @property
    def skipped_steps(self) -> int:
        """Count the steps without a usable observation (small gradient, non-finite loss). Waits for the device."""
        return int(self._filter()[self.filter_entries.index("skipped_steps")].item())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the one filter, e.g. after unfreezing them. A group's own options are ``per_group``.

        Raises:
            ValueError: if the group sets another option differently from the rest, or a value out of range.
            TypeError: for parameters that are not real floating-point tensors.
        """
        if self.param_groups and isinstance(param_group, dict):  # options may have changed since the constructor
            first = self.param_groups[0]
            shared = [name for name in self.defaults if name not in self.per_group and name in first]
            param_group = {name: first[name] for name in shared} | param_group
        super().add_param_group(param_group)
        group, first = self.param_groups[-1], self.param_groups[0]
        if "filter" not in first:
            device = first["params"][0].device if first["params"] else torch.device("cpu")
            first["filter"] = torch.tensor(self._filter_values, dtype=scalar_dtype(device), device=device)
        group["filter"] = first["filter"]
        if group is first:
            self._accepted.update(self._shared())

    def _shared(self) -> dict[str, Any]:
        """Return the options that all groups have in common, as they are now."""
        first = self.param_groups[0]
        return {name: first[name] for name in self.defaults if name in first and name not in self.per_group}

    def _check_changes(self) -> None:
        """Refuse what somebody wrote into a param group since the last step, where nothing would read it."""
        self._check_rates()
        shared = self._shared()
        if shared != self._accepted:
            for name in self.fixed:
                if shared[name] != self._accepted[name]:
                    raise ValueError(
                        f"{name} was changed from {self._accepted[name]!r} to {shared[name]!r} in a param group, but "
                        f"{type(self).__name__} reads it in the constructor only: set it back, or make a new optimizer"
                    )
            self._check_options(self.param_groups[0])
            self._accepted.update(shared)
        for group in self.param_groups[1:]:
            self._check_shared(group, shared)

    def _check_options(self, options: dict[str, Any]) -> None:
        """Raise a ValueError or a TypeError that names what is wrong with the options that all groups share."""
        raise NotImplementedError

    def _check_group(self, group: dict[str, Any]) -> None:
        check_lr(group["lr"])
        now = self.defaults if group is self.param_groups[0] else self.defaults | self._shared()
        self._check_shared(group, {name: value for name, value in now.items() if name not in self.per_group})
        check_real(type(self).__name__, group["params"])

    def _check_shared(self, group: dict[str, Any], shared: dict[str, Any]) -> None:
        for name, value in shared.items():
            if group[name] != value:
                raise ValueError(
                    f"{name}={group[name]!r} in a param group: {type(self).__name__} keeps one filter for all groups, "
                    f"so all of them have the same {name} (here {value!r}); a group may set "
                    + ", ".join(self.per_group)
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        # load_state_dict, unpickling and deepcopy end here: check what came, then share one filter between the groups.
        groups = state.get("param_groups", [])
        saved = groups[0].get("filter") if groups else None
        if isinstance(saved, Tensor) and saved.numel() == len(self.filter_entries) - self.new_entries:
            saved = torch.cat([saved, saved.new_zeros(self.new_entries)])  # of version 0.1
        if not isinstance(saved, Tensor) or saved.numel() != len(self.filter_entries):
            raise ValueError(
                f"this state_dict holds no filter of {type(self).__name__} ({', '.join(self.filter_entries)}): "
                "it was saved by another optimizer or by other options"
            )
        if not saved.isfinite().all():
            raise ValueError(
                f"the filter in this state_dict of {type(self).__name__} is not finite: load an earlier one"
            )
        super().__setstate__(state)
        self._share_filter(saved)
        self._accepted = self._shared()

    def _share_filter(self, values: Tensor) -> None:
        """Put one tensor of scalars into all groups."""
        device = next((p.device for group in self.param_groups for p in group["params"]), values.device)
        values = values.to(device=device, dtype=scalar_dtype(device))
        for group in self.param_groups:
            group["filter"] = values

    def _filter(self) -> Tensor:
        """Return the filter's tensor, on the device of the first parameter even if the model was moved meanwhile."""
        values: Tensor = self.param_groups[0]["filter"]
        first = next((p for group in self.param_groups for p in group["params"]), None)
        if first is not None and first.device != values.device:
            self._share_filter(values)
            values = self.param_groups[0]["filter"]
        return values

    def _entries(self) -> Entries:
        """Return the filter's scalars by name, as views of its tensor."""
        return dict(zip(self.filter_entries, self._filter().unbind(), strict=True))


class Losses(NamedTuple):
    """What is kept of the losses seen since ``predict()``."""

    total: Scalar  # their sum
    squares: Scalar  # the sum of their squares
    number: int


@dataclass
class Pending:
    """What is known since ``predict()``, in one object: wrappers that act for an optimizer share it."""

    losses: tuple[Losses, ...] = ()  # one entry per call of observe()
    earlier: int = 0  # how many of them came before the last predict(): of micro-batches whose gradients are there
    dtype: torch.dtype = torch.float32  # of the losses
    zeroed: tuple[tuple[int, int], ...] = ()  # gradients that zero_grad() filled with zeros, and their versions


class LossFilter(ScalarFilter):
    """Base of the optimizers that filter the loss: ``predict`` -> loss and gradient -> ``step``.

    Subclasses implement :meth:`_predict`, :meth:`_update` and :meth:`_initialise`.
    """

    per_group = ("lr", "weight_decay")
    fixed: tuple[str, ...] = ("initial_variance", "initial_measurement_noise")
    new_entries = 1
    filter_type: Any  # the NamedTuple of the filter's scalars
    _pending: Pending
    _process_group: Any  # no value in the class, which would hide the optimizer's from wrappers that inherit from it
    _knows_ranks: bool  # whether somebody said, or was asked, what joins the ranks

    @property
    def negative_losses(self) -> int:
        """Return how many steps had a negative mean loss, which "relative" cannot go below. Waits for the device."""
        return int(self._filter()[self.filter_entries.index("negative_losses")].item())

    def __init__(
        self, params: Any, defaults: dict[str, Any], filter_values: dict[str, float], process_group: Any
    ) -> None:
        if process_group not in (None, False) and not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(
                "process_group must be a torch.distributed.ProcessGroup, None, or False for ranks that mean to be "
                f"alone, got {process_group!r}"
            )
        self._process_group = process_group or None
        self._knows_ranks = process_group is not None
        self._pending = Pending()
        super().__init__(params, defaults, filter_values)

    def _check_options(self, options: dict[str, Any]) -> None:
        for name in ("initial_variance", "initial_measurement_noise", "min_grad_norm"):
            check_number(name, options[name])
        check_number("noise_decay", options["noise_decay"], high=1.0)
        if options["measurement_noise"] is not None:
            check_number("measurement_noise", options["measurement_noise"], open_low=True)
        check_flag("foreach", options["foreach"])
        check_flag("fused", options["fused"])

    # -- what a subclass fills in ------------------------------------------------------------------------------

    def _initialise(self) -> None:
        """Create the per-parameter state that does not exist yet."""
        raise NotImplementedError

    def _predict(self) -> None:
        """Move weights and filter to the prediction."""
        raise NotImplementedError

    def _update(self, losses: Losses) -> Scalar:
        """Correct weights and filter with the losses; return their mean."""
        raise NotImplementedError

    # -- the protocol --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self) -> None:
        """Move weights and filter to the prediction, where loss and gradient must be evaluated.

        A second call before ``step`` moves nothing. Losses observed before it still count if their gradients are there,
        as those of micro-batches are, and are forgotten if the gradients were cleared since: so a step that a gradient
        scaler skipped can simply be repeated. Between this call and the backward pass clear them with the optimizer's
        :meth:`zero_grad`: what ``model.zero_grad()`` does is seen before this call, or by ``observe`` before backward.

        Raises:
            RuntimeError: in ``torch.inference_mode``, where only evaluation belongs.
            ValueError, TypeError: if an option was changed in a param group to what the constructor would refuse, in
                some of the groups only, or where nothing reads it any more.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{type(self).__name__}.predict() was called in torch.inference_mode, but it moves the weights, for "
                "training: let the hook that calls it do so only where torch.is_grad_enabled()"
            )
        options = [[(type(group.get(name)), group.get(name)) for name in self.defaults] for group in self.param_groups]
        if options != self._checked:
            self._check_changes()
            self._checked = options
        pending = self._pending
        if pending.losses and not self._has_gradients():
            pending.losses = ()
        pending.earlier = len(pending.losses)
        if not self.param_groups[0]["predicted"]:
            if not self._knows_ranks:
                self._warn_of_ranks()
            self._predict()
            for group in self.param_groups:
                group["predicted"] = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and forget the losses from before the last ``predict()``, whose gradients they were."""
        super().zero_grad(set_to_none)
        pending = self._pending
        pending.losses, pending.earlier = pending.losses[pending.earlier :], 0
        grads = [] if set_to_none else [p.grad for p in self._trained() if p.grad is not None]
        pending.zeroed = tuple((id(g), g._version) for g in grads)

    def _has_gradients(self) -> bool:
        """Say whether a gradient was computed since they were cleared."""
        grads = [p.grad for p in self._trained() if p.grad is not None]
        return any((id(g), g._version) not in self._pending.zeroed for g in grads)

    def observe(self, losses: Tensor | float) -> None:
        """Hand in the losses whose gradient is in ``p.grad``; the next ``step()`` uses them.

        Args:
            losses: per-sample losses, any shape, or their mean as a scalar (which counts as one sample). Calls between
                ``predict`` and ``step`` add up, as the micro-batches of an accumulated gradient do.

        Raises:
            RuntimeError: without a ``predict()`` before the forward pass.
            TypeError, ValueError: if the losses are no real floating-point numbers, or none at all.
        """
        if not self.param_groups[0]["predicted"]:
            raise RuntimeError(
                f"{type(self).__name__} got a loss without predict(): loss and gradient must be taken at the predicted "
                "weights; call optimizer.predict() before the forward pass, or use optimizer.step(closure)"
            )
        if not isinstance(losses, (Tensor, float, int)):
            raise TypeError(f"losses must be a tensor or a float, got a {type(losses).__name__}")
        losses = torch.as_tensor(losses).detach()
        if not losses.is_floating_point():
            raise TypeError(f"losses must be real floating-point numbers, got dtype {losses.dtype}")
        if losses.numel() == 0:
            raise ValueError("losses are empty: a step needs at least one sample")
        pending = self._pending
        if pending.earlier and not self._has_gradients():  # somebody else cleared them, such as model.zero_grad()
            pending.losses, pending.earlier = pending.losses[pending.earlier :], 0
        values = losses.to(self.param_groups[0]["filter"])
        seen = Losses(scalars(values.sum()), scalars(values.square().sum()), losses.numel())
        pending.losses += (seen,)
        pending.dtype = losses.dtype

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Tensor] | None = None, *, loss: Tensor | float | None = None
    ) -> Tensor | None:
        """Make one step; weights and filter are the posterior afterwards.

        It has three forms: ``step(closure)``; ``predict()``, forward and backward pass, ``step(loss=losses)``; or
        ``predict()``, both passes, ``observe(losses)``, ``step()``.

        Args:
            closure: clears the gradients, computes the losses, calls ``backward`` on their mean, returns the losses.
                Where it hands them to ``observe``, these count and not what it returns, and with them those of earlier
                micro-batches, unless it clears their gradients.
            loss: the same losses where forward and backward were run by the caller after :meth:`predict`.

        Returns:
            The mean loss as a 0-dim tensor, still on the device. ``None`` after a closure that returned None and left
            no gradient, a batch left out: a step without observation. ``None``, too, for the bare ``step()`` at lr = 0
            with which distributed checkpoints create the state; nothing moves then.

        Raises:
            RuntimeError: if there is no loss, or no ``predict()`` before it, or a gradient is sparse.
            TypeError, ValueError: if the closure returns no losses, and as :meth:`observe` does.

        Where that or the closure raises after a ``predict()``, the weights stay at the prediction; the next step goes
        on from there.
        """
        if closure is not None:
            if not callable(closure):
                raise TypeError(
                    f"step() takes a closure, got a {type(closure).__name__}; losses go in as step(loss=...)"
                )
            self.predict()
            with torch.enable_grad():
                returned = closure()
            if returned is None:
                self._check_observed(loss)
            elif loss is not None:
                raise RuntimeError("step() takes a closure or a loss, not both")
            elif len(self._pending.losses) == self._pending.earlier:  # it observed none itself
                self._pending.losses, loss = (), returned
        if loss is not None:
            self.observe(loss)
        if self._pending.losses:
            columns = zip(*self._pending.losses, strict=True)
            mean = self._update(Losses(*(sum(more, first) for first, *more in columns)))
        elif closure is not None:  # it had no losses this time: the prediction stands
            state, mean = self.filter_type(*scalars(self._filter())), None
            self._write(state._replace(skipped_steps=state.skipped_steps + 1))
        elif all(float(group["lr"]) == 0 for group in self.param_groups):
            self._initialise()
            return None
        else:
            raise RuntimeError(
                f"{type(self).__name__}.step() needs the losses: use step(closure), or predict() before the forward "
                "pass and step(loss=losses) after backward, or observe(losses) before a bare step()"
            )
        self._pending.losses, self._pending.earlier = (), 0
        for group in self.param_groups:
            group["predicted"] = False
        if mean is None:
            return None
        if not isinstance(mean, Tensor):
            mean = torch.full((), mean, dtype=self._pending.dtype, device=self.param_groups[0]["filter"].device)
        return mean.to(self._pending.dtype)

    def _check_observed(self, loss: Any) -> None:
        """Raise if a closure returned None and there is a gradient, but no loss.

        Closures of frameworks return None around a step whose losses were observed, and where they skip a batch.
        """
        if loss is None and not self._pending.losses and self._has_gradients():
            raise TypeError("the closure must return the losses, got None; or call observe(losses) before the step")

    # -- the filter's scalars, groups and state -----------------------------------------------------------------

    def _write(self, new: Any, observed: Scalar = True, missing: Any = None) -> None:
        """Keep new scalars, or others where there was no observation."""
        values = self.param_groups[0]["filter"]
        if not isinstance(new[0], Tensor):
            values.copy_(values.new_tensor(new))
        elif missing is None:
            values.copy_(torch.stack(new))
        else:
            values.copy_(torch.where(observed, torch.stack(new), torch.stack(missing)))

    def filter_state(self) -> dict[str, float]:
        """Return the filter's scalars by name, as numbers. Reading them waits for the device."""
        values = dict(zip(self.filter_entries, self._filter().tolist(), strict=True))
        return {name: value for name, value in values.items() if name not in COUNTS}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the one filter; between ``predict`` and ``step`` they count as predicted where they are.

        Raises:
            ValueError, TypeError: as :meth:`ScalarFilter.add_param_group` does.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["predicted"] = self.param_groups[0].get("predicted", False)
        if group["predicted"]:
            self._initialise()

    def _check_group(self, group: dict[str, Any]) -> None:
        check_number("weight_decay", group["weight_decay"])
        super()._check_group(group)
        if self._process_group is not None:
            check_meshes(group["params"], self._process_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {"_process_group": None, "_knows_ranks": False} | self.__dict__  # nothing yet, if unpickled
        super().__setstate__(state)
        self._pending = Pending()

    # -- ranks ---------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy everything but the process group, which copies share."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        new._process_group, new._knows_ranks = self._process_group, self._knows_ranks
        return new

    def _warn_of_ranks(self) -> None:
        """Say once that nothing joins the filters of several ranks, where nothing does."""
        self._knows_ranks = True
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        if not any(is_sharded(p) for group in self.param_groups for p in group["params"]):
            warnings.warn(
                f"{type(self).__name__} runs on {dist.get_world_size()} ranks without a process_group: every rank "
                "filters its own losses, so replicas drift apart; give process_group=torch.distributed.group.WORLD, "
                "or process_group=False if the ranks train apart on purpose",
                stacklevel=4,
            )
