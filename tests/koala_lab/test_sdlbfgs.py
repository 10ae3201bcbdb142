"""SdLBFGS against dense damped BFGS in float64, its damping, its state, and its protocol of two gradients."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from koala_lab.baselines.sdlbfgs import SdLBFGS, damped_change, two_loop
from koala_lab.config import RunConfig
from koala_lab.runs.training import train
from tests.support.cases import Net, assert_same, evaluate, snapshot, weights

LAMBDA = 0.25  # curvature that damping keeps, as a share of gamma


def saddle(x: Tensor) -> Tensor:
    """A loss with negative curvature in many places."""
    return 2 * torch.cos(2 * x).sum() + (x.cumsum(0) ** 2).sum() / 20


def steps(x: nn.Parameter, optimizer: Any, count: int) -> list[Tensor]:
    """Weights before each of some steps on the saddle with a noise that changes from step to step, and after them."""
    path = [x.detach().clone()]
    for k in range(count):
        noise = torch.randn(len(x), generator=torch.Generator().manual_seed(k), dtype=torch.float64)

        def closure(noise: Tensor = noise) -> Tensor:
            optimizer.zero_grad()
            loss = saddle(x) + noise @ x
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)
        path.append(x.detach().clone())
    return path


def dense(path: list[Tensor], rate: float, p: int, delta: float) -> tuple[list[Tensor], list[np.ndarray], int]:
    """The same steps with matrices: damped BFGS from the first of the last p pairs on. Returns weights, all H, and how
    many pairs were damped."""
    n, damped = len(path[0]), 0
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    x, gamma, found, matrices = path[0].numpy(), 1.0, [path[0]], []
    for k in range(len(path) - 1):
        noise = torch.randn(n, generator=torch.Generator().manual_seed(k), dtype=torch.float64)

        def gradient(at: np.ndarray, noise: Tensor = noise) -> np.ndarray:
            point = torch.tensor(at, requires_grad=True)
            return np.asarray(torch.autograd.grad(saddle(point) + noise @ point, point)[0])

        H = np.eye(n) / gamma
        for s, y in pairs[-p:]:
            V = np.eye(n) - np.outer(y, s) / (s @ y)
            H = V.T @ H @ V + np.outer(s, s) / (s @ y)
        matrices.append(H)
        g = gradient(x)
        new = x - rate * H @ g
        s, y = new - x, gradient(new) - g
        gamma = delta if s @ y <= 0 else max(y @ y / (s @ y), delta)
        B0 = gamma * np.eye(n)
        theta = 1.0
        if s @ y < LAMBDA * s @ B0 @ s:
            theta = (1 - LAMBDA) * s @ B0 @ s / (s @ B0 @ s - s @ y)
            damped += 1
        pairs.append((s, theta * y + (1 - theta) * B0 @ s))
        x = new
        found.append(torch.tensor(x))
    return found, matrices, damped


def last_matrix(path: list[Tensor], rate: float, p: int) -> np.ndarray:
    """The H that the next step would take."""
    return dense([*path, path[-1]], rate, p, 0.5)[1][-1]


def start(n: int = 6) -> nn.Parameter:
    return nn.Parameter(torch.randn(n, generator=torch.Generator().manual_seed(3), dtype=torch.float64))


@pytest.mark.parametrize(("history", "rate"), [(1, 0.2), (3, 0.2), (50, 0.2), (5, 0.25)])
def test_it_is_dense_damped_bfgs(history: int, rate: float) -> None:
    x = start()
    optimizer = SdLBFGS([x], rate, history_size=history, delta=0.5)
    path = steps(x, optimizer, 15)
    expected, matrices, damped = dense(path, rate, history, 0.5)
    assert 2 <= damped <= 13, "the comparison means something"
    for ours, theirs in zip(path, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(last_matrix(path, rate, history), optimizer.inverse_hessian(), rtol=1e-9, atol=1e-9)
    assert min(np.linalg.eigvalsh(H).min() for H in matrices) > 0, "positive definite without a line search"


def test_damping_keeps_a_quarter_of_the_curvature() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        s, y = torch.randn(2, 5, generator=generator, dtype=torch.float64)
        gamma = float(torch.rand(1, generator=generator)) * 3 + 0.01
        damped, least = damped_change(s, y, gamma), 0.25 * gamma * s @ s
        assert s @ damped >= least * (1 - 1e-12)
        if s @ y >= least:
            assert torch.equal(damped, y)
        else:
            torch.testing.assert_close(s @ damped, least)


def test_the_recursion_fulfils_the_secant_equation_of_the_last_pair() -> None:
    generator = torch.Generator().manual_seed(1)
    pairs = [tuple(torch.randn(2, 7, generator=generator, dtype=torch.float64)) for _ in range(4)]
    pairs = [(s, damped_change(s, y, 2.0)) for s, y in pairs]
    torch.testing.assert_close(two_loop(pairs[-1][1], pairs, 2.0), pairs[-1][0])
    torch.testing.assert_close(two_loop(pairs[0][0], [], 2.0), pairs[0][0] / 2)


def test_on_a_quadratic_it_finds_the_minimum() -> None:
    A = torch.diag(torch.tensor([1.0, 3.0, 10.0, 30.0], dtype=torch.float64))
    x = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = SdLBFGS([x], 0.02)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = x @ A @ x / 2
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)
    optimizer.param_groups[0]["lr"] = 1.0
    for _ in range(40):
        optimizer.step(closure)
    assert x.abs().max() < 1e-6


def test_both_gradients_are_of_the_same_minibatch_and_the_first_loss_is_returned() -> None:
    net = Net()
    optimizer = SdLBFGS(net.parameters(), 0.1)
    seen: list[Tensor] = []

    def closure() -> Tensor:
        losses = evaluate(net, optimizer, 0)
        seen.append(losses.detach())
        return losses

    returned = optimizer.step(closure)
    assert len(seen) == 2
    assert torch.equal(returned.detach(), seen[0])
    assert seen[1].mean() < seen[0].mean()


def run(net: Net, optimizer: SdLBFGS, numbers: range) -> None:
    for k in numbers:
        optimizer.step(lambda k=k: evaluate(net, optimizer, k))


@pytest.mark.parametrize("way", ["file", "deepcopy"])
def test_resuming_gives_the_same_bits(way: str) -> None:
    net = Net()
    optimizer = SdLBFGS(net.parameters(), 0.3, history_size=4)
    run(net, optimizer, range(6))
    if way == "deepcopy":
        other, resumed = copy.deepcopy((net, optimizer))
    else:
        file = io.BytesIO()
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        other = Net(seed=1)
        other.load_state_dict(saved["net"])
        resumed = SdLBFGS(other.parameters())
        resumed.load_state_dict(saved["optimizer"])
    run(net, optimizer, range(6, 10))
    run(other, resumed, range(6, 10))
    assert_same(
        {k: v for k, v in snapshot(other, resumed).items() if "state" not in k},
        {k: v for k, v in snapshot(net, optimizer).items() if "state" not in k},
    )
    assert len(resumed.state[next(other.parameters())]["changes"]) == 4


def test_what_is_not_finite_is_not_remembered() -> None:
    x = nn.Parameter(torch.ones(2))
    optimizer = SdLBFGS([x], 0.1)

    def closure(scale: float) -> Tensor:
        optimizer.zero_grad()
        loss = scale * (x**2).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(lambda: closure(1.0))
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step(lambda: closure(1.0))  # no displacement
    optimizer.step(lambda: closure(float("nan")))
    assert len(optimizer.state[x]["changes"]) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be a finite number >= 0, got -1"),
        ({"history_size": 0}, ValueError, "history_size must be a whole number >= 1, got 0"),
        ({"history_size": 2.5}, ValueError, "history_size must be a whole number >= 1, got 2.5"),
        ({"delta": 0.0}, ValueError, "delta must be a finite number > 0, got 0"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SdLBFGS([nn.Parameter(torch.ones(2))], **options)


def test_a_second_group_and_complex_weights_are_refused() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(2))]}, {"params": [nn.Parameter(torch.ones(3))]}]
    with pytest.raises(ValueError, match="takes one param group"):
        SdLBFGS(groups)
    with pytest.raises(TypeError, match="SdLBFGS needs real"):
        SdLBFGS([nn.Parameter(torch.ones(2, dtype=torch.complex64))])


def test_parameters_without_a_gradient_stay() -> None:
    net = Net()
    net.out.requires_grad_(False)
    before = net.out.clone()
    optimizer = SdLBFGS(net.parameters(), 0.1)
    moved = weights(net)
    run(net, optimizer, range(3))
    assert torch.equal(net.out, before)
    assert not torch.equal(weights(net), moved)


def test_it_trains_a_network_and_resumes(tmp_path: Any) -> None:
    config = RunConfig(dataset="digits", model="resnet8", optimizer="sdlbfgs", epochs=2, batch_size=32, train_size=160)
    whole = train(config)
    assert whole.epochs[-1]["train_loss"] < whole.epochs[0]["train_loss"]

    def stop(done: int, steps: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, checkpoint=tmp_path / "c", checkpoint_seconds=0, on_step=stop)
    resumed = train(config, checkpoint=tmp_path / "c")
    assert resumed.provenance["weights_sha256"] == whole.provenance["weights_sha256"]
