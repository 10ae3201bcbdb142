"""One training spread over ranks, with DDP and with FSDP2, as 02_going_further.ipynb launches it:

torchrun --standalone --nproc-per-node 2 02_going_further_ranks.py FOLDER

The batch is divided among the ranks; FOLDER receives a distributed checkpoint of each training.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from koala_lib import Apollo, KoalaM

STEPS, SAMPLES = 6, 12


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def batch(k: int) -> tuple[Tensor, Tensor]:
    """The k-th batch of all ranks together."""
    inputs = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    return inputs, inputs.sin().sum(dim=1)


def losses_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    losses: Tensor = (model(inputs).squeeze(1) - targets).square()
    return losses


def train(model: nn.Module, optimizer: Any, rank: int = 0, ranks: int = 1) -> None:
    for k in range(STEPS):
        inputs, targets = (part[rank::ranks] for part in batch(k))  # every rank has a share of the same size

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            optimizer.zero_grad()
            losses = losses_of(model, inputs, targets)
            losses.mean().backward()  # type: ignore[no-untyped-call]
            return losses

        optimizer.step(closure)


# name: optimizer of the parameters and, if there is one, of the group of replicas
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "KoalaM": lambda params, group=None: KoalaM(params, process_group=group),
    "Apollo": lambda params, group=None: Apollo(params, lr=0.1, sigma=1.0, warmup_steps=0),
}


def main(folder: str) -> None:
    distributed.init_process_group("gloo")  # "nccl" on GPUs, with one torch.cuda.set_device a rank
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    for name, make in OPTIMIZERS.items():
        for way in ("DDP", "FSDP2"):
            model: nn.Module = make_model()
            if way == "DDP":
                model = DistributedDataParallel(model)
                optimizer = make(model.parameters(), distributed.group.WORLD)
            else:
                fully_shard(model)
                optimizer = make(model.parameters())  # shards know their ranks
            train(model, optimizer, rank, ranks)

            weights, state = get_state_dict(model, optimizer)
            save({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/{name}-{way}")
            if name == "KoalaM":
                filters: list[Any] = [None] * ranks
                distributed.all_gather_object(filters, optimizer.filter_state())
                if rank == 0:
                    print(f"{way}: {ranks} ranks, one filter on all of them: {all(f == filters[0] for f in filters)}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
