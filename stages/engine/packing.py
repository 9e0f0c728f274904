"""Which examples run together: pure functions of lengths, shared by all stages.

An example costs its prompt once plus all but the last token of each completion. Examples are packed
whole into rows of at most `budget` tokens, and packs are dealt to ranks; neither the budget nor the
number of ranks changes what is computed, only where.
"""

import bisect
from collections.abc import Sequence


def pack_lengths(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Best-fit-decreasing packs of item numbers, each within `budget` tokens unless one item exceeds it.

    Deterministic: ties go to the lower item number and the older pack. O(n log n).
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
    """Packs of each rank: the costliest first, always to the rank with the least so far."""
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for number in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        rank = loads.index(min(loads))
        ranks[rank].append(number)
        loads[rank] += costs[number]
    return ranks
