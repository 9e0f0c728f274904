"""What a larger `compute.tokens_per_batch` brings: tokens computed, speed and memory of the same examples at several budgets.

In: a folder with `pairs/` and `tokenizers/olmo2_dolma2`. A random Llama, and the cells of `prefix_tree.py`. Out:
`results/token_budget.json` and `.md`. Run from the repository root: `python benchmarks/token_budget.py --data FOLDER`.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.prefix_tree import CELLS, LAYERS, VOCABULARY, WIDTH, Made, model, row_set
from benchmarks.record import write_results
from benchmarks.two_builds import allocated_at_most, seconds
from stages.engine.packs import build_pack
from stages.engine.row_logps import score_groups
from stages.engine.scorer import Scorer
from stages.runtime.compute import resolve_compute
from stages.runtime.malloc import keep_freed_memory
from stages.settings.fields import ComputeSettings

BUDGETS = (1_024, 2_048, 4_096, 8_192)
DEFAULT = ComputeSettings().tokens_per_batch
SHOWN = ("one system prompt", "tools", "hh-rlhf", "en_demo", "graded stories")
NOTES = (
    f"A random Llama of {LAYERS} layers, width {WIDTH}, {VOCABULARY:,} ids; float32, one thread. `positions`: what a forward pass over "
    f"the examples computes; `packs`: in so many passes. `forward` is the work of cache-ref, `step` a forward and a backward pass over "
    f"all of them: how many times as fast as with the default of {DEFAULT:,} tokens, medians of {{}} rounds, and the smallest and largest "
    f"ratio of a round. `memory`: the most that tensors take in the step beside weights and gradients, in MiB."
)


def main() -> None:
    """Measure the cells in turn and write the results."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--rounds", type=int, default=7)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = [row for name in SHOWN for row in rows_of(name, CELLS[name](chosen.data), chosen.rounds)]
    title = "What a larger budget of tokens brings"
    write_results("token_budget", rows, title, NOTES.format(chosen.rounds))


def rows_of(name: str, made: Made, rounds: int) -> list[dict[str, Any]]:
    """The rows of the table of a cell, one for each budget."""
    works = {budget: works_at(budget, made) for budget in BUDGETS}
    took: dict[int, list[tuple[float, float]]] = {budget: [] for budget in BUDGETS}
    for number in range(rounds):
        for budget in BUDGETS if number % 2 else reversed(BUDGETS):
            forward, step = works[budget]
            took[budget].append((seconds(forward), seconds(step)))
    found = []
    for budget, (forward, step) in works.items():
        positions, packs = forward()
        row = {"name": name, "budget": budget, "positions": positions, "packs": packs}
        for place, work in enumerate(("forward", "step")):
            pairs = zip(took[DEFAULT], took[budget], strict=True)
            ratios = [default[place] / ours[place] for default, ours in pairs]
            row[work] = statistics.median(ratios)
            row[f"{work}_spread"] = f"{min(ratios):.2f} to {max(ratios):.2f}"
        row["memory"] = allocated_at_most(step) / 2**20
        print(row, flush=True)
        found.append(row)
    return found


def works_at(budget: int, made: Made) -> tuple[Callable[[], tuple[int, int]], Callable[[], None]]:
    """The forward pass over these examples, which returns its positions and packs, and a step."""
    rows = row_set(made)
    compute = resolve_compute(ComputeSettings(device="cpu", dtype="float32", tokens_per_batch=budget))
    scorer = Scorer(model(), compute, lambda line: None)
    groups = [rows.example_rows(example, mismatched=False) for example in range(rows.num_examples)]

    def forward() -> tuple[int, int]:
        with torch.inference_mode():
            return score_groups(scorer, rows, groups)[1], len(scorer.plan(rows, groups))

    def step() -> None:
        for items in scorer.plan(rows, groups):
            scorer(build_pack(rows, [groups[item] for item in items])).completion_logps.sum().backward()

    return forward, step


if __name__ == "__main__":
    main()
