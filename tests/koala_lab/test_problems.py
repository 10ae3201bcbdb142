"""Small problems, and following optimizers that see several tensors, targets and constant rates."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from koala_lab.theory import problems
from koala_lib import KoalaM, KoalaV
from koala_lib.reference.koala import ReferenceKoalaM

F64 = torch.float64


@pytest.fixture(scope="module")
def network() -> problems.FiniteSum:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(30, 5, generator=generator, dtype=F64)
    return problems.tanh_network(inputs, torch.arange(30) % 3, hidden=4, seed=7)


def test_tanh_network_is_the_network_it_says(network: problems.FiniteSum) -> None:
    assert network.sizes == (20, 4, 12, 3)
    inputs = torch.randn(30, 5, generator=torch.Generator().manual_seed(3), dtype=F64)
    x = torch.randn(39, generator=torch.Generator().manual_seed(0), dtype=F64)
    W1, b1, W2, b2 = x.split([20, 4, 12, 3])
    hidden, output = nn.Linear(5, 4, dtype=F64), nn.Linear(4, 3, dtype=F64)
    with torch.no_grad():
        hidden.weight.copy_(W1.view(5, 4).T), hidden.bias.copy_(b1)
        output.weight.copy_(W2.view(4, 3).T), output.bias.copy_(b2)
        logits = output(torch.tanh(hidden(inputs)))
    expected = nn.functional.cross_entropy(logits, torch.arange(30) % 3, reduction="none")
    torch.testing.assert_close(network.losses(x), expected)


def test_tanh_network_starts_where_its_seed_says() -> None:
    inputs, labels = torch.zeros(4, 64), torch.arange(4)
    first, again, other = (problems.tanh_network(inputs, labels, hidden=100, seed=s) for s in (0, 0, 1))
    assert first.start == again.start != other.start
    W1, b1, W2, b2 = torch.tensor(first.start).split(list(first.sizes or ()))
    assert float(W1.std()) == pytest.approx(1 / 8, rel=0.05)
    assert float(W2.std()) == pytest.approx(1 / 10, rel=0.1)
    assert not b1.any()
    assert not b2.any()


def test_least_squares_is_a_valley_with_its_minimum_near_ones() -> None:
    valley = problems.least_squares()
    hessian = torch.func.hessian(lambda x: valley.losses(x).mean())(torch.zeros(2, dtype=F64))
    low, high = torch.linalg.eigvalsh(hessian).tolist()
    assert 20 < high / low < 60
    minimum = torch.linalg.solve(hessian, -valley.gradient([0.0, 0.0]))
    torch.testing.assert_close(minimum, torch.ones(2, dtype=F64), rtol=0, atol=0.05)
    assert valley.start == (-1.0, 3.0)


def test_follow_cuts_x_into_the_tensors_of_the_problem_or_of_the_caller(network: problems.FiniteSum) -> None:
    seen: list[list[int]] = []

    def make(params: list[nn.Parameter]) -> KoalaV:
        seen.append([p.numel() for p in params])
        return KoalaV(params, measurement_noise=0.5)

    layered = problems.follow(network, make, 5)
    merged = problems.follow(network, make, 5, sizes=[24, 15])
    whole = problems.follow(network, partial(KoalaV, measurement_noise=0.5, blocks="global"), 5)
    one = problems.follow(network, make, 5, sizes=[39])
    assert seen == [[20, 4, 12, 3], [24, 15], [39]]
    torch.testing.assert_close(one.points, whole.points, rtol=1e-12, atol=1e-13)
    assert len({float(run.last.norm()) for run in (layered, merged, one)}) == 3
    for run in (layered, one):  # what is recorded belongs to the whole vector
        losses, gradients = network.at(run.points[3])
        assert float(run.losses[3]) == pytest.approx(float(losses.mean()), rel=1e-12)
        assert float(run.gradient_norms[3]) == pytest.approx(float(gradients.mean(0).norm()), rel=1e-12)
    with pytest.raises(ValueError, match=r"sizes \[20, 20\] add up to 40, but x has 39 entries"):
        problems.follow(network, make, 5, sizes=[20, 20])


def test_follow_takes_a_constant_rate() -> None:
    bowl = problems.quadratic([1.0, 2.0])
    constant = problems.follow(bowl, torch.optim.SGD, 4, epsilon=0.25)
    called = problems.follow(bowl, torch.optim.SGD, 4, epsilon=lambda k: 0.25)
    assert torch.equal(constant.points, called.points)
    assert float(constant.last[0]) == 0.75**4


@pytest.mark.parametrize("risk", ["relative", "absolute"])
def test_a_target_is_equation_22_to_the_letter(network: problems.FiniteSum, risk: str) -> None:
    """Losses with the target taken off, at lr = 1, are the reference that has the target in R."""
    epsilon, picks = 0.3, torch.randint(30, (25, 8), generator=torch.Generator().manual_seed(2))
    target = (lambda loss: (1 - epsilon) * loss) if risk == "relative" else (lambda loss: loss - epsilon)
    run = problems.follow(network, KoalaM, 25, samples=picks, target=target)
    parts = [part.clone() for part in torch.tensor(network.start, dtype=F64).split(list(network.sizes or ()))]
    twin = ReferenceKoalaM([{"params": parts}], lr=epsilon, target_risk=risk, noise_target="current")
    for k in range(25):
        twin.predict()
        torch.testing.assert_close(run.points[k], torch.cat(twin.x), rtol=1e-10, atol=1e-12)
        losses, gradients = network.at(torch.cat(twin.x))
        assert float(run.losses[k]) == pytest.approx(float(losses[picks[k]].mean()))  # the loss itself
        twin.update(losses[picks[k]], gradients[picks[k]].mean(0).split(list(network.sizes or ())))
    torch.testing.assert_close(run.last, torch.cat(twin.x), rtol=1e-10, atol=1e-12)
