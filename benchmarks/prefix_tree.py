"""What rows share, computed once: this build beside another one, which shares prompts within an example alone.

In: a folder with `pairs/`, `graded/` and `tokenizers/olmo2_dolma2`, and the folder of the other build (a git worktree). A random
Llama, float32, one thread. Each round is a process of its own for each build, in turn. Work that has no real texts is made of
random tokens. Out: `results/prefix_tree.json` and `.md`. Run from the repository root:

    git worktree add ../before COMMIT
    python benchmarks/prefix_tree.py --data FOLDER --other ../before
"""

import argparse
import gzip
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY, LAYERS, WIDTH, LIMIT, BUDGET = 8_192, 2, 512, 512, 8_192
ROUNDS = 3
# Prompt and completions of an example, token ids.
Made = list[tuple[list[int], list[list[int]]]]


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--other", type=Path, help="the folder of the other build")
    options.add_argument("--rounds", type=int, default=ROUNDS)
    options.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    options.add_argument("--build", type=Path, help="print the seconds of this build and no more")
    chosen = options.parse_args()
    if chosen.build:
        sys.path.insert(0, str(chosen.build))
        print(json.dumps({name: seconds_of(CELLS[name](chosen.data)) for name in chosen.cells}))
        return
    found: dict[str, list[dict[str, Any]]] = {"this": [], "other": []}
    for round_number in range(chosen.rounds):
        builds = [("this", ROOT), ("other", chosen.other.resolve())]
        for name, build in builds if round_number % 2 else reversed(builds):
            found[name].append(measured(build, chosen))
            print(round_number, name, found[name][-1], flush=True)
    sys.path.insert(0, str(ROOT))
    from benchmarks.record import write_results

    notes = (
        f"Examples a processor second of this build and of the other, medians of {chosen.rounds} rounds, and the smallest and largest ratio of "
        f"a round. A random Llama of {LAYERS} layers, width {WIDTH}, {VOCABULARY:,} ids, float32, one thread, "
        f"packs of up to {BUDGET:,} tokens. `forward` is the work of cache-ref on these examples, `step` that of an "
        f"optimizer step on all of them: forward and backward passes, without the optimizer. `tokens` is the ratio of the "
        f"positions computed, the limit of the other ratios where attention costs nothing."
    )
    rows = [row_of(name, found) for name in chosen.cells]
    write_results("prefix_tree", rows, "Every shared prefix once", notes)


