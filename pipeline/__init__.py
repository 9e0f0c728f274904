"""The top layer: the command line, the configuration, the commands and what they print, the quickstart.

For Python: `Session`, and the `Rows`, `Policy`, `Completions` and `Verdicts` that its methods return (`notebook.py`).
"""

from typing import Any

__all__ = ["Completions", "Policy", "Rows", "Session", "Verdicts"]


def __getattr__(name: str) -> Any:
    """The names of the Python interface, imported when they are used, because they import torch."""
    if name in __all__:
        from pipeline import notebook

        return getattr(notebook, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
