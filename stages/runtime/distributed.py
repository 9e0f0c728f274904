"""The ranks of a `torchrun` launch; without one, a single rank."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from cache.errors import AlignError

T = TypeVar("T")

TIMEOUT_SECONDS = 600
BUCKET_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class World:
    """The rank of this process, the number of ranks, and whether the model is sharded over them (FSDP2)."""

    rank: int = 0
    size: int = 1
    sharded: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes files and log lines."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over all ranks, in place, and return it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_main(self, make: Callable[[], T]) -> T:
        """Call `make` on the first rank only; return its result, or raise its `AlignError`, on every rank."""
        if self.size == 1:
            return make()
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = make()
            except AlignError as error:  # the other ranks would wait for a result
                box[1] = error
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier()

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum gradients over all ranks, in flat buckets; a rank without a gradient contributes zeros.

        Called once per step, after the last pack, so ranks may have different numbers of packs.
        """
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            if sum(gradient.numel() for gradient in bucket) >= BUCKET_ELEMENTS:
                _sum_bucket(bucket)
                bucket = []
        if bucket:
            _sum_bucket(bucket)


def _sum_bucket(bucket: list[Tensor]) -> None:
    flat = torch.cat([gradient.flatten() for gradient in bucket])
    dist.all_reduce(flat)
    for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
        gradient.copy_(part.view_as(gradient))


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor as it is."""
    # Slow to import, and not every command trains.
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def join_world(device: torch.device, sharded: bool = False) -> World:
    """The ranks that `torchrun` started (RANK and WORLD_SIZE in the environment), or a single rank."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 and not sharded:
        return World()
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        alone: dict[str, Any] = {"store": HashStore(), "rank": 0, "world_size": 1} if size == 1 else {}
        dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_SECONDS), **alone)
    return World(dist.get_rank(), size, sharded)
