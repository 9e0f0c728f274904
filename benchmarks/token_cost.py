"""How the cost of scoring grows: seconds a token over the number of pairs, and over their length.

In: nothing; rows are drawn, weights are random. Out: `results/token_cost.json`, `.md` and `.png`. Flat lines mean
that nothing but attention grows faster than the tokens. Run from the repository root:

    python benchmarks/token_cost.py
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.record import RESULTS, write_results
from stages.cache_ref.stage import score_unit
from stages.cache_ref.work_units import WorkUnit
from stages.data.rows import Example, Row, RowSet, to_table
from stages.engine.packs import inputs_of
from stages.engine.prefix_tree import num_tokens
from stages.engine.scorer import Scorer
from stages.runtime.compute import Compute
from stages.runtime.malloc import keep_freed_memory

PAIRS = (100, 300, 1_000, 3_000, 10_000)
LENGTHS = (64, 128, 256, 512, 1024, 2048)
TOKENS, ROUNDS, UNIT = 16_384, 3, 256
SHAPES = {
    "pairs": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512},
    "length": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 8_192},
}


def main() -> None:
    torch.set_num_threads(2)
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    scorers = {name: make_scorer(shape) for name, shape in SHAPES.items()}
    for count in PAIRS:
        rows.append({"name": f"{count} pairs", **measure(scorers["pairs"], draw_rows(count, 40, 24))})
        print(rows[-1], flush=True)
    for length in LENGTHS:
        completion = length // 4
        drawn = draw_rows(TOKENS // length, length - 2 * completion, completion)
        rows.append({"name": f"{length} tokens a pair", **measure(scorers["length"], drawn)})
        print(rows[-1], flush=True)
    notes = (
        "Scoring as `cache-ref` does, units of 256 examples in packs of 2048 tokens, float32, medians of 3. Over pairs: "
        "width 64, 2 layers, prompts of 40 and completions of 24 tokens on average. Over length: width 256, 4 layers, "
        f"{TOKENS} tokens in all, half of each pair its prompt. `attention_share`: share of the forward pass spent in "
        "attention, which grows with length; the rest does not. `planning_seconds`: cutting the data into packs, whole."
    )
    write_results("token_cost", rows, "Cost of scoring a token", notes)
    plot(rows)


def make_scorer(shape: dict[str, int]) -> Scorer:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **shape, num_attention_heads=shape["hidden_size"] // 32, max_position_embeddings=4096
    )
    return Scorer(LlamaForCausalLM(config), Compute(torch.device("cpu"), torch.float32, 2048), print)


def draw_rows(count: int, prompt: int, completion: int) -> RowSet:
    """Pairs whose prompts and completions have these lengths on average."""
    random = np.random.default_rng(0)

    def draw(mean: int) -> np.ndarray:
        length = max(1, int(mean * random.uniform(0.5, 1.5)))
        return random.integers(1, 500, length).astype(np.int32)

    def row(role: str) -> Row:
        ids = draw(completion)
        return Row(role, ids, np.ones(len(ids), bool))

    examples = [
        Example(str(n), "drawn", draw(prompt), [row("chosen"), row("rejected")]) for n in range(count)
    ]
    return RowSet([to_table(examples, list(range(count)))])


def measure(scorer: Scorer, rows: RowSet) -> dict[str, float]:
    groups = [rows.example_rows(example, mismatched=False) for example in range(rows.num_examples)]
    lengths = [num_tokens(inputs_of(rows, group)) for group in groups]
    began = time.perf_counter()
    scorer.plan(rows, groups)
    planning = time.perf_counter() - began
    seconds = []
    for _ in range(ROUNDS if sum(lengths) < 500_000 else 1):
        began = time.perf_counter()
        with torch.inference_mode():
            for begin in range(0, len(groups), UNIT):
                score_unit(WorkUnit(rows, groups[begin : begin + UNIT]), scorer)
        seconds.append(time.perf_counter() - began)
    return {
        "tokens": sum(lengths),
        "microseconds_per_token": 1e6 * statistics.median(seconds) / sum(lengths),
        "attention_share": attention_share(scorer, rows, groups[:UNIT]),
        "planning_seconds": planning,
    }


def attention_share(scorer: Scorer, rows: RowSet, groups: list[np.ndarray]) -> float:
    """Share of the forward pass in attention, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as found:
        score_unit(WorkUnit(rows, groups), scorer)
    events = found.key_averages()
    attended = sum(e.self_cpu_time_total for e in events if "attention" in e.key)
    return attended / sum(e.self_cpu_time_total for e in events)


def plot(rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, mark, label in ((axes[0], "pairs", "pairs"), (axes[1], "tokens a pair", "tokens in a pair")):
        own = [row for row in rows if row["name"].endswith(mark)]
        sizes = [int(row["name"].split()[0]) for row in own]
        total = np.array([row["microseconds_per_token"] for row in own])
        rest = total * (1 - np.array([row["attention_share"] for row in own]))
        axis.plot(sizes, total, "o-", label="all")
        axis.plot(sizes, rest, "s--", label="without attention")
        axis.set(xscale="log", xlabel=label, ylabel="microseconds a token", ylim=(0, 1.25 * total.max()))
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.minorticks_off()
        axis.legend(frameon=False)
    figure.savefig(RESULTS / "token_cost.png", dpi=150)


if __name__ == "__main__":
    main()
