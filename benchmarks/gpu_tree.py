"""Shared prefixes on a GPU: steps over examples that begin alike, and over the same ones with another first token each.

In: a device and a shape; the examples are those of `prefix_tree.py` that are made of random tokens. Out: a row for each
kind of work: steps a second with what the examples share computed once, and computed for each. Run it with
`benchmarks/gpu.sh`.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_engine import BUDGET, ROUNDS, model_of, timed
from benchmarks.gpu_shape import OLMO2_1B, TINY
from benchmarks.prefix_tree import CELLS, VOCABULARY, Made, row_set
from stages.data.rows import RowSet
from stages.engine.packs import build_pack
from stages.engine.scorer import Scorer
from stages.runtime.compute import Compute

MADE = ("one system prompt", "dialogues of 8 turns", "tools", "lists of 8")
REPEATED = 4  # a GPU is not filled by what a CPU takes seconds for
TITLE = "Every shared prefix once, on a GPU"
NOTES = (
    f"The OLMo-2 of 1B shape of the other tables, bfloat16 autocast, packs of {BUDGET} tokens; forward and backward of the summed "
    f"log-probs. `apart`: the first token of each example is another one, so that only what its own rows share is "
    f"computed once. Medians of {ROUNDS} steps."
)


def unmeasured(why: str) -> list[dict[str, Any]]:
    """The rows without a GPU."""
    return [{"name": name, "result": why} for name in MADE]


def measured(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """A row for each kind of work."""
    shape = {**(TINY if tiny else OLMO2_1B), "vocab_size": VOCABULARY}
    compute = Compute(device, torch.bfloat16 if device.type == "cuda" else torch.float32, BUDGET)
    torch.manual_seed(0)
    with device:
        model = model_of(shape)
    scorer = Scorer(model, compute, print)
    for name in MADE[:1] if tiny else MADE:
        examples = CELLS[name](Path())
        if tiny:
            examples = [(prompt[-120:], [ids[:10] for ids in answers]) for prompt, answers in examples[:3]]
            examples = [(examples[0][0][:100] + prompt[-20:], answers) for prompt, answers in examples]
        else:
            examples = examples * REPEATED if name.startswith("lists") else examples
        found = {
            kind: timed(partial(_step, scorer, rows), rows, model, device, 1 if tiny else ROUNDS)
            for kind, rows in (("tree", row_set(examples)), ("apart", row_set(_apart(examples))))
        }
        yield {
            "name": name,
            **{f"examples_per_second_{kind}": figures["pairs_per_second"] for kind, figures in found.items()},
            "ratio": found["tree"]["pairs_per_second"] / found["apart"]["pairs_per_second"],
            **{f"peak_gib_{kind}": figures["peak_gib"] for kind, figures in found.items()},
        }


def _step(scorer: Scorer, rows: RowSet) -> None:
    groups = [rows.example_rows(example, mismatched=False) for example in range(rows.num_examples)]
    with scorer.weights_cast_once():
        for items in scorer.plan(rows, groups):
            scorer(build_pack(rows, [groups[item] for item in items])).completion_logps.sum().backward()
    scorer.zero_grad(set_to_none=True)


def _apart(made: Made) -> Made:
    """The same examples, none of which begins like another."""
    return [([number + 1, *prompt[1:]], completions) for number, (prompt, completions) in enumerate(made)]
