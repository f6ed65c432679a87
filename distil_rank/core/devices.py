"""Devices and processes: `--device`, and the group of processes that `torchrun` started."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from distil_rank.core.errors import InputError
from distil_rank.core.moments import Moments


def pick_device(name: str) -> torch.device:
    """The device of `--device auto|cpu|cuda|cuda:N`; auto is CUDA where there is one.

    Within `torchrun`, auto and cuda are this process's own GPU. InputError where it is not here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("auto, cpu, cuda or cuda:N can be computed on")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--device must name a device that is here, got {name!r}: {reason}"
        ) from None
    return device


@contextmanager
def threads(count: int) -> Iterator[None]:
    """A fixed number of torch threads, then the previous one again."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Group:
    """This process (`rank` of `world`) and the device it computes on."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            # a reduction over gloo: NCCL's own barrier would need a GPU in every rank
            dist.all_reduce(torch.zeros(1))

    def merge(self, moments: Moments) -> Moments:
        """The moments of all ranks, merged in rank order: bit-equal on every rank. O(d^2)."""
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
def process_group(device: str = "auto") -> Iterator[Group]:
    """The group `torchrun` started, or one process alone: gloo, and NCCL beside it on GPUs."""
    chosen = pick_device(device)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Group(device=chosen)
        return
    if dist.is_initialized():  # within another one: the same group, which ends with the outer one
        yield Group(dist.get_rank(), dist.get_world_size(), chosen)
        return
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    # A rank waits while another still works on a long shard; torchrun ends a group that fails.
    dist.init_process_group(backend, timeout=timedelta(days=7))
    try:
        yield Group(dist.get_rank(), dist.get_world_size(), chosen)
    finally:
        dist.destroy_process_group()
