"""SVRG against a loop over samples in numpy, and what its estimate is known to be."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from koala_lab.baselines.svrg import Svrg
from koala_lab.config import RunConfig
from koala_lab.runs.training import TrainingRun, train

LOSS = nn.CrossEntropyLoss(reduction="none")
Batch = tuple[Tensor, Tensor]


def batches(sizes: tuple[int, ...] = (4, 4, 4), seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, 5, generator=generator, dtype=torch.float64),
            torch.randint(3, (n,), generator=generator),
        )
        for n in sizes
    ]


def network(hidden: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, hidden), nn.Tanh(), nn.Linear(hidden, 3)).double()


def flat(tensors: object) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])  # type: ignore[attr-defined]


def gradient(net: nn.Module, data: list[Batch]) -> Tensor:
    """Of the mean loss over all samples."""
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    return flat(torch.autograd.grad(LOSS(net(x), y).mean(), [*net.parameters()]))


def estimate(net: nn.Module, optimizer: Svrg, batch: Batch) -> Tensor:
    """What a step with lr = 1 subtracts; the weights are put back."""
    before = copy.deepcopy(net.state_dict())
    optimizer.step(*batch)
    moved = flat(before.values()) - flat(net.parameters())
    net.load_state_dict(before)
    return moved


def disturb(net: nn.Module, scale: float) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=scale)


def sample_gradient(W: np.ndarray, b: np.ndarray, x: np.ndarray, y: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the cross-entropy of softmax(W x + b)."""
    z = W @ x + b
    p = np.exp(z - z.max())
    p /= p.sum()
    p[y] -= 1
    return np.outer(p, x), p


def test_equals_a_loop_over_the_samples() -> None:
    data, lr = batches((4, 3, 5)), 0.3
    net = nn.Linear(5, 3).double()
    W, b = (p.detach().numpy().copy() for p in net.parameters())
    optimizer = Svrg(net, LOSS, lr)
    for _ in range(3):
        optimizer.start_epoch(data)
        losses = [optimizer.step(*batch).item() for batch in data]

    def mean(W: np.ndarray, b: np.ndarray, samples: list[tuple[np.ndarray, int]]) -> list[np.ndarray]:
        gradients = [sample_gradient(W, b, x, y) for x, y in samples]
        return [sum(part) / len(samples) for part in zip(*gradients, strict=True)]  # type: ignore[misc]

    parts = [[(row.numpy(), int(t)) for row, t in zip(x, y, strict=True)] for x, y in data]
    for _ in range(3):
        W0, b0 = W.copy(), b.copy()
        full = mean(W0, b0, [sample for part in parts for sample in part])
        expected = []
        for part in parts:
            logits = [(W @ x + b, y) for x, y in part]
            expected.append(np.mean([np.log(np.exp(z).sum()) - z[y] for z, y in logits]))
            here, there = mean(W, b, part), mean(W0, b0, part)
            W = W - lr * (here[0] - there[0] + full[0])
            b = b - lr * (here[1] - there[1] + full[1])
    np.testing.assert_allclose(net.weight.detach().numpy(), W, rtol=0, atol=1e-12)
    np.testing.assert_allclose(net.bias.detach().numpy(), b, rtol=0, atol=1e-12)
    np.testing.assert_allclose(losses, expected, rtol=1e-9)


def test_at_the_snapshot_every_batch_gives_the_full_gradient() -> None:
    net, data = network(), batches()
    optimizer = Svrg(net, LOSS, 1.0)
    optimizer.start_epoch(data)
    for batch in [*data, *batches(seed=1)]:
        torch.testing.assert_close(estimate(net, optimizer, batch), gradient(net, data), rtol=0, atol=1e-12)


