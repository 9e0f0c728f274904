"""Device, dtype and token budget of the models: the same for the reference and the policy."""

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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


def set_up_process(compute: Compute, log: Callable[[str], None]) -> None:
    """Set the GPU of this process under torchrun; on a CPU make the allocator keep freed memory, and name a slow dtype."""
    if compute.device.type == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if compute.device.type == "cpu":
        keep_freed_memory()
        if compute.dtype == torch.bfloat16 and not multiplies_bfloat16(torch.cpu.get_capabilities()):
            log(
                "This processor does not multiply bfloat16 (it has no AVX-512): torch takes up to eighty times as long as in "
                "float32. Use --set compute.dtype=float32."
            )


def multiplies_bfloat16(capabilities: Mapping[str, Any]) -> bool:
    """Whether torch's products of bfloat16 are not far slower than those of float32, from `torch.cpu.get_capabilities()`."""
    # oneDNN multiplies bfloat16 with AVX-512, if need be by way of float32, and with AVX-NE-CONVERT. Without, torch has a loop
    # of its own: 4 to 82 times as long as float32 for products of 1,024 x 512 x 2,048 (torch 2.13, an AMD EPYC with AVX2).
    is_x86 = capabilities.get("architecture") == "x86_64"
    return not is_x86 or any(capabilities.get(name) for name in ("avx512_bw", "avx_ne_convert"))


def require_bitsandbytes(what: str) -> None:
    """Raise `MachineError` if bitsandbytes, which `what` needs, is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MachineError(
            f"{what} needs bitsandbytes, which is not installed. Install it with: pip install -e '.[bitsandbytes]'"
        )
