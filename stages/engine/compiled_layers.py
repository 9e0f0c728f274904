"""The layers of a model compiled by torch.compile: what does not multiply matrices takes fewer passes over memory.

In: a model that is scored in packs.  Out: the same model, whose layers are compiled as they are first called. Attention along
the tree stays as it is: its calls depend on the pack.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from cache.errors import MachineError


def compile_layers(model: Any, device: torch.device) -> None:
    """Have each layer of `model` compiled as it is first called.

    Raises `MachineError` where torch.compile does not work, such as a CPU without a C++ compiler.
    """
    if device.type == "cpu":
        _keep_apart_by_vector_width()
    try:
        torch.compile(_doubled)(torch.ones(8, device=device))
    except Exception as error:  # whatever torch, its compiler or the driver raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        raise MachineError(
            f"compute.compile is true, and torch.compile fails on this machine ({type(error).__name__}: {reason[:160]}). Install "
            f"a C++ compiler (on a GPU also triton), or use --set compute.compile=false."
        ) from error
    for layer in decoder_layers(model):
        # A GPU's packs have one length; on a CPU each has its own.
        layer.compile(dynamic=None if device.type == "cuda" else True)


def _keep_apart_by_vector_width() -> None:
    """Name the width of the vector instructions in torch's settings, which are part of the key of its cache on disk.

    The width that torch finds by itself is not: with another ATEN_CPU_CAPABILITY, or in a cache that machines share, it takes code
    that was made for other instructions (findings/torch_compile_cache_mixes_vector_widths.sh).
    """
    from torch._inductor import config, cpu_vec_isa

    config.cpp.simdlen = cpu_vec_isa.pick_vec_isa().bit_width() or 1


def not_compiled() -> AbstractContextManager[None]:
    """Within it layers run as they are written: for generation, and for rows alone, whose shapes are all different."""
    return torch.compiler.set_stance("force_eager")


def decoder_layers(model: Any) -> list[nn.Module]:
    """The transformer's layers: the module list that is as long as the configuration's number of layers."""
    number = model.config.get_text_config().num_hidden_layers
    lists = [module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList)]
    return list(next((found for found in lists if len(found) == number), []))


def _doubled(values: Tensor) -> Tensor:
    return values + values
