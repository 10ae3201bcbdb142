"""Two and four processes (gloo) on shares of a batch: DDP and FSDP2 go the way of one process on the joined batch."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from koala_lab import paths
from koala_lib import KoalaM, KoalaV, Meka
from koala_lib.optim import apollo
from koala_lib.optim._engine import compiled, passes, products
from koala_lib.optim._engine.compiled import CompiledPass
from tests.support.cases import CASES, Case, Net, each_case, evaluate, losses_of, weights

STEPS, BATCH, NAN_STEP, SAVED = 7, 7, 4, 5
SHARES = {  # of the batch, by rank: of different sizes
    1: [slice(0, 7)],
    2: [slice(0, 5), slice(5, 7)],
    4: [slice(0, 3), slice(3, 4), slice(4, 6), slice(6, 7)],
}
WAYS = {2: ["ddp", "fsdp", "fsdp, group"], 4: ["ddp", "fsdp", "hsdp", "hsdp, group"]}
SPREAD = [case for case in CASES if "foreach" not in case.kwargs]
FUSED = ["V-released", "M", "++", "Apollo"]
each_way = pytest.mark.parametrize(("world", "way"), [(n, way) for n, ways in WAYS.items() for way in ways])
each_spread = pytest.mark.parametrize("case", SPREAD, ids=str)


class Spread(Net):
    """Without 0-dim and empty parameters, which ``fully_shard`` refuses, and with one that never has a gradient. Most
    shards are uneven, some are empty."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.scale = nn.Parameter(self.scale.detach().reshape(1))
        self.empty = nn.Parameter(torch.zeros(1, 3, dtype=torch.float64))
        self.spare = nn.Parameter(torch.ones(3, dtype=torch.float64))


def hsdp_mesh() -> Any:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))


def build(case: Case, way: str = "", seed: int = 0) -> tuple[Spread, nn.Module, Any]:
    """The net, the module to call, and the optimizer with two param groups."""
    net = Spread(seed)
    module: nn.Module = net
    if "ddp" in way:
        module = DistributedDataParallel(net, find_unused_parameters=True)
    if "fsdp" in way:
        fully_shard(net)
    if "hsdp" in way:
        fully_shard(net, mesh=hsdp_mesh())
    groups = [
        {"params": [net.weight, net.out, net.spare]},
        {"params": [net.bias, net.scale, net.empty], "lr": 0.7 * case.kwargs.get("lr", 1.0)},
    ]
    grouped = case.filters and ("ddp" in way or "group" in way)
    return net, module, case(groups, **({"process_group": distributed.group.WORLD} if grouped else {}))


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def advance(net: nn.Module, module: nn.Module, optimizer: Any, steps: range) -> dict[str, Any]:
    """Train on this rank's share; all that training goes on from, the path there, and collectives of two steps."""
    ranks = distributed.get_world_size() if distributed.is_initialized() else 1
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    path, returned, collectives = [], [], []
    filters = hasattr(optimizer, "predict")
    for k in steps:
        calls = [CommDebugMode() if k < 2 else nullcontext() for _ in range(2)]
        if filters:
            with calls[0]:
                optimizer.predict()
        optimizer.zero_grad()
        losses = losses_of(module, k, BATCH, SHARES[ranks][rank])
        (losses.sum() * ranks / BATCH).backward()  # the mean over the ranks of this is the mean over the samples
        if k == NAN_STEP and rank == ranks - 1:
            losses = losses * torch.nan
        with calls[1]:
            mean = optimizer.step(**({"loss": losses} if filters else {}))
        if k < 2:
            collectives.append(tuple(c.get_total_counts() for c in calls))
        returned.append(float("nan") if mean is None else float(mean))
        if k % 3 == 0:
            path.append(torch.cat([whole(p).reshape(-1) for p in net.parameters()]))
    names = {p: name for name, p in net.named_parameters()}
    state = {
        f"{names[p]}.{key}": whole(value) for p, entries in optimizer.state.items() for key, value in entries.items()
    }
    return {
        "path": torch.stack(path),
        "state": state,
        "filter": optimizer.param_groups[0]["filter"].clone() if filters else torch.empty(0),
        "returned": torch.tensor(returned, dtype=torch.float64),
        "collectives": collectives,
    }


