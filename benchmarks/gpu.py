"""What is measured on a GPU, part by part, each within its time; results are written after every row.

    benchmarks/gpu.sh                        the tests that need a GPU, then this
    python benchmarks/gpu.py [--device cpu] [--tiny] [--seconds 80] [--out FOLDER]

Out: `results/gpu.*`, `gpu_training.*` and `gpu_tree.*`. Without a CUDA device the rows say that nothing was measured; `--device cpu
--tiny` runs the same code on a tiny model.
"""

import argparse
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import gpu_engine, gpu_training, gpu_tree
from benchmarks.record import RESULTS, write_results

PARTS = {"gpu": gpu_engine, "gpu_training": gpu_training, "gpu_tree": gpu_tree}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, and one round")
    parser.add_argument("--seconds", type=float, default=80, help="for each part; what is left is named")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    device = torch.device(options.device)
    for name, part in PARTS.items():
        if device.type == "cuda" and not torch.cuda.is_available():
            rows = part.unmeasured("not measured: no CUDA device")
            _write(name, part, rows, "No CUDA device", options.out)
        else:
            _run(name, part, device, options)


def _run(name: str, part: ModuleType, device: torch.device, options: argparse.Namespace) -> None:
    card = torch.cuda.get_device_name() if device.type == "cuda" else "A CPU, to try the code"
    deadline, rows = time.monotonic() + options.seconds, list[dict[str, Any]]()
    print(f"{name}: {card}", flush=True)
    for row in part.measured(device, options.tiny):
        print(" ", row, flush=True)
        rows.append(row)
        _write(name, part, rows, card, options.out)
        if time.monotonic() > deadline:
            print(f"  stopped after {options.seconds:g} seconds", flush=True)
            break


def _write(name: str, part: ModuleType, rows: list[dict[str, Any]], card: str, folder: Path) -> None:
    write_results(name, rows, part.TITLE, f"{card}. {part.NOTES}", folder)


if __name__ == "__main__":
    main()
