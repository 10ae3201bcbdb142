"""The Kalman recursions behind the optimizers, as pure functions of scalars.

Every argument is a 0-dim tensor or a number; nothing is modified. "predict" is the time update of Table 1 of the KOALA
paper, "condition" its measurement update. The n x n covariance is approximated by a scalar (eq. 11) or by one
2 x 2 block times the identity (eq. 21), so a recursion costs a handful of operations whatever the model's size.

Symbols: P = ``variance``; A, C, B = the entries of :class:`MomentumCovariance`; Q, q_x^2 = ``process_noise``;
q_p^2 = ``velocity_noise``; R = ``measurement_noise``; |g|^2 = ``squared_norm``; S = :func:`innovation_variance`.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from torch import Tensor

Scalar = TypeVar("Scalar", Tensor, float)


class MomentumCovariance(NamedTuple):
    """The 2 x 2 covariance of (position, velocity) that stands for P = [[A, C], [C, B]] (x) I (KOALA, above eq. 21)."""

    variance: Tensor  # A = sigma_x^2
    covariance: Tensor  # C = sigma_c^2, of either sign
    velocity_variance: Tensor  # B = sigma_p^2


def innovation_variance(variance: Scalar, squared_norm: Scalar, measurement_noise: Scalar) -> Scalar:
    """S = P |g|^2 + R, the predicted variance of the observed loss (Table 1 with eq. 11)."""
    return variance * squared_norm + measurement_noise


def predict_position(variance: Scalar, process_noise: Scalar) -> Scalar:
    """P^ = P + Q (Algorithm 1, predict).

    >>> predict_position(0.1, 1.0)
    1.1
    """
    return variance + process_noise


def condition_position(variance: Scalar, squared_norm: Scalar, measurement_noise: Scalar) -> Scalar:
    """P = R / S P^ (eq. 13), which is P^ - |g|^2 / S P^^2 written without cancellation.

    >>> condition_position(1.0, 3.0, 1.0)
    0.25
    """
    return variance * (measurement_noise / innovation_variance(variance, squared_norm, measurement_noise))


def predict_momentum(
    P: MomentumCovariance, momentum: float, process_noise: Tensor, velocity_noise: float
) -> MomentumCovariance:
    """P^ = F P F^T + Q with F = [[1, 1], [0, kappa]] (eq. 19, Table 1).

    A^ = A + 2 C + B + q_x^2,  C^ = kappa (C + B),  B^ = kappa^2 B + q_p^2.
    """
    A, C, B = P
    return MomentumCovariance(
        variance=A + 2 * C + B + process_noise,
        covariance=momentum * (C + B),
        velocity_variance=momentum**2 * B + velocity_noise,
    )


def condition_momentum(P: MomentumCovariance, squared_norm: Tensor, measurement_noise: Tensor) -> MomentumCovariance:
    """P = (P^^-1 + diag(|g|^2 / R, 0))^-1 (eq. 21, Table 1); stays positive definite.

    With eta = |g|^2 / S: A = A^ - eta A^^2 = R/S A^,  C = C^ - eta A^ C^ = R/S C^,  B = B^ - eta C^^2.
    """
    A, C, B = P
    S = innovation_variance(A, squared_norm, measurement_noise)
    shrink = measurement_noise / S
    return MomentumCovariance(
        variance=A * shrink,
        covariance=C * shrink,
        velocity_variance=B - C * (squared_norm / S) * C,
    )


def running_average(average: Scalar, value: Scalar, decay: float) -> Scalar:
    """beta a + (1 - beta) v, the average of eqs. 22 and 23."""
    return decay * average + (1 - decay) * value
