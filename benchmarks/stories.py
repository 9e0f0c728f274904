"""The run on which small trainings are measured: a 260-thousand-parameter model and graded stories it knows."""

from pathlib import Path
from typing import Any


def stories(data: Path, **prepare: Any) -> dict[str, dict[str, Any]]:
    """The blocks data, policy and prepare; `data` holds `models/` and `graded/`, `prepare` replaces keys."""
    return {
        "data": {"path": str(data / "graded" / "tinystories_graded_synthetic.jsonl")},
        "policy": {"model": str(data / "models" / "stories260K-hf-hd32")},
        "prepare": {"max_length": 512, "append_eos": False, "heldout_fraction": 0.2, **prepare},
    }
