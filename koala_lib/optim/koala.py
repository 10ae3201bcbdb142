"""KOALA: training as Kalman filtering of the loss (Davtyan et al., AAAI 2022, arXiv 2107.03331).

The weights are a hidden state, the minibatch loss is a noisy observation of a target risk, and the gradient is the
observation's Jacobian. :class:`KoalaV` lets the weights drift at random (Algorithm 1), :class:`KoalaM` adds velocities
(eqs. 16-21). The recursions of the covariance are in :mod:`koala_lib.kalman`; ``koala_lib/reference/koala.py`` holds
the same optimizers as slow loops in the paper's symbols. "Released row N" points to the table of differences between
paper and released code in ``notebooks/koala/10_kalman_view_of_training.ipynb``, section 7.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from koala_lib import kalman
from koala_lib.optim._engine.checks import check_choice, check_dense, check_flag, check_number
from koala_lib.optim._engine.compiled import Pass
from koala_lib.optim._engine.lists import decayed, squared_norms, subtract
from koala_lib.optim._engine.sharded import (
    check_meshes,
    is_sharded,
    local,
    local_gradients,
    mean_over_ranks,
    rank_groups,
    shard_counts,
    times_shards,
)
from koala_lib.optim.filter import Entries, LossFilter

__all__ = ["KoalaM", "KoalaV"]


# ---- passes over the weights: lists of tensors of one device and dtype ------------------------------------------


def _average(averages: list[Tensor], params: list[Tensor], weights: Tensor) -> None:
    """x_avg += weight (x - x_avg), with a weight for each tensor."""
    for average, x, weight in zip(averages, params, weights.to(params[0].dtype).unbind(), strict=True):
        average.lerp_(x, weight)


@Pass
def _advance(
    params: list[Tensor], velocities: list[Tensor], averages: list[Tensor], momentum: float, weight: float
) -> Tensor | None:
    """x_avg += weight (x - x_avg), then x += p and p *= kappa; |x - x_avg|^2 of every tensor before x moved."""
    drifts = None
    if averages:
        if isinstance(weight, Tensor):  # compiled
            _average(averages, params, weight.expand(len(averages)))
        elif weight:
            torch._foreach_lerp_(averages, params, weight)
        drifts = torch.stack(squared_norms(torch._foreach_sub(params, averages)))
    if velocities:
        torch._foreach_add_(params, velocities)
        torch._foreach_mul_(velocities, momentum)
    return drifts


@Pass
def _observe(params: list[Tensor], grads: list[Tensor], weight_decay: float) -> Tensor:
    """|g|^2, |h|^2 and |x|^2 of every tensor; without weight decay the first ones twice and zeros."""
    raw = torch.stack(squared_norms(grads))
    if not isinstance(weight_decay, Tensor) and not weight_decay:
        return torch.stack([raw, raw, torch.zeros_like(raw)])
    squared = squared_norms(decayed(params, grads, weight_decay)), squared_norms(params)
    return torch.stack([raw, *map(torch.stack, squared)])


@Pass
def _correct(
    params: list[Tensor],
    velocities: list[Tensor],
    averages: list[Tensor],
    grads: list[Tensor],
    weight_decay: float,
    observed: Tensor,
    steps: Tensor,
    velocity_steps: Tensor,
    weights: Tensor,
) -> None:
    """x -= step h and p -= velocity step h, where there was an observation, then x_avg += weight (x - x_avg)."""
    # A step of zero times an infinite gradient is NaN, so a missing observation clears the direction itself.
    zero = torch.zeros((), dtype=grads[0].dtype, device=grads[0].device)
    directions = [torch.where(observed, h, zero) for h in decayed(params, grads, weight_decay)]
    subtract(params, directions, steps)
    if velocities:
        subtract(velocities, directions, velocity_steps)
    if averages:
        _average(averages, params, weights)


# ---- the optimizers ----------------------------------------------------------------------------------------------


class _Bucket(NamedTuple):
    """Tensors that are treated at once, and what of them and of their gradients lies on this rank."""

    params: list[Tensor]
    weights: list[Tensor]
    grads: list[Tensor]


class _Blocks(NamedTuple):
    """What one param group observed; one entry per tensor that has a gradient, in the order of the buckets."""

    group: dict[str, Any]
    buckets: list[_Bucket]
    raw: Tensor  # |g_i|^2
    decayed: Tensor  # |h_i|^2
    decay_loss: Tensor  # lambda / 2 |x_i|^2

    @property
    def params(self) -> list[Tensor]:
        return [p for bucket in self.buckets for p in bucket.params]


class _Koala(LossFilter):
    """What KOALA-V and KOALA-M share: noise estimates, layer-wise gains, skip rule."""

    has_velocity: bool

    def __init__(self, params: Any, options: dict[str, Any], process_group: Any) -> None:
        for name in ("initial_variance", "initial_measurement_noise", "min_grad_norm"):
            check_number(name, options[name])
        check_number("noise_decay", options["noise_decay"], high=1.0)
        if options["process_noise"] is not None:
            check_number("process_noise", options["process_noise"])
        if options["measurement_noise"] is not None:
            check_number("measurement_noise", options["measurement_noise"], open_low=True)
        check_choice("target_risk", options["target_risk"], ("relative", "absolute"))
        check_choice("blocks", options["blocks"], ("tensor", "global"))
        check_choice("formulas", options["formulas"], ("paper", "released"))
        check_flag("foreach", options["foreach"])
        check_flag("fused", options["fused"])
        q, R = options["process_noise"], options["measurement_noise"]
        adaptive_q = 0.01 if options["formulas"] == "released" else 0.0  # released row 1 starts its average at 0.01
        initial = {
            "variance": options["initial_variance"],
            "covariance": options.get("initial_covariance", 0.0),
            "velocity_variance": options.get("initial_velocity_variance", 0.0),
            "process_noise": adaptive_q if q is None else q,
            "measurement_noise": options["initial_measurement_noise"] if R is None else R,
            "skipped_steps": 0.0,
        }
        if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(f"process_group must be a torch.distributed.ProcessGroup or None, got {process_group!r}")
        self._process_group = process_group
        super().__init__(params, options, initial)

    _process_group: Any = None

    @property
    def _options(self) -> dict[str, Any]:
        """The options that all groups share."""
        return self.param_groups[0]

    @property
    def _released(self) -> bool:
        return bool(self._options["formulas"] == "released")

    def _initialise(self) -> None:
        start = torch.zeros_like if self._released else torch.clone  # x_avg: released row 2
        for group in self.param_groups:
            for p in group["params"]:
                if self.has_velocity and "velocity" not in self.state[p]:
                    self.state[p]["velocity"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                if self._options["process_noise"] is None and "average" not in self.state[p]:
                    self.state[p]["average"] = start(p.detach(), memory_format=torch.preserve_format)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if self._process_group is not None:
            check_meshes(group["params"], self._process_group)

    # -- time update -----------------------------------------------------------------------------------------------

    def _predict(self) -> None:
        entries, drift = self._entries(), self._advance_weights()
        if drift is not None:  # q_x^2 of eqs. 23 and 24, or the released smoothed |x - x_avg| / n (released row 1)
            q, n = entries["process_noise"], sum(p.numel() for group in self.param_groups for p in group["params"])
            beta = self._options["noise_decay"]
            estimate = kalman.running_average(q, drift.sqrt() / n, beta) if self._released else drift / n
            entries["process_noise"] = estimate
        entries |= self._predict_covariance(entries)
        self._filter().copy_(torch.stack([entries[name] for name in self.filter_entries]))

    def _advance_weights(self) -> Tensor | None:
        """Move what has a velocity; |x_{k-1} - x_avg|^2, where the process noise is estimated from it."""
        options, adaptive = self._options, self._options["process_noise"] is None
        if not self.has_velocity and not adaptive:
            return None
        params = [p for group in self.param_groups for p in group["params"]]
        kappa = options["momentum"] if self.has_velocity else 0.0
        weight = 0.0 if self._released else 1 - options["noise_decay"]  # released row 2: after the update
        drift = torch.zeros_like(self._filter()[0])
        for bucket in self._buckets(params):
            velocities = self._kept(bucket, "velocity", self.has_velocity)
            averages = self._kept(bucket, "average", adaptive)
            drifts = _advance(local(bucket), velocities, averages, kappa, weight, fused=options["fused"])
            if adaptive:
                for squared, shards in zip(drifts.to(drift.device).unbind(), shard_counts(bucket), strict=True):
                    drift.add_(squared, alpha=shards)
        if not adaptive:
            return None
        return mean_over_ranks(drift, self._rank_groups()) if any(map(is_sharded, params)) else drift

    def _kept(self, params: list[Tensor], name: str, exists: bool) -> list[Tensor]:
        return local(self.state[p][name] for p in params) if exists else []

    def _predict_covariance(self, entries: Entries) -> Entries:
        raise NotImplementedError

    # -- measurement update ----------------------------------------------------------------------------------------

    def _update(self, losses: Tensor) -> Tensor:
        options, entries = self._options, self._entries()
        groups = [blocks for group in self.param_groups if (blocks := self._observe_group(group)).buckets]
        if not groups:  # no gradient anywhere: nothing was observed
            entries["skipped_steps"].add_(1)
            return losses[0] / losses[2]
        sizes = [len(blocks.raw) for blocks in groups]
        losses, raw, squared, decay_loss = self._reduced(losses, groups)
        mean, mean_square = losses[0] / losses[2], losses[1] / losses[2]

        # Skip rule: the paper leaves out the whole step, the released code single tensors (released row 8).
        finite = torch.isfinite(mean_square) & torch.isfinite(raw.sum())
        seen = raw if self._released else raw.sum().expand_as(raw)
        usable = (seen.sqrt() >= options["min_grad_norm"]) & finite

        R = entries["measurement_noise"]
        if options["measurement_noise"] is None:  # (22) against target 0, used in the same step (released rows 4, 5)
            R = kalman.running_average(R, mean_square, options["noise_decay"])

        squared = squared.masked_fill(~usable, 0.0)
        if options["blocks"] == "global":
            squared = squared.sum().expand_as(squared)
            decay_loss = decay_loss.masked_fill(~usable, 0.0).sum().expand_as(squared)
        residual = mean + decay_loss if options["target_risk"] == "relative" else torch.ones_like(squared)
        S = kalman.innovation_variance(entries["variance"], squared, R)
        usable = usable & (S > 0)  # S = 0: neither the loss nor the weights are uncertain, so there is nothing to learn
        step = torch.where(usable, residual / S, 0.0)  # e / S at lr = 1
        for blocks, part, mask in zip(groups, torch.split(step, sizes), torch.split(usable, sizes), strict=True):
            self._correct_group(blocks, entries, part * blocks.group["lr"], mask)

        # (25): one covariance for all blocks, conditioned on the largest, since t -> t / (A t + R) increases.
        posterior = entries | self._condition_covariance(entries, squared.max(), R) | {"measurement_noise": R}
        missing = entries | {"skipped_steps": entries["skipped_steps"] + 1}
        new, old = (torch.stack([e[name] for name in self.filter_entries]) for e in (posterior, missing))
        self._filter().copy_(torch.where(usable.any(), new, old))
        return mean

    def _condition_covariance(self, entries: Entries, squared_norm: Tensor, R: Tensor) -> Entries:
        raise NotImplementedError

    def _observe_group(self, group: dict[str, Any]) -> _Blocks:
        """Norms of the group's gradients; nothing is changed."""
        params = [p for p in group["params"] if p.grad is not None]
        check_dense(type(self).__name__, params)
        weight_decay, entries = group["weight_decay"], self._filter()
        buckets = [_Bucket(ps, local(ps), local_gradients(ps)) for ps in self._buckets(params)]
        norms = [_observe(b.weights, b.grads, weight_decay, fused=self._options["fused"]) for b in buckets]
        g2, h2, x2 = torch.cat([n.to(entries.device) for n in norms], 1) if norms else entries.new_zeros(3, 0)
        return _Blocks(group, buckets, g2, h2, weight_decay / 2 * x2)

    def _rank_groups(self) -> list[Any]:
        """The process groups whose ranks keep one filter."""
        if self._process_group is not None:
            return [self._process_group]
        return rank_groups(p for group in self.param_groups for p in group["params"])

    def _reduced(self, losses: Tensor, groups: list[_Blocks]) -> tuple[Tensor, ...]:
        """Losses, and the three norms of all blocks: means over the ranks, in one collective, of whole tensors."""
        norms = torch.cat([torch.stack([b.raw, b.decayed, b.decay_loss]) for b in groups], 1)
        if ranks := self._rank_groups():
            norms = times_shards(norms, (p for blocks in groups for p in blocks.params))
            together = mean_over_ranks(torch.cat([losses, norms.flatten()]), ranks)
            losses, norms = together[: len(losses)], together[len(losses) :].view_as(norms)
        return losses, *norms

    def _correct_group(self, blocks: _Blocks, entries: Entries, step: Tensor, usable: Tensor) -> None:
        """x -= A e / S h and p -= C e / S h for the tensors of one group (12), (25)."""
        # The released KOALA-V moves along the gradient without weight decay (released row 9).
        plain = self._released and not self.has_velocity
        weight_decay = 0.0 if plain else blocks.group["weight_decay"]
        averaging = self._released and self._options["process_noise"] is None
        # x_avg moves after the update, for tensors with a usable gradient only (released row 2)
        weights = (1 - self._options["noise_decay"]) * usable.to(step.dtype)
        velocity_step = entries["covariance"] * step if self.has_velocity else torch.zeros_like(step)
        factors = torch.stack([entries["variance"] * step, velocity_step, weights])
        sizes = [len(bucket.params) for bucket in blocks.buckets]
        for bucket, of_bucket in zip(blocks.buckets, torch.split(factors, sizes, 1), strict=True):
            device = bucket.params[0].device
            _correct(
                bucket.weights,
                self._kept(bucket.params, "velocity", self.has_velocity),
                self._kept(bucket.params, "average", averaging),
                bucket.grads,
                weight_decay,
                usable.any().to(device),
                *of_bucket.to(device).unbind(),
                fused=self._options["fused"],
            )


