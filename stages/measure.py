"""A few real forward and backward passes: seconds and peak memory, to hold against what was predicted.

In: a policy in training and packs.  Out: seconds of each pass, positions and peak bytes.
"""

import ctypes
import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stages.packs import Pack
from stages.trainable import Trainable

CLEAR_PEAK = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Measured:
    """`peak_bytes` is None where the system does not say; `seconds` and `positions` are of the passes together."""

    seconds: float
    positions: int
    peak_bytes: int | None
    update_seconds: float


def measure(policy: Trainable, optimizer: torch.optim.Optimizer, packs: Sequence[Pack]) -> Measured:
    """Train on `packs` once to warm up and once for the clock, at a learning rate of 0.

    On a CPU the peak is the process's, less what it held beside the weights before the first pass: Python and
    its libraries are no part of the prediction.
    """
    device = policy.scorer.compute.device
    before = _held_beside(policy, device)
    _pass(policy, packs[:1])
    optimizer.step()
    _forget_peak(device)
    started = time.monotonic()
    _pass(policy, packs)
    _wait(device)
    seconds = time.monotonic() - started
    optimizer.step()
    _wait(device)
    update = time.monotonic() - started - seconds
    peak = _peak_bytes(device)
    positions = sum(pack.input_ids.shape[1] for pack in packs)
    return Measured(seconds, positions, None if peak is None else peak - before, update)


def _held_beside(policy: Trainable, device: torch.device) -> int:
    """What this process holds besides the weights; 0 on a GPU, where nothing else is counted."""
    if device.type == "cuda":
        return 0
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what loading the model has freed
    weights = sum(parameter.nbytes for parameter in policy.scorer.parameters())
    return max(0, (_status("VmRSS") or 0) - weights)


def _pass(policy: Trainable, packs: Sequence[Pack]) -> None:
    with policy.scorer.weights_cast_once():
        for pack in packs:
            policy.scorer(pack).sum().backward()


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


def _status(name: str) -> int | None:
    """A line of Linux's /proc/self/status in bytes; None on other systems."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
