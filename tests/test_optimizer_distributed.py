"""Two processes (gloo): replicas with a process group keep one filter, and sharded tensors are one tensor."""

from pathlib import Path
from typing import Any

import pytest
import torch
from optimizers import CASES, FILTERS, Case, Net, advance, assert_same, each_case, evaluate, losses_of, snapshot
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

STEPS, BATCH, NAN_STEP = 7, 7, 4
SHARE = [slice(0, 5), slice(5, BATCH)]  # of the batch, by rank: 5 and 2 samples
REPLICAS = [case for case in FILTERS if "foreach" not in case.kwargs]


def replica(case: Case, rank: int, group: Any) -> dict[str, Any]:
    """Train on this rank's share; the gradients are those of the mean over all samples, as a weighted DDP has them."""
    net = Net()
    optimizer = case(net.parameters(), process_group=group)
    for k in range(STEPS):
        optimizer.predict()
        optimizer.zero_grad()
        losses = losses_of(net, k, BATCH)[SHARE[rank]]
        (losses.sum() / BATCH).backward()
        for p in net.parameters():
            distributed.all_reduce(p.grad)
        if k == NAN_STEP and rank == 1:
            losses = losses * torch.nan
        returned = optimizer.step(loss=losses)
    return {**snapshot(net, optimizer), "filter": optimizer.filter_state(), "returned": returned}


def single(case: Case) -> tuple[Net, Any, Tensor]:
    net = Net()
    optimizer = case(net.parameters())
    for k in range(STEPS):
        optimizer.predict()
        optimizer.zero_grad()
        losses = losses_of(net, k, BATCH)
        losses.mean().backward()
        returned = optimizer.step(loss=losses * torch.nan if k == NAN_STEP else losses)
    return net, optimizer, returned


def skipped_below(threshold: float) -> int:
    """Whether a step with a gradient of norm 1 on every rank is skipped."""
    x = nn.Parameter(torch.zeros(1))
    optimizer = REPLICAS[0]([x], min_grad_norm=threshold, process_group=distributed.group.WORLD)
    optimizer.predict()
    x.grad = torch.ones(1)
    optimizer.step(loss=torch.ones(3))
    return optimizer.skipped_steps


def sharded(case: Case, mesh: Any, foreach: bool) -> dict[str, Any]:
    """The same net with DTensors; `out` stays a plain tensor on every rank."""
    net = Net()
    for name, where in {"weight": Shard(1), "bias": Shard(0), "scale": Replicate()}.items():
        value = distribute_tensor(net.get_parameter(name).detach(), mesh, [where])
        setattr(net, name, nn.Parameter(value))
    optimizer = case(net.parameters(), foreach=foreach)
    plain = Net()
    for k in range(STEPS):
        if case.filters:
            optimizer.predict()
        # The gradients come from a plain copy, so that only the optimizer sees DTensors.
        for p, q in zip(net.parameters(), plain.parameters(), strict=True):
            q.data = p.full_tensor().detach().clone() if hasattr(p, "full_tensor") else p.detach().clone()
        losses = evaluate(plain, optimizer, k)
        for p, q in zip(net.parameters(), plain.parameters(), strict=True):
            p.grad = distribute_tensor(q.grad, mesh, p.placements) if hasattr(p, "placements") else q.grad
            q.grad = None
        optimizer.step(**{"loss": losses} if case.filters else {})
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in net.named_parameters()}
    filtered = optimizer.filter_state() if case.filters else {}
    return {"weights": {name: t.detach().clone() for name, t in whole.items()}, "filter": filtered}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    calls: list[int] = []
    all_reduce = distributed.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    distributed.all_reduce = counted
    results: dict[str, Any] = {}
    for case in REPLICAS:
        calls.clear()
        results[f"{case}"] = replica(case, rank, distributed.group.WORLD)
        results[f"{case} calls"] = len(calls)
    results["implicit"] = replica(REPLICAS[0], rank, None)
    distributed.all_reduce = all_reduce
    results["skipped"] = [skipped_below(0.9), skipped_below(1.1)]
    mesh = init_device_mesh("cpu", (2,))
    for case in CASES:
        for foreach in (False, True):
            results[f"{case} sharded {foreach}"] = sharded(case, mesh, foreach)
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", REPLICAS, ids=str)
def test_replicas_follow_a_single_process_on_the_joined_batch(case: Case, ranks: list[dict[str, Any]]) -> None:
    net, optimizer, returned = single(case)
    first, second = (rank[f"{case}"] for rank in ranks)
    assert_same(second, first)  # filter and weights, bit by bit
    for name, p in net.named_parameters():
        torch.testing.assert_close(first[f"weights.{name}"], p.detach(), rtol=0, atol=1e-10)
    assert first["filter"] == pytest.approx(optimizer.filter_state(), rel=1e-10)
    assert float(first["group.0.filter"][-1]) == optimizer.skipped_steps == 1
    torch.testing.assert_close(first["returned"], returned, rtol=1e-10, atol=0)
    by_hand = 5  # all_reduce calls of the test itself per step
    assert ranks[0][f"{case} calls"] == STEPS * (by_hand + 1)


def test_the_threshold_of_small_gradients_does_not_grow_with_the_ranks(ranks: list[dict[str, Any]]) -> None:
    assert [rank["skipped"] for rank in ranks] == [[0, 1], [0, 1]]


def test_a_process_group_is_never_implicit(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["implicit"] for rank in ranks)
    assert first["filter"]["measurement_noise"] != second["filter"]["measurement_noise"]


@pytest.mark.parametrize("foreach", [False, True])
@each_case
def test_sharded_tensors_are_one_tensor(case: Case, foreach: bool, ranks: list[dict[str, Any]]) -> None:
    net = Net()
    optimizer = case(net.parameters())
    advance(net, optimizer, range(STEPS))
    for rank in ranks:
        result = rank[f"{case} sharded {foreach}"]
        for name, p in net.named_parameters():
            torch.testing.assert_close(result["weights"][name], p.detach(), rtol=0, atol=1e-12)
        assert result["filter"] == pytest.approx(optimizer.filter_state() if case.filters else {}, rel=1e-10)