class KoalaV(_Koala):
    r"""KOALA-V, the vanilla filter: weights that drift at random (Algorithm 1).

    .. math::
        \hat P &= P + Q, \qquad S_i = \hat P |g_i|^2 + R, \\
        x_i &\leftarrow x_i - \frac{\hat P e_i}{S_i} g_i, \qquad
        P = \hat P - \max_i \frac{|g_i|^2}{S_i} \hat P^2

    for blocks i (eqs. 12, 13, 25), with R averaged as in eq. 22. Loss and gradient are evaluated after the prediction,
    see :meth:`step`. The scalars P, Q, R are shared by all param groups; ``lr`` and ``weight_decay`` are per group.

    Args:
        params: real floating-point tensors or param groups.
        lr: epsilon_k, the share of the loss to remove in a step (``target_risk="relative"``, eq. 28) or the amount
            (``"absolute"``, eq. 27). Schedulers act on it.
        initial_variance: P_0 = sigma_0^2.
        process_noise: Q, a fixed variance; ``None`` estimates it from the drift of the weights (eqs. 23, 24).
        measurement_noise: R, a fixed variance in squared units of the loss; ``None`` averages the squared losses (22).
        initial_measurement_noise: R_0 of that average.
        noise_decay: beta_R and beta_x, the coefficient of the averages.
        target_risk: ``"relative"``: e_i = lr (L + lambda/2 |x_i|^2). ``"absolute"``: e_i = lr.
        blocks: ``"tensor"`` treats every parameter tensor as a layer (25); ``"global"`` is Algorithm 1 as printed.
        weight_decay: lambda of an L2 term inside the loss and the gradient.
        min_grad_norm: a gradient with a smaller norm is no observation: the step is skipped and counted.
        formulas: ``"paper"``, or ``"released"`` for what the authors' code computes (the two differ, see below).
        process_group: where given, losses and norms are reduced over it in one collective, so that all ranks keep one
            filter; ``DistributedDataParallel`` needs it. DTensors, as ``fully_shard`` makes them, need it not: they
            reduce over their own mesh, in one collective per mesh dimension, and if it is given it must hold that mesh.
        foreach: lists of tensors at once (more memory, fewer launches); ``None``: all of them on CUDA, small ones on
            the CPU.
        fused: ``True`` compiles the passes over tensors of 4097 elements and more, which pays from some million weights
            on; ``None`` never does.

    Raises:
        ValueError, TypeError: for an option out of range or of the wrong type; the message names it.

    Several devices: R and e come from the losses of all ranks, sample by sample, as from one joined batch, while DDP
    and FSDP average the gradients rank by rank. With unequal batches, call ``backward`` on
    ``losses.sum() * ranks / samples_of_all_ranks``.

    Differs from the authors' code unless ``formulas="released"``: there the step follows the gradient without weight
    decay, although S uses it. Extra memory: none with a fixed process noise, one tensor per parameter without, of the
    parameter's dtype. The filter is kept in float64, whatever the dtype of the weights.

    Example, the loss x^2 / 2 at x = 2 (loss 2, gradient 2): P^ = 0.1 + 1, S = 1.1 * 4 + 1, x = 2 - 1.1 * 2 / 5.4 * 2.

    >>> x = torch.nn.Parameter(torch.tensor([2.0]))
    >>> optimizer = KoalaV([x], measurement_noise=1.0)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = (x**2 / 2).sum()
    ...     loss.backward()
    ...     return loss
    >>> optimizer.step(closure)
    tensor(2.)
    >>> x.data
    tensor([1.1852])
    >>> round(optimizer.filter_state()["variance"], 4)  # R / S P^
    0.2037
    """

    has_velocity = False
    filter_entries = ("variance", "process_noise", "measurement_noise", "skipped_steps")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        *,
        initial_variance: float = 0.1,
        process_noise: float | None = 1.0,
        measurement_noise: float | None = None,
        initial_measurement_noise: float = 1.0,
        noise_decay: float = 0.9,
        target_risk: str = "relative",
        blocks: str = "tensor",
        weight_decay: float = 0.0,
        min_grad_norm: float = 1e-9,
        formulas: str = "paper",
        process_group: Any = None,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        options = {k: v for k, v in locals().items() if k not in ("self", "params", "process_group", "__class__")}
        if formulas == "released" and process_noise is None:
            raise ValueError(
                "process_noise=None needs formulas='paper': the released KOALA-V has a fixed process noise only"
            )
        super().__init__(params, options, process_group)

    def _predict_covariance(self, entries: Entries) -> Entries:
        return {"variance": kalman.predict_position(entries["variance"], entries["process_noise"])}

    def _condition_covariance(self, entries: Entries, squared_norm: Tensor, R: Tensor) -> Entries:
        return {"variance": kalman.condition_position(entries["variance"], squared_norm, R)}


