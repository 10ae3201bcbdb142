"""The Kalman recursions behind the optimizers, as pure functions of scalars.

Every argument is a 0-dim tensor or a number; nothing is modified. "predict" is the time update of Table 1 of the KOALA
paper, "condition" its measurement update. The n x n covariance is approximated by a scalar (eq. 11) or by one
2 x 2 block times the identity (eq. 21), so a recursion costs a handful of operations whatever the model's size. The
last section holds the two filters of MEKA, where gradient and loss are the hidden states.

Symbols: P = ``variance``; A, C, B = the entries of :class:`MomentumCovariance`; Q, q_x^2 = ``process_noise``;
q_p^2 = ``velocity_noise``; R = ``measurement_noise``; |g|^2 = ``squared_norm``; S = :func:`innovation_variance`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Scalar = TypeVar("Scalar", Tensor, float)


class MomentumCovariance(NamedTuple):
    """The 2 x 2 covariance of (position, velocity) that stands for P = [[A, C], [C, B]] (x) I (KOALA, above eq. 21)."""

    variance: Tensor  # A = sigma_x^2
    covariance: Tensor  # C = sigma_c^2, of either sign
    velocity_variance: Tensor  # B = sigma_p^2


def innovation_variance(variance: Scalar, squared_norm: Scalar, measurement_noise: Scalar) -> Scalar:
    """Return S = P |g|^2 + R, the predicted variance of the observed loss (Table 1 with eq. 11)."""
    return variance * squared_norm + measurement_noise


def predict_position(variance: Scalar, process_noise: Scalar) -> Scalar:
    """Return P^ = P + Q (Algorithm 1, predict).

    >>> predict_position(0.1, 1.0)
    1.1
    """
    return variance + process_noise


def condition_position(variance: Scalar, squared_norm: Scalar, measurement_noise: Scalar) -> Scalar:
    """Return P = R / S P^ (eq. 13), which is P^ - |g|^2 / S P^^2 written without cancellation.

    >>> condition_position(1.0, 3.0, 1.0)
    0.25
    """
    return variance * (measurement_noise / innovation_variance(variance, squared_norm, measurement_noise))


def predict_momentum(
    P: MomentumCovariance, momentum: float, process_noise: Tensor, velocity_noise: float
) -> MomentumCovariance:
    """Return P^ = F P F^T + Q with F = [[1, 1], [0, kappa]] (eq. 19, Table 1).

    A^ = A + 2 C + B + q_x^2,  C^ = kappa (C + B),  B^ = kappa^2 B + q_p^2.
    """
    A, C, B = P
    return MomentumCovariance(
        variance=A + 2 * C + B + process_noise,
        covariance=momentum * (C + B),
        velocity_variance=momentum**2 * B + velocity_noise,
    )


def condition_momentum(P: MomentumCovariance, squared_norm: Tensor, measurement_noise: Tensor) -> MomentumCovariance:
    """Return P = (P^^-1 + diag(|g|^2 / R, 0))^-1 (eq. 21, Table 1); stays positive definite.

    With eta = |g|^2 / S: A = A^ - eta A^^2 = R/S A^,  C = C^ - eta A^ C^ = R/S C^,  B = B^ - eta C^^2. Rounding must
    not take B below C^2 / A of the new A and C, which is R/S C^^2 / A^.
    """
    A, C, B = P
    S = A * squared_norm + measurement_noise
    shrink = measurement_noise / S
    least = C * (shrink / (A + (A == 0))) * C
    larger: Any = torch.maximum if isinstance(least, Tensor) else max
    return MomentumCovariance(
        variance=A * shrink,
        covariance=C * shrink,
        velocity_variance=larger(B - C * (squared_norm / S) * C, least),
    )


def running_average(average: Scalar, value: Scalar, decay: float) -> Scalar:
    """Return beta a + (1 - beta) v, the average of eqs. 22 and 23."""
    return decay * average + (1 - decay) * value


def corrected_average(average: Scalar, value: Scalar, weight: Scalar, decay: float) -> Scalar:
    """Return the bias-corrected average sum_i beta^(t-i) v_i / sum_i beta^(t-i), as in Adam.

    MEKA's paper averages (section 4) and does not say how its averages start.

    Args:
        average: of the values before, anything at first.
        value: v_t.
        weight: 1 - beta^t, which is :func:`running_average` of ones, v_t's included.
        decay: beta.

    >>> corrected_average(corrected_average(0.0, 3.0, weight=0.5, decay=0.5), 6.0, weight=0.75, decay=0.5)
    5.0
    """
    share = (1 - decay) / weight
    return (1 - share) * average + share * value  # exactly v_t where it is the first, or decay = 0


# ---- MEKA: the full gradient and the full loss as hidden states --------------------------------------------------
#
# Symbols: p = ``variance`` of the filtered gradient (P = p I), sigma = ``measurement_noise`` of the minibatch gradient;
# u, s = ``value`` and its ``variance``, y, r = the minibatch loss and its noise. d is the last displacement of the
# weights, m the filtered gradient before it, B the minibatch Hessian, Q the covariance of B d. The time update of the
# scalar p is :func:`predict_position`.


class ValueEstimate(NamedTuple):
    """The loss after an observation."""

    value: Tensor  # u
    variance: Tensor  # s
    model_error: Tensor  # lambda


def gain(variance: Tensor, measurement_noise: Tensor) -> Tensor:
    """Return k = p / (p + sigma), the weight of the observation (MEKA, eq. 7 with P = p I); elementwise.

    1 where both vanish: the observation is exact there, while the prediction is exact for quadratic losses only.

    >>> import torch
    >>> gain(torch.tensor([3.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 0.0]))
    tensor([0.7500, 0.0000, 1.0000])
    """
    return (variance / (variance + measurement_noise)).masked_fill(variance + measurement_noise == 0, 1.0)


def condition_variance(variance: Tensor, measurement_noise: Tensor) -> Tensor:
    """Return (1 - k) p = k sigma (MEKA, eq. 8 with P = p I); elementwise.

    The second form keeps its digits where p >> sigma, as in the first step: P_0 is 1e4, a gradient's noise often 1e-8.

    >>> import torch
    >>> condition_variance(torch.tensor(3.0), torch.tensor(1.0))
    tensor(0.7500)
    """
    return gain(variance, measurement_noise) * measurement_noise


def condition_gradient(
    mean: Tensor, covariance: Tensor, gradient: Tensor, measurement_noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Condition the gradient on an observation, with full covariance matrices (MEKA, eqs. 7 and 8).

    K = P^ (P^ + Sigma)^-1, m = (I - K) m^ + K g, P = (I - K) P^ (I - K)^T + K Sigma K^T. The time update (6) before it
    is m^ = m + B d, P^ = P + Q; the covariance added is that of the very B d (printed as Q_{t-1}).

    Args:
        mean: m^, shape (..., n); leading dimensions are runs that share their covariances.
        covariance: P^, shape (n, n).
        gradient: g, shape (..., n).
        measurement_noise: Sigma, shape (n, n); P^ + Sigma must be invertible.

    Returns:
        m, P and the gain K.

    >>> import torch
    >>> one = torch.ones(1, 1)
    >>> condition_gradient(torch.zeros(1), 3 * one, torch.ones(1), one)
    (tensor([0.7500]), tensor([[0.7500]]), tensor([[0.7500]]))
    """
    K = torch.linalg.solve(covariance + measurement_noise, covariance).T  # both are symmetric
    rest = torch.eye(len(K), dtype=K.dtype, device=K.device) - K
    return (
        mean @ rest.T + gradient @ K.T,
        rest @ covariance @ rest.T + K @ measurement_noise @ K.T,
        K,
    )


