"""Step sizes planned ahead: exact moments, and plans that no other step size improves."""

from __future__ import annotations

import pytest
import torch

from koala_lab.theory import horizon
from koala_lab.theory import meka as theory_meka
from koala_lab.theory.meka_runs import descend
from koala_lab.theory.problems import NoisyQuadratic, noisy_quadratic

F64 = torch.float64
PROBLEM = noisy_quadratic(4, condition=20.0, distance=2.0, seed=1)


@pytest.mark.parametrize("filtered", [True, False])
def test_a_constant_step_gives_the_known_recursions(filtered: bool) -> None:
    exact = theory_meka.filtered_excess if filtered else theory_meka.sgd_excess
    numbers = PROBLEM.hessian, PROBLEM.gradient_noise(3), PROBLEM.gradient(PROBLEM.start)
    seen = horizon.follow(horizon.start(PROBLEM, 3, filtered=filtered), torch.full((30,), 0.7, dtype=F64))
    torch.testing.assert_close(seen.excess, exact(*numbers, 0.7, 30), rtol=1e-11, atol=0)


def test_steps_that_change_are_those_of_simulated_runs() -> None:
    # 0.9 and then 0.2: the runs of the first part go on from where they are, with the filter that they have
    runs, steps = 40_000, [0.9, 0.2, 1.4]
    generator = torch.Generator().manual_seed(0)
    theta, H = PROBLEM.start.expand(runs, -1), PROBLEM.hessian
    noises = (
        torch.randn(3, runs, 4, generator=generator, dtype=F64) @ torch.linalg.cholesky(PROBLEM.gradient_noise(2)).T
    )
    expected = horizon.follow(horizon.start(PROBLEM, 2, filtered=True), torch.tensor(steps, dtype=F64)).excess
    for t, alpha in enumerate(steps):
        theta = theta - alpha * (theta @ H + noises[: t + 1].mean(0))
        assert float(PROBLEM.excess(theta).mean()) == pytest.approx(float(expected[t + 1]), rel=0.02)


@pytest.mark.parametrize("filtered", [True, False])
def test_the_greedy_step_is_the_best_next_one(filtered: bool) -> None:
    moments = horizon.start(PROBLEM, 2, filtered=filtered).step(torch.tensor(0.8, dtype=F64))
    others = torch.linspace(0, 4, 4001, dtype=F64)
    ends = torch.stack([moments.step(alpha).excess for alpha in others])
    assert float(others[ends.argmin()]) == pytest.approx(float(moments.greedy()), abs=1e-3)
    assert torch.equal(horizon.plan(moments, 3, 1).steps[0], moments.greedy())


@pytest.mark.parametrize("filtered", [True, False])
def test_no_single_step_improves_a_plan(filtered: bool) -> None:
    moments = horizon.start(PROBLEM, 2, filtered=filtered)
    planned = horizon.plan(moments, 6, 6, sweeps=2000)
    end = float(planned.excess[-1])
    assert end < 0.9 * float(horizon.plan(moments, 6, 1).excess[-1])
    for i in range(6):
        for factor in (0.9, 0.99, 1.01, 1.1):
            steps = planned.steps.clone()
            steps[i] *= factor
            assert float(horizon.follow(moments, steps).excess[-1]) > end
    again = horizon.plan(moments, 6, 6, begin=planned.steps, sweeps=1)
    assert float(again.excess[-1]) <= end
    short = horizon.plan(moments, 6, 6, longest=1.0)
    assert float(short.steps.max()) == pytest.approx(1.0)
    assert float(short.excess[-1]) > end
    with pytest.raises(ValueError, match="steps=6 is no multiple of horizon=4"):
        horizon.plan(moments, 6, 4)


def test_minibatch_gradients_need_a_plan_of_several_steps() -> None:
    """Short horizon bias in two dimensions: the greedy step gives the steep direction all its attention."""
    problem = NoisyQuadratic(torch.diag(torch.tensor([1.0, 0.01], dtype=F64)), torch.eye(2, dtype=F64),
                             torch.tensor([1.0, 10.0], dtype=F64))  # fmt: skip
    moments = horizon.start(problem, 2, filtered=False)
    greedy, planned = horizon.plan(moments, 100, 1), horizon.plan(moments, 100, 100)
    assert float(greedy.excess[-1]) > 2 * float(planned.excess[-1])
    simulated = descend(problem, 2, float(greedy.steps[0]), gradient="sample", batch_size=2, runs=20_000)[1].mean()
    assert float(simulated) == pytest.approx(float(greedy.excess[1]), rel=0.03)