def row_of(cell: str, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The row of the table of a cell."""
    rounds = {build: [one[cell] for one in processes] for build, processes in found.items()}
    first = {build: cells[0] for build, cells in rounds.items()}
    row: dict[str, Any] = {"name": cell, "examples": first["this"]["examples"]}
    row["tokens"] = first["other"]["positions"] / first["this"]["positions"]
    for work in ("forward", "step"):
        ratios = [
            before[work] / after[work] for before, after in zip(rounds["other"], rounds["this"], strict=True)
        ]
        for build, cells in rounds.items():
            row[f"{work}_{build}"] = row["examples"] / statistics.median(one[work] for one in cells)
        row[f"{work}_ratio"] = row[f"{work}_this"] / row[f"{work}_other"]
        row[f"{work}_spread"] = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return row


def measured(build: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """What a process of a build prints."""
    command = [sys.executable, __file__, "--data", str(chosen.data), "--build", str(build), "--cells"]
    output = subprocess.run([*command, *chosen.cells], check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def seconds_of(made: Made) -> dict[str, float]:
    """Processor seconds of a reference pass and of a step over these examples by the build that is imported, and positions."""
    import torch

    from stages.engine.packs import build_pack
    from stages.engine.row_logps import score_groups
    from stages.engine.scorer import Scorer
    from stages.runtime.compute import resolve_compute
    from stages.runtime.malloc import keep_freed_memory
    from stages.settings.fields import ComputeSettings

    torch.set_num_threads(1)
    keep_freed_memory()
    rows = row_set(made)
    compute = resolve_compute(ComputeSettings(device="cpu", dtype="float32", tokens_per_batch=BUDGET))
    scorer = Scorer(model(), compute, lambda line: None)
    groups = [np.arange(begin, end) for begin, end in zip(rows.starts, rows.ends, strict=True)]

    def step() -> float:
        began = time.process_time()
        for items in scorer.plan(rows, groups):
            scorer(build_pack(rows, [groups[item] for item in items])).completion_logps.sum().backward()
        return time.process_time() - began

    with torch.inference_mode():
        score_groups(scorer, rows, groups[:1])
        began = time.process_time()
        _, positions = score_groups(scorer, rows, groups)
        forward = time.process_time() - began
    return {"examples": len(made), "positions": positions, "forward": forward, "step": step()}


def row_set(made: Made) -> Any:
    """The rows of these examples."""
    from stages.data.rows import Example, Row, RowSet, to_table

    examples = [
        Example(
            str(number),
            "made",
            np.array(prompt, np.int32),
            [Row("ranked", np.array(ids, np.int32), np.ones(len(ids), bool)) for ids in completions],
        )
        for number, (prompt, completions) in enumerate(made)
    ]
    return RowSet([to_table(examples, [0] * len(examples))])


def model() -> Any:
    """A random Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": WIDTH // 64, "num_key_value_heads": WIDTH // 64}
    shape = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": LAYERS}
    config = LlamaConfig(vocab_size=VOCABULARY, **shape, **heads, max_position_embeddings=8_192)
    return LlamaForCausalLM(config).eval()


def drawn(seed: int) -> Callable[[int], list[int]]:
    """A function that draws so many tokens."""
    random = np.random.default_rng(seed)
    return lambda number: random.integers(3, VOCABULARY, number).tolist()


def system_prompt(_: Path) -> Made:
    """One system prompt of 1,000 tokens, questions of 100, two answers of 100."""
    draw = drawn(0)
    system = draw(1_000)
    return [(system + draw(100), [draw(100), draw(100)]) for _ in range(8)]


def dialogues(_: Path) -> Made:
    """Feedback on each of the 8 turns of a dialogue: 40 tokens of the user, 80 of the model."""
    draw, found = drawn(1), []
    for _ in range(2):
        history: list[int] = []
        for _ in range(8):
            history = history + draw(40)
            found.append((history, [draw(80)]))
            history = history + found[-1][1][0]
    return found


def tools(_: Path) -> Made:
    """Tool definitions of 600 tokens shared by 16 examples, questions of 80, two answers of 80."""
    draw = drawn(2)
    definitions = draw(600)
    return [(definitions + draw(80), [draw(80), draw(80)]) for _ in range(16)]


def lists(_: Path) -> Made:
    """Lists of 8 answers that leave one beginning of 60 tokens at random places."""
    draw, random, found = drawn(3), np.random.default_rng(3), []
    for _ in range(5):
        prompt, begun = draw(100), draw(60)
        found.append((prompt, [begun[: int(random.integers(0, 60))] + draw(60) for _ in range(8)]))
    return found


def encoder(data: Path) -> Callable[[str], list[int]]:
    """From a text to ids of the small vocabulary; equal texts have equal ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizers" / "olmo2_dolma2")
    return lambda text: [
        token % VOCABULARY for token in tokenizer(text, add_special_tokens=False)["input_ids"]
    ]


def hh(data: Path) -> Made:
    """Pairs of hh-rlhf."""
    encode = encoder(data)
    lines = gzip.decompress((data / "pairs" / "hh_harmless_base_test.jsonl.gz").read_bytes()).splitlines()
    found: Made = []
    for line in lines[::7]:
        pair = json.loads(line)
        prompt = pair["chosen"].rpartition("\n\nAssistant:")[0] + "\n\nAssistant:"
        if pair["rejected"].startswith(prompt):
            answers = [encode(pair[side][len(prompt) :])[:LIMIT] for side in ("chosen", "rejected")]
            found.append((encode(prompt), answers))
    return short(found, 16)


def en_demo(data: Path) -> Made:
    """Pairs of LLaMA-Factory's demonstration."""
    encode, found = encoder(data), []
    for pair in json.loads((data / "pairs" / "llamafactory_dpo_en_demo.json").read_text()):
        turns = "".join(f"<|{turn['from']}|>\n{turn['value']}\n" for turn in pair["conversations"])
        answers = [encode(pair[side]["value"]) for side in ("chosen", "rejected")]
        found.append((encode(f"{turns}<|gpt|>\n"), answers))
    return short(found, 8)


def stories(data: Path) -> Made:
    """Graded stories: lists that begin like one another."""
    encode, found = encoder(data), []
    for line in (data / "graded" / "tinystories_graded_synthetic.jsonl").read_text().splitlines()[:64]:
        story = json.loads(line)
        found.append((encode(story["prompt"]), [encode(text) for text in story["responses"]]))
    return short(found, 32)


def short(made: Made, number: int) -> Made:
    """The first examples, cut at the limit, with a last token behind each answer."""
    return [
        (prompt, [[*answer[: LIMIT - len(prompt) - 1], 0] for answer in answers])
        for prompt, answers in made
        if len(prompt) < LIMIT - 32
    ][:number]


CELLS: dict[str, Callable[[Path], Made]] = {
    "one system prompt": system_prompt,
    "dialogues of 8 turns": dialogues,
    "tools": tools,
    "lists of 8": lists,
    "hh-rlhf": hh,
    "en_demo": en_demo,
    "graded stories": stories,
}

if __name__ == "__main__":
    main()
