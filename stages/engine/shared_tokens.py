"""How many tokens rows have apart, with each prompt once, and with everything that they begin with once."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stages.engine.prefix_tree import in_order, num_tokens

# Examples that cache-ref scores together.
UNIT_EXAMPLES = 256


class SharedTokens(NamedTuple):
    """Tokens without sharing, with the prompt of an example once, and as a tree."""

    apart: int = 0
    prompt_once: int = 0
    tree: int = 0

    def __str__(self) -> str:
        """All three, for a table."""
        return f"{self.apart:,}; {self.prompt_once:,} with prompts once, {self.tree:,} with shared beginnings once"


def shared_tokens(examples: Sequence[tuple[np.ndarray, Sequence[np.ndarray]]]) -> SharedTokens:
    """The tokens of examples that are scored together, each a prompt and its completions."""
    rows = [np.concatenate([prompt, ids]) for prompt, completions in examples for ids in completions]
    once = sum(len(prompt) + sum(map(len, completions)) for prompt, completions in examples)
    return SharedTokens(sum(map(len, rows)), once, num_tokens(rows))


def in_units(prompts: Sequence[np.ndarray], size: int = UNIT_EXAMPLES) -> list[list[int]]:
    """Example numbers in units of `size`, in the order of their prompts, so that those that begin alike meet."""
    order = [number for number, _ in in_order(prompts)]
    return [order[begin : begin + size] for begin in range(0, len(order), size)]
