"""This build beside another one on the same work: a process for each round of each build, in turn.

In: cells of work, and a function that measures one by the code of the build that is imported: its number of `examples`,
processor seconds of `forward` and `step`, bytes of `memory`, and what else is shown of it. Out: a row for each cell, with the
medians of both builds, their ratios, and the smallest and the largest ratio of a round.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = ("forward", "step")
ROUNDS = 7
Measure = Callable[[str, Path], dict[str, Any]]


def compare(doc: str, script: str, cells: Collection[str], measure: Measure, title: str, notes: str) -> None:
    """Measure what the command line asks for, and write `results/<name of the script>.json` and `.md`."""
    chosen = _options(doc, cells)
    if chosen.build:
        sys.path.insert(0, str(chosen.build))
        print(json.dumps({cell: measure(cell, chosen.data) for cell in chosen.cells}))
        return
    found: dict[str, list[dict[str, Any]]] = {"this": [], "other": []}
    for number in range(chosen.rounds):
        builds = [("this", ROOT), ("other", chosen.other.resolve())]
        for name, build in builds if number % 2 else reversed(builds):
            found[name].append(_measured(script, build, chosen))
            print(number, name, found[name][-1], flush=True)
    sys.path.insert(0, str(ROOT))
    from benchmarks.record import write_results

    said = (
        f"Examples a processor second of this build and of the other, medians of {chosen.rounds} rounds, and the smallest and largest "
        f"ratio of a round. Float32, one thread. "
    )
    write_results(Path(script).stem, [_row(cell, found) for cell in chosen.cells], title, said + notes)


def _options(doc: str, cells: Collection[str]) -> argparse.Namespace:
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--other", type=Path, help="the folder of the other build")
    options.add_argument("--rounds", type=int, default=ROUNDS)
    options.add_argument("--cells", nargs="+", choices=cells, default=list(cells))
    options.add_argument("--build", type=Path, help="print the figures of this build and no more")
    return options.parse_args()


def _measured(script: str, build: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """What a process of a build prints."""
    command = [sys.executable, script, "--data", str(chosen.data), "--build", str(build), "--cells"]
    output = subprocess.run([*command, *chosen.cells], check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def _row(cell: str, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The row of the table of a cell."""
    rounds = {build: [one[cell] for one in processes] for build, processes in found.items()}
    this, other = rounds["this"][0], rounds["other"][0]
    row = {"name": cell, "examples": this["examples"]}
    row |= {name: value for name, value in this.items() if isinstance(value, str)}
    if "positions" in this:
        row["tokens"] = other["positions"] / this["positions"]
    for work in WORK:
        ratios = [
            before[work] / after[work] for before, after in zip(rounds["other"], rounds["this"], strict=True)
        ]
        for build, measured in rounds.items():
            row[f"{work}_{build}"] = row["examples"] / statistics.median(one[work] for one in measured)
        row[f"{work}_ratio"] = row[f"{work}_this"] / row[f"{work}_other"]
        row[f"{work}_spread"] = f"{min(ratios):.2f} to {max(ratios):.2f}"
    row["memory_this"], row["memory_other"] = (one["memory"] / 2**20 for one in (this, other))
    return row


def seconds(work: Callable[[], object]) -> float:
    """Processor seconds that a call takes."""
    began = time.process_time()
    work()
    return time.process_time() - began


def allocated_at_most(work: Callable[[], object]) -> int:
    """The most bytes that tensors made within a call took, by torch's own profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
