"""APOLLO: a diagonal quasi-Newton method, tensor by tensor (Ma, 2020, arXiv 2009.13586).

The diagonal B of the Hessian changes as little as the weak secant equation allows (:func:`weak_secant_update`), and the
step is the averaged gradient divided by max(|B|, sigma). ``koala_lib/reference/apollo.py`` holds the same optimizer as
slow loops in the paper's symbols.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from koala_lib.optim._engine.checks import (
    CheckedOptimizer,
    check_bool,
    check_choice,
    check_flag,
    check_lr,
    check_number,
    check_real,
    options_among,
)
from koala_lib.optim._engine.compiled import CompiledPass
from koala_lib.optim._engine.lists import HALF, scalar_dtype, wide
from koala_lib.optim._engine.passes import (
    Bucket,
    Passes,
    Scalars,
    add,
    average,
    decayed,
    scalars,
    squared_norms,
    subtract_quotients,
    sums,
)
from koala_lib.optim._engine.sharded import local, mean_over_ranks, times_shards
from koala_lib.optim._engine.spread import Spread

__all__ = ["Apollo"]


# ---- Algorithm 1 on lists of tensors of one device and dtype; half precision is computed in float32 ------------------


class _Tensors(NamedTuple):
    """What a step needs of a bucket; entry i of every list belongs to tensor i."""

    params: list[Tensor]  # theta_t
    grads: list[Tensor]  # g_{t+1}
    means: list[Tensor]  # m_t
    curvatures: list[Tensor]  # B_t
    directions: list[Tensor]  # d_t, where decoupled weight decay keeps it
    mean_rates: Scalars  # a = (1 - beta) / (1 - beta^(t+1)), the weight of the new gradient in the average
    rates: Scalars  # eta
    sigma: float
    weight_decay: float
    maximize: bool
    spread: Spread | None = None


def _gradients(t: _Tensors) -> list[Tensor]:
    """Return g_{t+1}; weight decay goes into it, or, where they are stored, into the directions."""
    g = wide(t.grads)
    if t.maximize:
        g = list(torch._foreach_neg(g))
    return g if t.directions else decayed(t.params, g, t.weight_decay)


def _rectified(curvatures: list[Tensor], sigma: Any) -> list[Tensor]:
    """Return D = max(|B|, sigma) (10)."""
    D = list(torch._foreach_abs(wide(curvatures)))
    if isinstance(sigma, Tensor):  # from CompiledPass, so that another value compiles nothing
        return [t.clamp(min=sigma) for t in D]
    torch._foreach_clamp_min_(D, sigma)
    return D


def _directions(t: _Tensors) -> list[Tensor]:
    """Return a copy of d_t, stored or computed anew from m_t and B_t."""
    if t.directions:
        return [d.float() if d.dtype in HALF else d.clone() for d in t.directions]
    return list(torch._foreach_div(wide(t.means), _rectified(t.curvatures, t.sigma)))


def _sums(
    curvatures: list[Tensor], d: list[Tensor], z: list[Tensor], rates: Scalars, spread: Spread | None = None
) -> tuple[Tensor, Tensor]:
    """Return (d^T y + d^T B d) / a, where y = a z, and |d|_4^4 of every tensor, (n,) each.

    Args:
        curvatures: B.
        d: directions, which become the squares of their elements.
        z: overwritten.
        rates: a.
        spread: where the rates are a vector that stays on an accelerator.
    """
    inverse = [1 / a for a in rates] if isinstance(rates, list) else rates.reciprocal()
    add(z, wide(curvatures), inverse, times=d, spread=spread)  # z + B d / a = (y + B d) / a
    torch._foreach_mul_(z, d)
    torch._foreach_mul_(d, d)
    return sums(z), squared_norms(d)


def _factor(excess: Any, fourth_power: Any, rate: Any, eps: float) -> Any:
    """Return the factor of d^2 in (8), (d^T y + d^T B d) / (|d|_4 + eps)^4, from the sums; 0 without a direction."""
    sqrt: Any = math.sqrt if isinstance(fourth_power, float) else torch.sqrt
    root = sqrt(sqrt(fourth_power)) + eps
    square = root * root
    scale = square * square
    return rate * excess / (scale + (scale == 0))


def _factors(excess: Tensor, fourth_powers: Tensor, rates: Scalars, eps: float) -> Scalars:
    """Return :func:`_factor` of every tensor."""
    if isinstance(rates, list):
        columns = zip(scalars(excess), scalars(fourth_powers), rates, strict=True)
        return [_factor(*numbers, eps) for numbers in columns]
    return _factor(excess.to(fourth_powers.dtype), fourth_powers, rates, eps)


def _update_curvatures(
    curvatures: list[Tensor],
    d: list[Tensor],
    z: list[Tensor],
    rates: Scalars,
    eps: float,
    spread: Spread | None = None,
) -> None:
    """Change B in place, with y = a z; d and z are overwritten."""
    factors = _factors(*_sums(curvatures, d, z, rates, spread), rates, eps)
    add(curvatures, d, factors, sign=-1, spread=spread)  # B -= (d^T y + d^T B d) / (|d|_4 + eps)^4 d^2 (8)


def weak_secant_update(curvatures: list[Tensor], directions: list[Tensor], changes: list[Tensor], eps: float) -> None:
    r"""Change the diagonal B of every tensor in place, as little as the weak secant equation allows (8).

    The solution (7) of (6) for the displacement -eta d and the change of gradient eta y; eta cancels.

    .. math::
        B \leftarrow B - \frac{d^\top y + d^\top B d}{(\|d\|_4 + \epsilon)^4}\, d^2.

    Args:
        curvatures: B, one tensor per parameter.
        directions: d, in the same shapes: the last displacement divided by minus the learning rate.
        changes: y, in the same shapes: the change of the averaged gradient.
        eps: epsilon; at 0, :math:`d^\top B d = -d^\top y` afterwards. Without a direction (d = 0) B stays.
    """
    ones = torch.ones(len(changes), dtype=scalar_dtype(changes[0].device), device=changes[0].device)
    d, y = ([t.clone() for t in tensors] for tensors in (directions, changes))
    _update_curvatures(curvatures, d, y, scalars(ones), eps)


def _descend(t: _Tensors, g: list[Tensor]) -> None:
    """Move averages, stored directions and weights, once the curvatures are new."""
    average(t.means, g, t.mean_rates, t.spread)  # m_{t+1} = m_t + a (g_{t+1} - m_t) (9)
    D = _rectified(t.curvatures, t.sigma)
    if t.directions:
        d = decayed(t.params, list(torch._foreach_div(wide(t.means), D)), t.weight_decay)
        for stored, direction in zip(t.directions, d, strict=True):
            stored.copy_(direction)
        decays = [eta * t.weight_decay for eta in t.rates] if isinstance(t.rates, list) else t.rates * t.weight_decay
        add(t.params, wide(t.params), decays, sign=-1, spread=t.spread)  # theta -= eta lambda theta
    subtract_quotients(t.params, t.means, D, t.rates, t.spread)  # theta_{t+1} = theta_t - eta m_{t+1} / D (10)


# ---- the same in two passes: for compiled code, and for shards, whose sums are joined between them -------------------


@CompiledPass
def _secant_sums(**tensors: Any) -> tuple[Tensor, Tensor]:
    """Return the two sums of (8) for every tensor, (n,) each."""
    t = _Tensors(**tensors)
    z = list(torch._foreach_sub(_gradients(t), t.means))
    return _sums(t.curvatures, _directions(t), z, t.mean_rates, t.spread)


@CompiledPass
def _apply(*, factors: Tensor, **tensors: Any) -> None:
    """Compute B -= factor d^2 (8), and what follows."""
    t = _Tensors(**tensors)
    g, d = _gradients(t), _directions(t)
    add(t.curvatures, torch._foreach_mul(d, d), factors, sign=-1, spread=t.spread)
    _descend(t, g)


# ---- the optimizer ---------------------------------------------------------------------------------------------------


class Apollo(CheckedOptimizer):
    r"""APOLLO, Algorithm 1, for every tensor of weights by itself ("parameter-wise").

    .. math::
        m_{t+1} &= m_t + a\,(g_{t+1} - m_t), \qquad a = \frac{1 - \beta}{1 - \beta^{t+1}}, \\
        B_{t+1} &= B_t - \frac{d_t^\top (m_{t+1} - m_t) + d_t^\top B_t d_t}{(\|d_t\|_4 + \epsilon)^4}\, d_t^2, \\
        d_{t+1} &= m_{t+1} / \max(|B_{t+1}|, \sigma), \qquad \theta_{t+1} = \theta_t - \eta_{t+1} d_{t+1}

    from m = d = B = 0 (eqs. 8-10; t = 0, 1, ... counts the gradients of the tensor). m is the exactly normalised
    average of the gradients; B estimates the diagonal of the Hessian times :math:`\eta`. The first step is
    :math:`\eta g / \sigma`, hence the warm-up.

    Conversion of rates: while \|B\| <= sigma, a step is that of ``torch.optim.SGD`` with momentum beta at the rate
    lr / sigma * (1 - beta) / (1 - beta^(t+1)), which goes to **lr / sigma * (1 - beta)**: 0.1 with the defaults.
    :meth:`above_floor` says for how many weights it is not.

    Args:
        params: real floating-point tensors or param groups; every option may differ between groups.
        lr: eta. Schedulers act on it, after the warm-up.
        beta: coefficient of the average of the gradients, in [0, 1).
        eps: epsilon, see ``eps_scaling``.
        sigma: the floor of \|B\|. Trajectories depend on lr / sigma and on epsilon sigma only (eq. 11, which leaves
            out epsilon), with decoupled decay also on sigma times the decay.
        warmup_steps: for so many steps the learning rate rises linearly from ``warmup_init_lr`` at the first step to
            the ``lr`` that the group was made with, whatever schedulers say meanwhile. ``lr = 0`` stands still also
            then.
        warmup_init_lr: ``None`` is a thousandth of that ``lr``.
        weight_decay: lambda; added to the gradient (L2), or, decoupled, to the direction: d + lambda theta.
        decoupled_weight_decay: which of the two. The decayed direction is also what the next update of B uses.
        eps_scaling: ``"released"``: the epsilon of the update is eps / sigma, as in the authors' code, which keeps the
            trajectories of sigma = 1; ``"literal"``: it is eps, as Algorithm 1 is printed.
        maximize: ascend.
        foreach: ``True`` treats lists of tensors at once (more memory, fewer launches); ``None`` does so with all
            of them on CUDA and with small ones on the CPU.
        fused: ``True`` compiles the passes over tensors of 4097 elements and more, which pays from some million weights
            on; ``None`` never does.

    Raises:
        ValueError, TypeError: for an option out of range or of the wrong type; the message names it.

    Several devices: under ``DistributedDataParallel`` every rank computes the same. DTensors, as ``fully_shard`` makes
    them, are updated where their shards lie, and their sums are joined in one collective (per mesh dimension).

    State per tensor: ``mean`` (m), ``curvature`` (B) and the number of gradients ``step``. The direction is computed
    anew from the first two; only with decoupled decay it is kept, as ``direction``. A gradient that is not finite makes
    its tensor not finite, as in ``torch.optim``. A step waits for nothing on the device.

    Differs from the authors' code: there warm-up goes to the constructor's ``lr`` for all groups, sigma is 0.01, and
    their variants with another floor or decay exist.

    Example, x^2 / 2 with beta = eps = 0: after one step of plain descent, B = eta * 1 > sigma makes the Newton step.

    >>> x = torch.nn.Parameter(torch.tensor([2.0]))
    >>> optimizer = Apollo([x], lr=0.5, beta=0.0, eps=0.0, sigma=0.25, warmup_steps=0)
    >>> for _ in range(2):
    ...     optimizer.zero_grad()
    ...     (x**2 / 2).sum().backward()
    ...     optimizer.step()
    ...     print(x.data, optimizer.state[x]["curvature"])
    tensor([-2.]) tensor([0.])
    tensor([0.]) tensor([0.5000])
    """

    whole_numbers = ("warmup_steps",)
    made_in_groups = ("base_lr",)
    traced = ("above_floor",)  # what describes a run by its mean

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.01,
        *,
        beta: float = 0.9,
        eps: float = 1e-4,
        sigma: float = 0.01,
        warmup_steps: int = 500,
        warmup_init_lr: float | None = None,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        eps_scaling: str = "released",
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, options_among(locals()))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step on the gradients in ``p.grad``; a tensor without a gradient stays.

        Args:
            closure: clears the gradients, computes the loss, calls ``backward`` and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: for a sparse gradient; nothing has moved then.
            ValueError, TypeError: for an lr or a weight decay that the constructor would refuse; likewise.
        """
        rates = [(group["lr"], group["weight_decay"]) for group in self.param_groups]
        if rates != self._checked:
            self._check_rates()
            self._checked = rates
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(group["decoupled_weight_decay"] for group in self.param_groups):  # which may begin later
            self._initialise()
        passes = Passes(self, ("step", "mean", "curvature"), with_gradient=True)
        if passes.ranks:
            self._step_on_shards(passes)
            return loss
        for bucket in passes.buckets:
            t, eps = self._tensors(bucket)
            compiled = bucket.compiled and CompiledPass.compiler_works is not False
            if compiled:
                excess, fourth_powers = _secant_sums(**t._asdict())
                compiled = CompiledPass.compiler_works is not False  # the first call finds out; nothing has moved yet
            if compiled:
                _apply(**t._asdict(), factors=_factors(excess, fourth_powers, t.mean_rates, eps))
            else:
                g, d = _gradients(t), _directions(t)
                z = list(torch._foreach_sub(g, t.means))  # y = m_{t+1} - m_t = a z
                _update_curvatures(t.curvatures, d, z, t.mean_rates, eps, t.spread)
                _descend(t, g)
        return loss

    def _step_on_shards(self, passes: Passes) -> None:
        """Join all sums in one collective before anything moves."""
        buckets = [(bucket.compiled, *self._tensors(bucket)) for bucket in passes.buckets]
        sums = [(_secant_sums if compiled else _secant_sums.plain)(**t._asdict()) for compiled, t, _ in buckets]
        joined = torch.cat([torch.stack([excess.to(powers.dtype), powers]) for excess, powers in sums], 1)
        here = times_shards(joined, (p for bucket in passes.buckets for p in bucket.params))
        whole = mean_over_ranks(here, passes.ranks)
        parts = torch.split(whole, [len(bucket.params) for bucket in passes.buckets], 1)
        for (compiled, t, eps), part in zip(buckets, parts, strict=True):
            excess, fourth_powers = part
            factors = _factors(excess, fourth_powers, t.mean_rates, eps)
            (_apply if compiled else _apply.plain)(**t._asdict(), factors=factors)

    def _initialise(self) -> None:
        """Create the state that does not exist yet of tensors with a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "mean" not in state:
                    state["step"] = torch.zeros((), device=p.device)
                    for name in ("mean", "curvature"):
                        state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
                if group["decoupled_weight_decay"] and "direction" not in state:
                    (D,) = _rectified([state["curvature"]], group["sigma"])
                    state["direction"] = (state["mean"] / D).to(p.dtype)

    def _tensors(self, bucket: Bucket) -> tuple[_Tensors, float]:
        """Return what a step needs and the epsilon of (8), and count the step."""
        group, counts = bucket.group, bucket.kept["step"]
        numbers = [scalars(count) for count in counts]
        if isinstance(numbers[0], Tensor):
            t = torch.stack(counts).to(scalar_dtype(counts[0].device))
            mean_rates, rates = self._rates(group, t)
        else:
            at = {t: self._rates(group, t) for t in set(numbers)}
            mean_rates, rates = (list(column) for column in zip(*(at[t] for t in numbers), strict=True))
        torch._foreach_add_(counts, counts[0].new_ones(()), alpha=1)  # without alpha it would be read as a number
        stored = group["decoupled_weight_decay"]
        if not stored and "direction" in self.state[bucket.params[0]]:  # of a time when it was decoupled
            for p in bucket.params:
                self.state[p].pop("direction", None)
        tensors = _Tensors(
            params=bucket.shards,
            grads=bucket.grads,
            means=bucket.kept["mean"],
            curvatures=bucket.kept["curvature"],
            directions=local(self.state[p]["direction"] for p in bucket.params) if stored else [],
            mean_rates=mean_rates,
            rates=rates,
            sigma=group["sigma"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            spread=bucket.spread,
        )
        return tensors, group["eps"] / group["sigma"] if group["eps_scaling"] == "released" else group["eps"]

    @staticmethod
    def _rates(group: dict[str, Any], t: Any) -> tuple[Any, Any]:
        """Return a of (9) and eta after t gradients; t is a number, or a vector of them."""
        beta, lr, end, steps = group["beta"], group["lr"], group["base_lr"], group["warmup_steps"]
        if isinstance(lr, Tensor):
            lr = scalars(lr.reshape(())) + 0 * t  # where t lies
        start = end / 1000 if group["warmup_init_lr"] is None else group["warmup_init_lr"]
        start, end = start * (lr != 0), end * (lr != 0)  # distributed checkpoints make a step at 0: nothing may move
        ramp = start + (end - start) * t / max(steps, 1)
        eta = torch.where(t < steps, ramp, lr) if isinstance(t, Tensor) else (ramp if t < steps else lr)
        return (1 - beta) / (1 - beta ** (t + 1)), eta

    @torch.no_grad()
    def above_floor(self) -> Tensor:
        r"""Return the share of the weights with \|B\| > sigma, those that the curvature matters to.

        Of the weights that had a gradient, and of the shards on this rank. A scalar that stays on the device.
        """
        above = [
            B.abs().flatten() > group["sigma"]
            for group in self.param_groups
            for B in local(self.state[p]["curvature"] for p in group["params"] if "curvature" in self.state.get(p, ()))
        ]
        return torch.cat(above).double().mean()

    def entries(self, names: Sequence[str]) -> Tensor:
        """Return entries of ``traced`` as a float64 vector that stays on the device."""
        return torch.stack([getattr(self, name)() for name in names])

    # -- groups and state ----------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, whose warm-up begins with their first gradient. A group may have every option of its own.

        Raises:
            ValueError, TypeError: as the constructor does.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("base_lr", float(group["lr"]))

    def _check_group(self, group: dict[str, Any]) -> None:
        check_lr(group["lr"])
        check_number("beta", group["beta"], high=1.0)
        check_number("eps", group["eps"])
        check_number("sigma", group["sigma"], open_low=True)
        check_number("warmup_steps", group["warmup_steps"])
        if not isinstance(group["warmup_steps"], Integral):
            raise TypeError(f"warmup_steps must be a whole number, got {group['warmup_steps']!r}")
        if group["warmup_init_lr"] is not None:
            check_number("warmup_init_lr", group["warmup_init_lr"])
        check_number("weight_decay", group["weight_decay"])
        for name in ("decoupled_weight_decay", "maximize"):
            check_bool(name, group[name])
        check_choice("eps_scaling", group["eps_scaling"], ("released", "literal"))
        check_flag("foreach", group["foreach"])
        check_flag("fused", group["fused"])
        check_real(type(self).__name__, group["params"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        # load_state_dict, unpickling and deepcopy end here
        if not all("base_lr" in group for group in state.get("param_groups", [])):
            raise ValueError("this state_dict holds no state of Apollo: it was saved by another optimizer")
        super().__setstate__(state)
        for p, kept in self.state.items():
            if "step" in kept:  # torch leaves it on the device of the checkpoint
                kept["step"] = kept["step"].to(p.device)
