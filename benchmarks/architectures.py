"""Every decoder-only architecture of transformers through the scoring engine, held against the model alone.

Out: `results/architectures.json` and `.md`. Each architecture is tiny and random, once as registered (with small
windows, chunks and the like) and once for each feature that can be switched on. Run from the repository root:

    python benchmarks/architectures.py
"""

import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import transformers

from benchmarks.record import write_results
from cache.errors import AlignError
from stages.engine.packs import build_pack
from stages.engine.scorer import Scorer
from stages.engine.self_check import Way
from stages.runtime.compute import Compute
from tests.stages.engine import tiny_architectures as tiny

FLOAT32 = Compute(torch.device("cpu"), torch.float32, 4096)


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = []
    for kind in tiny.KINDS:
        rows += rows_of(kind)
        print(f"{len(rows)} {rows[-1]}", flush=True)
    write_results("architectures", rows, "Every decoder-only architecture of transformers", notes(rows))


def rows_of(kind: str) -> list[dict[str, Any]]:
    """The rows of the table for one architecture."""
    if kind in tiny.NOT_BUILT:
        return [{"name": kind, "way": "not built", "message": tiny.NOT_BUILT[kind]}]
    return [row_of(kind, feature, changes) for feature, changes in tiny.features(kind).items()]


def row_of(kind: str, feature: str, changes: dict[str, Any]) -> dict[str, Any]:
    """How a feature of an architecture is scored, and the largest difference to the model alone."""
    row: dict[str, Any] = {"name": f"{kind}/{feature}"}
    rows = tiny.make_rows()
    try:
        config = tiny.build_config(kind, **changes)
        model = tiny.build(config, tiny.TRUTH.get(row["name"], "eager"))
        with torch.no_grad():
            truth = torch.cat([tiny.alone(model, rows, number) for number in range(len(rows))])
    except Exception as error:  # transformers itself cannot do this
        return {
            **row,
            "way": "not built",
            "message": f"{type(error).__name__}: {str(error).splitlines()[0][:150]}",
        }
    said: list[str] = []
    try:
        began = time.process_time()
        scorer = Scorer(tiny.build(config, "sdpa"), FLOAT32, said.append)
        row["self_check_seconds"] = time.process_time() - began
    except AlignError as error:
        return {**row, "way": "refused", "message": str(error)}
    groups = [rows.example_rows(example, mismatched=False) for example in range(rows.num_examples)]
    with torch.no_grad():
        found = scorer(build_pack(rows, groups)).completion_logps
    difference = float((found.double() - truth).abs().max())
    return {**row, "way": name_of(scorer.way), "difference": difference, "message": " ".join(said)}


def name_of(way: Way) -> str:
    if way.backend is None:
        return "padded batches" if way.padded else "one by one"
    return "packed" if way.longest is None else f"packed up to {way.longest} tokens"


def notes(rows: list[dict[str, Any]]) -> str:
    """The counts, over architectures and over all rows."""
    first = {row["name"].split("/")[0]: row["way"].split(" up")[0] for row in reversed(rows)}
    worst = max(rows, key=lambda row: row.get("difference", 0.0))
    seconds = sorted(row["self_check_seconds"] for row in rows if "self_check_seconds" in row)
    return (
        f"{len(first)} architectures, as registered: {_counts(first.values())}. {len(rows)} configurations in all: "
        f"{_counts(row['way'].split(' up')[0] for row in rows)}. The largest difference to the model alone (eager, float32, "
        f"a new copy for each row, fed the whole row) is {worst['difference']:.2g} nats a token, of {worst['name']}. "
        f"Windows and chunks are {tiny.WINDOW} tokens and rotary thresholds {tiny.ORIGINAL}; the rows have 9 to 210. "
        f"The self-check takes {seconds[len(seconds) // 2]:.2f} CPU seconds in the median, {seconds[-1]:.2f} at most. "
        f"`not built`: transformers cannot build or run it, for the reason given."
    )


def _counts(ways: Any) -> str:
    return ", ".join(f"{number} {way}" for way, number in Counter(ways).most_common())


if __name__ == "__main__":
    main()