class KoalaM(_Koala):
    r"""KOALA-M: weights that move with a velocity (eqs. 16-21).

    Predict: :math:`\hat x = x + p,\ \hat p = \kappa p`, and :math:`\hat P = F P F^\top + Q`. Condition, for blocks i:

    .. math::
        S_i = \hat A |g_i|^2 + R, \qquad
        x_i = \hat x_i - \frac{\hat A e_i}{S_i} g_i, \qquad p_i = \hat p_i - \frac{\hat C e_i}{S_i} g_i

    with the covariance [[A, C], [C, B]] updated as in :func:`koala_lib.kalman.condition_momentum` for the block with
    the largest gradient (25). **The gradient is taken at the predicted weights**, see :meth:`step`; after ``step`` the
    weights are the posterior, so evaluation needs no mode.

    Args:
        momentum: kappa, the decay of the velocities, in [0, 1).
        initial_variance: A_0 = sigma_{x,0}^2.
        initial_velocity_variance: B_0 = sigma_{p,0}^2.
        initial_covariance: C_0 = sigma_{c,0}^2, with C_0^2 <= A_0 B_0.
        process_noise: q_x^2; ``None`` estimates it from the drift of the weights (eqs. 23, 24).
        velocity_noise: q_p^2; the paper gives no value, 0.01 is the released code's.

    The other arguments are those of :class:`KoalaV`. Extra memory: the velocity, and the average of the weights where
    the process noise is estimated. With ``initial_velocity_variance = initial_covariance = velocity_noise = 0`` it is
    KOALA-V.

    Raises:
        ValueError, TypeError: for an option out of range or of the wrong type; the message names it.

    Differs from the authors' code unless ``formulas="released"``: there q_x^2 is a smoothed norm / n instead of (24),
    and the average starts at zero and follows the update instead of preceding it.

    Example: the first step is KOALA-V's with P^ = A_0 + B_0 + q_x^2 = 0.2 + 0; p gets kappa B_0 / P^ of it.

    >>> x = torch.nn.Parameter(torch.tensor([2.0]))
    >>> optimizer = KoalaM([x], measurement_noise=1.0)
    >>> optimizer.predict()
    >>> loss = (x**2 / 2).sum()
    >>> loss.backward()
    >>> optimizer.step(loss=loss)
    tensor(2.)
    >>> x.data, optimizer.state[x]["velocity"]
    (tensor([1.5556]), tensor([-0.2000]))
    """

    has_velocity = True
    filter_entries = (
        "variance",
        "covariance",
        "velocity_variance",
        "process_noise",
        "measurement_noise",
        "skipped_steps",
    )

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        *,
        momentum: float = 0.9,
        initial_variance: float = 0.1,
        initial_velocity_variance: float = 0.1,
        initial_covariance: float = 0.0,
        process_noise: float | None = None,
        velocity_noise: float = 0.01,
        measurement_noise: float | None = None,
        initial_measurement_noise: float = 1.0,
        noise_decay: float = 0.9,
        target_risk: str = "relative",
        blocks: str = "tensor",
        weight_decay: float = 0.0,
        min_grad_norm: float = 1e-9,
        formulas: str = "paper",
        process_group: Any = None,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        options = {k: v for k, v in locals().items() if k not in ("self", "params", "process_group", "__class__")}
        for name in ("initial_variance", "initial_velocity_variance", "velocity_noise"):
            check_number(name, options[name])
        check_number("momentum", momentum, high=1.0)
        check_number("initial_covariance", initial_covariance, low=-float("inf"))
        if initial_covariance**2 > initial_variance * initial_velocity_variance:
            raise ValueError(
                f"initial_covariance={initial_covariance} is impossible: its square must not exceed "
                f"initial_variance * initial_velocity_variance = {initial_variance * initial_velocity_variance:g}"
            )
        super().__init__(params, options, process_group)

    def _predict_covariance(self, entries: Entries) -> Entries:
        P = kalman.MomentumCovariance(*(entries[name] for name in kalman.MomentumCovariance._fields))
        options = self._options
        P = kalman.predict_momentum(P, options["momentum"], entries["process_noise"], options["velocity_noise"])
        return P._asdict()

    def _condition_covariance(self, entries: Entries, squared_norm: Tensor, R: Tensor) -> Entries:
        P = kalman.MomentumCovariance(*(entries[name] for name in kalman.MomentumCovariance._fields))
        return kalman.condition_momentum(P, squared_norm, R)._asdict()
