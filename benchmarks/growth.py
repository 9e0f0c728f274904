"""How time and memory grow with the number of rows, from 10 thousand to 10 million, without a model's forward passes.

In: nothing; short rows are drawn. Out: `results/growth.json` and `.md`: for each size and each part of the way from rows to
training, seconds and peak memory. Every part of every size is a process of its own. Run from the repository root, with
5 GB of disk for the largest size:

    python benchmarks/growth.py [--sizes 10000 100000] [--folder FOLDER]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from benchmarks.record import RESULTS, write_results
from cache.artifacts import Artifact, Draft, Store, open_artifact
from cache.ref_logps import RefLogps
from stages.data.rows import Example, Row, RowSet
from stages.prepare.counts import RowCounts
from stages.prepare.duplicates import Duplicates
from stages.prepare.shard_writer import SplitWriter
from stages.settings.data import FilterSettings, PrepareSettings

SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
BATCH = 2_048
STEPS, EXAMPLES_OF_A_STEP = 200, 64
REFERENCE = {"reference": "drawn"}
MIB = 1024 * 1024


class Watch:
    """Adds up what is done inside of it: seconds, and processor seconds, which other processes do not lengthen."""

    def __init__(self) -> None:
        self.seconds = self.processor = 0.0

    def __enter__(self) -> None:
        self.seconds -= time.perf_counter()
        self.processor -= time.process_time()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter()
        self.processor += time.process_time()

    @property
    def figures(self) -> dict[str, float]:
        return {"seconds": self.seconds, "processor": self.processor}


class Peak:
    """The memory of this process that is not mapped from files, at its highest since this began, in MiB."""

    def __init__(self) -> None:
        self.begin = self.highest = _status("RssAnon")
        self.ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self.ended.wait(0.01):
            self.highest = max(self.highest, _status("RssAnon"))

    def end(self) -> float:
        self.ended.set()
        return max(self.highest, _status("RssAnon")) - self.begin


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def drawn(count: int) -> Iterator[list[Example]]:
    """Pairs of short rows, some of which begin alike."""
    random = np.random.default_rng(0)
    for begin in range(0, count, BATCH):
        size = min(BATCH, count - begin)
        ids = random.integers(1, 500, (size, 18)).astype(np.int32)
        ids[:, 0] = ids[:, 0] % 4
        lengths = random.integers(3, 6, (size, 2))
        yield [
            Example(
                f"{begin + n:024x}",
                f"drawn.jsonl:{begin + n + 1}",
                ids[n, :8],
                [
                    Row(role, completion := ids[n, at : at + length], np.ones(len(completion), bool))
                    for role, at, length in zip(
                        ("chosen", "rejected"), (8, 13), lengths[n].tolist(), strict=True
                    )
                ],
            )
            for n in range(size)
        ]


def write(folder: Path, rows: int) -> dict[str, float]:
    """prepare's writer: mismatch groups, keys, counts of shared tokens, shards."""
    store, counts, watch = Store(folder), RowCounts(), Watch()
    settings = PrepareSettings(mismatched=False)
    draft = store.draft("rows", "drawn", "prepare", {"rows": rows, "prepare": settings.model_dump()})
    writers = {split: SplitWriter(draft, split, settings, counts) for split in ("train", "heldout")}
    for batch in drawn(rows // 2):
        with watch:
            for number, example in enumerate(batch):
                writers["heldout" if number % 100 == 0 else "train"].add(example)
    with watch:
        for writer in writers.values():
            writer.finish()
        _publish(store, draft)
    return watch.figures


def _publish(store: Store, draft: Draft) -> None:
    store.publish(draft, {}, {}, "")
    draft.discard()


def duplicates(folder: Path, rows: int) -> dict[str, float]:
    """filter.duplicates=exact: each row looked up among all before it."""
    seen, watch = Duplicates(FilterSettings(duplicates="exact")), Watch()
    for batch in drawn(rows // 2):
        with watch:
            assert not any(seen.reason(example.example_id, "") for example in batch)
    return watch.figures


def rows_artifact(folder: Path) -> Artifact:
    [path] = (folder / "rows").iterdir()
    return open_artifact(path)


def row_sets(folder: Path) -> list[RowSet]:
    return [RowSet.of(rows_artifact(folder), split) for split in ("train", "heldout")]


def store_at(folder: Path) -> RefLogps:
    return RefLogps(folder / "ref-logps" / "drawn", REFERENCE)


def cache_ref(folder: Path, rows: int) -> dict[str, float]:
    """cache-ref with a scorer that costs nothing: what is missing, units in the order of prompts, the store."""
    from stages.cache_ref.work_units import units_of
    from stages.runtime.shares import Worker

    watch = Watch()
    with watch:
        sets, reference = row_sets(folder), store_at(folder)
        for unit in units_of(sets, Worker()):
            todo = unit.unscored(reference)
            lengths = todo.rows.completion_lengths[np.concatenate(todo.groups)]
            flat = np.full(lengths.sum(), -1.0, np.float32)
            reference.add(todo.keys, np.split(flat, np.cumsum(lengths)[:-1]))
    return watch.figures


def open_and_match(folder: Path, rows: int) -> dict[str, float]:
    """Open rows and store, and look every row up."""
    watch = Watch()
    with watch:
        sets, reference = row_sets(folder), store_at(folder)
        for row_set in sets:
            reference.require(row_set.keys, "align cache-ref")
    return watch.figures


def train(folder: Path, rows: int) -> dict[str, float]:
    """Start of training, then steps: the model is loaded before and counts for neither."""
    from benchmarks.token_cost import SHAPES, make_scorer
    from stages.losses import LOSSES
    from stages.runtime.distributed import World
    from stages.train.audit import _examples
    from stages.train.data_order import DataOrder
    from stages.train.step.row_scorer import RowScorer

    scorer = make_scorer(SHAPES["pairs"])
    peak, watch, steps = Peak(), Watch(), []
    with watch:
        sets, reference = row_sets(folder), store_at(folder)
        for row_set in sets:
            reference.require(row_set.scored_keys(False), "align cache-ref")
            row_set.max_length()
            row_set.token_ids()
        _examples(sets[1])
        own = RowScorer(scorer, sets[0], reference, LOSSES["dpo"](), World())
        own.pairs.summary()
        order = DataOrder(sets[0].mismatch_groups, 0, EXAMPLES_OF_A_STEP)
        order.examples_of(1)
    for step in range(1, STEPS + 1):
        with (step_watch := Watch()):
            groups = [own.pairs.scored(example) for example in order.examples_of(step).tolist()]
            for pack in own.packs(groups):
                np.concatenate([reference.get(sets[0].keys[row]) for row in pack.rows])
        steps.append(step_watch.processor)
    return {**watch.figures, "step_ms": 1e3 * statistics.median(steps), "memory": peak.end()}


PARTS: dict[str, Callable[[Path, int], dict[str, float]]] = {
    "prepare's writer": write,
    "exact duplicates": duplicates,
    "cache-ref": cache_ref,
    "open and match": open_and_match,
    "open and match again": open_and_match,
    "start of train": train,
}


def measure(part: str, folder: Path, rows: int) -> None:
    """One part in this process; prints its figures."""
    peak = Peak()
    found = PARTS[part](folder, rows)
    memory = peak.end()
    print(json.dumps({"memory": memory, "resident": _status("VmHWM"), **found}))


def run(part: str, folder: Path, rows: int) -> dict[str, Any]:
    line = [sys.executable, __file__, "--part", part, "--folder", str(folder), "--sizes", str(rows)]
    done = subprocess.run(line, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        "name": f"{part}, {rows:,} rows",
        "part": part,
        "rows": rows,
        "seconds": round(found["seconds"], 2),
        "processor_seconds": round(found["processor"], 2),
        "memory_mib": round(found["memory"]),
        "resident_mib": round(found["resident"]),
        "step_ms": round(found["step_ms"], 2) if "step_ms" in found else None,
    }


def measured_before(sizes: Sequence[int]) -> list[dict[str, Any]]:
    """The results of other sizes, so that one size can be measured again."""
    path = RESULTS / "growth.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    return [row for row in rows if row["rows"] not in sizes]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--part", choices=PARTS)
    given = parser.parse_args()
    if given.part:
        measure(given.part, given.folder, given.sizes[0])
        return
    measured = measured_before(given.sizes)
    for rows in given.sizes:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            for part in PARTS:
                measured.append(run(part, Path(folder), rows))
                print(measured[-1], flush=True)
    notes = (
        "Pairs of 8 prompt tokens and 3 to 5 completion tokens; no forward passes. `seconds` and `processor_seconds` of a part, on a machine with other work; `memory_mib`: the most "
        "memory that it held and that was not mapped from files, above what it began with (for train: above the model); "
        "`resident_mib`: the most of everything, modules, the model and mapped pages of files included. `start of train`: all that "
        f"happens before step 1 but loading and running the model; `step_ms`: then planning a step of {EXAMPLES_OF_A_STEP} pairs, "
        f"their packs and their reference log-probs, in processor time, the median of {STEPS}. The first `open and match` hashes every file of the "
        "store, the second believes the notes of the first."
    )
    measured.sort(key=lambda row: row["rows"])
    write_results("growth", measured, "Growth with the number of rows", notes, RESULTS)


if __name__ == "__main__":
    main()
