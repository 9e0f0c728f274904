"""From how many tokens on a shared node pays: what attention along the tree takes more, beside what the shared tokens save.

In: nothing; random examples of one prompt and completions that begin with the same k tokens, and the same examples whose
completions begin differently. Out: `results/shared_node.json` and `.md`, microseconds for a node and a layer, the least of the rounds.
Run from the repository root: `python benchmarks/shared_node.py`.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.record import write_results
from stages.engine.attention_calls import Rules
from stages.engine.prefix_tree import TreeIndex, grow
from stages.engine.tree_attention import TreeAttention

EXAMPLES, PROMPT, COMPLETION, HEAD_DIM = 8, 100, 60, 64
LENGTHS, FOLLOWERS, WIDTHS = (1, 2, 4, 8, 16), (2, 8), (128, 512)
NOTES = (
    f"Packs of {EXAMPLES} examples with prompts of {PROMPT} tokens and completions of {COMPLETION} more than the shared ones; float32, "
    f"one thread. `attention`: how much longer a layer's attention takes for a shared node of so many tokens, with so many rows "
    f"that go on from it, than where each row has these tokens for itself; negative: shorter. `saved`: the time of a layer's matrix "
    f"products for the tokens that are shared. A node pays where `saved` is more than `attention`. Microseconds for a node and a layer."
)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--rounds", type=int, default=30)
    rounds = options.parse_args().rounds
    torch.set_num_threads(1)
    rows = [
        row_of(width, followers, length, rounds)
        for width in WIDTHS
        for followers in FOLLOWERS
        for length in LENGTHS
    ]
    write_results("shared_node", rows, "From how many tokens on a shared node pays", NOTES)


def row_of(width: int, followers: int, length: int, rounds: int) -> dict[str, Any]:
    """A row of the table."""
    works = {shared: attention(width, followers, length, shared) for shared in (True, False)}
    row: dict[str, Any] = {"name": f"width {width}, {followers} rows, {length} tokens"}
    for name, backward in (("forward", False), ("step", True)):
        took = least({shared: partial(work, backward) for shared, work in works.items()}, rounds)
        token = products(width, backward, rounds)
        row[f"{name}_attention"] = (took[True] - took[False]) / EXAMPLES
        row[f"{name}_saved"] = (followers - 1) * length * token
    print(row, flush=True)
    return row


def attention(width: int, followers: int, length: int, shared: bool) -> Callable[[bool], None]:
    """A layer's attention over such a pack: a forward pass, or a forward and a backward pass."""
    random, rows = np.random.default_rng(0), []
    for _ in range(EXAMPLES):
        prompt, begun = random.integers(3, 10**6, PROMPT), random.integers(3, 10**6, length)
        for _ in range(followers):
            first = begun if shared else random.integers(3, 10**6, length)
            rows.append(
                np.concatenate([prompt, first, random.integers(3, 10**6, COMPLETION)]).astype(np.int32)
            )
    tree = TreeIndex(grow(rows).runs)
    sides = [torch.randn(1, width // HEAD_DIM, tree.size, HEAD_DIM, requires_grad=True) for _ in range(3)]
    rules = Rules(HEAD_DIM**-0.5)

    def work(backward: bool) -> None:
        result = TreeAttention.apply(*sides, None, tree, rules)
        if backward:
            torch.autograd.grad(result, sides, torch.ones_like(result))

    return work


def products(width: int, backward: bool, rounds: int, tokens: int = 512) -> float:
    """Microseconds a token of a layer's matrix products: projections of attention, and an MLP of three times the width."""
    shapes = [(width, width)] * 4 + [(width, 3 * width)] * 2 + [(3 * width, width)]
    weights = [torch.randn(shape) for shape in shapes]
    inputs = [torch.randn(tokens, shape[0]) for shape in shapes]
    outputs = [torch.randn(tokens, shape[1]) for shape in shapes]

    def work() -> None:
        for given, weight, slope in zip(inputs, weights, outputs, strict=True):
            given @ weight
            if backward:
                slope @ weight.T
                given.T @ slope

    return least({True: work}, rounds)[True] / tokens


def least(works: dict[bool, Callable[[], None]], rounds: int) -> dict[bool, float]:
    """The least processor microseconds of each, in turn."""
    found = dict.fromkeys(works, float("inf"))
    for number in range(rounds + 1):
        for name, work in works.items():
            began = time.process_time()
            work()
            if number:
                found[name] = min(found[name], 1e6 * (time.process_time() - began))
    return found


if __name__ == "__main__":
    main()
