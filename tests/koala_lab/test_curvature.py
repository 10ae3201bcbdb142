"""Estimates of the Hessian's diagonal: equations, exact answers, signal and noise, and APOLLO with other equations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from koala_lab.baselines.apollo_variants import ApolloVariant
from koala_lab.theory import curvature as theory
from koala_lab.theory.problems import FiniteSum, quadratic, tanh_network
from koala_lib import Apollo
from koala_lib.optim.apollo import weak_secant_update

SIZES = [4, 1, 3]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(seed: int = 0) -> FiniteSum:
    x = random(40, 3, seed=seed)
    return tanh_network(x, (x[:, 0] > x[:, 1] ** 2).long(), hidden=4, seed=seed)


def batches(steps: int, size: int) -> Tensor:
    return torch.randint(0, 40, (steps, size), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize(("equation", "cuts"), [("element", [1] * 8), ("tensor", SIZES), ("network", [8])])
def test_the_equation_of_groups_is_that_of_so_many_tensors(equation: str, cuts: list[int], eps: float) -> None:
    B, d, y = random(3, 8)
    new = [t.clone() for t in B.split(cuts)]
    weak_secant_update(new, list(d.split(cuts)), list(y.split(cuts)), eps)
    found = theory.secant_update(B, d, y, theory.groups_of(SIZES, equation), eps)
    torch.testing.assert_close(found, torch.cat(new), rtol=1e-11, atol=1e-12)
    if equation == "element" and eps == 0:
        torch.testing.assert_close(found, -y / d, rtol=1e-11, atol=0)


def test_without_a_direction_nothing_is_learned() -> None:
    B, y = random(2, 3)
    d = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    found = theory.secant_update(B, d, y, theory.groups_of([3], "element"), 0.0)
    assert torch.equal(found[:2], B[:2])
    assert found[2] == pytest.approx(-float(y[2]))


def test_an_unknown_equation_is_refused() -> None:
    with pytest.raises(ValueError, match="equation 'row' is unknown; known are element, tensor, network"):
        theory.groups_of([1], "row")


@pytest.mark.parametrize("samples", [None, batches(30, 5)])
def test_the_replayed_equation_of_the_run_itself_is_its_b(samples: Tensor | None) -> None:
    problem = network()
    assert problem.sizes is not None
    run = theory.recorded(problem, 30, lr=0.05, samples=samples, eps=1e-3, eps_scaling="literal")
    assert float((run.curvatures.abs() > 0.01).double().mean()) > 0.01
    found = theory.estimates(run, theory.groups_of(problem.sizes, "tensor"), lr=0.05, eps=1e-3)
    torch.testing.assert_close(found, run.curvatures, rtol=1e-6, atol=1e-9)  # d is the difference of two points


def test_the_diagonal_and_hutchinsons_estimate_of_it() -> None:
    problem, x = network(), random(26)
    [H] = [torch.autograd.functional.hessian(lambda t: problem.losses(t).mean(), x)]
    torch.testing.assert_close(theory.hessian_diagonal(problem, x), H.diagonal())
    every, generator = torch.arange(40), torch.Generator().manual_seed(0)
    found = theory.hutchinson(problem, x, 4000, generator, every)
    assert float((found - H.diagonal()).norm() / H.diagonal().norm()) < 0.1
    # of a diagonal Hessian one probe is exact
    h = quadratic([1.0, 4.0])
    torch.testing.assert_close(
        theory.hutchinson(h, torch.zeros(2).double(), 1, generator, torch.tensor([0])),
        torch.tensor([1.0, 4.0], dtype=torch.float64),
    )


def test_the_error_leaves_scale_and_sign_free() -> None:
    h = torch.tensor([3.0, -4.0], dtype=torch.float64)
    assert theory.error(-7 * h, h) == pytest.approx(0, abs=1e-7)
    assert theory.error(torch.tensor([4.0, 3.0]).double(), h) == pytest.approx(math.sqrt(1 - (24 / 25) ** 2))
    assert theory.error(torch.zeros(2).double(), h) == 1


def test_errors_beside_what_is_known_exactly() -> None:
    """On the whole sample the exact diagonal of the minibatch has no error, and Hutchinson's falls with the probes."""
    problem, x, generator = network(), random(26), torch.Generator().manual_seed(0)
    truth = theory.hessian_diagonal(problem, x)
    found = theory.errors(problem, x, {"twice": 2 * truth}, torch.arange(40), generator)
    assert list(found) == ["twice", "constant", "Hutchinson, 1", "Hutchinson, 10", "minibatch, exact"]
    assert found["twice"] == pytest.approx(0, abs=1e-7)
    assert found["minibatch, exact"] == pytest.approx(0, abs=1e-7)
    assert 0 < found["Hutchinson, 10"] < found["Hutchinson, 1"]
    assert found["constant"] == pytest.approx(float(truth.abs().std(correction=0) / truth.square().mean().sqrt()))


