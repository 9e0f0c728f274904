"""Where the time of a DPO step goes on this machine, by kind of operation: torch's profiler on the engine's benchmark.

In: a folder as `engine_world.py` describes. Out: `results/engine_profile.json` and `.md`. Run from the
repository root:

    python benchmarks/engine_profile.py --data FOLDER
"""

import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.engine_worker import Ours, batches
from benchmarks.engine_world import Work, build_world, data_folder
from benchmarks.record import write_results

# Parts of an operator's name, and the kind of work they are; the first that fits counts.
KINDS = (
    ("attention", "attention"),
    ("mm", "matrix products"),
    ("linear", "matrix products"),
    ("adam", "optimizer"),
    ("copy_", "casts and copies"),
    ("cat", "casts and copies"),
)
STEPS = 3


def main() -> None:
    data = data_folder(__doc__)
    torch.set_num_threads(2)
    rows = [profiled(data, dtype) for dtype in ("float32", "bfloat16")]
    write_results(
        "engine_profile",
        rows,
        "Where the time of a step goes",
        f"DPO on hh-rlhf, max_length 512, 8 pairs, the model of `engine.py`; {STEPS} steps after one of warm-up, forward, "
        "backward and optimizer. Shares of the time inside operators (torch's profiler, whose own cost is spread over them).",
    )


def profiled(data: Path, dtype: str) -> dict[str, float | str]:
    """Seconds a step and the share of each kind of operation."""
    work = Work("ours", "dpo", dtype, "hh", 512, 32_000, 8, STEPS, str(data))
    world = build_world(data, work.dataset, work.max_length, work.vocabulary)
    system, steps = Ours(work, world), batches(world, work, "random")
    system.run(steps[0])
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for examples in steps[1:]:
            system.run(examples)
    shares: dict[str, float] = defaultdict(float)
    for event in found.key_averages():
        name = event.key.removeprefix("aten::")
        shares[next((kind for part, kind in KINDS if part in name), "the rest")] += event.self_cpu_time_total
    total = sum(shares.values())
    row = {"name": dtype, "seconds_a_step": total / 1e6 / STEPS}
    row |= {kind: shares[kind] / total for kind in sorted(shares, key=lambda kind: -shares[kind])}
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
