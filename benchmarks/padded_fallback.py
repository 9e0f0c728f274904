"""Models that cannot be packed: right-padded batches beside one completion at a time, and two builds beside each other.

In: a folder with `pairs/hh_harmless_base_test.jsonl.gz` and `tokenizers/olmo2_dolma2`, and the folder of another build
(a git worktree). Random models of layers that a pack cannot hold, on pairs of hh-rlhf of up to 512 tokens. Each round is a
process of its own, the builds in turn. Out: `results/padded_fallback.json` and `.md`. Run from the repository root:

    git worktree add ../before COMMIT
    python benchmarks/padded_fallback.py --data FOLDER --other ../before
"""

import argparse
import gzip
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 8_192
# A shape is layers and width; a case is a model type, its shape, and pairs.
CASES = {
    "mamba 2 x 64": ("mamba", 2, 64, 8),
    "bloom 2 x 64": ("bloom", 2, 64, 32),
    "bloom 16 x 512": ("bloom", 16, 512, 8),
    "qwen3_next 4 x 64": ("qwen3_next", 4, 64, 8),
}
ROUNDS = 3


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--other", type=Path, help="the folder of the other build")
    options.add_argument("--rounds", type=int, default=ROUNDS)
    options.add_argument("--case", choices=CASES, help="of one build, which prints its seconds")
    options.add_argument("--build", type=Path, default=ROOT)
    chosen = options.parse_args()
    if chosen.case:
        print(json.dumps(seconds_of(chosen.case, chosen.data, chosen.build)))
        return
    rows = [row_of(case, chosen) for case in CASES]
    sys.path.insert(0, str(ROOT))
    from benchmarks.record import write_results

    notes = (
        f"Pairs a second of this build and of the other, medians of {chosen.rounds} rounds, and the smallest and largest ratio of a "
        f"round. Random weights, {VOCABULARY:,} ids, real lengths of hh-rlhf up to 512 tokens, compute.tokens_per_batch at its "
        "default, float32, one thread. The step is simpo's, without the optimizer."
    )
    write_results("padded_fallback", rows, "Models that cannot be packed", notes)


def row_of(case: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """The row of the table of a case."""
    found: dict[str, list[dict[str, Any]]] = {"this": [], "other": []}
    for round_number in range(chosen.rounds):
        builds = [("this", ROOT), ("other", chosen.other.resolve())]
        for name, build in builds if round_number % 2 else reversed(builds):
            found[name].append(measured(case, chosen.data, build))
    row: dict[str, Any] = {"name": case, "pairs": CASES[case][3], "way": found["this"][0]["way"]}
    for work in ("reference", "step"):
        ratios = [
            before[work] / after[work] for before, after in zip(found["other"], found["this"], strict=True)
        ]
        for name, rounds in found.items():
            row[f"{work}_{name}"] = CASES[case][3] / statistics.median(one[work] for one in rounds)
        row[f"{work}_ratio"] = row[f"{work}_this"] / row[f"{work}_other"]
        row[f"{work}_spread"] = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(row, flush=True)
    return row


def measured(case: str, data: Path, build: Path) -> dict[str, Any]:
    """What a process of a build prints."""
    command = [sys.executable, __file__, "--data", str(data), "--case", case, "--build", str(build)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def seconds_of(case: str, data: Path, build: Path) -> dict[str, Any]:
    """Seconds of the reference pass and of a step, in this process, by the code of `build`."""
    sys.path.insert(0, str(build))
    import torch

    from stages.data.rows import RowSet, to_table
    from stages.engine.row_logps import score_groups
    from stages.engine.scorer import Scorer
    from stages.losses import parse_loss
    from stages.runtime.compute import resolve_compute
    from stages.runtime.distributed import World
    from stages.runtime.malloc import keep_freed_memory
    from stages.settings.fields import ComputeSettings
    from stages.train.step.row_scorer import RowScorer
    from stages.train.step.step import accumulate_step

    torch.set_num_threads(1)
    keep_freed_memory()
    kind, layers, width, pairs = CASES[case]
    examples = examples_of(data, pairs)
    rows = RowSet([to_table(examples, [0] * len(examples))])
    compute = resolve_compute(ComputeSettings(device="cpu", dtype="float32"))
    scorer = Scorer(model_of(kind, layers, width), compute, lambda line: None)
    groups = [rows.example_rows(example, mismatched=False) for example in range(rows.num_examples)]
    loss = parse_loss({"name": "simpo"})
    row_scorer = RowScorer(scorer, rows, None, loss, World())
    with torch.inference_mode():
        score_groups(scorer, rows, groups[:1])
        reference = timed(lambda: score_groups(scorer, rows, groups))
    step = timed(lambda: accumulate_step(row_scorer, loss, range(len(groups)), {}))
    way = "padded" if getattr(scorer.way, "padded", False) else "alone"
    return {"reference": reference, "step": step, "way": "packed" if scorer.packed else way}


def timed(work: Any) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def examples_of(data: Path, count: int) -> list[Any]:
    """Pairs spread over hh-rlhf: their own lengths, other tokens."""
    import numpy as np
    from transformers import AutoTokenizer

    from stages.data.rows import Example, Row

    lines = gzip.decompress((data / "pairs" / "hh_harmless_base_test.jsonl.gz").read_bytes()).splitlines()
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizers" / "olmo2_dolma2")
    random = np.random.default_rng(0)
    examples: list[Any] = []
    for line in lines[:: len(lines) // (2 * count)]:
        pair = json.loads(line)
        prompt = pair["chosen"].rpartition("\n\nAssistant:")[0]
        sizes = [len(tokenizer(text)["input_ids"]) for text in (prompt, pair["chosen"], pair["rejected"])]
        if not sizes[0] < min(sizes[1:]) <= max(sizes[1:]) <= 512 or len(examples) == count:
            continue
        ids = [
            random.integers(3, VOCABULARY, size).astype(np.int32)
            for size in (sizes[0], *(size - sizes[0] for size in sizes[1:]))
        ]
        completions = [
            Row(role, tokens, np.ones(len(tokens), bool))
            for role, tokens in zip(("chosen", "rejected"), ids[1:], strict=True)
        ]
        examples.append(Example(str(len(examples)), "hh", ids[0], completions))
    return examples


def model_of(kind: str, layers: int, width: int) -> Any:
    """A random model of a type."""
    import torch
    import transformers

    common = {"vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": width // 32, "num_key_value_heads": width // 32, "head_dim": 32}
    recurrent = {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
    recurrent |= {"linear_num_key_heads": width // 32, "linear_num_value_heads": width // 32}
    dense = {"intermediate_size": 4 * width, "num_experts": 0, "decoder_sparse_step": 1}
    options = {
        "mamba": {},
        "bloom": {"n_head": width // 32, "n_layer": layers},
        "qwen3_next": {**heads, **recurrent, **dense, "mlp_only_layers": list(range(layers))},
    }
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **common, **options[kind])
    return transformers.AutoModelForCausalLM.from_config(config).eval()


if __name__ == "__main__":
    main()
