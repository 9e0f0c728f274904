"""Where the time of `align cache-ref` goes: in the forward passes, or in reading, planning, hashing and writing.

In: a folder as `engine_world.py` describes. Out: `results/cache_ref_overhead.json` and `.md`. The stage runs as
a person runs it, on the first pairs of hh-rlhf and a random OLMo-2 of 16 layers, with a clock around the loading
of the model, its self-check and every forward pass. Run from the repository root:

    python benchmarks/cache_ref_overhead.py --data FOLDER [--pairs 1024]
"""

import argparse
import gzip
import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.engine_world import DATASETS, make_model
from benchmarks.record import write_results


class Clock:
    """Seconds spent inside some functions, one total for each name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

        return timed


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--pairs", type=int, default=1024)
    arguments = options.parse_args()
    model = make_model(arguments.data.resolve(), 32_000)
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder) / "pairs.jsonl"
        with gzip.open(arguments.data / DATASETS["hh"], "rt") as lines:
            pairs.write_text("".join(itertools.islice(lines, arguments.pairs)))
        rows = [measure(pairs, model, Path(folder) / dtype, dtype) for dtype in ("float32", "bfloat16")]
    notes = (
        "`align cache-ref` in one process, imports done. `load`: hashing and loading the weights; `self_check`: the trial "
        "pack at load; `forward`: the forward passes, head included; `other`: reading rows, planning, building packs, and "
        "what hashing and writing the shards adds, which happens while the next unit is scored. `other_share`: of the time "
        "after loading and self-check."
    )
    write_results("cache_ref_overhead", rows, "What cache-ref does besides scoring", notes)


def measure(pairs: Path, model: Path, store: Path, dtype: str) -> dict[str, Any]:
    """Seconds of the stage, by what they were spent on."""
    from pipeline.config import build_config
    from pipeline.session import Session
    from stages.cache_ref import stage as cache_ref
    from stages.engine import scorer as scoring

    blocks = {
        "data": {"path": str(pairs)},
        "policy": {"model": str(model)},
        "prepare": {"max_length": 512, "template": "plain"},
        "compute": {"dtype": dtype},
    }
    session = Session(build_config(blocks), store, log=lambda line: None)
    session.run("prepare")
    clock = Clock()
    patches = (
        (cache_ref, "reference_identity", "load"),
        (cache_ref, "load_model", "load"),
        (scoring, "choose_way", "self_check"),
        (scoring.Scorer, "forward", "forward"),
    )
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    for (owner, name, function), (_, _, label) in zip(originals, patches, strict=True):
        setattr(owner, name, clock.around(label, function))
    began = time.perf_counter()
    result = session.run("cache-ref").as_json()
    total = time.perf_counter() - began
    for owner, name, function in originals:
        setattr(owner, name, function)
    load, check = clock.seconds["load"], clock.seconds["self_check"]
    forward = (
        clock.seconds["forward"] - check
    )  # the self-check's own passes lie within it, and are nearly all of it
    work = total - load - check
    row = {"name": dtype, "rows_scored": result["rows_scored"], "seconds": total, "load": load}
    row |= {
        "self_check": check,
        "forward": forward,
        "other": work - forward,
        "other_share": 1 - forward / work,
    }
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
