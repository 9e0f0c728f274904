"""The engine beside TRL 1.16 on the same machine, weights, token ids and pairs: speed, memory, equality.

In: a folder as `engine_world.py` describes. Out: `results/engine.json` and `.md`. Every system is a process
of its own that holds its model; a round is one optimizer step (or one reference pass) on one batch, and the
systems take turns round by round, so that whatever else the machine does meets all of them. Figures are
medians of the rounds, ratios medians of the rounds' ratios. Run from the repository root:

    python benchmarks/engine.py --data FOLDER [--cells NAME...] [--rounds 5]

TRL gets an environment of its own in `.bench-venv`, made on the first run; all systems run on its torch.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.engine_world import build_world
from benchmarks.engine_world import statistics as token_statistics
from benchmarks.peer import peer_python
from benchmarks.record import write_results

WORKER = Path(__file__).with_name("engine_worker.py")
# How a peer's kind is run: the worker's system, and the order of the pairs.
KINDS = {"shipped": ("shipped", "random"), "compact": ("compact", "random"), "tuned": ("compact", "sorted")}


@dataclass(frozen=True)
class Cell:
    """One line of work and the peers to compare with."""

    task: str
    dataset: str
    max_length: int
    vocabulary: int
    dtype: str
    peers: tuple[str, ...]
    batch: int = 8

    @property
    def name(self) -> str:
        prefix = {"dpo": "train_dpo", "kto": "train_kto", "cache_ref": "cache_ref"}[self.task]
        return f"{prefix}_{self.dataset}{self.max_length}_{self.vocabulary // 1000}k_{self.dtype}"


ALL = ("shipped", "compact", "tuned")
CELLS = (
    Cell("dpo", "hh", 512, 32_000, "float32", ALL),
    Cell("dpo", "hh", 512, 32_000, "bfloat16", ("shipped", "compact")),
    Cell("cache_ref", "hh", 512, 32_000, "float32", ALL),
    Cell("kto", "hh", 512, 32_000, "float32", ("shipped", "compact")),
    Cell("dpo", "hh", 512, 100_352, "float32", ("compact",)),
    Cell("dpo", "en_demo", 512, 32_000, "float32", ("compact", "tuned"), batch=4),
    Cell("dpo", "en_demo", 2048, 32_000, "bfloat16", ("compact",), batch=2),
    Cell("cache_ref", "hh", 512, 32_000, "bfloat16", ("compact",)),
    Cell("dpo", "hh", 512, 100_352, "bfloat16", ("compact",)),
    Cell("dpo", "hh", 2048, 32_000, "float32", ("compact",)),
    Cell("dpo", "en_demo", 512, 32_000, "bfloat16", ("compact",), batch=4),
    Cell("cache_ref", "en_demo", 512, 32_000, "float32", ("compact", "tuned"), batch=4),
    Cell("dpo", "en_demo", 2048, 32_000, "float32", ("compact",), batch=2),
    Cell("dpo", "en_demo", 2048, 100_352, "bfloat16", ("compact",), batch=2),
)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", type=Path, required=True)
    options.add_argument(
        "--cells",
        nargs="+",
        default=[],
        choices=[cell.name for cell in CELLS],
        help="only these cells, written to engine_cells",
    )
    options.add_argument("--rounds", type=int, default=5)
    arguments = options.parse_args()
    python = peer_python()
    cells = [cell for cell in CELLS if not arguments.cells or cell.name in arguments.cells]
    rates = {dtype: matmul_rate(dtype) for dtype in sorted({cell.dtype for cell in cells})}
    rows: list[dict[str, Any]] = []
    for cell in cells:
        rows += measure(cell, python, arguments.data.resolve(), arguments.rounds, rates[cell.dtype])
        write(rows, arguments, rates)


def measure(cell: Cell, python: Path, data: Path, rounds: int, rate: float) -> list[dict[str, Any]]:
    """Two rows for each peer: speed, and memory. Ours runs again beside each, as two peers do not fit together."""
    world = build_world(data, cell.dataset, cell.max_length, cell.vocabulary, cell.task == "kto")
    shared = {
        "dataset": f"{cell.dataset}, max_length {cell.max_length}, {cell.batch} pairs",
        "dtype": cell.dtype,
    }
    rows: list[dict[str, Any]] = []
    for kind in cell.peers:
        system, order = KINDS[kind]
        workers = [Worker(python, cell, name, rounds, data) for name in ("ours", system)]
        turns = [[worker.round(order, number) for worker in workers] for number in range(rounds + 1)]
        for worker in workers:
            worker.close()
        ours, peer = ([turn[side] for turn in turns] for side in (0, 1))
        row = {
            "name": cell.name,
            "peer_kind": kind,
            **shared,
            "unit": "pairs/s",
            **compare(ours[1:], peer[1:]),
        }
        # A step's loss is a mean, a reference pass's result a sum over its pairs.
        scale = cell.batch if cell.task == "cache_ref" else 1
        row["max_loss_diff"] = max(abs(a["loss"] - b["loss"]) for a, b in turns) / scale
        row["flops_ratio"] = statistics.median(
            b["flops"] / a["flops"] for a, b in zip(ours[1:], peer[1:], strict=True)
        )
        row["matmul_share"] = statistics.median(step["flops"] / step["seconds"] for step in ours[1:]) / rate
        sizes = [max(step["peak_bytes"] for step in steps) / 2**30 for steps in (ours, peer)]
        memory = {"name": f"memory_{cell.name}", "peer_kind": kind, **shared, "unit": "GiB above the model"}
        rows += [
            {**row, **token_statistics(world)},
            {**memory, "ours": sizes[0], "peer": sizes[1], "ratio": sizes[1] / sizes[0]},
        ]
    for row in rows:
        shown = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
        print(shown, flush=True)
    return rows


def compare(ours: list[dict[str, Any]], peer: list[dict[str, Any]]) -> dict[str, float]:
    """Median pairs a second of both, and the median, least and largest ratio of a round."""
    speeds = [statistics.median(step["pairs"] / step["seconds"] for step in steps) for steps in (ours, peer)]
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(ours, peer, strict=True)]
    return {
        "ours": speeds[0],
        "peer": speeds[1],
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


class Worker:
    """A system in a process of its own; a round is asked for and answered in one line."""

    def __init__(self, python: Path, cell: Cell, system: str, rounds: int, data: Path) -> None:
        work = {
            "system": system,
            **{key: getattr(cell, key) for key in ("task", "dtype", "dataset", "max_length", "vocabulary")},
            "batch": cell.batch,
            "rounds": rounds,
            "data": str(data),
        }
        command = [str(python), str(WORKER), json.dumps(work)]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._read("ready")

    def round(self, order: str, number: int) -> dict[str, Any]:
        """Run a round; seconds, pairs, loss, flops and peak memory."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{order} {number}\n")
        self.process.stdin.flush()
        return self._read("seconds")

    def _read(self, key: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{") and key in (found := json.loads(line)):
                return found
        raise RuntimeError(f"the worker ended with exit code {self.process.wait()}: {self.process.args}")

    def close(self) -> None:
        """End the process and wait for it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def matmul_rate(dtype: str) -> float:
    """Floating point operations a second of the best matrix product of the sizes the model has."""
    import torch

    torch.set_num_threads(2)
    best = 0.0
    for rows, inner, columns in ((2048, 512, 2048), (2048, 2048, 512), (1024, 512, 32_000)):
        left = torch.randn(rows, inner).to(getattr(torch, dtype))
        right = torch.randn(columns, inner).to(getattr(torch, dtype))
        for _ in range(20):
            began = time.perf_counter()
            left @ right.T
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - began))
    return best


def write(rows: list[dict[str, Any]], arguments: argparse.Namespace, rates: dict[str, float]) -> None:
    measured = ", ".join(f"{rate / 1e9:.0f} GFLOP/s {dtype}" for dtype, rate in sorted(rates.items()))
    notes = (
        "A random OLMo-2 of 16 layers, width 512 (67 million parameters besides embedding and head). TRL 1.16.0 with "
        "gradient checkpointing off, handed the same token ids and reference log-probs: `shipped`, as it runs on a CPU "
        "(every position goes through its head); `compact`, its GPU behaviour forced (completion positions only), the "
        "honest rival; `tuned`, compact on data presorted by length. Order is random unless tuned. hh is prompt-heavy, "
        "en_demo completion-heavy: `sharing` is what computing each prompt once saves there. "
        f"{arguments.rounds} rounds after one of warm-up. `matmul_share`: useful model FLOPs (6 a parameter and token "
        "trained, 2 forward; each prompt once, the head on completions) over the machine's measured matmul rate "
        f"({measured}). `flops_ratio`: model FLOPs "
        "that TRL runs for the same pairs, padding and its head's recomputation included, over the useful ones: the ratio "
        "there would be if both ran at the same rate and did nothing else. `max_loss_diff`: largest "
        "difference of a step's loss (cache_ref: of the sum of log-probs, per pair). Memory: peak resident size above the "
        "loaded model, gradients and optimizer included."
    )
    name = "engine" if not arguments.cells else "engine_cells"
    write_results(name, rows, "The engine beside TRL 1.16.0", notes)


if __name__ == "__main__":
    main()
