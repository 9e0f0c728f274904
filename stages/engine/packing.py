"""Which examples share a pack, and which rank scores it: pure functions of the examples' tokens.

In: the inputs of each example's rows, and the token budget of a pack.  Out: the examples of each pack, whole examples
always, and the packs of each rank. Neither the budget nor the number of ranks changes a result.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from stages.engine.prefix_tree import in_order, num_shared, num_tokens


class _Item(NamedTuple):
    """Examples that stay together, and the tokens they add to what they share with others."""

    size: int
    examples: tuple[int, ...]


@dataclass
class _Branch:
    """What shares its first `depth` tokens."""

    depth: int
    items: list[_Item] = field(default_factory=list)

    def packed(self, budget: int, depth: int) -> list[_Item]:
        """Its items, together as far as a pack has room for them and for these tokens, as items of what shares `depth`."""
        more = self.depth - depth
        return [
            _Item(
                more + sum(self.items[number].size for number in numbers),
                tuple(example for number in numbers for example in self.items[number].examples),
            )
            for numbers in pack_lengths([item.size for item in self.items], budget - self.depth)
        ]


def plan_packs(examples: Sequence[Sequence[np.ndarray]], budget: int) -> list[list[int]]:
    """The example numbers of each pack, within `budget` distinct tokens; an example longer than that is alone.

    What many examples begin with is in as few packs as there can be: from the longest common beginnings to the shortest,
    those that share one are packed together first.
    """
    common = [rows[0][: min(num_shared(rows[0], row) for row in rows)] for rows in examples]
    branches = [_Branch(0)]

    def close(depth: int) -> None:
        while (branch := branches[-1]).depth > depth:
            branches.pop()
            if branches[-1].depth < depth:
                branches.append(_Branch(depth))
            branches[-1].items += branch.packed(budget, branches[-1].depth)

    for example, shared in in_order(common):
        close(shared)
        if branches[-1].depth < len(common[example]):
            branches.append(_Branch(len(common[example])))
        own = num_tokens(examples[example]) - len(common[example])
        branches[-1].items.append(_Item(own, (example,)))
    close(0)
    return [list(item.examples) for item in branches[0].packed(budget, 0)]


def sized_packs(examples: Sequence[Sequence[np.ndarray]], budget: int) -> list[tuple[int, list[int]]]:
    """The packs of `plan_packs`, each with its number of positions."""
    packs = plan_packs(examples, budget)
    return [(num_tokens([row for item in items for row in examples[item]]), items) for items in packs]


def pack_lengths(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Best-fit-decreasing bin packing: the item numbers of each pack, within `budget` tokens.

    An item longer than the budget has a pack of its own. Deterministic: ties go to the lower item number and to the
    older pack. O(n log n).
    """
    packs: list[list[int]] = []
    open_packs: list[tuple[int, int]] = []  # (room left, pack number), sorted
    for item in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        size = lengths[item]
        position = bisect.bisect_left(open_packs, (size, -1))
        if position < len(open_packs):
            room, number = open_packs.pop(position)
            packs[number].append(item)
        else:
            room, number = budget, len(packs)
            packs.append([item])
        if room - size > 0:
            bisect.insort(open_packs, (room - size, number))
    return packs


def deal(costs: Sequence[int], world_size: int) -> list[list[int]]:
    """The packs of each rank: the longest pack first, always to the rank with the least cost so far."""
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for number in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        rank = loads.index(min(loads))
        ranks[rank].append(number)
        loads[rank] += costs[number]
    return ranks
