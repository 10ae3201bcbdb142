"""Weights spread over several ranks: the passes work on the shards that lie here, and few collectives join the sums.

A DTensor is known by its placements, so that plain torch need not import ``torch.distributed.tensor``. The sum over all
elements of a tensor is the number of its shards times the mean over all ranks of their local sums: ranks with another
shard, with a replica and with an empty shard all count right, and so do plain tensors, which every rank holds whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

PLAIN = {Tensor, nn.Parameter}  # asked for by type, which is faster than by an attribute that they lack


def is_sharded(tensor: Tensor) -> bool:
    """Say whether it is a DTensor."""
    return type(tensor) not in PLAIN and hasattr(tensor, "placements")


def local(tensors: Iterable[Any]) -> list[Tensor]:
    """Return the part of each tensor that lies on this rank, in the same memory. Call without autograd."""
    return [t.to_local() if is_sharded(t) else t for t in tensors]


def local_gradients(params: Iterable[Any]) -> list[Tensor]:
    """Return ``p.grad`` where there is one: the part of it that belongs to the local part of p."""
    grads = [(p, p.grad) for p in params if p.grad is not None]
    return local(
        # A gradient may have other placements than its weights, such as sums over the ranks that are still to be made.
        g.redistribute(placements=p.placements) if is_sharded(p) and g.placements != p.placements else g
        for p, g in grads
    )


def rank_groups(params: Iterable[Any]) -> list[Any]:
    """Return the process groups that join all ranks among which parameters are spread: one per mesh dimension."""
    groups: list[Any] = []
    for mesh in dict.fromkeys(p.device_mesh for p in params if is_sharded(p)):
        groups += [g for d in range(mesh.ndim) if mesh.size(d) > 1 and (g := mesh.get_group(d)) not in groups]
    return groups


def check_meshes(params: Iterable[Any], group: Any) -> None:
    """Raise unless every parameter is spread over ranks of the process group only."""
    ranks = dist.get_process_group_ranks(group)
    for p in params:
        if is_sharded(p) and not set(p.device_mesh.mesh.flatten().tolist()) <= set(ranks):
            raise ValueError(
                f"process_group has the ranks {ranks}, but a parameter lies on {p.device_mesh}: give a group with all "
                "ranks of the mesh, such as torch.distributed.group.WORLD, or none"
            )


def shard_counts(params: Iterable[Any]) -> list[int]:
    """Return into how many different parts each tensor is cut; 1 if every rank holds it whole."""
    return [
        math.prod(p.device_mesh.size(d) for d, where in enumerate(p.placements) if not where.is_replicate())
        if is_sharded(p)
        else 1
        for p in params
    ]


def times_shards(sums: Tensor, params: Iterable[Any]) -> Tensor:
    """Multiply local sums of N tensors, ``(..., N)``, with the number of shards of each."""
    counts = shard_counts(params)
    # Numbers, because a tensor of them would be copied from the host, for which a GPU is waited.
    return torch.stack(torch._foreach_mul(sums.unbind(-1), counts), -1) if counts else sums


def mean_over_ranks(values: Tensor, groups: Sequence[Any]) -> Tensor:
    """Return the mean over the ranks of all groups, the same bits on each of them; one collective per group."""
    for group in groups:
        values = values / dist.get_world_size(group)
        dist.all_reduce(values, group=group)
    return values
