"""What a forward pass keeps for its backward pass, moved to the host's memory in between.

torch's `save_on_cpu` also moves weights, which are kept anyway; here they stay where they are.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Copying less than this takes longer than it is worth.
MIN_BYTES = 1 << 16


@contextlib.contextmanager
def offloaded(wanted: bool) -> Iterator[None]:
    """Within this, tensors saved for the backward pass wait on the host, in pinned memory."""
    if not wanted:
        yield
        return

    def to_host(tensor: Tensor) -> Any:
        if isinstance(tensor, torch.nn.Parameter) or tensor.nbytes < MIN_BYTES:
            return tensor
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copy.copy_(tensor, non_blocking=True)
        return tensor.device, copy

    def to_device(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed[1].to(packed[0], non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(to_host, to_device):
        yield
