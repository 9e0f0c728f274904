"""Device, dtype and token budget of the models: the same for the reference and the policy."""

import importlib.util
import os
from dataclasses import dataclass

import torch

from cache.errors import MachineError
from stages.runtime.malloc import keep_freed_memory
from stages.settings.fields import ComputeSettings

# Part of the identity of a reference log-prob: raise it when a change of the scoring engine changes results.
SCORER_VERSION = 5


@dataclass(frozen=True)
class Compute:
    """Device and dtype of a forward pass, and the tokens in one."""

    device: torch.device
    dtype: torch.dtype
    tokens_per_batch: int
    load_in_4bit: bool = False
    compile: bool = False

    @property
    def dtype_name(self) -> str:
        """The dtype as it is written in identities and messages."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def arithmetic(self) -> str:
        """The dtype, and whether weights are in 4 bits: what changes a log-prob."""
        return f"{self.dtype_name}, weights in nf4" if self.load_in_4bit else self.dtype_name


def resolve_compute(settings: ComputeSettings) -> Compute:
    """Turn 'auto' into a device and dtype; raises `MachineError` when the device or bitsandbytes is not there."""
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present[device]:
        raise MachineError(
            f"compute.device is {device}, and this machine has no such device. Use --set compute.device=cpu."
        )
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if settings.load_in_4bit:
        require_bitsandbytes("compute.load_in_4bit")
    return Compute(
        torch.device(device),
        getattr(torch, dtype),
        settings.tokens_per_batch,
        settings.load_in_4bit,
        settings.compile,
    )


def set_up_process(compute: Compute) -> None:
    """Set the GPU of this process under torchrun; on a CPU make the allocator keep freed memory."""
    if compute.device.type == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if compute.device.type == "cpu":
        keep_freed_memory()


def require_bitsandbytes(what: str) -> None:
    """Raise `MachineError` if bitsandbytes, which `what` needs, is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MachineError(
            f"{what} needs bitsandbytes, which is not installed. Install it with: pip install -e '.[bitsandbytes]'"
        )
