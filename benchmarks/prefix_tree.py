"""What rows share, computed once: this build beside another one, which shares prompts within an example alone.

In: a folder with `pairs/`, `graded/` and `tokenizers/olmo2_dolma2`, and the folder of the other build (a git worktree). A random
Llama. Work that has no real texts is made of random tokens. Out: `results/prefix_tree.json` and `.md`. Run from the repository root:

    git worktree add ../before COMMIT
    python benchmarks/prefix_tree.py --data FOLDER --other ../before
"""

import gzip
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.two_builds import allocated_at_most, compare, seconds

VOCABULARY, LAYERS, WIDTH, LIMIT, BUDGET = 8_192, 2, 512, 512, 8_192
# Of the cell in which conversations are kept together.
CONVERSATIONS, TURNS = 3, 8
KEPT_TOGETHER = f"dialogues of {TURNS} turns"
# Prompt and completions of an example, token ids.
Made = list[tuple[list[int], list[list[int]]]]
NOTES = (
    f"A random Llama of {LAYERS} layers, width {WIDTH}, {VOCABULARY:,} ids, packs of up to {BUDGET:,} tokens. `forward` is the "
    f"work of cache-ref on these examples, `step` that of an optimizer step on all of them: forward and backward passes, "
    f"without the optimizer. Of the dialogues it is an epoch of KTO steps of {TURNS} examples with their mismatched rows, in this "
    f"build with train.keep_together. `tokens` is the ratio of the positions computed, the limit of the other ratios where "
    f"attention costs nothing. `memory` is the most that tensors take in a step beside weights and gradients, in MiB."
)


def measure(cell: str, data: Path) -> dict[str, Any]:
    """The figures of a cell by the build that is imported."""
    import torch

    from stages.engine.packs import build_pack
    from stages.engine.row_logps import score_groups
    from stages.engine.scorer import Scorer
    from stages.runtime.compute import resolve_compute
    from stages.runtime.malloc import keep_freed_memory
    from stages.settings.fields import ComputeSettings

    torch.set_num_threads(1)
    keep_freed_memory()
    made = CELLS[cell](data)
    rows = row_set(made)
    compute = resolve_compute(ComputeSettings(device="cpu", dtype="float32", tokens_per_batch=BUDGET))
    scorer = Scorer(model(), compute, lambda line: None)
    groups = [rows.example_rows(example, mismatched=False) for example in range(rows.num_examples)]

    def forward() -> int:
        with torch.inference_mode():
            return score_groups(scorer, rows, groups)[1]

    def step() -> None:
        for items in scorer.plan(rows, groups):
            scorer(build_pack(rows, [groups[item] for item in items])).completion_logps.sum().backward()

    work = kto_steps(scorer, made) if cell == KEPT_TOGETHER else step
    found = {
        "examples": len(made),
        "positions": forward(),
        "forward": seconds(forward),
        "step": seconds(work),
    }
    return {**found, "memory": allocated_at_most(work)}


def kto_steps(scorer: Any, made: Made) -> Callable[[], None]:
    """An epoch of KTO steps: forward and backward passes."""
    from cache.ref_logps import RefLogps
    from stages.losses import parse_loss
    from stages.runtime.distributed import World
    from stages.train.data_order import DataOrder
    from stages.train.step.row_scorer import RowScorer
    from stages.train.step.step import accumulate_step

    rows, loss = row_set(made, ("desirable",), mismatched=True), parse_loss({"name": "kto"})
    reference = RefLogps(Path(tempfile.mkdtemp()), {"made": "for the benchmark"})
    keys = {rows.keys[row]: int(rows.completion_lengths[row]) for row in range(len(rows))}
    reference.add(list(keys), [np.full(length, -1, np.float32) for length in keys.values()])
    try:  # the other build may have no such option
        from stages.train.conversations import conversations

        together = [conversations(rows, [])]
    except ImportError:
        together = []
    order = DataOrder(rows.mismatch_groups, 0, TURNS, *together)
    row_scorer = RowScorer(scorer, rows, reference, loss, World())

    def epoch() -> None:
        for step in range(1, CONVERSATIONS + 1):
            accumulate_step(row_scorer, loss, order.examples_of(step).tolist(), {})

    return epoch


def row_set(made: Made, roles: Sequence[str] = ("ranked",), mismatched: bool = False) -> Any:
    """The rows of these examples, with these roles in turn; with mismatched ones, each in a group of four."""
    from stages.data.rows import Example, Row, RowSet, to_table
    from stages.prepare.mismatched import GROUP_EXAMPLES, add_mismatched

    examples = [
        Example(
            str(number),
            "made",
            np.array(prompt, np.int32),
            [
                Row(roles[place % len(roles)], np.array(ids, np.int32), np.ones(len(ids), bool))
                for place, ids in enumerate(completions)
            ],
        )
        for number, (prompt, completions) in enumerate(made)
    ]
    for begin in range(0, len(examples), GROUP_EXAMPLES) if mismatched else ():
        add_mismatched(examples[begin : begin + GROUP_EXAMPLES], BUDGET)
    return RowSet([to_table(examples, [number // GROUP_EXAMPLES for number in range(len(examples))])])


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
    """Feedback on each turn of a dialogue: 40 tokens of the user, 80 of the model."""
    draw, found = drawn(1), []
    for _ in range(CONVERSATIONS):
        history: list[int] = []
        for _ in range(TURNS):
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


def hh(data: Path, number: int = 16) -> Made:
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
    return short(found, number)


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
    KEPT_TOGETHER: dialogues,
    "tools": tools,
    "lists of 8": lists,
    "hh-rlhf": hh,
    "en_demo": en_demo,
    "graded stories": stories,
}

if __name__ == "__main__":
    compare(__doc__, __file__, CELLS, measure, "Every shared prefix once", NOTES)
