"""Where and in what arithmetic models run; the same for the reference and the policy."""

from dataclasses import dataclass

import torch

from cache.errors import MachineError
from stages.allocator import keep_freed_memory
from stages.settings import ComputeSettings

# Part of a reference log-prob's identity: raise it when the scoring engine's numbers change.
SCORER_VERSION = 1


@dataclass(frozen=True)
class Compute:
    """Where and in what arithmetic models run."""

    device: torch.device
    dtype: torch.dtype
    tokens_per_batch: int

    @property
    def dtype_name(self) -> str:
        """The dtype as it stands in identities and messages."""
        return str(self.dtype).removeprefix("torch.")


def resolve_compute(settings: ComputeSettings) -> Compute:
    """Turn 'auto' into a device and dtype; raises `MachineError` when the device is not there."""
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present[device]:
        raise MachineError(
            f"compute.device is {device}, which this machine does not have. Use --set compute.device=cpu."
        )
    if device == "cpu":
        keep_freed_memory()
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return Compute(torch.device(device), getattr(torch, dtype), settings.tokens_per_batch)
