"""What the optimizers share: argument checks, norms of tensor lists, and the protocol of filters of the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
LARGE = 2**16  # elements from which a tensor is treated alone
LONG = 4097  # elements from which torch 2.13 compiles sums that add up parts, and so other code
SLOTS = {"short": 8, "long": 4}  # tensors in the lists that are compiled: more save calls, fewer compile sooner
Entries = dict[str, Tensor]  # a filter's scalars by name


def check_number(name: str, value: object, low: float = 0.0, high: float = math.inf, *, open_low: bool = False) -> None:
    """Raise unless ``value`` is a finite number with low <= value < high (low < value if ``open_low``)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    number = float(value)
    if not (low < number if open_low else low <= number) or not number < high:
        bounds = f"{'>' if open_low else '>='} {low:g}" + (f" and < {high:g}" if math.isfinite(high) else "")
        raise ValueError(f"{name} must be a finite number {bounds}, got {value!r}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{name} must be True, False or None, got {value!r}")


def check_lr(lr: object) -> None:
    """A learning rate is a number or, for captured graphs, a 0-dim tensor."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or not lr.is_floating_point():
            raise ValueError(f"lr as a tensor must hold one real number, got {lr.dtype} of shape {tuple(lr.shape)}")
        lr = float(lr)
    check_number("lr", lr)


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


def scalar_dtype(device: torch.device) -> torch.dtype:
    """The dtype of filter scalars: float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def channels_last(t: Tensor) -> bool:
    """Whether a batch of images, or the weights of a convolution, have the channels together in memory."""
    return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)


def flat(t: Tensor) -> Tensor | None:
    """All elements of a dense tensor as a vector in the order of the memory; ``None`` for other tensors."""
    if channels_last(t):
        t = t.permute(0, 2, 3, 1)
    # .data forgets which tensor this is a view of, on whose shape compiled code would depend.
    return t.view(-1).data if t.is_contiguous() else None


def wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Half precision as float32, the rest as it is."""
    return [t.float() if t.dtype in HALF else t for t in tensors]


def squared_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """|t|^2 of each tensor as a 0-dim float64 tensor on its device, accumulated in float32 or better."""
    if not tensors:
        return []
    if torch.compiler.is_compiling():  # compiled sums are cascades, good to 1e-6 at any size
        return [t.square().sum().to(scalar_dtype(t.device)) for t in wide(tensors)]
    dtype = torch.float32 if tensors[0].dtype in HALF else tensors[0].dtype
    if tensors[0].device.type == "cpu":
        return _squared_norms_cpu(tensors, dtype)
    norms = torch._foreach_norm(list(tensors), 2, dtype=dtype)
    return [n.to(scalar_dtype(n.device)).square() for n in norms]


def _squared_norms_cpu(tensors: Sequence[Tensor], dtype: torch.dtype, row: int = 1024) -> list[Tensor]:
    # torch's CPU norm adds up a float32 tensor in one go and is off by 1.5 % at 1e7 elements. Norms of short rows,
    # added in float64, cost the same and are good to 1e-6. (Other layouts: below LARGE a norm in float64 is as fast.)
    vectors = [flat(t) if t.numel() > (row if t.is_contiguous() else LARGE) else None for t in tensors]
    wholes = [None if v is None else v[: v.numel() // row * row] for v in vectors]
    short = [t if v is None else v[v.numel() // row * row :] for t, v in zip(tensors, vectors, strict=True)]
    squared = torch.stack(torch._foreach_norm(short, 2, dtype=torch.float64)).square().unbind()
    return [
        rest if whole is None else _squared_rows(whole.view(-1, row), dtype) + rest
        for rest, whole in zip(squared, wholes, strict=True)
    ]


def _squared_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
    return norms.double().square().sum()


def decayed(params: list[Tensor], grads: list[Tensor], weight_decay: float | Tensor) -> list[Tensor]:
    """h = g + lambda x, leaving ``p.grad`` alone."""
    if isinstance(weight_decay, Tensor):  # compiled
        return [torch.addcmul(g, x, weight_decay) for g, x in zip(grads, params, strict=True)]
    return list(torch._foreach_add(grads, params, alpha=weight_decay)) if weight_decay else grads


def subtract(tensors: Sequence[Tensor], directions: Sequence[Tensor], steps: Tensor) -> None:
    """x -= step h, with a step for each tensor; half precision is computed in float32 and rounded once."""
    for x, h, step in zip(tensors, directions, steps.unbind(), strict=True):
        if x.dtype in HALF:
            x.sub_(h.float() * step)
        else:
            x.addcmul_(h, step, value=-1)


class CheckedOptimizer(torch.optim.Optimizer):
    """Base of all of them: a param group is checked by :meth:`_check_group`, and refused without a trace."""

    whole_numbers: tuple[str, ...] = ()  # the options that are counts

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with options of their own.

        Raises:
            ValueError, TypeError: as the constructor does.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        # numpy's numbers would keep torch.load(weights_only=True) from reading the state_dict
        for name in self.defaults:
            if isinstance(group[name], Real) and not isinstance(group[name], bool):
                group[name] = int(group[name]) if name in self.whole_numbers else float(group[name])

    def _check_group(self, group: dict[str, Any]) -> None:
        raise NotImplementedError


class ScalarFilter(CheckedOptimizer):
    """Base of the optimizers with a filter: one small tensor of scalars, ``filter_entries`` in order, for all weights.

    It lives in every param group (the same tensor): there ``load_state_dict`` keeps its float64, which it would cast to
    the dtype of the weights in ``state``, and checkpoints keyed by parameter find it.
    """

    filter_entries: tuple[str, ...]  # one of them is "skipped_steps"
    per_group: tuple[str, ...] = ("lr",)  # the options that groups may set differently

    def __init__(self, params: Any, defaults: dict[str, Any], filter_values: dict[str, float]) -> None:
        self._filter_values = [filter_values[name] for name in self.filter_entries]
        super().__init__(params, defaults)

    @property
    def skipped_steps(self) -> int:
        """How many steps had no usable observation (small gradient, non-finite loss). Waits for the device."""
        return int(self._filter()[self.filter_entries.index("skipped_steps")].item())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the one filter, e.g. after unfreezing them. A group's own options are ``per_group``.

        Raises:
            ValueError: if the group sets another option differently from the rest, or a value out of range.
            TypeError: for parameters that are not real floating-point tensors.
        """
        if self.param_groups:  # whose options may have been changed since the constructor
            first = self.param_groups[0]
            param_group = {name: first[name] for name in self.defaults if name not in self.per_group} | param_group
        super().add_param_group(param_group)
        group, first = self.param_groups[-1], self.param_groups[0]
        if "filter" not in first:
            device = first["params"][0].device if first["params"] else torch.device("cpu")
            first["filter"] = torch.tensor(self._filter_values, dtype=scalar_dtype(device), device=device)
        group["filter"] = first["filter"]

    def _check_group(self, group: dict[str, Any]) -> None:
        check_lr(group["lr"])
        for name, default in self.defaults.items():
            value = default if group is self.param_groups[0] else self.param_groups[0][name]
            if name not in self.per_group and group[name] != value:
                raise ValueError(
                    f"{name}={group[name]!r} in a param group: {type(self).__name__} keeps one filter for all groups, "
                    f"so {name} is set once in the constructor (here {value!r}); a group may set "
                    + ", ".join(self.per_group)
                )
        check_real(type(self).__name__, group["params"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        # load_state_dict, unpickling and deepcopy end here: check what came, then share one filter between the groups.
        groups = state.get("param_groups", [])
        saved = groups[0].get("filter") if groups else None
        if not isinstance(saved, Tensor) or saved.numel() != len(self.filter_entries):
            raise ValueError(
                f"this state_dict holds no filter of {type(self).__name__} ({', '.join(self.filter_entries)}): "
                "it was saved by another optimizer or by other options"
            )
        super().__setstate__(state)
        self._share_filter(saved)

    def _share_filter(self, values: Tensor) -> None:
        device = next((p.device for group in self.param_groups for p in group["params"]), values.device)
        values = values.to(device=device, dtype=scalar_dtype(device))
        for group in self.param_groups:
            group["filter"] = values

    def _filter(self) -> Tensor:
        """The filter's tensor, on the device of the first parameter even if the model was moved meanwhile."""
        values: Tensor = self.param_groups[0]["filter"]
        first = next((p for group in self.param_groups for p in group["params"]), None)
        if first is not None and first.device != values.device:
            self._share_filter(values)
            values = self.param_groups[0]["filter"]
        return values

    def _entries(self) -> Entries:
        return dict(zip(self.filter_entries, self._filter().unbind(), strict=True))


class LossFilter(ScalarFilter):
    """Base of the optimizers that filter the loss: ``predict`` -> loss and gradient -> ``step``.

    Subclasses implement :meth:`_predict`, :meth:`_update` and :meth:`_initialise`.
    """

    per_group = ("lr", "weight_decay")
    _observed: Tensor | None = None  # sum, sum of squares and number of the losses seen since predict()
    _observed_dtype = torch.float32

    # -- what a subclass fills in ------------------------------------------------------------------------------

    def _initialise(self) -> None:
        """Create the per-parameter state that does not exist yet."""
        raise NotImplementedError

    def _predict(self) -> None:
        """Time update of weights and filter."""
        raise NotImplementedError

    def _update(self, losses: Tensor) -> Tensor:
        """Measurement update of weights and filter from (sum, sum of squares, number) of the losses; the mean loss."""
        raise NotImplementedError

    # -- the protocol --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self) -> None:
        """Move weights and filter to the prediction, where loss and gradient must be evaluated.

        A second call before ``step`` moves nothing, so a step that a gradient scaler skipped can simply be repeated;
        losses observed meanwhile are forgotten.
        """
        self._observed = None
        if not self.param_groups[0]["predicted"]:
            self._initialise()
            self._predict()
            self._set_predicted(True)

    @torch.no_grad()
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
            raise TypeError(f"losses must be a tensor or a float, got {losses!r} ({type(losses).__name__})")
        losses = torch.as_tensor(losses)
        if not losses.is_floating_point():
            raise TypeError(f"losses must be real floating-point numbers, got dtype {losses.dtype}")
        if losses.numel() == 0:
            raise ValueError("losses are empty: a step needs at least one sample")
        values = losses.to(self._filter().device).to(self._filter().dtype)
        count = torch.full_like(values.sum(), losses.numel())
        seen = torch.stack([values.sum(), values.square().sum(), count])
        self._observed = seen if self._observed is None else self._observed + seen
        self._observed_dtype = losses.dtype

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Tensor] | None = None, *, loss: Tensor | float | None = None
    ) -> Tensor | None:
        """One step: ``step(closure)``, or ``predict()`` ... ``step(loss=losses)``, or ``predict()`` ...
        ``observe(losses)`` ... ``step()``.

        Args:
            closure: clears the gradients, computes the losses, calls ``backward`` on their mean, returns the losses.
            loss: the same losses where forward and backward were run by the caller after :meth:`predict`.

        Returns:
            The mean loss as a 0-dim tensor, still on the device. ``None`` for the bare ``step()`` at lr = 0 with which
            distributed checkpoints create the state; nothing moves then.

        Raises:
            RuntimeError: if there is no loss, or no ``predict()`` before it, or a gradient is sparse.

        Where that or the closure raises after a ``predict()``, the weights stay at the prediction; the next step goes
        on from there.
        """
        if closure is not None:
            if loss is not None:
                raise RuntimeError("step() takes a closure or a loss, not both")
            if not callable(closure):
                raise TypeError(
                    f"step() takes a closure, got a {type(closure).__name__}; losses go in as step(loss=...)"
                )
            self.predict()
            with torch.enable_grad():
                loss = closure()
            if loss is None:
                raise TypeError("the closure must return the losses, got None")
        if loss is not None:
            self.observe(loss)
        if self._observed is None:
            if all(float(group["lr"]) == 0 for group in self.param_groups):
                self._initialise()
                return None
            raise RuntimeError(
                f"{type(self).__name__}.step() needs the losses: use step(closure), or predict() before the forward "
                "pass and step(loss=losses) after backward, or observe(losses) before a bare step()"
            )
        mean = self._update(self._observed)
        self._set_predicted(False)
        self._observed = None
        return mean.to(self._observed_dtype)

    def filter_state(self) -> dict[str, float]:
        """The filter's scalars by name, as numbers. Reading them waits for the device."""
        values = dict(zip(self.filter_entries, self._filter().tolist(), strict=True))
        del values["skipped_steps"]
        return values

    # -- groups and state ----------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["predicted"] = self.param_groups[0].get("predicted", False)
        if group["predicted"]:
            self._initialise()

    def _check_group(self, group: dict[str, Any]) -> None:
        check_number("weight_decay", group["weight_decay"])
        super()._check_group(group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._observed = None

    def _set_predicted(self, value: bool) -> None:
        for group in self.param_groups:
            group["predicted"] = value

    def _buckets(self, params: list[Tensor]) -> Iterator[list[Tensor]]:
        options = self.param_groups[0]
        return buckets(params, foreach=options["foreach"], fused=options["fused"])


def buckets(
    params: list[Tensor], *, foreach: bool | None, fused: bool | None, much: int = 2**18
) -> Iterator[list[Tensor]]:
    """Lists of parameters to treat at once, of one device and dtype.

    A single tensor without ``foreach``. By default all of them on CUDA; elsewhere small ones, up to ``much``
    elements together, which saves calls, and large ones alone, which saves memory. With ``fused`` lists as
    they are compiled: short tensors, on the CPU, and long ones.
    """
    if fused:
        short = [p for p in params if 1 < p.numel() < LONG and p.device.type == "cpu"]
        for size, listed in (("long", [p for p in params if p.numel() >= LONG]), ("short", short)):
            for kind in _kinds(listed):
                yield from (kind[i : i + SLOTS[size]] for i in range(0, len(kind), SLOTS[size]))
        params = [p for p in params if p.numel() <= 1 or (p.numel() < LONG and p.device.type != "cpu")]
    if foreach is False:
        yield from ([p] for p in params)
    elif foreach or (params and params[0].device.type == "cuda"):
        yield from _kinds(params)
    else:
        yield from _runs(params, LARGE, much)


def _kinds(params: list[Tensor]) -> Iterable[list[Tensor]]:
    """Parameters by device and dtype."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in params:
        kinds.setdefault((p.device, p.dtype), []).append(p)
    return kinds.values()


def _runs(params: list[Tensor], small: int, much: int) -> Iterator[list[Tensor]]:
    """Successive small tensors of one kind, in their order."""
    run: list[Tensor] = []
    room, kind = 0, None
    for p in params:
        size, this = p.numel(), (p.device, p.dtype)
        if run and (size > room or this != kind):
            yield run
            run = []
        if not run:
            room, kind = much if size <= small else size, this
        run.append(p)
        room -= size
    if run:
        yield run
