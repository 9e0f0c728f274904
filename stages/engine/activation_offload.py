"""Activation offload: tensors saved for the backward pass wait in host memory between the two passes."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Smaller tensors stay on the device: the overhead of a copy is larger than the gain.
MIN_BYTES = 1 << 16


@contextlib.contextmanager
def offloaded(enabled: bool) -> Iterator[None]:
    """Within the context, tensors that autograd saves are moved to pinned host memory, if `enabled`."""
    if not enabled:
        yield
        return

    def to_host(tensor: Tensor) -> Any:
        # torch's `save_on_cpu` moves weights too, which stay on the device in any case.
        if isinstance(tensor, torch.nn.Parameter) or tensor.nbytes < MIN_BYTES:
            return tensor
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copy.copy_(tensor, non_blocking=True)
        return tensor.device, copy

    def to_device(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed[1].to(packed[0], non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(to_host, to_device):
        yield