def test_signals_against_drawn_minibatches() -> None:
    problem, size = network(), 4
    before = random(26)
    after, mean, a = before + 1e-2 * random(26, seed=1), random(26, seed=2), 0.1
    signals = theory.secant_signals(problem, before, after, mean, weight=a, batch_size=size)
    step = after - before
    H = torch.func.hessian(lambda t: problem.losses(t).mean())(before)
    target = float(step @ H @ step)
    slopes = {x: problem.at(p)[1] @ step for x, p in (("before", before), ("after", after))}
    first, last = (torch.randint(0, 40, (200_000, size), generator=torch.Generator().manual_seed(s)) for s in (3, 4))
    drawn = {
        "same batch": (slopes["after"][last] - slopes["before"][last]).mean(1),
        "different batches": slopes["after"][last].mean(1) - slopes["before"][first].mean(1),
        "averages": a * (slopes["after"][last].mean(1) - mean @ step),
    }
    for name, values in drawn.items():
        # the variance between 40 samples divides by 39, that of drawn minibatches by 40
        assert float(values.mean()) / target == pytest.approx(signals[name].mean, abs=5 * signals[name].sd / 400)
        assert float(values.std()) / abs(target) == pytest.approx(signals[name].sd, rel=0.02)
    assert signals["same batch"].mean == pytest.approx(1, abs=0.05)  # Taylor
    mean_error = float((drawn["averages"] / target - 1).square().mean()) ** 0.5
    assert signals["averages"].rms_error == pytest.approx(mean_error, rel=0.02)


# ---- the optimizer ---------------------------------------------------------------------------------------------------


def weights(optimizer: Any, cuts: list[int], steps: int = 20, **options: Any) -> tuple[Tensor, float]:
    """Weights after some steps on the network, cut into tensors, and the share above the floor."""
    problem = network()
    params = [nn.Parameter(t.clone()) for t in torch.tensor(problem.start, dtype=torch.float64).split(cuts)]
    made = optimizer(params, **options)
    for rows in batches(steps, 5):
        made.zero_grad()
        problem.losses(torch.cat([*params]))[rows].mean().backward()
        made.step()
    return torch.cat([p.detach() for p in params]), float(made.above_floor())


@pytest.mark.parametrize("warmup_steps", [0, 8])
@pytest.mark.parametrize("equation", theory.EQUATIONS)
def test_a_variant_is_apollo_on_other_tensors(equation: str, warmup_steps: int) -> None:
    sizes = [*(network().sizes or ())]
    cuts = {"element": [1] * sum(sizes), "tensor": sizes, "network": [sum(sizes)]}[equation]
    options = {"lr": 0.05, "eps": 1e-4, "weight_decay": 1e-3, "warmup_steps": warmup_steps}
    wanted, above = weights(Apollo, cuts, **options)
    found, share = weights(ApolloVariant, sizes, equation=equation, **options)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)
    assert share == above > 0


def test_the_variants_differ() -> None:
    sizes = [*(network().sizes or ())]
    ways = [weights(ApolloVariant, sizes, lr=0.05, equation=e, warmup_steps=0)[0] for e in theory.EQUATIONS]
    assert all(float((ways[i] - ways[j]).abs().max()) > 1e-3 for i, j in ((0, 1), (0, 2), (1, 2)))