def test_the_estimate_is_unbiased_and_its_variance_falls_with_the_distance_to_the_snapshot() -> None:
    variances, plain = [], []
    for scale in (0.1, 0.01, 0.001):
        net, data = network(), batches((4,) * 6)
        optimizer = Svrg(net, LOSS, 1.0)
        optimizer.start_epoch(data)
        disturb(net, scale)
        estimates = torch.stack([estimate(net, optimizer, batch) for batch in data])
        torch.testing.assert_close(estimates.mean(0), gradient(net, data), rtol=0, atol=1e-12)
        variances.append(estimates.var(0).sum().item())
        plain.append(torch.stack([gradient(net, [batch]) for batch in data]).var(0).sum().item())
    assert variances[1] < plain[1] / 100
    assert variances[1] == pytest.approx(variances[0] / 100, rel=0.3)  # as the squared distance
    assert variances[2] == pytest.approx(variances[1] / 100, rel=0.03)


def test_state_dict_goes_on_with_the_same_bits_and_gradients_are_left_alone() -> None:
    net, data = network(), batches()
    optimizer = Svrg(net, LOSS, 0.5)
    optimizer.start_epoch(data)
    optimizer.step(*data[0])
    other = network()
    other.load_state_dict(net.state_dict())
    resumed = Svrg(other, LOSS, 0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one in (optimizer, resumed):
        one.step(*data[1])
    assert torch.equal(flat(net.parameters()), flat(other.parameters()))
    assert all(p.grad is None for p in net.parameters())


def test_frozen_parameters_stay() -> None:
    net, data = network(), batches()
    net[0].requires_grad_(False)  # type: ignore[index]
    frozen = net[0].weight.clone()  # type: ignore[index]
    optimizer = Svrg(net, LOSS, 0.5)
    optimizer.start_epoch(data)
    optimizer.step(*data[0])
    assert torch.equal(net[0].weight, frozen)  # type: ignore[index]


def test_what_is_wrong_is_said() -> None:
    net, data = network(), batches()
    with pytest.raises(RuntimeError, match="start_epoch"):
        Svrg(net, LOSS, 0.5).step(*data[0])
    with pytest.raises(ValueError, match="at least one batch"):
        Svrg(net, LOSS, 0.5).start_epoch([])
    with pytest.raises(ValueError, match="BatchNorm, '1'"):
        Svrg(nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), LOSS, 0.5)
    with pytest.raises(ValueError, match="lr must be a finite number >= 0, got -1"):
        Svrg(net, LOSS, -1)


# ---------------------------------------------------------------- in a training run

CONFIG = RunConfig(
    dataset="digits",
    model="mlp_100",
    optimizer="svrg",
    optimizer_args={"lr": 0.3},
    epochs=2,
    batch_size=64,
    train_size=320,
    augment=True,
    milestones=(1,),
    gamma=0.5,
)


def test_a_run_takes_a_snapshot_of_the_batches_of_every_epoch() -> None:
    result = train(CONFIG)
    run = TrainingRun(CONFIG, torch.device("cpu"))
    optimizer = Svrg(run.task.network, LOSS, 0.3)
    losses = []
    for epoch, lr in enumerate((0.3, 0.15)):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.start_epoch(run.task.batches(epoch))
        losses.append(torch.stack([optimizer.step(x, y) for x, y in run.task.batches(epoch)]).mean().item())
    assert [e["train_loss"] for e in result.epochs] == pytest.approx(losses, rel=1e-5)
    assert losses[1] < losses[0] < 2.5


@pytest.mark.parametrize("at", [3, 5, 7])  # in the first epoch, at its end, in the second
def test_an_interrupted_run_has_the_same_bits(at: int, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == at + 1:  # the checkpoint of step `at` is the last one
            raise Stop

    whole, file = train(CONFIG), tmp_path / "checkpoint.pt"
    with pytest.raises(Stop):
        train(CONFIG, checkpoint=file, checkpoint_seconds=0, on_step=stop)
    assert train(CONFIG, checkpoint=file).to_json()["epochs"] == list(whole.epochs)
    assert train(CONFIG, checkpoint=file).provenance["weights_sha256"] == whole.provenance["weights_sha256"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"model": "resnet8"}, "BatchNorm"), ({"precision": "bfloat16"}, "optimizer='svrg' runs the forward pass itself")],
)
def test_what_a_run_cannot_do_is_said(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(CONFIG.but(**changes))
