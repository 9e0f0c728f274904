"""The GPUs as their driver reports them, and whether the installed torch can use them. Does not import torch."""

import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from pipeline.doctor.finding import Finding

QUERY = "name,memory.total,memory.free,compute_cap"
OLDEST_BF16 = 8.0  # compute capability: Ampere
TIMEOUT_SECONDS = 20


def gpus() -> list[Finding]:
    """A line for each GPU, or one that says that there is none."""
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return [Finding("gpu", "mps", "ok", "Apple GPU", "compute.device=mps")]
    lines = _driver_lines()
    if not lines:
        return [Finding("gpu", "gpu", "note", "none: models run on the CPU")]
    found = [_gpu(number, line) for number, line in enumerate(lines)]
    if cuda_of_torch() is None:
        advice = "pip install torch with CUDA (pytorch.org/get-started)"
        found.append(Finding("gpu", "torch", "note", "a build without CUDA: it does not use the GPU", advice))
    return found


def cuda_of_torch() -> str | None:
    """The CUDA version that the installed torch was built for; None without CUDA or torch."""
    try:
        path = Path(str(distribution("torch").locate_file("torch/version.py")))
        text = path.read_text(encoding="utf-8")
    except (PackageNotFoundError, OSError):
        return None
    found = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return found[1] if found else None


def _driver_lines() -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()


def _gpu(number: int, line: str) -> Finding:
    """One line of nvidia-smi: name, MiB in total, MiB free, compute capability."""
    name, total, free, capability = (part.strip() for part in line.split(","))
    known = re.fullmatch(r"\d+\.\d+", capability)
    has_bf16 = known is not None and float(capability) >= OLDEST_BF16
    dtype = "bfloat16" if has_bf16 else "no bfloat16, so compute.dtype is float32"
    found = f"{name}, {_gib(total)} GiB, {_gib(free)} GiB free, {dtype}"
    return Finding("gpu", f"gpu {number}", "ok" if has_bf16 else "note", found)


def _gib(mebibytes: str) -> str:
    return f"{int(mebibytes) / 1024:.0f}" if mebibytes.isdigit() else "?"
