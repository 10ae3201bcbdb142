"""KOALA++: the loss's Kalman filter with a covariance that is no multiple of the identity.

Xia, Davtyan and Favaro, "KOALA++: Efficient Kalman-Based Optimization with Gradient-Covariance Products" (NeurIPS 2025,
arXiv 2506.04432). KOALA puts P = sigma^2 I into Table 1 of the extended Kalman filter; here P is a matrix that is never
formed: all that a step needs of it is the product v_k = H_k P_{k-1} with the gradient H_k, a vector like the weights.
``koala_lib/reference/koala_plus_plus.py`` holds the same optimizer as a slow loop; the equations' numbers are its.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from koala_lib.optim._engine.checks import check_bool, check_number, options_among
from koala_lib.optim._engine.passes import Scalar, like, scalars
from koala_lib.optim._engine.products import Measured, ProductPasses
from koala_lib.optim.filter import Losses, LossFilter

__all__ = ["KoalaPlusPlus"]

FORGOTTEN = 1e60  # times as large a squared gradient starts anew: float32 does not hold v for both


class ProductFilter(NamedTuple):
    """The scalars of KOALA++, as they are named in ``filter_state()``."""

    process_noise: Scalar  # Q, as the last observed step used it
    measurement_noise: Scalar  # R
    drift_variance: Scalar  # what predictions added to P since the last observed step: the next step's Q
    skipped_steps: Scalar
    negative_losses: Scalar


class KoalaPlusPlus(LossFilter):
    r"""KOALA++, the filter of KOALA-V with a structured covariance, known by its product with the gradient.

    With the gradient :math:`H_k` (a row), :math:`v_k = H_k P_{k-1}` and target 0, for each parameter tensor by itself:

    .. math::
        S_k &= H_k v_k^\top + Q |H_k|^2 + R, \qquad
        x_k = x_{k-1} - \frac{\eta L_k}{S_k} (v_k + Q H_k)^\top, \\
        v_k &= (\alpha_k - \lambda_k) v_{k-1} + Q (H_k - \lambda_k H_{k-1}) + w_k H_{k-1}, \qquad
        \lambda_k = \frac{H_k (v_{k-1} + Q H_{k-1})^\top}{S_{k-1}}

    where :math:`\alpha_k v_{k-1} + w_k H_{k-1}` stands for :math:`H_k P_{k-2}`: the smallest matrix (in the Frobenius
    norm) that is known to give :math:`H_{k-1} P_{k-2} = v_{k-1}`, among all matrices, the symmetric or the positive
    semidefinite ones. A tensor's first step is the released code's: as after an observation of the same gradient under
    :math:`P_0 = \sigma_0^2 I`, so that it is KOALA-V's second one.

    Args:
        params: real floating-point tensors or param groups.
        lr: eta_k, the share of the loss to remove in a step. Schedulers act on it. As in :class:`KoalaV` with
            ``target_risk="relative"``, a negative loss climbs towards 0; ``negative_losses`` counts those steps.
        initial_variance: sigma_0^2, of P_0 = sigma_0^2 I.
        process_noise: Q, a fixed variance that every prediction adds to P.
        symmetric: whether P_{k-2} is symmetric, or any matrix (the paper's "vanilla" variant).
        positive_semidefinite: whether it is even a covariance, v^T v / (H v^T): the paper's open question. Then no
            variance is ever negative. Not with ``symmetric=False``.
        measurement_noise: R, a fixed variance in squared units of the loss; ``None`` averages the squared losses, as
            (22) of KOALA does.
        initial_measurement_noise: R_0 of that average.
        noise_decay: beta_R, its coefficient.
        weight_decay: lambda of an L2 term inside the loss (of every tensor its own) and the gradient.
        min_grad_norm: a gradient with a smaller norm is no observation: the step is skipped and counted.
        process_group: as in :class:`KoalaV`.
        foreach: as in :class:`KoalaV`.
        fused: likewise.

    Extra memory: two tensors per parameter, v and the last gradient. R and Q are shared by all param groups; ``lr`` and
    ``weight_decay`` are per group. A tensor without a gradient, with a gradient of zeros, or with S_k <= 0 (which can
    happen without ``positive_semidefinite``) or not finite waits: it keeps its place and its two vectors. One whose
    gradient is 1e30 times the last one takes a first step again. A skipped step lets the prediction stand, so the next
    one has its Q beside its own.

    Raises:
        ValueError, TypeError: for an option out of range or of the wrong type; the message names it.

    Differs from the authors' code in what it does where S_k or H_{k-1} vanish, which there divides by zero, and in R
    where that code is given mean losses, or the variance of a single one.

    Example: P^ = 0.1 + 0.1, so P_0 becomes 1 / (0.2 * 4 + 1) * 0.2 = 1/9 and v = 2/9; S = 4/9 + 0.1 * 4 + 1.

    >>> x = torch.nn.Parameter(torch.tensor([2.0]))
    >>> optimizer = KoalaPlusPlus([x], measurement_noise=1.0)
    >>> optimizer.predict()
    >>> loss = (x**2 / 2).sum()
    >>> loss.backward()
    >>> optimizer.step(loss=loss)
    tensor(2.)
    >>> x.data, optimizer.state[x]["product"]  # 2 - 2 / (83/45) * (2/9 + 0.1 * 2)
    (tensor([1.5422]), tensor([0.2222]))
    """

    filter_type = ProductFilter
    filter_entries = ProductFilter._fields
    new_entries = 0

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        *,
        initial_variance: float = 0.1,
        process_noise: float = 0.1,
        symmetric: bool = True,
        positive_semidefinite: bool = False,
        measurement_noise: float | None = None,
        initial_measurement_noise: float = 1.0,
        noise_decay: float = 0.9,
        weight_decay: float = 0.0,
        min_grad_norm: float = 1e-9,
        process_group: Any = None,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        options = options_among(locals())
        initial = {
            "process_noise": process_noise,
            "measurement_noise": initial_measurement_noise if measurement_noise is None else measurement_noise,
            "drift_variance": 0.0,
            "skipped_steps": 0.0,
            "negative_losses": 0.0,
        }
        super().__init__(params, options, initial, process_group)

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options(options)
        check_number("process_noise", options["process_noise"])
        check_bool("symmetric", options["symmetric"])
        check_bool("positive_semidefinite", options["positive_semidefinite"])
        if options["positive_semidefinite"] and not options["symmetric"]:
            raise ValueError(
                "positive_semidefinite=True is impossible with symmetric=False: a positive semidefinite covariance is "
                "symmetric; leave symmetric=True"
            )

    def _initialise(self) -> None:
        for p in self._trained():
            for name in ("gradient", "product"):
                if name not in self.state[p]:
                    self.state[p][name] = torch.zeros_like(p, memory_format=torch.preserve_format)

    def _predict(self) -> None:
        state = ProductFilter(*scalars(self._filter()))
        drift = state.drift_variance + self.param_groups[0]["process_noise"]  # P^ = P + Q I, and x^ = x
        self._write(state._replace(drift_variance=drift))

    def _closure(self, seen: Measured) -> tuple[Tensor, Tensor]:
        """Return alpha and w of H_k P_{k-2} = alpha v_{k-1} + w H_{k-1}, for the smallest P_{k-2} that is known to be.

        That is G^T v / |G|^2 for G = H_{k-1}; or (G^T v + v^T G) / |G|^2 - (G v^T) G^T G / |G|^4, the smallest
        symmetric matrix; or v^T v / (G v^T), the smallest positive semidefinite one.
        """
        options = self.param_groups[0]
        if options["positive_semidefinite"]:
            return torch.where(seen.Gv > 0, seen.Hv / seen.Gv, 0.0), torch.zeros_like(seen.Gv)
        alpha = seen.HG / seen.GG
        w = (seen.Hv - alpha * seen.Gv) / seen.GG
        return alpha, w if options["symmetric"] else torch.zeros_like(w)

    def _update(self, losses: Losses) -> Scalar:
        options, state = self.param_groups[0], ProductFilter(*scalars(self._filter()))
        beta, variance = options["noise_decay"], options["initial_variance"]
        passes = ProductPasses(self, ["gradient", "product"], with_gradient=True, process_group=self._process_group)
        if not passes.buckets:  # no gradient anywhere
            self._write(state._replace(skipped_steps=state.skipped_steps + 1))
            return losses.total / losses.number
        seen = passes.measure(losses)
        L, Q_last, R_last, Q, R = seen.loss, *state[:3], state.measurement_noise
        state = state._replace(negative_losses=state.negative_losses + (L < 0))
        missing = state._replace(skipped_steps=state.skipped_steps + 1)
        if options["measurement_noise"] is None:
            R = beta * R + (1 - beta) * seen.squared_loss  # (22) of KOALA, used in the same step
        else:
            R = like(R, options["measurement_noise"])  # which may have changed

        # The first step of a tensor: as if the same gradient had been observed before, under P_0 = sigma_0^2 I.
        S_last = seen.Gv + Q_last * seen.GG + R_last
        HH = seen.HH
        first = (seen.GG == 0) | (S_last <= 0) | (HH > FORGOTTEN * seen.GG)
        before = {"HG": HH, "GG": HH, "Hv": variance * HH, "Gv": variance * HH}
        seen = seen._replace(**{name: torch.where(first, t, getattr(seen, name)) for name, t in before.items()})
        S_last = torch.where(first, seen.Gv + Q_last * seen.GG + R, S_last)

        gain = (seen.Hv + Q_last * seen.HG) / S_last  # lambda_k
        alpha, w = self._closure(seen)
        a, b, c = alpha - gain, w - gain * Q_last, Q_last  # v_k = a v_{k-1} + b H_{k-1} + c H_k
        Hv = a * seen.Hv + b * seen.HG + c * seen.HH
        S = Hv + Q * seen.HH + R
        steps = seen.lr * (L + seen.penalty) / S

        observed = (seen.norm >= options["min_grad_norm"]) & (seen.norm + seen.squared_loss < math.inf)
        # S <= 0 is no variance; 0 / 0 is not > 0; an infinite one has inner products that overflowed.
        part = (HH > 0) & (S > 0) & S.isfinite() & observed
        observed = observed & scalars(part.any())
        if observed is False:
            self._write(missing)
            return L
        passes.revise(
            from_product=torch.where(part, torch.where(first, 0.0, a), 1.0),
            from_last=torch.where(part & ~first, b, 0.0),
            from_gradient=torch.where(part, torch.where(first, variance * a + b + c, c), 0.0),
            noise=Q,
            steps=torch.where(part, steps, 0.0),
            taken=part,
            observed=observed,
        )
        state = state._replace(process_noise=Q, measurement_noise=R, drift_variance=0 * Q)
        self._write(state, observed, missing)
        return L
