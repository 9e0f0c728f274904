"""A few real forward and backward passes: their time and peak memory, to compare with the prediction.

In: a policy in training and packs.  Out: seconds, positions, and two peaks in bytes: that of the live tensors of a step,
which is what `memory.py` predicts, and that of the process, which also holds freed memory.
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
    """`seconds` and `positions` are sums over the passes; bytes are None if the system does not report them."""

    seconds: float
    positions: int
    peak_bytes: int | None
    held_bytes: int | None
    update_seconds: float


def measure(policy: Trainable, optimizer: torch.optim.Optimizer, packs: Sequence[Pack]) -> Measured:
    """Train on `packs`, once to measure memory and once to measure time, at a learning rate of 0.

    On a CPU the memory is that of the process, less what it held before besides weights, gradients and optimizer
    state, because the prediction does not include Python and its libraries. The policy has to be loaded after
    `give_back_freed_memory`, or memory that was freed after loading is counted too.
    """
    device = policy.scorer.compute.device
    _train(policy, optimizer, packs[:1])  # loads code and creates the optimizer state
    beside = _held_beside(policy, optimizer, device)
    _reset_peak(device)
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
    """Bytes of this process besides weights, gradients and optimizer state; 0 on a GPU, which holds nothing else."""
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


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR_PEAK.exists():
        CLEAR_PEAK.write_text("5")


def _peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")


def _less(found: int | None, beside: int) -> int | None:
    return None if found is None else found - beside


def _status(name: str) -> int | None:
    """The value of a line of Linux's /proc/self/status, in bytes; None on other systems."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