def predict_value(
    value: Scalar,
    variance: Scalar,
    slope: Scalar,
    curvature: Scalar,
    slope_variance: Scalar,
    curvature_variance: Scalar,
) -> tuple[Scalar, Scalar]:
    """Predict mean and variance of the loss after the displacement d, without the model error (MEKA, eq. 16).

    u^ = u + m^T d + 1/2 d^T B d and s + d^T P d + 1/4 d^T Q d.

    Args:
        value: u.
        variance: s.
        slope: m^T d, with the filtered gradient from before the displacement.
        curvature: d^T B d.
        slope_variance: d^T P d, that is p |d|^2 in the scalar form.
        curvature_variance: d^T Q d, that is q |d|^2 in the scalar form.

    >>> predict_value(1.0, 0.5, slope=-2.0, curvature=4.0, slope_variance=0.25, curvature_variance=1.0)
    (1.0, 1.0)
    """
    return value + slope + curvature / 2, variance + slope_variance + curvature_variance / 4


def condition_value(value: Tensor, variance: Tensor, observation: Tensor, measurement_noise: Tensor) -> ValueEstimate:
    """Condition the loss on an observation, with the model error that makes it most likely (MEKA, App. B).

    lambda = max((y - u^)^2 - c, 0) with c = variance + r, the maximum of the likelihood (19) of y ~ N(u^, lambda + c)
    over lambda >= 0 (eqs. 21, 22). Then s^ = variance + lambda, gamma = s^ / (s^ + r), u = (1 - gamma) u^ + gamma y,
    s = (1 - gamma) s^.

    >>> import torch
    >>> zero, one = torch.tensor(0.0), torch.tensor(1.0)
    >>> condition_value(zero, one, 2 * one, one)  # c = 2, lambda = 4 - 2, s^ = 3
    ValueEstimate(value=tensor(1.5000), variance=tensor(0.7500), model_error=tensor(2.))
    """
    error = ((observation - value).square() - (variance + measurement_noise)).clamp(min=0)
    estimate = condition_trusted_value(value, variance + error, observation, measurement_noise)
    return estimate._replace(model_error=error)


def condition_trusted_value(
    value: Tensor, variance: Tensor, observation: Tensor, measurement_noise: Tensor
) -> ValueEstimate:
    """Condition the loss on an observation, with lambda = 0: as if the prediction had no model error.

    gamma = s^ / (s^ + r) with s^ = variance, u = (1 - gamma) u^ + gamma y, s = (1 - gamma) s^.
    """
    return ValueEstimate(
        value=value + gain(variance, measurement_noise) * (observation - value),
        variance=condition_variance(variance, measurement_noise),
        model_error=torch.zeros_like(variance),
    )
