"""One line for each loss: against TRL's code, on held-out data, and however a step is split.

In: `results/losses_vs_trl.json` and `results/learning.json`, made by the scripts of those names. Out:
`results/losses.json` and `.md`, with the split measured here: the step that the tests use (16 pairs of a tiny
model), whole and as 16 micro-batches. Run from the repository root:

    python benchmarks/losses.py
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.record import RESULTS, write_results
from stages.runtime.distributed import World
from tests.stages.train.step.test_step import BLOCKS, BUDGETS, make_reference, make_rows, step_of


def main() -> None:
    peers = {row["name"]: row for row in _rows("losses_vs_trl")}
    learned = {row["name"]: row for row in _rows("learning")}
    data = make_rows()
    with tempfile.TemporaryDirectory() as folder:
        reference = make_reference(data, Path(folder))
        rows: list[dict[str, Any]] = []
        for name, block in BLOCKS.items():
            whole, split = (
                step_of(block, data, reference, BUDGETS[way], World(), passes=2)[0]
                for way in ("1x16", "16x1")
            )
            peer, run = peers.get(_as_compared(name), {}), learned.get(name, {})
            rows.append(
                {
                    "name": name,
                    "peer_max_abs_diff": peer.get("peer_max_abs_diff"),
                    "peer_max_abs_grad_diff": peer.get("peer_max_abs_grad_diff"),
                    "heldout_accuracy": run.get("heldout_accuracy"),
                    "heldout_margin": run.get("heldout_margin"),
                    "split_invariance": float((whole - split).norm() / whole.norm()),
                }
            )
            print(rows[-1], flush=True)
    notes = (
        "`peer_max_abs_diff`, `peer_max_abs_grad_diff`: largest difference from TRL 1.16.0's own code, empty where TRL has "
        "no such loss ([losses_vs_trl.md](losses_vs_trl.md)). `heldout_accuracy`, `heldout_margin`: after three epochs on "
        "graded stories, mean of three seeds ([learning.md](learning.md)). `split_invariance`: norm of the difference "
        "between the gradient of a step of 16 pairs in one micro-batch and in 16, over its norm, float32."
    )
    write_results("losses", rows, "The losses", notes)


def _rows(name: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


def _as_compared(name: str) -> str:
    """The line of the comparison with TRL that is of this loss."""
    names = {"kto": "kto desirable_weight=1.2", "orpo_sequence": "orpo nll_span=sequence"}
    return names.get(name, name)


if __name__ == "__main__":
    main()
