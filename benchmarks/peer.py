"""The environment of its own in which TRL runs, made on the first use."""

import subprocess
import sys
from pathlib import Path

VENV = Path(__file__).resolve().parent.parent / ".bench-venv"
REQUIREMENTS = [
    "torch==2.13.0",
    "trl==1.16.0",
    "transformers<5.20",
    "pydantic>=2.10",
    "PyYAML>=6",
    "rich>=13.9",
]


def peer_python() -> Path:
    """The interpreter of that environment, with TRL installed."""
    python = VENV / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
    return python
