"""KOALA: training as Kalman filtering of the loss (Davtyan et al., AAAI 2022, arXiv 2107.03331).

The weights are a hidden state, the minibatch loss is a noisy observation of a target risk, and the gradient is the
observation's Jacobian. :class:`KoalaV` lets the weights drift at random (Algorithm 1), :class:`KoalaM` adds velocities
(eqs. 16-21). The recursions of the covariance are in :mod:`koala_lib.kalman`; ``koala_lib/reference/koala.py`` holds
the same optimizers as slow loops in the paper's symbols. "Released row N" points to the table of differences between
paper and released code in ``notebooks/koala/10_kalman_view_of_training.ipynb``, section 7.
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from koala_lib import kalman
from koala_lib.optim._engine.checks import check_choice, check_number, options_among
from koala_lib.optim._engine.passes import KoalaPasses, Scalar, like, scalars
from koala_lib.optim.filter import Losses, LossFilter

__all__ = ["KoalaM", "KoalaV"]


class PositionFilter(NamedTuple):
    """The scalars of KOALA-V, as they are named in ``filter_state()``."""

    variance: Scalar  # P
    process_noise: Scalar  # Q
    measurement_noise: Scalar  # R
    skipped_steps: Scalar
    negative_losses: Scalar


class MomentumFilter(NamedTuple):
    """The scalars of KOALA-M, as they are named in ``filter_state()``."""

    variance: Scalar  # A = sigma_x^2
    covariance: Scalar  # C = sigma_c^2
    velocity_variance: Scalar  # B = sigma_p^2
    process_noise: Scalar  # q_x^2
    measurement_noise: Scalar  # R
    skipped_steps: Scalar
    negative_losses: Scalar


class _Koala(LossFilter):
    """What KOALA-V and KOALA-M share: Algorithm 1 with gains per layer (25), noise estimates, skip rule."""

    has_velocity: bool

    def __init__(self, params: Any, options: dict[str, Any], process_group: Any) -> None:
        q, R = options["process_noise"], options["measurement_noise"]
        adaptive_q = 0.01 if options["formulas"] == "released" else 0.0  # released row 1 starts its average at 0.01
        initial = {
            "variance": options["initial_variance"],
            "covariance": options.get("initial_covariance", 0.0),
            "velocity_variance": options.get("initial_velocity_variance", 0.0),
            "process_noise": adaptive_q if q is None else q,
            "measurement_noise": options["initial_measurement_noise"] if R is None else R,
            "skipped_steps": 0.0,
            "negative_losses": 0.0,
        }
        super().__init__(params, options, initial, process_group)

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options(options)
        if options["process_noise"] is not None:
            check_number("process_noise", options["process_noise"])
        check_choice("target_risk", options["target_risk"], ("relative", "absolute"))
        check_choice("blocks", options["blocks"], ("tensor", "global"))
        check_choice("formulas", options["formulas"], ("paper", "released"))

    def _initialise(self) -> None:
        options = self.param_groups[0]
        start = torch.zeros_like if options["formulas"] == "released" else torch.clone  # x_avg: released row 2
        for p in self._trained():
            if self.has_velocity and "velocity" not in self.state[p]:
                self.state[p]["velocity"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            if options["process_noise"] is None and "average" not in self.state[p]:
                self.state[p]["average"] = start(p.detach(), memory_format=torch.preserve_format)

    # -- Table 1, time update --------------------------------------------------------------------------------------

    def _predict(self) -> None:
        options, state = self.param_groups[0], self.filter_type(*scalars(self._filter()))
        adaptive, released = options["process_noise"] is None, options["formulas"] == "released"
        beta, q = options["noise_decay"], state.process_noise
        if not adaptive:
            q = like(q, options["process_noise"])  # which may have changed
        if self.has_velocity or adaptive:
            kept = ["velocity"] * self.has_velocity + ["average"] * adaptive
            passes = KoalaPasses(self, kept, with_gradient=False, process_group=self._process_group)
            drift = passes.advance(
                momentum=options["momentum"] if self.has_velocity else 0.0,
                average_rate=0.0 if released else 1 - beta,  # (23); released row 2: after the update
            )
        if adaptive:
            n = sum(p.numel() for bucket in passes.buckets for p in bucket.params) or 1
            q_x = drift / n  # |x_{k-1} - x_avg|^2 / n (24)
            q = kalman.running_average(q, drift**0.5 / n, beta) if released else q_x  # released row 1
        self._write(self._predict_covariance(state, q))

    def _predict_covariance(self, state: Any, q: Scalar) -> Any:
        """Return the covariance of the prediction, P^ = F P F^T + Q."""
        raise NotImplementedError

    # -- Table 1, measurement update -------------------------------------------------------------------------------

    def _update(self, losses: Losses) -> Scalar:
        options, state = self.param_groups[0], self.filter_type(*scalars(self._filter()))
        released, beta = options["formulas"] == "released", options["noise_decay"]
        averages = released and options["process_noise"] is None
        kept = ["velocity"] * self.has_velocity + ["average"] * averages
        passes = KoalaPasses(self, kept, with_gradient=True, process_group=self._process_group)
        if not passes.buckets:  # no gradient anywhere
            self._write(state._replace(skipped_steps=state.skipped_steps + 1))
            return losses.total / losses.number
        seen = passes.observe(
            losses,
            least=options["min_grad_norm"] if released else None,  # released row 8
            together=options["blocks"] == "global",
        )
        L, A, R = seen.loss, state.variance, state.measurement_noise
        state = state._replace(negative_losses=state.negative_losses + (L < 0))
        missing = state._replace(skipped_steps=state.skipped_steps + 1)
        if options["measurement_noise"] is None:  # against target 0, used in the same step (released rows 4, 5)
            R = beta * R + (1 - beta) * seen.squared_loss  # (22)
        else:
            R = like(R, options["measurement_noise"])

        # A step is skipped if the gradient is too small, or loss or gradient are not finite; or if no S_i > 0: neither
        # the loss nor the weights are uncertain, so there is nothing to learn.
        observed = (seen.norm >= options["min_grad_norm"]) & (seen.norm + seen.squared_loss < math.inf)
        observed = observed & (A * seen.largest + R > 0)
        if observed is False:
            self._write(missing)
            return L

        gains = []
        for i in seen.blocks:
            e = i.lr * (L + i.penalty) if options["target_risk"] == "relative" else i.lr  # (28), or (27)
            S = A * i.squared_norm + R  # Table 1 with P = A I (11)
            gains.append(e / (S + (S == 0)))  # a single S_i = 0 means that A or h_i is 0, and x_i stays
        passes.correct(
            steps=[A * gain for gain in gains],  # x_i -= P^ e_i / S_i h_i (12)
            velocity_steps=[state.covariance * gain for gain in gains] if self.has_velocity else None,
            average_rates=[(1 - beta) * i.part for i in seen.blocks] if averages else None,  # released row 2
            weight_decay=self.has_velocity or not released,  # released row 9
            observed=observed,
        )
        # (25): one covariance for all blocks, conditioned on the largest, since t -> t / (A t + R) increases.
        self._write(self._condition_covariance(state, seen.largest, R), observed, missing)
        return L

    def _condition_covariance(self, state: Any, squared_norm: Scalar, R: Scalar) -> Any:
        """Return the covariance of the posterior, P = (I - K H) P^."""
        raise NotImplementedError


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
            (``"absolute"``, eq. 27). Schedulers act on it. Other options may be changed between steps, too, in all
            groups alike; those named ``initial_...`` say how the filter starts and are refused then.
        initial_variance: P_0 = sigma_0^2.
        process_noise: Q, a fixed variance; ``None`` estimates it from the drift of the weights (eqs. 23, 24).
        measurement_noise: R, a fixed variance in squared units of the loss; ``None`` averages the squared losses (22).
        initial_measurement_noise: R_0 of that average.
        noise_decay: beta_R and beta_x, the coefficient of the averages.
        target_risk: ``"relative"``: e_i = lr (L + lambda/2 |x_i|^2). ``"absolute"``: e_i = lr; for losses that can be
            negative (GANs, log-densities, policy gradients), where ``"relative"`` climbs towards loss 0.
            ``negative_losses`` counts the steps with a negative mean loss.
        blocks: ``"tensor"`` treats every parameter tensor as a layer (25); ``"global"`` is Algorithm 1 as printed.
        weight_decay: lambda of an L2 term inside the loss and the gradient.
        min_grad_norm: a gradient with a smaller norm is no observation: the step is skipped and counted.
        formulas: ``"paper"``, or ``"released"`` for what the authors' code computes (the two differ, see below).
        process_group: where given, losses and norms are reduced over it in one collective, so that all ranks keep one
            filter; ``DistributedDataParallel`` needs it, and several ranks without it are warned once. ``False`` says
            that they train apart on purpose. DTensors, as ``fully_shard`` makes them, need none: they reduce over their
            own mesh, in one collective per mesh dimension, and if it is given it must hold that mesh.
        foreach: ``True`` treats lists of tensors at once (more memory, fewer launches); ``None`` does so with all
            of them on CUDA and with small ones on the CPU.
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
    filter_type = PositionFilter
    filter_entries = PositionFilter._fields

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
        super().__init__(params, options_among(locals()), process_group)

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options(options)
        if options["formulas"] == "released" and options["process_noise"] is None:
            raise ValueError(
                "process_noise=None needs formulas='paper': the released KOALA-V has a fixed process noise only"
            )

    def _predict_covariance(self, state: PositionFilter, q: Scalar) -> PositionFilter:
        P = kalman.predict_position(state.variance, q)  # P^ = P + Q
        return state._replace(variance=P, process_noise=q)

    def _condition_covariance(self, state: PositionFilter, squared_norm: Scalar, R: Scalar) -> PositionFilter:
        P = kalman.condition_position(state.variance, squared_norm, R)  # (13)
        return state._replace(variance=P, measurement_noise=R)


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
    fixed = (*_Koala.fixed, "initial_velocity_variance", "initial_covariance")
    filter_type = MomentumFilter
    filter_entries = MomentumFilter._fields

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
        super().__init__(params, options_among(locals()), process_group)

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options(options)
        for name in ("initial_velocity_variance", "velocity_noise"):
            check_number(name, options[name])
        check_number("momentum", options["momentum"], high=1.0)
        check_number("initial_covariance", options["initial_covariance"], low=-sys.float_info.max)
        A, C, B = (options[f"initial_{name}"] for name in ("variance", "covariance", "velocity_variance"))
        if C**2 > A * B:
            raise ValueError(
                f"initial_covariance={C} is impossible: its square must not exceed "
                f"initial_variance * initial_velocity_variance = {A * B:g}"
            )

    def _predict_covariance(self, state: MomentumFilter, q: Scalar) -> MomentumFilter:
        options = self.param_groups[0]
        P = kalman.MomentumCovariance(state.variance, state.covariance, state.velocity_variance)
        P = kalman.predict_momentum(P, options["momentum"], q, options["velocity_noise"])  # (19)
        return state._replace(**P._asdict(), process_noise=q)

    def _condition_covariance(self, state: MomentumFilter, squared_norm: Scalar, R: Scalar) -> MomentumFilter:
        P = kalman.MomentumCovariance(state.variance, state.covariance, state.velocity_variance)
        P = kalman.condition_momentum(P, squared_norm, R)  # (21)
        return state._replace(**P._asdict(), measurement_noise=R)
