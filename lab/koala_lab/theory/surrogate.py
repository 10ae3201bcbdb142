"""KOALA++ as it is meant: the extended Kalman filter whose covariance is a matrix made anew from one product.

Of P a step of KOALA++ keeps the product v = H P with a gradient H only. :func:`surrogate` writes out the matrix that
then stands for P, and :func:`surrogate_filter` runs Table 1 of KOALA with it, in n x n matrices: what
:class:`koala_lib.KoalaPlusPlus` computes in vectors. For problems of a few dimensions, as
:func:`koala_lab.theory.ekf.dense_filter`, which keeps P itself; :func:`products` compares the two along one path.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from koala_lab.checks import check_known
from koala_lab.theory.ekf import Estimates
from koala_lab.theory.problems import FiniteSum

CLOSURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # H, v -> P with H P = v
    "vanilla": lambda H, v: torch.outer(H, v) / (H @ H),
    "symmetric": lambda H, v: (
        (torch.outer(H, v) + torch.outer(v, H)) / (H @ H) - (H @ v) * torch.outer(H, H) / (H @ H) ** 2
    ),
    "semidefinite": lambda H, v: torch.outer(v, v) / (H @ v),
}


def surrogate(closure: str, H: Tensor, v: Tensor) -> Tensor:
    """Return the matrix P (n, n) with the smallest Frobenius norm that fulfils H P = v.

    Args:
        closure: among which matrices: ``"vanilla"`` (all of them), ``"symmetric"``, ``"semidefinite"`` (symmetric and
            positive semidefinite, which needs H v^T > 0 and is no part of the paper).
        H: (n,), not 0.
        v: (n,).

    Raises:
        ValueError: for another closure.

    >>> surrogate("semidefinite", torch.tensor([1.0, 0.0]), torch.tensor([2.0, 2.0]))
    tensor([[2., 2.],
            [2., 2.]])
    """
    check_known("closure", closure, CLOSURES)
    return CLOSURES[closure](H, v)


def _posterior(closure: str, H: Tensor, v: Tensor, Q: float, R: float) -> Tensor:
    """Return P_k = (I - K_k H_k) P^_k, with the surrogate of P_{k-1} in P^_k."""
    P = surrogate(closure, H, v) + Q * torch.eye(len(H), dtype=H.dtype)
    return P - torch.outer(H @ P, H @ P) / (H @ P @ H + R)


def products(
    kind: str, gradients: Tensor, *, initial_variance: float, process_noise: float, measurement_noise: float
) -> Tensor:
    """Return what a filter that observes given gradients knows before each of them: v_k = H_k P_{k-1}, (steps, n).

    Args:
        kind: a closure; ``"dense"``, which keeps P; or ``"scalar"``, KOALA-V's P = sigma^2 I (eqs. 11, 13).
        gradients: H_k, (steps, n); none is 0.
        initial_variance: sigma_0^2.
        process_noise: Q.
        measurement_noise: R.

    Raises:
        ValueError: for another kind.
    """
    check_known("kind", kind, (*CLOSURES, "dense", "scalar"))
    Q, R, identity = process_noise, measurement_noise, torch.eye(gradients.shape[1], dtype=gradients.dtype)
    P, rows = initial_variance * identity, []
    if kind in CLOSURES:  # the first step begins with a virtual one
        P = _posterior(kind, gradients[0], initial_variance * gradients[0], Q, R)
    for H in gradients:
        v = H @ P
        rows.append(v)
        if kind in CLOSURES:
            P = _posterior(kind, H, v, Q, R)
            continue
        P = P + Q * identity
        S = H @ P @ H + R
        P = P * R / S if kind == "scalar" else P - torch.outer(H @ P, H @ P) / S
    return torch.stack(rows)


def surrogate_filter(
    problem: FiniteSum,
    steps: int,
    closure: str,
    *,
    initial_variance: float = 0.1,
    process_noise: float = 0.1,
    measurement_noise: float = 1.0,
    samples: Tensor | None = None,
    sizes: tuple[int, ...] | None = None,
) -> Estimates:
    """Filter the (minibatch) loss of a problem, target 0, with the surrogate for P; one filter per tensor.

    Args:
        problem: the loss; the weights start at its starting point.
        steps: number of steps.
        closure: as in :func:`surrogate`.
        initial_variance: sigma_0^2 of P_0 = sigma_0^2 I.
        process_noise: Q.
        measurement_noise: R, in units of loss^2.
        samples: indices (steps,) or (steps, B) of the sample losses that step k sees; ``None`` is full batch.
        sizes: lengths of the tensors; ``None`` is the problem's, or one tensor.

    Returns:
        The estimates of all steps. The covariances are those that a step began with, P_{k-1}, block-diagonal.

    Raises:
        ValueError: for another closure.
    """
    check_known("closure", closure, CLOSURES)
    x = torch.tensor(problem.start, dtype=torch.float64)
    blocks = torch.arange(len(x)).split(list(sizes or problem.sizes or [len(x)]))  # type: ignore[no-untyped-call]
    before: dict[int, tuple[Tensor, Tensor]] = {}
    R, rows = measurement_noise, []
    for k in range(steps):
        losses, gradients = problem.at(x)
        seen = slice(None) if samples is None else samples[k].reshape(-1)
        loss, gradient, start = losses[seen].mean(), gradients[seen].mean(0), x
        x, covariances = x.clone(), []
        for i, block in enumerate(blocks):
            H = gradient[block]
            last, product = before.get(i, (H, initial_variance * H))  # (6) at first
            P = _posterior(closure, last, product, process_noise, R)
            before[i] = H, H @ P
            covariances.append(P)
            predicted = P + process_noise * torch.eye(len(H), dtype=torch.float64)
            x[block] -= H @ predicted / (H @ predicted @ H + R) * loss
        rows.append((start, x, torch.block_diag(*covariances)))  # type: ignore[no-untyped-call]
    return Estimates(*(torch.stack(column) for column in zip(*rows, strict=True)))
