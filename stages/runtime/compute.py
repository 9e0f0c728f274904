"""Where and in what arithmetic models run; the same for the reference and the policy."""

import importlib.util
import os
from dataclasses import dataclass

import torch

from cache.errors import MachineError
from stages.runtime.malloc import keep_freed_memory
from stages.settings.fields import ComputeSettings

# Part of a reference log-prob's identity: raise it when the scoring engine's numbers change.
SCORER_VERSION = 2


@dataclass(frozen=True)
class Compute:
    """Where and in what arithmetic models run."""

    device: torch.device
    dtype: torch.dtype
    tokens_per_batch: int
    load_in_4bit: bool = False

    @property
    def dtype_name(self) -> str:
        """The dtype as it stands in identities and messages."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def arithmetic(self) -> str:
        """The dtype, and the 4-bit weights where there are any: what changes a log-prob."""
        return f"{self.dtype_name}, weights in nf4" if self.load_in_4bit else self.dtype_name


def resolve_compute(settings: ComputeSettings) -> Compute:
    """Turn 'auto' into a device and dtype; raises `MachineError` when the device or bitsandbytes is not there."""
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present[device]:
        raise MachineError(
            f"compute.device is {device}, which this machine does not have. Use --set compute.device=cpu."
        )
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if settings.load_in_4bit:
        require_bitsandbytes("compute.load_in_4bit")
    return Compute(
        torch.device(device), getattr(torch, dtype), settings.tokens_per_batch, settings.load_in_4bit
    )


def set_up_process(compute: Compute) -> None:
    """Set what holds for the whole process: its GPU under torchrun, and on a CPU that freed memory is kept for reuse."""
    if compute.device.type == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if compute.device.type == "cpu":
        keep_freed_memory()


def require_bitsandbytes(what: str) -> None:
    """Raise `MachineError` where bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MachineError(
            f"{what} needs bitsandbytes, which is not installed. Install it with: pip install -e '.[bitsandbytes]'"
        )
