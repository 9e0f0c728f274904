"""A few real forward and backward passes: seconds and peak memory, to hold against what was predicted.

In: a policy in training and packs.  Out: seconds of each pass, positions and peak bytes: of what lives in a step,
which is what is predicted, and of what the process holds for it, which an allocator makes more.
"""

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stages.engine.packs import Pack
from stages.runtime.malloc import give_back_freed_memory, keep_freed_memory
from stages.train.policy import Trainable

CLEAR_PEAK = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Measured:
    """`seconds` and `positions` are of the passes together; bytes are None where the system does not say."""

    seconds: float
    positions: int
    peak_bytes: int | None
    held_bytes: int | None
    update_seconds: float


def measure(policy: Trainable, optimizer: torch.optim.Optimizer, packs: Sequence[Pack]) -> Measured:
    """Train on `packs` once for the memory and once for the clock, at a learning rate of 0.

    On a CPU memory is the process's, less what it held beside weights, gradients and optimizer state before:
    Python and its libraries are no part of the prediction. The policy has to be loaded after
    `give_back_freed_memory`, or what loading has freed is counted too.
    """
    device = policy.scorer.compute.device
    _train(policy, optimizer, packs[:1])  # brings code and optimizer state into memory
    beside = _held_beside(policy, optimizer, device)
    _forget_peak(device)
    _train(policy, optimizer, packs)
    peak = _peak_bytes(device)
    if device.type == "cpu":  # as in a run
        keep_freed_memory()
        _train(policy, optimizer, packs[:1])
    started = time.monotonic()
    _pass(policy, packs)
    _wait(device)
    seconds = time.monotonic() - started
    optimizer.step()
    _wait(device)
    update = time.monotonic() - started - seconds
    held = torch.cuda.max_memory_reserved() if device.type == "cuda" else _peak_bytes(device)
    positions = sum(pack.input_ids.shape[1] for pack in packs)
    return Measured(seconds, positions, _less(peak, beside), _less(held, beside), update)


def _held_beside(policy: Trainable, optimizer: torch.optim.Optimizer, device: torch.device) -> int:
    """What this process holds besides weights, gradients and optimizer state; 0 on a GPU, where nothing else is counted."""
    if device.type == "cuda":
        return 0
    gc.collect()
    give_back_freed_memory()
    weights = list(policy.scorer.parameters())
    tensors = [*weights, *(weight.grad for weight in weights if weight.grad is not None)]
    tensors += [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    return max(0, (_status("VmRSS") or 0) - sum(tensor.nbytes for tensor in tensors))


def _train(policy: Trainable, optimizer: torch.optim.Optimizer, packs: Sequence[Pack]) -> None:
    _pass(policy, packs)
    optimizer.step()


def _pass(policy: Trainable, packs: Sequence[Pack]) -> None:
    with policy.scorer.weights_cast_once():
        for pack in packs:
            policy.scorer(pack).completion_logps.sum().backward()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR_PEAK.exists():
        CLEAR_PEAK.write_text("5")


def _peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")


def _less(found: int | None, beside: int) -> int | None:
    return None if found is None else found - beside


def _status(name: str) -> int | None:
    """A line of Linux's /proc/self/status in bytes; None on other systems."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
