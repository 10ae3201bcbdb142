"""KOALA++ against matrices: the surrogates are the smallest ones, and the optimizer is the filter that uses them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from koala_lab.theory import problems
from koala_lab.theory.ekf import dense_filter
from koala_lab.theory.surrogate import CLOSURES, products, surrogate, surrogate_filter
from koala_lib import KoalaPlusPlus, KoalaV

F64 = torch.float64
OPTIONS: dict[str, dict[str, Any]] = {
    "vanilla": {"symmetric": False},
    "symmetric": {},
    "semidefinite": {"positive_semidefinite": True},
}
each = pytest.mark.parametrize("closure", CLOSURES)


def random_member(closure: str, n: int, generator: torch.Generator) -> Tensor:
    """A matrix of the kind, often of low rank where it is semidefinite."""
    A = torch.randn(n, n, generator=generator, dtype=F64)
    if closure == "vanilla":
        return A
    return A + A.T if closure == "symmetric" else A[:, : 1 + n // 2] @ A[:, : 1 + n // 2].T


@each
def test_the_surrogate_is_the_smallest_matrix_of_its_kind_with_this_product(closure: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (1, 2, 3, 6):
        for _ in range(20):
            H, true = torch.randn(n, generator=generator, dtype=F64), random_member(closure, n, generator)
            v = H @ true
            P = surrogate(closure, H, v)
            torch.testing.assert_close(H @ P, v, rtol=1e-9, atol=1e-10)
            assert P.norm() <= true.norm() * (1 + 1e-9)
            if closure != "vanilla":
                torch.testing.assert_close(P, P.T)
            if closure == "semidefinite":
                assert torch.linalg.eigvalsh(P).min() >= -1e-9 * P.norm()
            # A step to any other matrix of the kind with the same product makes it longer.
            step = true - P
            assert float((P * step).sum()) >= -1e-8 * float(true.norm() ** 2)


def test_a_larger_kind_has_a_smaller_member() -> None:
    generator = torch.Generator().manual_seed(1)
    H, true = torch.randn(5, generator=generator, dtype=F64), random_member("semidefinite", 5, generator)
    norms = [float(surrogate(closure, H, H @ true).norm()) for closure in ("vanilla", "symmetric", "semidefinite")]
    assert norms == sorted(norms)
    assert norms[0] < norms[2] < float(true.norm())


def test_only_the_semidefinite_surrogate_is_a_covariance() -> None:
    H, v = torch.tensor([1.0, 0.0], dtype=F64), torch.tensor([1.0, 1.0], dtype=F64)
    lowest = {closure: float(torch.linalg.eigvalsh(surrogate(closure, H, v))[0]) for closure in list(CLOSURES)[1:]}
    assert lowest["symmetric"] < -0.5
    assert lowest["semidefinite"] == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="closure"):
        surrogate("positive", H, v)


@pytest.mark.parametrize("sizes", [None, (2, 4, 3, 1)], ids=["one tensor", "four tensors"])
@each
def test_the_optimizer_is_the_filter_of_the_surrogate(closure: str, sizes: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    problem = problems.random_online("logistic", 40, n=10)
    picks = torch.randint(40, (50, 5), generator=generator)
    noises = {"initial_variance": 0.3, "process_noise": 0.02, "measurement_noise": 0.5}
    dense = surrogate_filter(problem, 50, closure, samples=picks, sizes=sizes, **noises)
    vectors: list[Tensor] = []
    kept: list[Any] = []

    def make(params: Any) -> KoalaPlusPlus:
        kept.append((params, KoalaPlusPlus(params, **noises, **OPTIONS[closure])))
        kept[0][1].register_step_post_hook(
            lambda o, *_: vectors.append(torch.cat([o.state[p]["product"].clone() for p in params]))
        )
        return kept[0][1]

    fast = problems.follow(problem, make, 50, samples=picks, sizes=sizes)
    torch.testing.assert_close(fast.points, dense.predicted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fast.last, dense.states[-1], rtol=1e-9, atol=1e-9)
    gradients = torch.stack([problem.at(x)[1][p].mean(0) for x, p in zip(dense.predicted, picks, strict=True)])
    v = (gradients[:, None] @ dense.covariances).squeeze(1)  # v_k = H_k P_{k-1}
    torch.testing.assert_close(torch.stack(vectors), v, rtol=1e-9, atol=1e-9)
    if sizes is None:
        torch.testing.assert_close(products(closure, gradients, **noises), v, rtol=1e-9, atol=1e-9)
    assert float((dense.states[-1] - dense.predicted[0]).norm()) > 0.5


def test_the_products_of_the_scalar_and_of_the_dense_filter() -> None:
    problem = problems.random_online("squares", 30, n=3)
    picks = torch.arange(30)
    noises = {"process_noise": 0.02, "measurement_noise": 0.5}
    one = problems.follow(problem, partial(KoalaV, blocks="global", **noises), 30, samples=picks)
    gradients = torch.stack([problem.at(x)[1][k] for k, x in enumerate(one.points)])
    v = (one.filter["variance"] - 0.02)[:, None] * gradients
    torch.testing.assert_close(products("scalar", gradients, initial_variance=0.1, **noises), v)
    matrices = {"initial_covariance": [[0.1]], "transition": [[1.0]], "process_noise": [[0.02]]}
    dense = dense_filter(problem, 30, measurement_noise=0.5, samples=picks, **matrices)
    gradients = torch.stack([problem.at(x)[1][k] for k, x in enumerate(dense.predicted)])
    v = (gradients[1:, None] @ dense.covariances[:-1]).squeeze(1)
    torch.testing.assert_close(products("dense", gradients, initial_variance=0.1, **noises)[1:], v)


def test_with_one_weight_all_closures_are_the_dense_filter_after_the_virtual_step() -> None:
    """P is a number then, v = H P holds it, and nothing is approximated."""
    problem = problems.quadratic([2.0], start=[1.5])
    noises = {"process_noise": 0.1, "measurement_noise": 0.7}
    runs = [problems.follow(problem, partial(KoalaPlusPlus, **noises, **o), 20) for o in OPTIONS.values()]
    for run in runs[1:]:
        torch.testing.assert_close(run.points, runs[0].points, rtol=1e-10, atol=1e-12)
    x, P = 1.5, 0.1
    H = 2 * x
    P = (P + 0.1) * 0.7 / ((P + 0.1) * H**2 + 0.7)  # the virtual observation
    for seen in runs[0].points.flatten().tolist():
        assert seen == pytest.approx(x, rel=1e-9)
        H, P = 2 * x, P + 0.1
        x, P = x - P * H / (P * H**2 + 0.7) * x**2, P * 0.7 / (P * H**2 + 0.7)


def test_the_semidefinite_filter_never_meets_a_negative_variance() -> None:
    """Of hostile gradients: large and small, opposite, nearly parallel."""
    generator = torch.Generator().manual_seed(3)
    lowest = {}
    for closure, options in OPTIONS.items():
        x = torch.nn.Parameter(torch.zeros(4, dtype=F64))
        optimizer = KoalaPlusPlus([x], lr=0.0, measurement_noise=1e-3, process_noise=1e-6, **options)
        worst = 0.0
        gradient = torch.randn(4, generator=generator, dtype=F64)
        for k in range(3000):
            noise = torch.randn(4, generator=generator, dtype=F64)
            gradient = noise if k % 3 == 0 else (-1) ** k * 10.0 ** (k % 5 - 2) * gradient + 0.1 * noise
            optimizer.predict()
            x.grad = gradient.clone()
            optimizer.step(loss=torch.ones((), dtype=F64))
            kept = optimizer.state[x]
            H, v = kept["gradient"], kept["product"]
            worst = min(worst, float(H @ v / (H.norm() * v.norm())))
        lowest[closure] = worst
        assert optimizer.skipped_steps == 0 or closure != "semidefinite"
    assert lowest["semidefinite"] > -1e-6
    assert lowest["vanilla"] < -1e-3, "the story is hostile enough to show what can happen"
