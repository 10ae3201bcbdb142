"""The dense filter of Table 1: against closed-form Bayesian regression, and KOALA as its scaled version."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from koala_lab.theory import problems
from koala_lab.theory.ekf import dense_filter
from koala_lib import KoalaM, KoalaV

F64 = torch.float64
ONE = [[1.0]]


def test_linear_losses_give_bayesian_regression() -> None:
    # Target 0 = offset + slope . x + v with x ~ N(start, P_0 I): all observations at once, in information form.
    generator = torch.Generator().manual_seed(0)
    slopes, offsets = (torch.randn(*shape, generator=generator, dtype=F64) for shape in ((7, 3), (7,)))
    start, P0, R = torch.tensor([0.3, -1.1, 0.7], dtype=F64), 0.4, 0.25
    run = dense_filter(
        problems.linear(slopes, offsets, start=start.tolist()),
        7,
        initial_covariance=[[P0]],
        transition=ONE,
        process_noise=[[0.0]],
        measurement_noise=R,
        samples=torch.arange(7),
    )
    covariance = torch.linalg.inv(torch.eye(3, dtype=F64) / P0 + slopes.T @ slopes / R)
    mean = covariance @ (start / P0 - slopes.T @ offsets / R)
    torch.testing.assert_close(run.covariances[-1], covariance, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(run.states[-1], mean, rtol=1e-10, atol=1e-12)


def test_process_noise_and_velocities_enter_the_prediction() -> None:
    # A flat loss observes nothing: the state is what F makes of it, the covariance F P F^T + Q.
    flat = problems.linear(torch.zeros(1, 1), torch.zeros(1), start=[2.0])
    P, F, Q = [[0.2, 0.1], [0.1, 0.3]], [[1.0, 1.0], [0.0, 0.9]], [[0.05, 0.0], [0.0, 0.02]]
    run = dense_filter(flat, 1, initial_covariance=P, transition=F, process_noise=Q, measurement_noise=1.0)
    expected = torch.tensor([[0.2 + 2 * 0.1 + 0.3 + 0.05, 0.9 * 0.4], [0.9 * 0.4, 0.81 * 0.3 + 0.02]], dtype=F64)
    torch.testing.assert_close(run.covariances[0], expected)
    assert run.predicted[0].tolist() == run.states[0].tolist() == [2.0, 0.0]


@pytest.mark.parametrize("kind", ["V", "M"])
def test_the_scaled_filter_is_koala(kind: str) -> None:
    problem, q, q_p, R = problems.logistic(), 0.02, 0.01, 0.5
    picks = torch.randint(40, (30, 5), generator=torch.Generator().manual_seed(1))
    common = {"process_noise": q, "measurement_noise": R, "blocks": "global"}
    if kind == "V":
        fast = problems.follow(problem, partial(KoalaV, **common), 30, samples=picks)
        P0, F, Q = [[0.1]], ONE, [[q]]
    else:
        fast = problems.follow(problem, partial(KoalaM, velocity_noise=q_p, **common), 30, samples=picks)
        P0, F, Q = [[0.1, 0.0], [0.0, 0.1]], [[1.0, 1.0], [0.0, 0.9]], [[q, 0.0], [0.0, q_p]]
    options = {"initial_covariance": P0, "transition": F, "process_noise": Q, "measurement_noise": R, "samples": picks}
    dense = dense_filter(problem, 30, scaled=True, **options)
    torch.testing.assert_close(fast.points, dense.predicted[:, :2], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(fast.last, dense.states[-1, :2], rtol=1e-11, atol=1e-12)
    for P in dense.covariances:  # (2x2) (x) I stays what it is
        small = P[::2, ::2].contiguous()
        torch.testing.assert_close(P, torch.kron(small, torch.eye(2, dtype=F64)), rtol=1e-12, atol=1e-13)
    F_, Q_ = torch.tensor(F, dtype=F64), torch.tensor(Q, dtype=F64)
    predicted = torch.stack([F_ @ P[::2, ::2] @ F_.T + Q_ for P in dense.covariances[:-1]])
    torch.testing.assert_close(fast.filter["variance"][1:], predicted[:, 0, 0], rtol=1e-11, atol=1e-12)
    if kind == "M":
        torch.testing.assert_close(fast.filter["covariance"][1:], predicted[:, 0, 1], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(fast.filter["velocity_variance"][1:], predicted[:, 1, 1], rtol=1e-11, atol=1e-12)
    exact = dense_filter(problem, 30, **options)
    assert float((exact.states[-1] - dense.states[-1]).norm()) > 1e-3  # the approximation is one


def test_scaling_changes_nothing_in_one_dimension() -> None:
    options = {"initial_covariance": ONE, "transition": ONE, "process_noise": [[0.1]], "measurement_noise": 0.3}
    runs = [dense_filter(problems.two_samples(), 20, scaled=s, **options) for s in (False, True)]
    torch.testing.assert_close(runs[0].states, runs[1].states, rtol=1e-12, atol=0)


def test_bad_input_is_named() -> None:
    options = {"transition": ONE, "process_noise": ONE, "measurement_noise": 1.0}
    with pytest.raises(ValueError, match=r"must have one shape, got \(2, 2\), \(1, 1\), \(1, 1\)"):
        dense_filter(problems.two_samples(), 1, initial_covariance=[[1.0, 0.0], [0.0, 1.0]], **options)
    with pytest.raises(ValueError, match="samples has 2 rows for 1 steps"):
        dense_filter(
            problems.two_samples(), 1, initial_covariance=ONE, samples=torch.zeros(2, dtype=torch.long), **options
        )
