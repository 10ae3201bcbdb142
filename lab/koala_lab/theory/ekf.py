"""Table 1 of KOALA as it is printed: the extended Kalman filter of the loss, with its full covariance matrix.

For problems of a few dimensions: a step costs O(n^3) and reads everything. It is what KOALA-V and KOALA-M
approximate, so notebooks and tests can say what the approximations (11) and (21) change, and that nothing else does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from koala_lab.theory.problems import FiniteSum

Matrix = Sequence[Sequence[float]]


class Estimates(NamedTuple):
    """What the filter believed; one row per step.

    Attributes:
        predicted: state x^_k (steps, d), where loss and gradient were taken.
        states: posterior state x_k (steps, d); d = n, or 2 n with velocities, which come second.
        covariances: posterior P_k (steps, d, d), in units of x^2.
    """

    predicted: Tensor
    states: Tensor
    covariances: Tensor


def dense_filter(
    problem: FiniteSum,
    steps: int,
    *,
    initial_covariance: Matrix,
    transition: Matrix,
    process_noise: Matrix,
    measurement_noise: float,
    samples: Tensor | None = None,
    scaled: bool = False,
) -> Estimates:
    """Filter the (minibatch) loss of a problem as an observation of the target 0.

    The three matrices are given for one coordinate and stand for themselves times the identity, as in eq. (19):
    (1, 1) for x alone, eqs. (7) and (8), and (2, 2) for x and its velocity, eqs. (16) to (18).

    Args:
        problem: the loss; the state starts at its starting point, velocities at 0.
        steps: number of steps.
        initial_covariance: P_0.
        transition: F.
        process_noise: Q.
        measurement_noise: R, in units of loss^2.
        samples: indices (steps,) or (steps, B) of the sample losses that step k sees; ``None`` is full batch.
        scaled: put |H|^2 I for H^T H in the update of the covariance, (11) and (21); that is KOALA.

    Returns:
        The estimates of all steps.

    Raises:
        ValueError: if the matrices differ in shape, or ``samples`` has not one row per step.

    >>> from koala_lab.theory.problems import quadratic
    >>> run = dense_filter(quadratic([1.0], start=[2.0]), 1, initial_covariance=[[0.5]], transition=[[1.0]],
    ...                    process_noise=[[0.5]], measurement_noise=4.0)
    >>> run.states.item(), run.covariances.item()  # x = 2 - 1 * 2 / 8 * 2, P = 4 / 8 * 1
    (1.5, 0.5)
    """
    small = [torch.tensor(m, dtype=torch.float64) for m in (initial_covariance, transition, process_noise)]
    if len({m.shape for m in small}) != 1:
        shapes = ", ".join(str(tuple(m.shape)) for m in small)
        raise ValueError(f"initial_covariance, transition and process_noise must have one shape, got {shapes}")
    if samples is not None and len(samples) != steps:
        raise ValueError(f"samples has {len(samples)} rows for {steps} steps; give one row per step")
    n = len(problem.start)
    identity = torch.eye(n, dtype=torch.float64)
    P, F, Q = (torch.kron(matrix, identity) for matrix in small)
    R = measurement_noise
    x = torch.zeros(len(P), dtype=torch.float64)
    x[:n] = torch.tensor(problem.start, dtype=torch.float64)
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for k in range(steps):
        # Predict
        predicted = F @ x
        P = F @ P @ F.T + Q
        # Update
        losses, gradients = problem.at(predicted[:n])
        seen = slice(None) if samples is None else samples[k].reshape(-1)
        H = torch.zeros_like(x)
        H[:n] = gradients[seen].mean(0)
        HH = torch.outer(H, H)
        if scaled:
            HH = torch.zeros_like(P)
            HH[:n, :n] = H @ H * identity
        S = H @ P @ H + R
        K = P @ H / S
        x = predicted + K * (0 - losses[seen].mean())
        P = P - P @ HH @ P / S  # (I - K H) P^
        rows.append((predicted, x, P))
    return Estimates(*(torch.stack(column) for column in zip(*rows, strict=True)))
