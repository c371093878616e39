"""One process or several: what the trainer needs from `torch.distributed`, and nothing else.

Started through `torchrun`, every process trains on its own block of the batch's streams and gradients are averaged by
`DistributedDataParallel`. Process 0 alone writes files. Checkpoints hold every process's hidden state and random
generators, so the folder must be readable by all of them when a run is resumed.
"""

from __future__ import annotations

import atexit
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """This process's place among all: `rank` of `size`, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """End a run that went well: nobody closes connections that another process may still be using."""
        if self.size > 1:
            dist.barrier()
            _close()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; the same answer everywhere."""
        if self.size == 1:
            return flag
        votes = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes.item())

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a 0-d tensor over the processes."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.size

    def gather(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every process's tensors, stacked by rank in a new first dimension, on the CPU."""
        if self.size == 1:
            return {name: tensor.detach().cpu()[None] for name, tensor in tensors.items()}
        gathered = {}
        for name, tensor in tensors.items():
            mine = tensor.detach().to(self.device).contiguous()
            parts = [torch.empty_like(mine) for _ in range(self.size)]
            dist.all_gather(parts, mine)
            gathered[name] = torch.stack(parts).cpu()
        return gathered


def join_world(device: torch.device | str | None = None) -> World:
    """Take this process's place: from `torchrun`'s environment where there is one, else alone.

    `device` defaults to the process's own GPU where there is one, else the CPU; a process group is made with nccl on
    GPUs and gloo on CPUs unless there is one already.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    if device.type == "cuda":
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_close)
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
    return World(rank=rank, size=size, device=device)


def _close() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap(model: nn.Module, world: World) -> nn.Module:
    """The model itself, or its `DistributedDataParallel`, which starts by copying process 0's weights to all."""
    if world.size == 1:
        return model
    return nn.parallel.DistributedDataParallel(model)


def synchronising(net: nn.Module, last: bool) -> AbstractContextManager[object]:
    """Gradients are exchanged in the last part of an accumulated batch only."""
    if last or not isinstance(net, nn.parallel.DistributedDataParallel):
        return nullcontext()
    return net.no_sync()