def assert_close(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """On the last steps, if only they were made again."""
    for name in ("path", "returned"):
        last = expected[name][-len(actual[name]) :]
        torch.testing.assert_close(actual[name], last, rtol=0, atol=1e-10, equal_nan=True)
    torch.testing.assert_close(actual["filter"], expected["filter"], rtol=1e-10, atol=0)
    assert actual["state"].keys() == expected["state"].keys()
    for name, value in expected["state"].items():
        torch.testing.assert_close(actual["state"][name], value, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


# ---------------------------------------------------------------- checkpoints


def save(net: nn.Module, optimizer: Any, folder: str) -> None:
    model, state = get_state_dict(net, optimizer)
    checkpoint.save({"model": model, "optimizer": state}, checkpoint_id=folder)


def load(net: nn.Module, optimizer: Any, folder: str) -> None:
    model, state = get_state_dict(net, optimizer)
    checkpoint.load({"model": model, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(net, optimizer, model_state_dict=model, optim_state_dict=state)


# ---------------------------------------------------------------- tensors distributed by hand


def by_hand(case: Case, mesh: Any) -> dict[str, Any]:
    """Replicas and a second dimension cut, beside `out`, a plain tensor; the same losses on every rank."""
    net = Net()
    for name, where in {"weight": Shard(1), "bias": Shard(0), "scale": Replicate()}.items():
        setattr(net, name, nn.Parameter(distribute_tensor(net.get_parameter(name).detach(), mesh, [where])))
    optimizer = case(net.parameters())
    plain = Net()
    for k in range(STEPS):
        if case.filters:
            optimizer.predict()
        # The gradients come from a plain copy, so that only the optimizer sees DTensors.
        for p, q in zip(net.parameters(), plain.parameters(), strict=True):
            q.data = whole(p)
        losses = evaluate(plain, optimizer, k)
        for p, q in zip(net.parameters(), plain.parameters(), strict=True):
            p.grad = q.grad if not isinstance(p, DTensor) else distribute_tensor(q.grad, mesh, p.placements)
            q.grad = None
        half = net.scale.grad.to_local() / 2  # the gradient of the replicas as a sum that is still to be made
        net.scale.grad = DTensor.from_local(half, mesh, [Partial()])
        optimizer.step(**({"loss": losses} if case.filters else {}))
    filtered = optimizer.filter_state() if case.filters else {}
    return {"weights": torch.cat([whole(p).reshape(-1) for p in net.parameters()]), "filter": filtered}


def skipped_below(threshold: float) -> int:
    """Whether a step with a gradient of norm 1 on every rank is skipped."""
    x = nn.Parameter(torch.zeros(1))
    optimizer = KoalaV([x], min_grad_norm=threshold, process_group=distributed.group.WORLD)
    optimizer.predict()
    x.grad = torch.ones(1)
    optimizer.step(loss=torch.ones(3))
    return optimizer.skipped_steps


def message(function: Any) -> str:
    try:
        function()
    except ValueError as error:
        return str(error)
    return "no error"


def fused(case: Case) -> dict[str, Any]:
    """With ``fused=True``, but a compiler that only traces; shards must reach it as plain tensors."""
    case = Case(case.name, case.factory, case.kwargs | {"fused": True})
    compile, lengths, seen = torch.compile, (compiled.MIN_COMPILED, compiled.MIN_COMPILED_LIST), []

    def trace(function: Any, **options: Any) -> Any:
        def call(**lists: Any) -> Any:
            seen.extend(type(t) for ts in lists.values() if isinstance(ts, list) for t in ts)
            return function(**lists)

        return call

    def forget(tensor: int, together: int) -> None:
        compiled.MIN_COMPILED, compiled.MIN_COMPILED_LIST = tensor, together
        for step in (each for module in (passes, products, apollo) for each in vars(module).values()):
            if isinstance(step, CompiledPass):
                step._compiled = None

    torch.compile = trace
    forget(2, 2)
    result = advance(*build(case, "fsdp"), range(STEPS))
    torch.compile = compile
    forget(*lengths)
    return result | {"plain": not any(issubclass(kind, DTensor) for kind in seen), "calls": len(seen)}


# ---------------------------------------------------------------- the processes


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store{world}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    results: dict[str, Any] = {}
    for case in SPREAD:
        for way in WAYS[world]:
            results[f"{case}, {way}"] = advance(*build(case, way), range(STEPS))
        for way in ("ddp", "fsdp"):
            net, module, optimizer = build(case, way, seed=world - 2)
            # As with Adam: before loading, torch makes state for all that needs a gradient, had it ever one or not.
            net.spare.requires_grad_(case.filters)
            if world == 2:
                advance(net, module, optimizer, range(SAVED))
                save(module, optimizer, f"{folder}/{case}, {way}")
            else:
                load(module, optimizer, f"{folder}/{case}, {way}")
                results[f"{case}, {way} resumed"] = advance(net, module, optimizer, range(SAVED, STEPS))
    if world == 2:
        mesh = init_device_mesh("cpu", (2,))
        for case in CASES:
            results[f"{case} by hand"] = by_hand(case, mesh)
        results["implicit"] = advance(*build(Case("", KoalaV), ""), range(STEPS))
        results["skipped"] = [skipped_below(0.9), skipped_below(1.1)]
        results["fused"] = {f"{case}": fused(case) for case in SPREAD if f"{case}" in FUSED}
    else:
        mesh = hsdp_mesh()
        net = fully_shard(Spread(), mesh=mesh)
        results["part of the mesh"] = message(lambda: KoalaM(net.parameters(), process_group=mesh.get_group(0)))
        results["meka, fsdp"] = message(lambda: Meka(net, nn.MSELoss()))
        ddp = DistributedDataParallel(Spread())
        results["meka, ddp"] = message(lambda: Meka(nn.Sequential(ddp), nn.MSELoss()))
    torch.save(results, f"{folder}/{world}.{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    for world in WAYS:
        multiprocessing.spawn(work, (world, str(folder)), nprocs=world)
    return {n: [torch.load(folder / f"{n}.{rank}.pt", weights_only=True) for rank in range(n)] for n in WAYS} | {
        1: [{"folder": str(folder)}]
    }


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return {f"{case}": advance(*build(case), range(STEPS)) for case in SPREAD}


@each_way
@each_spread
def test_ranks_follow_one_process_on_the_joined_batch(case: Case, world: int, way: str, ranks: Any, alone: Any) -> None:
    first, *others = (rank[f"{case}, {way}"] for rank in ranks[world])
    assert_close(first, alone[f"{case}"])
    if case.filters:
        assert float(first["filter"][-2]) == 1  # the step whose losses were not finite on one rank
    for other in others:  # bit by bit
        assert torch.equal(other["filter"], first["filter"])
        assert torch.equal(other["path"], first["path"])


@each_way
@each_spread
def test_one_collective_a_step(case: Case, world: int, way: str, ranks: Any) -> None:
    adaptive = "average" in case.state and "ddp" not in way
    dimensions = 2 if way == "hsdp" or ("hsdp" in way and not case.filters) else 1
    expected = (adaptive * dimensions, dimensions) if case.filters else (0, dimensions * (way != "ddp"))
    for rank in ranks[world]:
        assert rank[f"{case}, {way}"]["collectives"] == [expected] * 2


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("world", [1, 4])
@each_spread
def test_a_checkpoint_of_two_ranks_resumes_on(case: Case, world: int, way: str, ranks: Any, alone: Any) -> None:
    if world == 1:
        net, module, optimizer = build(case, seed=1)
        net.spare.requires_grad_(case.filters)
        load(net, optimizer, f"{ranks[1][0]['folder']}/{case}, {way}")
        resumed = [advance(net, module, optimizer, range(SAVED, STEPS))]
    else:
        resumed = [rank[f"{case}, {way} resumed"] for rank in ranks[world]]
    for result in resumed:
        assert_close(result, alone[f"{case}"])


@each_case
def test_tensors_distributed_by_hand(case: Case, ranks: Any) -> None:
    net = Net()
    optimizer = case(net.parameters())
    for k in range(STEPS):
        optimizer.step(lambda k=k: evaluate(net, optimizer, k))
    for rank in ranks[2]:
        result = rank[f"{case} by hand"]
        torch.testing.assert_close(result["weights"], weights(net), rtol=0, atol=1e-12)
        assert result["filter"] == pytest.approx(optimizer.filter_state() if case.filters else {}, rel=1e-10)


@pytest.mark.parametrize("case", [case for case in SPREAD if f"{case}" in FUSED], ids=str)
def test_fused_shards_reach_the_compiler_as_plain_tensors(case: Case, ranks: Any, alone: Any) -> None:
    for rank in ranks[2]:
        result = rank["fused"][f"{case}"]
        assert_close(result, alone[f"{case}"])
        assert result["plain"]
        assert result["calls"]


def test_the_threshold_of_small_gradients_does_not_grow_with_the_ranks(ranks: Any) -> None:
    assert [rank["skipped"] for rank in ranks[2]] == [[0, 1], [0, 1]]


def test_a_process_group_is_never_implicit(ranks: Any) -> None:
    first, second = (rank["implicit"] for rank in ranks[2])
    assert not torch.equal(first["filter"], second["filter"])
    assert first["collectives"] == [(0, 0)] * 2


def test_a_process_group_must_hold_the_mesh(ranks: Any) -> None:
    for rank in ranks[4]:
        assert "give a group with all ranks of the mesh" in rank["part of the mesh"]


def test_torchrun_starts_the_script_of_the_notebook(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = paths.notebooks() / "02_going_further_ranks.py"
    done = subprocess.run([*torchrun, str(script), str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("one filter on all of them: True") == 2
    assert {path.name for path in tmp_path.iterdir()} == {"KoalaM-DDP", "KoalaM-FSDP2", "Apollo-DDP", "Apollo-FSDP2"}


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_meka_says_that_it_runs_in_one_process(way: str, ranks: Any) -> None:
    for rank in ranks[4]:
        assert rank[f"meka, {way}"].startswith("Meka runs in one process, but")
