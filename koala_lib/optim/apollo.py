"""APOLLO: a diagonal quasi-Newton method for stochastic, nonconvex losses (Ma, 2020, arXiv 2009.13586).

Every tensor of weights has a diagonal estimate of the Hessian, which changes as little as it can while its curvature
along the last direction becomes the one that the gradients show (the weak secant equation).
``koala_lib/reference/apollo.py`` holds the same optimizer as slow loops in the paper's symbols.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from koala_lib.optim._engine.checks import (
    CheckedOptimizer,
    check_choice,
    check_dense,
    check_flag,
    check_lr,
    check_number,
    check_real,
)
from koala_lib.optim._engine.compiled import Pass
from koala_lib.optim._engine.lists import buckets, decayed, scalar_dtype, squared_norms, subtract, wide
from koala_lib.optim._engine.sharded import local, local_gradients, mean_over_ranks, rank_groups, times_shards

__all__ = ["Apollo"]


# ---- passes over the weights: lists of tensors of one device and dtype; half precision is computed in float32 --------


def _directions(means: list[Tensor], curvatures: list[Tensor], sigma: float | Tensor) -> list[Tensor]:
    """d = m / D with D = max(|B|, sigma) (10)."""
    D = list(torch._foreach_abs(wide(curvatures)))
    if isinstance(sigma, Tensor):  # compiled
        D = [t.clamp(min=sigma) for t in D]
    else:
        torch._foreach_clamp_min_(D, sigma)
    return list(torch._foreach_div(wide(means), D))


def _sums(curvatures: list[Tensor], directions: list[Tensor], changes: list[Tensor]) -> Tensor:
    """d^T y + d^T B d and |d|_4^4 of every tensor, (2, tensors)."""
    products = torch._foreach_addcmul(changes, wide(curvatures), directions)  # y + B d
    torch._foreach_mul_(products, directions)
    fourth_powers = torch.stack(squared_norms(torch._foreach_mul(directions, directions)))
    return torch.stack([torch.stack([t.sum() for t in products]).to(fourth_powers.dtype), fourth_powers])


def _shifts(sums: Tensor, eps: float) -> Tensor:
    """(d^T y + d^T B d) / (|d|_4 + eps)^4 of every tensor."""
    excess, fourth_power = sums
    scale = (fourth_power.sqrt().sqrt() + eps).square().square()
    return torch.where(scale == 0, 0.0, excess / scale)


def weak_secant_update(curvatures: list[Tensor], directions: list[Tensor], changes: list[Tensor], eps: float) -> None:
    r"""Change the diagonal B of every tensor in place, as little as the weak secant equation allows (8):

    .. math::
        B \leftarrow B - \frac{d^\top y + d^\top B d}{(\|d\|_4 + \epsilon)^4}\, d^2.

    Args:
        curvatures: B, one tensor each.
        directions: d, the last displacement divided by minus the learning rate.
        changes: y, of the averaged gradients.
        eps: epsilon; at 0, :math:`d^\top B d = -d^\top y` afterwards. Without a direction (d = 0) B stays.
    """
    shifts = _shifts(_sums(curvatures, directions, changes), eps)
    subtract(curvatures, torch._foreach_mul(directions, directions), shifts)


Secant = tuple[list[Tensor], list[Tensor]]


def _secant(
    params: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    curvatures: list[Tensor],
    directions: list[Tensor],
    weights: Tensor,
    sigma: float,
    weight_decay: float | Tensor,
    maximize: bool,
) -> Secant:
    """d_t and m_{t+1} - m_t, given the weight of the new gradient in m. Decay goes into the direction where
    ``directions`` are stored, else into the gradient."""
    grads = wide(grads)
    if maximize:
        grads = list(torch._foreach_neg(grads))
    if not directions:
        grads = decayed(params, grads, weight_decay)
    changes = list(torch._foreach_sub(grads, means))
    for change, weight in zip(changes, weights.unbind(), strict=True):
        change.mul_(weight)
    return wide(directions) or _directions(means, curvatures, sigma), changes


@Pass
def _observe(
    params: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    curvatures: list[Tensor],
    directions: list[Tensor],
    weights: Tensor,
    sigma: float,
    *decay: Any,
) -> tuple[Tensor, Secant | None]:
    """The sums of (8), and what they are of; a compiled pass does not keep it, since to compute it again costs less."""
    d, y = _secant(params, grads, means, curvatures, directions, weights, sigma, *decay)
    return _sums(curvatures, d, y), None if isinstance(sigma, Tensor) else (d, y)


@Pass
def _apply(
    params: list[Tensor],
    secant: Secant | None,
    shifts: Tensor,
    rates: Tensor,
    grads: list[Tensor],
    means: list[Tensor],
    curvatures: list[Tensor],
    directions: list[Tensor],
    weights: Tensor,
    sigma: float,
    weight_decay: float | Tensor,
    maximize: bool,
) -> None:
    """B -= shift d^2, m += y, and theta -= rate d with the new d, in place."""
    d, y = secant or _secant(params, grads, means, curvatures, directions, weights, sigma, weight_decay, maximize)
    subtract(curvatures, torch._foreach_mul(d, d), shifts)
    torch._foreach_add_(means, y)
    new = _directions(means, curvatures, sigma)
    if directions:
        new = decayed(params, new, weight_decay)
        for stored, direction in zip(directions, new, strict=True):
            stored.copy_(direction)
    subtract(params, new, rates)


class _Part(NamedTuple):
    """Tensors of one param group that are treated at once."""

    group: dict[str, Any]
    params: list[Tensor]
    arguments: tuple[Any, ...]  # of _observe
    rates: Tensor


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

    Args:
        params: real floating-point tensors or param groups; every option may differ between groups.
        lr: eta. Schedulers act on it, after the warm-up.
        beta: coefficient of the average of the gradients, in [0, 1).
        eps: epsilon, see ``eps_scaling``.
        sigma: the floor of \|B\|. Trajectories depend on lr / sigma and on epsilon sigma only (Theorem 1, which leaves
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
        foreach: lists of tensors at once (more memory, fewer launches); ``None``: all of them on CUDA, small ones on
            the CPU.
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
        options = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on the gradients in ``p.grad``; a tensor without gradient stays.

        Args:
            closure: clears the gradients, computes the loss, calls ``backward`` and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: for a sparse gradient; nothing has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        observed = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        for params in observed:
            check_dense(type(self).__name__, params)
        parts: list[_Part] = []
        for group, params in zip(self.param_groups, observed, strict=True):
            self._initialise(group, params)
            listed = buckets(params, foreach=group["foreach"], fused=group["fused"])
            parts += [self._part(group, bucket) for bucket in listed]
        if ranks := rank_groups(p for params in observed for p in params):
            self._move_shards(parts, ranks)
        else:
            for part in parts:
                self._move(part, *_observe(*part.arguments, fused=part.group["fused"]))
        return loss

    def _initialise(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Create the state that does not exist yet."""
        for p in params:
            state = self.state[p]
            if "mean" not in state:
                state["step"] = torch.zeros((), device=p.device)
                for name in ("mean", "curvature"):
                    state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
            if group["decoupled_weight_decay"] and "direction" not in state:
                (d,) = _directions([state["mean"]], [state["curvature"]], group["sigma"])
                state["direction"] = d.to(p.dtype)

    def _part(self, group: dict[str, Any], params: list[Tensor]) -> _Part:
        counts, means, curvatures = (
            local(self.state[p][name] for p in params) for name in ("step", "mean", "curvature")
        )
        decoupled = group["decoupled_weight_decay"]
        directions = local(self.state[p]["direction"] for p in params) if decoupled else []
        t = torch.stack(counts).to(scalar_dtype(params[0].device))
        torch._foreach_add_(counts, 1)
        weights = (1 - group["beta"]) / (1 - group["beta"] ** (t + 1))
        tensors = (local(params), local_gradients(params), means, curvatures, directions, weights)
        options = (group["sigma"], group["weight_decay"], group["maximize"])
        return _Part(group, params, (*tensors, *options), self._rates(group, t))

    def _move(self, part: _Part, sums: Tensor, secant: Secant | None = None) -> None:
        group = part.group
        eps = group["eps"] / group["sigma"] if group["eps_scaling"] == "released" else group["eps"]
        params, *rest = part.arguments
        _apply(params, secant, _shifts(sums, eps), part.rates, *rest, fused=group["fused"])

    def _move_shards(self, parts: list[_Part], ranks: list[Any]) -> None:
        """All sums are made and joined in one collective before anything moves."""
        here = torch.cat([_observe(*part.arguments, fused=part.group["fused"])[0] for part in parts], 1)
        here = times_shards(here, (p for part in parts for p in part.params))
        whole = torch.split(mean_over_ranks(here, ranks), [len(part.params) for part in parts], 1)
        for part, sums in zip(parts, whole, strict=True):
            self._move(part, sums)

    @staticmethod
    def _rates(group: dict[str, Any], t: Tensor) -> Tensor:
        """Learning rates after t gradients."""
        lr, end, steps = group["lr"], group["base_lr"], group["warmup_steps"]
        if isinstance(lr, Tensor):
            lr = lr.reshape(())
        start = end / 1000 if group["warmup_init_lr"] is None else group["warmup_init_lr"]
        ramp = start + (end - start) * t / max(steps, 1)
        after = torch.zeros_like(ramp) + lr  # where() would copy a learning rate that is a tensor on the host
        # Distributed checkpoints make a step at lr = 0, which must move nothing.
        rates: Tensor = torch.where(t < steps, ramp, after) * (lr != 0)
        return rates

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
            if not isinstance(group[name], bool):
                raise TypeError(f"{name} must be True or False, got {group[name]!r}")
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
