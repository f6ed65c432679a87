"""Several processes started by `torchrun`, or one process without it: rank, device, barrier, merged moments."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from distil_rank.statistics.moments import Moments


@dataclass(frozen=True)
class Group:
    """This process (`rank` of `world`, `local_rank` on its machine) and the device it computes on."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            # a reduction over gloo: NCCL's own barrier would need a GPU in every rank
            dist.all_reduce(torch.zeros(1))

    def merge(self, moments: Moments) -> Moments:
        """The moments of all ranks, merged in rank order: bit-equal on every rank. Memory O(d^2) in any world."""
        if self.world == 1:
            return moments
        merged = Moments(moments.dim)
        for rank in range(self.world):
            state = moments.state() if rank == self.rank else Moments(moments.dim).state()
            for tensor in state.values():
                dist.broadcast(tensor, src=rank)
            merged.merge(Moments.from_state(state))
        return merged


@contextmanager
def process_group() -> Iterator[Group]:
    """The group `torchrun` started, or one process alone: gloo on the CPU, NCCL beside it where there are GPUs."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if world == 1:
        yield Group(device=device)
        return
    if dist.is_initialized():  # within another one: the same group, which ends with the outer one
        yield Group(dist.get_rank(), dist.get_world_size(), local_rank, device)
        return
    # A rank waits while another still works on a long shard; torchrun itself ends the group when one rank fails.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(days=7))
    try:
        yield Group(dist.get_rank(), dist.get_world_size(), local_rank, device)
    finally:
        dist.destroy_process_group()
